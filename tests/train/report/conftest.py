"""A run folder as training leaves it, with made-up numbers that behave like real ones."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.base.files import write_json
from models.checkpoint.family import FAMILY_FILE, Member, write_family
from models.checkpoint.huggingface_config import config_to_hugging_face
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity

CONFIG = ElasticConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FAMILY = {"S": "ffn=0.125", "M": "ffn=0.25", "L": "ffn=0.5", "draft": "layers=0-1", "XL": "full"}
# Of each member: parameters, loss above the full model's, final alpha.
KNOWN = {
    "S": (1_710_000, 0.24, 0.74),
    "M": (1_990_000, 0.17, 0.79),
    "L": (2_560_000, 0.09, 0.86),
    "draft": (1_850_000, 0.19, 0.81),
    "XL": (3_704_512, 0.0, 1.0),
}
LOOP = "    for line in lines:\n        if line.startswith('<b>'):\n            return "
SAMPLES = {
    "XL": f"{LOOP}line\n    return None\n",
    "L": f"{LOOP}lines\n    return None\n",
    "S": "    for name in lines:\n        if name:\n            return name\n",
}

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a run folder below the test's own and returns it."""
    return lambda name="demo", **changes: write_run(tmp_path / name, **changes)


@pytest.fixture
def members() -> list[Member]:
    """The family that `make_run` measures."""
    return make_members()


def write_run(path: Path, *, steps: int = 400, shift: float = 0.0, learning_rate: float = 0.001) -> Path:
    """A finished run; `shift` makes it worse."""
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as stream:
        for line in make_lines(steps, shift):
            stream.write(json.dumps(line) + "\n")
    (path / "recipe.yaml").write_text(f"optim:\n  lr: {learning_rate}\nseed: 0\n")
    (path / "model").mkdir()
    write_json(path / "model" / "config.json", config_to_hugging_face(CONFIG))
    provenance = {"commit": "0123abc", "versions": {"torch": "2.13.0"}, "recipe": {"seed": 0}}
    family = {name: Granularity.parse(text) for name, text in FAMILY.items()}
    write_family(path / "model" / FAMILY_FILE, family, make_members(shift), provenance)
    speeds = {"plain_tokens_per_second": 201.5, "speculative_tokens_per_second": 366.2}
    write_json(path / "decode.json", speeds | {"tau": 3.21, "alpha": 0.78, "draft": "draft"})
    return path


def make_members(shift: float = 0.0) -> list[Member]:
    return [
        Member(
            name=name,
            granularity=FAMILY[name],
            parameters=parameters,
            loss=1.77 + shift + gap,
            perplexity=math.exp(1.77 + shift + gap),
            match=100 * alpha,
            kl=0.9 * gap,
            alpha=alpha,
        )
        for name, (parameters, gap, alpha) in KNOWN.items()
    ]


def make_lines(steps: int, shift: float) -> Iterator[dict[str, Any]]:
    """What training appends, ten train lines to a valid line."""
    for step in range(5, steps + 1, 5):
        done = step / steps
        full = 1.77 + shift + 5.2 * math.exp(-7 * done) + 0.03 * math.sin(step * 1.7)
        objective = {
            f"loss/{name}": 1.1 * gap + 2 * math.exp(-7 * done) for name, (_, gap, _) in KNOWN.items()
        }
        yield {
            "kind": "train",
            "step": step,
            "tokens": step * 8192,
            "seconds": step * 0.9,
            "lr": 0.001 * min(1, 20 * done) * (0.55 + 0.45 * math.cos(math.pi * done)),
            "tokens_per_second": 9100 + 300 * math.sin(step),
            "gradient_norm": 0.4 + 3 * math.exp(-9 * done) + 0.05 * math.sin(step * 3.1),
            "mfu": 0.31 + 0.01 * math.sin(step),
            "data_wait": 0.002,
            **objective,
            "loss/XL": full,
        }
        if step % 50 == 0:
            yield make_valid(step, done, shift)
            yield make_gradient(step, done)
            for name, text in SAMPLES.items():
                yield {
                    "kind": "sample",
                    "step": step,
                    "member": name,
                    "prompt": "def first_bold(lines):\n",
                    "text": text if step == steps else "pass",
                }


def make_valid(step: int, done: float, shift: float) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "valid", "step": step, "tokens": step * 8192}
    for name, (_, gap, alpha) in KNOWN.items():
        line[f"valid/{name}/loss"] = 1.77 + shift + gap + 5.2 * math.exp(-7 * done)
        line[f"valid/{name}/alpha"] = alpha - (1 - alpha) * math.exp(-4 * done)
        line[f"valid/{name}/match"] = 100 * line[f"valid/{name}/alpha"]
        line[f"valid/{name}/kl"] = gap
        if name != "XL":
            line[f"valid/{name}/speedup"] = 1 + line[f"valid/{name}/alpha"]
    return line


def make_gradient(step: int, done: float) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": "gradient", "step": step, "tokens": step * 8192}
    for name, (_, gap, alpha) in KNOWN.items():
        line[f"gradient/{name}/norm"] = 0.4 + gap + math.exp(-9 * done)
        if name != "XL":
            line[f"gradient/{name}/cosine"] = alpha * math.exp(-done)
    return line
