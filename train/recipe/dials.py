"""Three dials, which set the other settings: how large, how long, and what the members are for.

    nestling train size=17M tokens=8M members=draft

They stand between the files and the other keys of the command line: defaults <- files <- dials <- keys.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.base.errors import UsageError
from train.recipe.overrides import pair_overrides
from train.recipe.sections import DataConfig, TrainerConfig
from train.recipe.settings import show

SIZES = {
    "1M": "width=128 ffn=512 layers=4 heads=4 kv=2 vocabulary=1024 lr=3e-3",
    "8M": "width=256 ffn=1024 layers=7 heads=8 kv=4 vocabulary=4096 lr=1.5e-3",
    "17M": "width=256 ffn=1024 layers=16 heads=8 kv=4 vocabulary=4096 lr=1.5e-3",
    "52M": "width=512 ffn=1536 layers=16 heads=8 kv=4 vocabulary=4096 lr=1e-3",
    "100M": "width=768 ffn=2048 layers=12 heads=12 kv=4 vocabulary=32768 lr=6e-4",
}
"""Shapes of the full model by its parameters."""
KEYS = {
    "width": "model.hidden_size",
    "ffn": "model.intermediate_size",
    "layers": "model.num_hidden_layers",
    "heads": "model.num_attention_heads",
    "kv": "model.num_key_value_heads",
    "vocabulary": "data.vocab_size",
    "lr": "optim.lr",
}

FEW_STEPS = 50
"""Steps of a run so short that it needs another schedule."""

# What each costs and brings is measured in docs/results/study.
_GENTLE = {
    "loss.divergence": "forward_kl",
    "loss.fade_to": 1.0,
    "owned.norms": True,
    "sampler.exit_stride": 4,
}
MEMBERS: Mapping[str, Mapping[str, Any]] = {
    "light": {
        **_GENTLE,
        "loss.narrow_gradient": 0.7,
        "loss.exit_gradient": 0.3,
        "loss.hidden_weight": 0.0,
        "owned.min_lr_ratio": None,
        "owned.rank": 0,
        "sampler.mixed_fraction": 0.0,
        "sampler.row_fraction": 0.08,
        "sampler.shared_cache": 0.5,
        "sampler.turns_power": 1.0,
    },
    "even": {
        **_GENTLE,
        "loss.exit_gradient": 1.0,
        "owned.rank": 16,
        "sampler.mixed_fraction": 0.125,
        "sampler.row_fraction": 0.25,
        "sampler.shared_cache": 0.25,
    },
    "draft": {
        "family": {"D": "layers=0-1", "E": "layers=0"},
        "loss.divergence": "neg_log_alpha",
        "loss.exit_gradient": 0.75,
        "loss.fade_to": 1.0,
        "owned.min_lr_ratio": None,
        "owned.norms": True,
        "sampler.exit_stride": 1,
    },
}


@dataclass(frozen=True)
class Dial:
    """A dial's values, its default, and what it does, for the help."""

    values: str
    default: str
    help: str


DIALS = {
    "size": Dial(
        "|".join(SIZES), "about 7M", "Parameters of the full model; sets its shape and learning rate."
    ),
    "tokens": Dial(
        "number, as in 8M",
        "8.2M",
        "Tokens to train on; sets the steps and all that follows from them. --dry-run tells the time.",
    ),
    "members": Dial(
        "|".join(MEMBERS),
        "even",
        "Purpose of the smaller models. light: a tenth of a step is for them; even: a quarter, and they own "
        "more; draft: the first layers alone, for speculative decoding. --dry-run tells what each costs.",
    ),
}


def split_dials(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the dials from the other keys.

    Raises:
        UsageError: one line for each value that a dial does not have.

    >>> split_dials(["--size", "8M", "seed=1"])
    ({'size': '8M'}, ['seed=1'])
    """
    pairs = list(pair_overrides(words))
    dials = {key: text for key, text in pairs if key in DIALS}
    problems = [
        f"{key}={text}: expected {DIALS[key].values.replace('|', ', ')}"
        for key, text in dials.items()
        if not (_count(text) if key == "tokens" else text in DIALS[key].values.split("|"))
    ]
    if problems:
        raise UsageError("\n".join(problems))
    return dials, [f"{key}={text}" for key, text in pairs if key not in DIALS]


def overrides_of(dials: Mapping[str, str]) -> Iterator[str]:
    """Yield what `size` and `members` set, as overrides.

    >>> list(overrides_of({"size": "8M"}))[:2]
    ['model.hidden_size=256', 'model.intermediate_size=1024']
    """
    if "size" in dials:
        for word in SIZES[dials["size"]].split():
            name, _, value = word.partition("=")
            yield f"{KEYS[name]}={value}"
    if "members" in dials:
        yield from (f"{key}={show(value)}" for key, value in MEMBERS[dials["members"]].items())


def schedule_of(tokens: str, trainer: TrainerConfig, data: DataConfig, *, taught: bool = False) -> list[str]:
    """Return what `tokens` sets: a run of this length in the proportions of the default one.

    In its first 50 steps members learn from text alone, however short it is, unless a teacher knows better: a
    full model that knows nothing yet is drawn to what is easily agreed on (docs/LOG.md). Nor is the family
    measured more often than that.

    >>> schedule_of("8.192M", TrainerConfig(), DataConfig())[:2]
    ['trainer.max_steps=2000', 'trainer.val_check_interval=250']
    """
    steps = max(1, round(_count(tokens) / (trainer.rows_per_step * data.sequence_length)))
    few = min(steps, FEW_STEPS)
    return [
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={max(steps // 8, few)}",
        f"trainer.checkpoint_every={max(1, steps // 4)}",
        f"optim.warmup_steps={steps // 20}",
        f"loss.ramp_start={steps // 10 if taught else max(steps // 10, few)}",
        f"loss.ramp_steps={steps * 2 // 5}",
    ]


def learning_of(num_tokens: float, num_parameters: float) -> dict[str, float]:
    """Return how narrow members learn in a run of this length, where their purpose does not fix it.

    That is how hard they pull at what they share, to what the rate of what they own falls, how much the full
    model's hidden states count, and how the smaller ones' turns grow with what they save. In a longer run the
    pull costs the full model less, what they own comes to rest, a small model has better uses for its width
    than to repeat a large one's states, and the large members need their turns.
    Measured at 0.8 and at 20 tokens a parameter (docs/LOG.md).

    >>> [tuple(learning_of(1e6 * count, 10e6).values()) for count in (5, 12, 25, 200)]
    [(0.2, 0.3, 12.0, 1.0), (0.3, 0.3, 11.0, 0.9), (0.7, 0.2, 9.0, 0.7), (1.0, 0.1, 6.0, 0.5)]
    """
    length = min(1.0, max(0.0, math.log(num_tokens / num_parameters, 5)))
    return {
        "loss.narrow_gradient": round(0.2 + 0.8 * length, 1),
        "owned.min_lr_ratio": round(0.3 - 0.2 * length, 1),
        "loss.hidden_weight": float(round(12 - 6 * length)),
        "sampler.turns_power": round(1 - 0.5 * length, 1),
    }


def _count(text: str) -> float:
    """Return a number with its unit, 0 if it is not one.

    >>> _count("8M"), _count("1.5B"), _count("200000"), _count("many"), _count("1e400")
    (8000000.0, 1500000000.0, 200000.0, 0, 0)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([kMB]?)", text)
    number = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]] if found else 0
    return number if math.isfinite(number) else 0
