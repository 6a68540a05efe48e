"""Weights shared out among processes by FSDP2, and whole again where they are saved or measured.

Each process keeps an equal part of every tensor, of its gradient and of AdamW's moments
(https://arxiv.org/abs/2304.11277). A block is gathered while it runs and let go after; embedding, norm
and head, which the start and the end of a step need, stay for the whole step.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.checkpoint.weights import model_from
from models.elastic.model import ElasticLM


def shard(module: nn.Module, model: ElasticLM, mesh: DeviceMesh, *, step: str) -> None:
    """Leave each process its part of the weights, which must be the same everywhere before.

    Args:
        module: holds the model; its method `step` runs everything from the tokens to the loss.
        model: the model.
        mesh: the processes, in one dimension.
        step: name of that method. Gathering hangs on it and not on the model's `forward`, because a step
            calls `ElasticLM.states`, and reads the last norm and the head's weight besides.
    """
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, step)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the weights only."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, every one of which must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, on the parameter's device; nothing is sent."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gather_model(model: ElasticLM, *, wanted: bool) -> ElasticLM | None:
    """The model with all its weights, which every process must ask for.

    Args:
        model: as the training holds it.
        wanted: False in a process that only takes part.

    Returns:
        The model itself if it is whole, a copy on the same device if not; None where it is not wanted.
    """
    if not is_sharded(model):
        return model if wanted else None
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = gather(parameter.detach())
        if wanted:
            tensors[name] = tensor
    return model_from(model.config, tensors) if wanted else None
