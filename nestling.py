"""nestling from Python: everything that the README uses, each imported on first use.

    import nestling

    nestling.train("tiny", overrides=["trainer.max_steps=100"], out="checkpoints/tiny")
    decoder = nestling.open_decoder("checkpoints/tiny/model", draft="auto")
    print(decoder.generate("def main(").text)

The code lives in the packages `models` and `train`. Where a folder or file of your own has one of
these names, or that of a package that they need, and comes first on Python's path, one line names it.
"""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.base.errors import NestlingError, UsageError
    from models.checkpoint.folder import ModelFolder, load_model
    from models.decode.decoder import Decoder, open_decoder
    from models.decode.sampling.params import SamplingParams
    from models.elastic.granularity import Granularity
    from models.elastic.view import View
    from models.serve.server import serve
    from models.serve.spread import open_spread
    from models.serve.stage import serve_stage
    from train.api import distill, evaluate, extract, search, train

__all__ = [
    "Decoder",
    "Granularity",
    "ModelFolder",
    "NestlingError",
    "SamplingParams",
    "UsageError",
    "View",
    "distill",
    "evaluate",
    "extract",
    "load_model",
    "open_decoder",
    "open_spread",
    "search",
    "serve",
    "serve_stage",
    "train",
]
_HOMES = {
    "models.base.errors": ("NestlingError", "UsageError"),
    "models.checkpoint.folder": ("ModelFolder", "load_model"),
    "models.decode.decoder": ("Decoder", "open_decoder"),
    "models.decode.sampling.params": ("SamplingParams",),
    "models.elastic.granularity": ("Granularity",),
    "models.elastic.view": ("View",),
    "models.serve.server": ("serve",),
    "models.serve.spread": ("open_spread",),
    "models.serve.stage": ("serve_stage",),
    "train.api": ("distill", "evaluate", "extract", "search", "train"),
}

NEEDED = (
    "altair",
    "datasets",
    "fastapi",
    "filelock",
    "gguf",
    "jinja2",
    "lightning",
    "numpy",
    "omegaconf",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
    "wandb",
    "websockets",
    "yaml",
)


def __getattr__(name: str) -> Any:
    """Import a name on first use (PEP 562)."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'nestling' has no attribute {name!r}")
    problem = _shadowed()
    if problem:
        raise ImportError(problem)
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def main() -> int:
    """Run the command `nestling`; return its exit code."""
    problem = _shadowed()
    if problem:
        print(f"nestling: error: {problem}", file=sys.stderr)
        return 1
    return int(importlib.import_module("train.cli").main())


def _shadowed() -> str | None:
    """Name the first file that Python would import in place of one of our packages."""
    for name in ("models", "train"):
        ours = Path(__file__).resolve().parent / name / "__init__.py"
        spec = importlib.util.find_spec(name)
        found = Path((spec and spec.origin) or "nothing").resolve()
        if found != ours:
            return (
                f"{found} hides nestling's own package `{name}`; rename it, or start Python in another folder"
            )
    return _shadowed_dependency()


def _shadowed_dependency() -> str | None:
    """Name the first file in the folder that Python was started in or for that hides a package we need."""
    folders = {Path(sys.path[0] or ".").resolve(), Path.cwd()} if sys.path else set()
    entered = [entry for entry in sys.path if Path(entry or ".").resolve() in folders]
    others = [entry for entry in sys.path if entry not in entered]
    for name in NEEDED:
        theirs = importlib.machinery.PathFinder.find_spec(name, entered)
        if theirs and theirs.origin and importlib.machinery.PathFinder.find_spec(name, others):
            return (
                f"{theirs.origin} hides the package `{name}`, which nestling needs; "
                "rename it, or start Python in another folder"
            )
    return None
