"""Budgets: what a member may cost, in which unit, and what an engine can hold."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from models.base.errors import UsageError
from models.base.numbers import si, size
from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops, count_kv_bytes, count_parameters
from models.elastic.granularity import FULL, Granularity

Cost = Callable[[Granularity], float]
"""What a member costs; the layers' parts add up."""

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {
    "B": 1.0,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
}
UNITS: Mapping[str, Mapping[str, float]] = {
    "params": _COUNTS,
    "bytes": {"": 1.0, **_BYTES},
    "flops": _COUNTS,
    "latency": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "memory": {"": 1.0, **_BYTES},
}
"""Kinds of budgets and their units: parameters; bytes of the weights; operations, and seconds, of a token;
bytes of the weights with keys and values of a whole context."""
_FORMS: Mapping[str, Callable[[float], str]] = {
    "params": si,
    "bytes": size,
    "flops": si,
    "latency": lambda seconds: f"{seconds * 1e3:.3g} ms",
    "memory": size,
}
ENGINES = ("hf", "padded", "vllm", "sglang", "llama.cpp", "mlx")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a member may cost; `most` is None where a budget only says what is counted."""

    kind: str
    text: str
    most: float | None = None
    is_fraction: bool = False

    def limit(self, cost: Cost) -> float | None:
        """Return the most that a member may cost, in the unit of `cost`; None for any cost."""
        return self.most * cost(FULL) if self.is_fraction and self.most is not None else self.most


def parse_budget(text: str) -> Budget:
    """Read a budget: a kind, and how much of it, or which fraction of what the full model costs.

    Raises:
        UsageError: naming what is not one, and what is.

    >>> parse_budget("params=0.5")
    Budget(kind='params', text='params=0.5', most=0.5, is_fraction=True)
    >>> parse_budget("latency=12ms").most, parse_budget("params=3.5M").most, parse_budget("bytes=50%").most
    (0.012, 3500000.0, 0.5)
    """
    kind, equals, amount = (part.strip() for part in text.partition("="))
    if kind not in UNITS:
        raise UsageError(
            f"--budget {text}: {kind!r} is not counted; choose from {', '.join(UNITS)}, as in params=0.5"
        )
    if not equals:
        return Budget(kind=kind, text=text)
    units = UNITS[kind]
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*|%)", amount)
    if found is None or float(found[1]) == 0:
        raise UsageError(f"--budget {text}: {amount!r} is no amount above 0; write {kind}={_example(kind)}")
    number, unit = float(found[1]), found[2]
    if unit == "%":
        if number > 100:
            raise UsageError(f"--budget {text}: {amount} is more than the full model; give 100% or less")
        number, unit = number / 100, ""
    if not unit and number <= 1:
        return Budget(kind=kind, text=text, most=number, is_fraction=True)
    if unit not in units:
        known = ", ".join(name for name in units if name)
        said = f"unknown unit {unit!r}" if unit else f"{amount} has no unit"
        raise UsageError(
            f"--budget {text}: {said}; give one of {known}, or a fraction of the full model, as in {kind}=0.5"
        )
    return Budget(kind=kind, text=text, most=number * units[unit])


def parse_budgets(texts: Sequence[str]) -> list[Budget]:
    """Read several budgets, all of which a member must keep.

    Raises:
        UsageError: for one that is not one, or two of a kind.
    """
    budgets = [parse_budget(text) for text in texts]
    seen: dict[str, Budget] = {}
    for one in budgets:
        if one.kind in seen:
            raise UsageError(
                f"--budget {seen[one.kind].text} and {one.text} exclude each other; give one of them"
            )
        seen[one.kind] = one
    return budgets


def _example(kind: str) -> str:
    return {"latency": "12ms", "bytes": "40MB", "memory": "60MB"}.get(kind, "3.5M") + f" or {kind}=0.5"


def show_cost(kind: str, value: float) -> str:
    """Write a cost as people read it.

    >>> show_cost("params", 3_704_512), show_cost("latency", 0.0123)
    ('3.70M', '12.3 ms')
    """
    return _FORMS[kind](value)


def cost_of(
    kind: str, config: ElasticConfig, *, weight_bytes: float, context: int, stored: Cost | None = None
) -> Cost:
    """Return what a member costs in one kind of budget, but for latency, which is measured.

    Args:
        kind: one of `UNITS`.
        config: the full model's shape.
        weight_bytes: bytes of a weight as it is stored.
        context: positions whose keys and values count.
        stored: bytes of a member's weights, if not all of them have as many.
    """

    def parameters(member: Granularity) -> float:
        return count_parameters(config, member)

    def weights(member: Granularity) -> float:
        return weight_bytes * count_parameters(config, member) if stored is None else stored(member)

    def in_memory(member: Granularity) -> float:
        cache = count_kv_bytes(
            config, member, num_positions=context, dtype_bytes=2 if weight_bytes < 4 else 4
        )
        return weights(member) + cache

    return {
        "params": parameters,
        "bytes": weights,
        "flops": lambda member: count_flops(config, member, num_cached=context // 2),
        "memory": in_memory,
    }[kind]


def holds_unequal(engine: str | None, config: ElasticConfig) -> tuple[bool, bool]:
    """Return whether an engine holds members whose layers differ in FFN width, and in heads.

    transformers and vLLM build each layer from `per_layer_config`; SGLang takes heads from the whole model;
    MLX-LM reads stock architectures, and padding to the widest layer saves nothing. llama.cpp holds them as
    `deci` (Llama) and `openelm` (Qwen3 with a tied head), not with biases or layers without RoPE.
    """
    match engine:
        case None | "hf" | "vllm":
            return True, not config.post_norms  # Gemma 3's class wants one number of heads
        case "sglang":
            return True, False
        case "llama.cpp":
            known = config.no_rope_layers is None and not (config.attention_bias or config.post_norms)
            is_openelm = config.tie_word_embeddings and config.rope_scaling is None
            held = known and (not config.qk_norm or is_openelm)
            return held, held
        case "padded" | "mlx":
            return False, False
    raise UsageError(f"--for {engine} is not an engine that is known; choose from {', '.join(ENGINES)}")
