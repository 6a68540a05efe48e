"""The model that a run begins from, `model.from`: its shape is the run's, and so is its tokenizer.

Its weights are read once, at step 0; a run that goes on reads its own state. Where the full model is held to
it (`loss.trust`), a frozen copy teaches beside it, as a teacher of `loss.teacher` would.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from models.base.dtypes import DTYPES
from models.base.errors import NestlingError, UsageError
from models.checkpoint.folder import ModelFolder, load_model
from models.checkpoint.weights import hash_weights, model_from, weights_of
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from train.data.tokenizer import TextTokenizer, load_tokenizer
from train.distill.open import check_teacher
from train.objective.teacher import ElasticTeacher, TeacherShape
from train.recipe.pretrained import read_start_config, shape_of
from train.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run keeps of the model that it began from.

    Args:
        path: As the recipe names it.
        sha256: Hash of its weights.
        tensors: Hash of its tensors in fp32, whatever file holds them.
        tokenizer: Its tokenizer, as its own files hold it.
        chat_template: Its chat template, if it has one.
        provenance: Where it came from.
    """

    path: str
    sha256: str
    tensors: str
    tokenizer: Tokenizer | None
    chat_template: str | None
    provenance: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """The part of a model's provenance that names it."""
        hashes = {"sha256": self.sha256, "tensors_sha256": self.tensors}
        return {"path": self.path, **hashes, "provenance": dict(self.provenance)}


def check_start(recipe: Recipe) -> ElasticConfig | None:
    """Return the shape of the model that a recipe begins from, or None; check that it fits, read no weights.

    Raises:
        UsageError: if there is no model, it has no tokenizer or another one than the recipe asks for, or the
            recipe states another shape.
        NestlingError: naming a file of it that is damaged.
    """
    start = recipe.model.from_
    if start is None:
        return None
    theirs = read_start_config(start)
    config = cut_shape(recipe, theirs)
    if recipe.model.train == "owned" and config != theirs:
        raise UsageError(
            f"model.train=owned: the full model stays that of model.from={start}; leave "
            "model.num_hidden_layers and model.intermediate_size out"
        )
    wrong = [
        f"model.{name}={getattr(recipe.model, name)}: is {value} in model.from={start}; leave it out"
        for name, value in shape_of(config).items()
        if getattr(recipe.model, name) != value
    ]
    if wrong:
        raise UsageError("\n".join(wrong))
    check_same_tokenizer(recipe, load_tokenizer(start, key="model.from"), f"model.from={start}")
    return config


def cut_shape(recipe: Recipe, config: ElasticConfig) -> ElasticConfig:
    """Return the shape that a run begins with: the model's own, or with its first layers and neurons alone.

    Args:
        recipe: The run.
        config: The shape of the model that it begins from.
    """
    return dataclasses.replace(
        config,
        num_hidden_layers=min(recipe.model.num_hidden_layers, config.num_hidden_layers),
        intermediate_size=min(recipe.model.intermediate_size, config.intermediate_size),
    )


def check_same_tokenizer(recipe: Recipe, theirs: TextTokenizer, shown: str) -> None:
    """Refuse a `data.tokenizer` that is not that of a model which the run shares it with.

    Args:
        recipe: The run.
        theirs: The model's tokenizer.
        shown: The setting that names the model, with its value.

    Raises:
        UsageError: naming both.
    """
    if recipe.data.tokenizer == "bpe":
        return
    ours = load_tokenizer(recipe.data.tokenizer)
    if ours.backend.get_vocab() != theirs.backend.get_vocab():
        raise UsageError(
            f"data.tokenizer={recipe.data.tokenizer}: its {ours.vocab_size} tokens are not the "
            f"{theirs.vocab_size} of {shown}; set it to bpe to take that model's"
        )


def open_start(recipe: Recipe) -> Start | None:
    """Return what is kept of a recipe's start, checked and hashed; None if it has none.

    Raises:
        UsageError, NestlingError: as `check_start`, or if its weights are missing or damaged.
    """
    if recipe.model.from_ is None:
        return None
    check_start(recipe)
    folder = _load(recipe.model.from_)
    return Start(
        path=recipe.model.from_,
        sha256=hash_weights(folder.path),
        tensors=hash_tensors(folder.model),
        tokenizer=folder.tokenizer,
        chat_template=folder.chat_template,
        provenance=folder.provenance,
    )


def check_taught(recipe: Recipe) -> TeacherShape | None:
    """Return the shape of the frozen model that the full one learns from: a teacher, or the original.

    Raises:
        UsageError, NestlingError: as `check_start` and `check_teacher`.
    """
    start, teacher = check_start(recipe), check_teacher(recipe)
    if start is None or not recipe.is_held:
        return teacher
    return TeacherShape.of(read_start_config(recipe.model.from_ or ""))


def open_original(recipe: Recipe, start: Start | None, dtype: str) -> ElasticTeacher | None:
    """Return the frozen original that the full model is held to; None without one."""
    if start is None or not recipe.is_held:
        return None
    model = load_model(Path(start.path).expanduser(), dtype=DTYPES[dtype]).model
    return ElasticTeacher(model, {"path": start.path, "sha256": start.sha256})


def load_start(recipe: Recipe) -> ElasticLM:
    """Return the model of `model.from` in fp32, or the prefix that the recipe asks for, ready to train."""
    assert recipe.model.from_ is not None
    model = _load(recipe.model.from_).model
    config = cut_shape(recipe, model.config)
    if config == model.config:
        return model.train()
    layers = ":".join(map(str, range(config.num_hidden_layers)))
    fraction = config.intermediate_size / model.config.intermediate_size
    view = View(model, Granularity.parse(f"layers={layers},ffn={fraction!r}", {}))
    assert view.config == config, (view.config, config)
    return model_from(config, view.state_dict()).train()


def hash_tensors(model: ElasticLM) -> str:
    """Return the SHA-256 of the full model's tensors in fp32, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights_of(model).items()):
        digest.update(f"{name} {list(tensor.shape)} ".encode())
        digest.update(tensor.float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def check_unchanged(model: ElasticLM, start: Start) -> None:
    """Check that the full model is bit for bit the one that the run began from.

    Raises:
        NestlingError: if it is not, which would be a defect.
    """
    if hash_tensors(model) != start.tensors:
        raise NestlingError(
            f"model.train=owned changed the full model of model.from={start.path}; nothing was written; "
            "please report it"
        )


def _load(start: str) -> ModelFolder:
    return load_model(Path(start).expanduser(), dtype=torch.float32)
