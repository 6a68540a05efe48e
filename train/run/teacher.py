"""A trained model that the full model of a run learns from (https://arxiv.org/abs/1503.02531).

It is a model folder, `loss.teacher`, whose tokenizer is the run's too. It stays as it is: no part of the
module that trains, so neither optimised, clipped, saved nor sharded; a run that goes on knows it again
by the hash of its weights. What is learned from it is train/objective/joint_loss.py's business.
"""

from dataclasses import dataclass
from pathlib import Path

from models.base.dtypes import DTYPES
from models.base.errors import UsageError
from models.checkpoint.folder import TOKENIZER, load_model, read_config
from models.checkpoint.weights import hash_weights
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from train.data.tokenizer import load_tokenizer
from train.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher, opened.

    Args:
        path: its folder, as the recipe names it.
        sha256: hash of its weights.
        model: frozen, on the CPU.
    """

    path: str
    sha256: str
    model: ElasticLM

    @property
    def record(self) -> dict[str, str]:
        """The part of a model's provenance that names its teacher."""
        return {"path": self.path, "sha256": self.sha256}


def check_teacher(recipe: Recipe) -> ElasticConfig | None:
    """Return the shape of a recipe's teacher, or None; check that it fits the recipe, and read no weights.

    Raises:
        UsageError: if there is no model folder, it has no tokenizer or another one than the recipe asks
            for, or its context is shorter than a row.
        NestlingError: naming a file of it that is damaged.
    """
    if recipe.loss.teacher is None:
        return None
    shown, folder = f"loss.teacher={recipe.loss.teacher}", _folder(recipe.loss.teacher)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{shown}: is no model folder; give one with config.json and model.safetensors")
    if not (folder / TOKENIZER).is_file():
        raise UsageError(f"{shown}: has no {TOKENIZER}, which the run would share; give a folder with one")
    config = read_config(folder)
    longest, length = config.max_position_embeddings, recipe.data.sequence_length
    if longest < length:
        raise UsageError(
            f"{shown}: reads at most {longest} tokens, fewer than data.sequence_length={length}; "
            f"set that to {longest} or less"
        )
    theirs = load_tokenizer(recipe.loss.teacher, key="loss.teacher")
    if recipe.data.tokenizer != "bpe":
        ours = load_tokenizer(recipe.data.tokenizer)
        if ours.backend.get_vocab() != theirs.backend.get_vocab():
            raise UsageError(
                f"data.tokenizer={recipe.data.tokenizer}: its {ours.vocab_size} tokens are not the "
                f"{theirs.vocab_size} of {shown}; set it to bpe to take the teacher's"
            )
    return config


def open_teacher(recipe: Recipe, dtype: str) -> Teacher | None:
    """Return a recipe's teacher, checked and hashed; None if it has none.

    Args:
        recipe: its `loss.teacher`.
        dtype: the training precision, `fp32` or `bf16`; the teacher's weights are held in it.

    Raises:
        UsageError, NestlingError: as `check_teacher`, or if its weights are missing or damaged.
    """
    if recipe.loss.teacher is None:
        return None
    check_teacher(recipe)
    folder = _folder(recipe.loss.teacher)
    return Teacher(
        path=recipe.loss.teacher,
        sha256=hash_weights(folder),
        model=load_model(folder, dtype=DTYPES[dtype]).model.requires_grad_(False),
    )


def _folder(path: str) -> Path:
    return Path(path).expanduser()
