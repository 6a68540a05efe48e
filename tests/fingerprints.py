"""Fingerprints of what the project computes, to compare before and after a change that must compute the same.

    python tests/fingerprints.py record BEFORE.json     at the old commit
    python tests/fingerprints.py compare BEFORE.json    at the new one, on the same machine

They are hashes of a run of 50 steps (losses and weights), of the same run interrupted and resumed, of an
extraction, of logits in each precision, of packed copies, and of text with and without a draft.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from models.checkpoint.folder import load_model
from models.elastic.granularity import FULL, Granularity
from models.elastic.request import Request
from models.kernels.codes import FOUR_BITS
from models.kernels.pack import make_panels
from models.packed.quantize import pack

ROOT = Path(__file__).parent.parent
PRECISIONS = ("fp32", "bf16", "int8", "int4")
DECODING = {
    "greedy": ("--draft", "D", "--gamma", "3"),
    "greedy plain": ("--draft", "none"),
    "greedy int8 draft": ("--draft", "S@int8", "--gamma", "4"),
    "greedy of int8": ("--draft", "D", "--gamma", "2", "--dtype", "int8"),
    "greedy of bf16": ("--draft", "D@int4", "--gamma", "3", "--dtype", "bf16"),
    "block": ("--draft", "D", "--gamma", "3", "--temperature", "1", "--seed", "5"),
    "token": (
        "--draft",
        "S",
        "--gamma",
        "2",
        "--temperature",
        "0.8",
        "--top-p",
        "0.9",
        "--verifier",
        "token",
    ),
    "coupled": (
        "--draft",
        "D",
        "--gamma",
        "3",
        "--temperature",
        "1",
        "--top-k",
        "20",
        "--verifier",
        "coupled",
    ),
    "nucleus": ("--draft", "S", "--gamma", "2", "--temperature", "0.8", "--top-p", "0.9", "--top-k", "20"),
    "lookup": ("--draft", "lookup", "--gamma", "3"),
}


def sha(data: bytes) -> str:
    """The first 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def of_tensor(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    return sha(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def nestling(*arguments: str) -> None:
    """Run the command line of this checkout."""
    command = [sys.executable, "-c", "import sys; from train.cli import main; sys.exit(main())", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def losses(run: Path) -> str:
    """Hash of all losses in a run's metrics, whatever else stands there."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in sorted(row.items()) if "loss" in key or key == "step"} for row in rows
    ]
    return sha(json.dumps(kept, sort_keys=True).encode())


def training(folder: Path) -> Iterator[tuple[str, str]]:
    """A run, and the same one that lost its end."""
    recipe = ["--config", "configs/tiny.yaml", f"data.cache_dir={folder / 'cache'}", "trainer.max_steps=50"]
    recipe += ["trainer.checkpoint_every=20", "dtype=fp32"]
    for name in ("whole", "resumed"):
        if name == "resumed":
            shutil.copytree(folder / "whole", folder / name)
            for state in (folder / name / "steps").iterdir():
                if state.is_dir() and int(state.name.split("-")[0]) > 20:
                    shutil.rmtree(state)
            shutil.rmtree(folder / name / "model")
        nestling("train", *recipe, "--out", str(folder / name))
        yield f"losses, {name} run", losses(folder / name)
        yield f"weights, {name} run", sha((folder / name / "model/model.safetensors").read_bytes())


def scoring(folder: Path) -> Iterator[tuple[str, str]]:
    """Logits of a prompt, and of tokens one by one, in each precision; packed copies."""
    model = load_model(folder / "whole/model").model
    tokens = torch.arange(24)[None] % model.config.vocab_size
    with torch.inference_mode():
        yield "logits, whole rows", of_tensor(model(tokens))
        yield "logits, whole rows of S", of_tensor(model(tokens, Granularity.parse("ffn=0.25")))
        for precision in PRECISIONS:
            packed = pack(model, precision)
            cache = packed.new_cache(64)
            parts = [packed.run([Request(tokens[0, :20].tolist(), cache, 20)])]
            cache.commit(20)
            parts.append(packed.run([Request([7], cache, 1)]))
            yield f"logits, {precision}", of_tensor(torch.cat(parts))
    weight = model.state_dict()["model.layers.0.mlp.gate_proj.weight"]
    for dtype in (torch.float32, torch.bfloat16, torch.int8, FOUR_BITS):
        panels = make_panels(weight, dtype=dtype)
        yield f"packed, {dtype}", of_tensor(panels.weight)
    yield "parameters", of_tensor(torch.cat([one.detach().flatten() for one in model.parameters()]))
    assert FULL.resolve(model.config).is_full


def decoding(folder: Path) -> Iterator[tuple[str, str]]:
    """Text of one prompt, drafted in different ways."""
    for name, flags in DECODING.items():
        out = folder / "text.json"
        prompt = ("--prompt", "def main(self):\n    ", "--max-new-tokens", "48")
        nestling("generate", str(folder / "whole/model"), *prompt, *flags, "--json", str(out))
        yield f"ids, {name}", sha(json.dumps(json.loads(out.read_text())["ids"]).encode())


def extraction(folder: Path) -> Iterator[tuple[str, str]]:
    """A member's folder."""
    nestling("extract", str(folder / "whole/model"), "--granularity", "S", "--out", str(folder / "S"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        yield f"extraction, {name}", sha((folder / "S" / name).read_bytes())


def fingerprints() -> dict[str, str]:
    """All hashes by name."""
    torch.set_num_threads(2)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (training, scoring, decoding, extraction):
            for name, value in part(Path(folder)):
                print(f"{name:32} {value}", flush=True)
                found[name] = value
    return found


def main() -> None:
    """Record or compare."""
    action, path = sys.argv[1], Path(sys.argv[2])
    found = fingerprints()
    if action == "record":
        path.write_text(json.dumps(found, indent=1))
        return
    before = json.loads(path.read_text())
    changed = [name for name in before if before[name] != found.get(name)]
    print(
        f"{len(before) - len(changed)} of {len(before)} equal" + "".join(f"\nCHANGED: {n}" for n in changed)
    )
    raise SystemExit(1 if changed else 0)


if __name__ == "__main__":
    main()
