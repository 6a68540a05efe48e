"""Random models of the shapes of published models: speed at sizes that nobody trained here.

A pass costs the same whatever the weights are, so a random model decodes as fast as a trained one; only
the fraction of drafted tokens that stay has to be set. The draft is an exit, the first layers at full width,
and what the further layers write to the residual stream is scaled by one factor: at 0 the full model is its
exit, and every drafted token stays; the larger the factor, the fewer do. Bisection finds the factor at
which the expected acceptance (sum over the vocabulary of min(p, q), under the distribution that tokens are
drawn from) is `alpha`.

    embedding -> exit's layers -> + factor * (further layers) -> norm -> head

Text of such a model is noise, without the bursts of easy and hard tokens that real text has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from models.base.dtypes import DTYPES
from models.base.errors import NestlingError, UsageError
from models.decode.sampling.params import SamplingParams, sampling_probs
from models.elastic.config import ElasticConfig
from models.elastic.count import count_weight_bytes
from models.elastic.granularity import Granularity
from models.elastic.model import Block, ElasticLM


def _shape(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, *, tied: bool = True
) -> ElasticConfig:
    return ElasticConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=tied,
    )


SHAPES: Mapping[str, ElasticConfig] = {
    "15M": _shape(288, 768, 6, 6, 6),  # stories15M, https://github.com/karpathy/llama2.c
    "60M": _shape(512, 1376, 8, 8, 8, tied=False),  # Llama 60M of GaLore, https://arxiv.org/abs/2403.03507
    "125M": _shape(576, 1536, 30, 9, 3),  # this and the next two: MobileLLM, https://arxiv.org/abs/2402.14905
    "350M": _shape(960, 2560, 32, 15, 5),
    "1B": _shape(1280, 3584, 54, 20, 5),
}

TOLERANCE = 0.01
"""Tolerance of the acceptance."""
NUM_ROWS, ROW_TOKENS = 16, 128
"""Random text that acceptance is measured on."""
# Spread of a logit: with 32,000 tokens their entropy is then 2 to 3 nats, as in trained models.
LOGIT_STD = 4.0
# Small beside what layers write, or a tied head would repeat the token that was read.
EMBEDDING_STD = 0.01
LEAST_FACTOR, MOST_FACTOR = 1e-4, 1e2
MAX_STEPS = 40
# Python, torch and transformers themselves, and activations.
PROCESS_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A random model whose exit drafts with a known acceptance."""

    model: ElasticLM
    alpha: float
    """Measured on random text."""
    factor: float
    """The factor of what the layers behind the exit write."""


def check_exit(config: ElasticConfig, exit_: Granularity) -> int:
    """Return the number of layers of an exit.

    Raises:
        UsageError: if it is another kind of member, or the full model.
    """
    plan = exit_.resolve(config)
    if not plan.is_layer_prefix or plan.is_full:
        raise UsageError(
            f"--draft {exit_}: with --random it is the first layers at full width, but not all of them, "
            "as in layers=0-1"
        )
    return len(plan.layers)


def needed_bytes(config: ElasticConfig, dtype: str) -> int:
    """Return an estimate of the memory that a bench takes, where its two engines hold the weights.

    Each may hold them twice for a moment: as read, and converted or packed.
    """
    width = DTYPES[dtype].itemsize if dtype in DTYPES else 4
    return count_weight_bytes(config, dtype_bytes=2 * width + 4 + width) + PROCESS_BYTES


def check_memory(size: str, dtype: str, free_bytes: int) -> None:
    """Refuse a model that would not fit into memory.

    Raises:
        UsageError: with what is needed, and what there is.
    """
    needed = needed_bytes(SHAPES[size], dtype)
    if needed > free_bytes:
        fitting = [name for name, shape in SHAPES.items() if needed_bytes(shape, dtype) <= free_bytes]
        remedy = f"choose {' or '.join(fitting)}" if fitting else "free some"
        raise UsageError(
            f"--random {size} needs about {needed / 2**30:.1f} GiB of memory in {dtype} and "
            f"{free_bytes / 2**30:.1f} GiB are free; {remedy}"
        )


def random_model(
    config: ElasticConfig,
    exit_: Granularity,
    *,
    alpha: float,
    params: SamplingParams,
    progress: Callable[[], None] | None = None,
) -> RandomModel:
    """Return a model of this shape, in fp32, whose exit drafts with acceptance `alpha`, to `TOLERANCE`.

    Args:
        config: the shape.
        exit_: the member that drafts.
        alpha: between 0 and 1.
        params: settings of sampling; greedily, acceptance is the fraction of equal choices.
        progress: called after each measurement.

    Raises:
        UsageError: if the member is no exit.
        NestlingError: if no factor gives this acceptance.
    """
    num_layers = check_exit(config, exit_)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _initialised(config).to(device)
    rest = [cast(Block, block) for block in model.model.layers[num_layers:]]
    tokens_BT = torch.randint(
        config.vocab_size, (NUM_ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(1)
    ).to(device)
    scale = 1.0

    def measure(factor: float) -> float:
        nonlocal scale
        _scale_writes(rest, factor / scale)
        scale = factor
        found = acceptance(model, num_layers, tokens_BT, params)
        if progress:
            progress()
        return found

    factor, found = find_factor(measure, alpha)
    return RandomModel(model=model.cpu().eval(), alpha=found, factor=factor)


def find_factor(measure: Callable[[float], float], alpha: float) -> tuple[float, float]:
    """Return the factor at which `measure`, which falls with it, gives `alpha`; and what it gives there.

    Rejections grow about in proportion to a small factor, so that the next guess follows from the last;
    where it leaves the bracket, this is bisection on the logarithm.

    Raises:
        NestlingError: if there is none.

    >>> factor, found = find_factor(lambda factor: 1 / (1 + factor), 0.8)
    >>> round(factor, 1), abs(found - 0.8) <= TOLERANCE
    (0.2, True)
    """
    low, high, factor = LEAST_FACTOR, MOST_FACTOR, 0.1
    found = 1.0
    for _ in range(MAX_STEPS):
        found = measure(factor)
        if abs(found - alpha) <= TOLERANCE / 2:
            return factor, found
        low, high = (factor, high) if found > alpha else (low, factor)
        guess = factor * (1 - alpha) / max(1 - found, 1e-6)
        factor = guess if low < guess < high else (low * high) ** 0.5
    raise NestlingError(
        f"--alpha {alpha:g} is out of reach: the nearest that random weights gave is {found:.3f}; "
        "choose one further from 0 and 1"
    )


@torch.inference_mode()
def acceptance(model: ElasticLM, num_layers: int, tokens_BT: Tensor, params: SamplingParams) -> float:
    """Return the mean over positions of sum min(p, q): p the model's distribution, q that of its exit."""
    overlaps: list[Tensor] = []
    for tokens_1T in tokens_BT.split(1):
        q_1TD, p_1TD = model.states(tokens_1T, exits=(num_layers,))
        p_TV, q_TV = (sampling_probs(model.head(states_1TD)[0], params) for states_1TD in (p_1TD, q_1TD))
        overlaps.append(torch.minimum(p_TV, q_TV).sum(-1))
    return float(torch.cat(overlaps).mean())


def _initialised(config: ElasticConfig) -> ElasticLM:
    """Return a model whose matrices keep the scale of their input, so that layers write about as much."""
    model = ElasticLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(1.0)
        model.model.embed_tokens.weight.normal_(std=EMBEDDING_STD, generator=generator)
        head_std = float(model.lm_head.weight.std())
        model.model.norm.weight.fill_(LOGIT_STD / (head_std * config.hidden_size**0.5))
    return model


@torch.no_grad()
def _scale_writes(blocks: Sequence[Block], factor: float) -> None:
    for block in blocks:
        for matrix in (block.self_attn.o_proj, block.mlp.down_proj):
            cast(nn.Linear, matrix).weight.mul_(factor)


def random_prompts(config: ElasticConfig, *, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Return prompts of random tokens, the same each time."""
    generator = torch.Generator().manual_seed(2)
    ids_BT = torch.randint(config.vocab_size, (num_prompts, num_tokens), generator=generator)
    rows: list[list[int]] = ids_BT.tolist()
    return rows
