"""Chunked loss: a function of logits, a few rows at a time.

A loss over [N, V] logits written plainly walks over several [N, V] arrays and keeps most of them for the
backward pass. Rows do not depend on each other, so the loss of a chunk of rows and its gradients, with
respect to what the logits are made of, can be made together and the logits freed: no [N, V] array ever
exists. The idea is that of Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2) and of Cut
Cross-Entropy (https://arxiv.org/abs/2411.09009), here for any loss that autograd can differentiate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.elastic.ops import at_least_fp32

CPU_ELEMENTS = 2**22
"""Logits of one chunk on a CPU: 16 MiB in fp32. Products on few rows are slow, and so are sums of
their weights' gradients; larger arrays only take more memory (docs/LOG.md)."""

GPU_ELEMENTS = 2**26
"""Logits of one chunk on a GPU, where chunks only bound memory and should keep the device busy."""

MIN_ROWS = 256
"""Rows of the smallest chunk: with fewer, products and the sums of their weights' gradients are slow."""


def rows_per_chunk(width: int, device: torch.device) -> int:
    """Return the number of rows of `width` logits that make one chunk.

    >>> rows_per_chunk(2048, torch.device("cpu")), rows_per_chunk(128_000, torch.device("cpu"))
    (2048, 256)
    """
    return max(MIN_ROWS, (CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS) // width)


def sum_by_chunks(
    function: Callable[..., Tensor],
    chunks: Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum a function over chunks, one after the other; what a chunk needed is freed before the next.

    The gradients are computed together with the values, so there is no second derivative.

    Args:
        function: Maps a chunk's number and its tensors to terms [M]. It may read `parameters`, and
            nothing else that requires a gradient.
        chunks: The tensors of each chunk, the same number for all.
        parameters: Tensors that the function reads besides its arguments, which get gradients too.

    Returns:
        The sum of all terms, differentiable with respect to chunks and parameters, and the terms [M],
        summed over the chunks, which are not.

    >>> weight = torch.tensor([3.0], requires_grad=True)
    >>> chunks = [[torch.tensor([1.0])], [torch.tensor([2.0])]]
    >>> total, terms = sum_by_chunks(lambda number, x: torch.stack([weight @ x, -x.sum()]), chunks, [weight])
    >>> total.backward()
    >>> total.item(), terms.tolist(), weight.grad
    (6.0, [9.0, -3.0], tensor([3.]))
    """
    tensors = [tensor for chunk in chunks for tensor in chunk]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*parameters, *tensors)):
        both: tuple[Tensor, Tensor] = _SumByChunks.apply(  # type: ignore[no-untyped-call]
            function, len(chunks), len(parameters), *parameters, *tensors
        )
        return both
    terms_M = torch.stack([function(number, *chunk) for number, chunk in enumerate(chunks)]).sum(0)
    return terms_M.sum(), terms_M


class _SumByChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], num_chunks: int, num_parameters: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        parameters = tensors[:num_parameters]
        # The sums are kept in fp32; autograd brings them into the parameters' own precision.
        grads = [
            torch.zeros_like(x, dtype=at_least_fp32(x.dtype)) if x.requires_grad else None for x in parameters
        ]
        size, terms = (len(tensors) - num_parameters) // num_chunks, []
        for number in range(num_chunks):
            chunk = [
                x.detach().requires_grad_(x.requires_grad)
                for x in tensors[num_parameters + number * size :][:size]
            ]
            with torch.enable_grad():  # the chunk's backward pass, inside the forward pass of the sum
                terms_M = function(number, *chunk)
                wanted = [x for x in (*parameters, *chunk) if x.requires_grad]
                found = iter(torch.autograd.grad(terms_M.sum(), wanted))
            for total in grads[:num_parameters]:
                if total is not None:
                    total += next(found)
            grads += [next(found) if x.requires_grad else None for x in chunk]
            terms.append(terms_M.detach())
        ctx.save_for_backward(*grads)
        terms_M = torch.stack(terms).sum(0)
        ctx.mark_non_differentiable(terms_M)
        return terms_M.sum(), terms_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if one is None else one * grad for one in ctx.saved_tensors]
        return None, None, None, *scaled
