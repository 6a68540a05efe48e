"""Open the teacher that a recipe names, and check it before anything is spent.

A teacher (https://arxiv.org/abs/1503.02531) stays as it is: no part of the module that trains, so neither
optimised, clipped, saved nor sharded; a run that goes on knows it again by a hash. Its kinds:

    a model folder or GGUF file that `nestling import` opens     train/objective/teacher.py
    any other causal model of transformers                       train/distill/stock.py
    a model behind an OpenAI-shaped endpoint                     train/distill/endpoint.py
    any of them, written down before the run                     train/distill/cache.py
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console

from models.base.dtypes import DTYPES
from models.base.errors import NestlingError, UsageError
from models.base.files import hash_files, read_json
from models.base.paths import is_url
from models.checkpoint.folder import load_model, read_config
from models.checkpoint.gguf_read import is_gguf
from models.checkpoint.weights import hash_weights
from train.data.tokenizer import MIXED_TEXT, TextTokenizer, load_tokenizer
from train.distill.cache import FILE, CachedTeacher, ModelSource, Source
from train.distill.endpoint import Endpoint, EndpointTeacher, check_endpoint
from train.distill.forms import Everything, Form, TopK, make_form
from train.distill.stock import StockTeacher, load_stock_teacher, read_stock_shape
from train.objective.teacher import ElasticTeacher, LogitTeacher, Teacher, TeacherShape
from train.recipe.pretrained import read_start_config
from train.recipe.recipe import Recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_teacher(recipe: Recipe) -> TeacherShape | None:
    """Return the shape of a recipe's teacher, or None; check that it fits the recipe, and read no weights.

    Raises:
        UsageError: if there is no model, it has no tokenizer or another one than the recipe asks for, its
            context is shorter than a row, or the device that it shall run on is not there.
        NestlingError: naming a file of it that is damaged.
    """
    if recipe.loss.teacher is None:
        return None
    if is_url(recipe.loss.teacher):
        return _check_served(recipe)[1]
    shown, path = f"loss.teacher={recipe.loss.teacher}", _path(recipe.loss.teacher)
    if not is_gguf(path) and not (path / "config.json").is_file():
        raise UsageError(
            f"{shown}: is no model folder; give one with config.json and model.safetensors, or a GGUF file"
        )
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(f"{shown}: has no tokenizer.json, which the run would share; give a folder with one")
    _device(recipe)
    shape = _read_shape(path)
    length = recipe.data.sequence_length
    if shape.longest is not None and shape.longest < length:
        raise UsageError(
            f"{shown}: reads at most {shape.longest} tokens, fewer than data.sequence_length={length}; "
            f"set that to {shape.longest} or less"
        )
    theirs = load_tokenizer(recipe.loss.teacher, key="loss.teacher")
    check_vocabulary(recipe, theirs, shape)
    return shape


def check_vocabulary(recipe: Recipe, theirs: TextTokenizer, shape: TeacherShape) -> None:
    """Refuse a teacher that reads other tokens than its student would, or scores fewer than there are.

    Raises:
        UsageError: naming both.
    """
    shown = f"loss.teacher={recipe.loss.teacher}"
    if theirs.vocab_size > shape.vocab_size:
        raise UsageError(
            f"{shown}: its tokenizer has {theirs.vocab_size} tokens and its logits are {shape.vocab_size} "
            "wide; give the tokenizer that it was trained with"
        )
    key, remedy = f"data.tokenizer={recipe.data.tokenizer}", "set it to bpe to take the teacher's"
    if recipe.data.tokenizer != "bpe":
        ours = load_tokenizer(recipe.data.tokenizer)
    elif recipe.model.from_ is not None:
        key, remedy = f"model.from={recipe.model.from_}", "choose a teacher with the same tokenizer"
        ours = load_tokenizer(recipe.model.from_, key="model.from")
        width = read_start_config(recipe.model.from_).vocab_size
        if width != shape.vocab_size:
            raise UsageError(f"{key}: scores {width} tokens, {shown} {shape.vocab_size}; {remedy}")
    else:
        return
    if ours.backend.get_vocab() != theirs.backend.get_vocab():
        raise UsageError(
            f"{key}: its {ours.vocab_size} tokens are not the {theirs.vocab_size} of {shown}; {remedy}"
        )
    if ours.backend.encode(MIXED_TEXT).ids != theirs.backend.encode(MIXED_TEXT).ids:
        raise UsageError(f"{key}: cuts a text in other places than {shown} does; {remedy}")


def open_teacher(recipe: Recipe, dtype: str, console: Console | None = None) -> Teacher | None:
    """Return a recipe's teacher, checked and hashed; None if it has none.

    Args:
        recipe: its `loss.teacher` and `distill`.
        dtype: the training precision, `fp32` or `bf16`, in which the teacher is held unless
            `distill.dtype` says otherwise.
        console: shows what a user should know of it.

    Raises:
        UsageError, NestlingError: as `check_teacher`, or if its weights are missing or damaged.
    """
    if recipe.loss.teacher is not None and is_url(recipe.loss.teacher):
        return _open_served(recipe)
    shape = check_teacher(recipe)
    if recipe.loss.teacher is None or shape is None:
        return None
    if shape.note and console is not None:
        console.print(f"loss.teacher={recipe.loss.teacher}: {shape.note}", markup=False, highlight=False)
    path, held = _path(recipe.loss.teacher), recipe.distill.dtype
    weights = dtype if held == "auto" else held
    record = {"path": recipe.loss.teacher, "sha256": hash_weights(path)}

    def load() -> LogitTeacher:
        if shape.elastic is None:
            return StockTeacher(load_stock_teacher(path, DTYPES[weights]), record, _device(recipe))
        return ElasticTeacher(load_model(path, dtype=DTYPES[weights]).model, record, _device(recipe))

    if recipe.distill.cache is None:
        return load()
    form = make_form(recipe, shape.vocab_size, weights)
    device = _device(recipe) or default_device(recipe)
    config = {"config": hash_files(path / "config.json")} if path.is_dir() else {}
    return make_cached_teacher(recipe, form, record, lambda: ModelSource(load(), form, device), config)


def make_cached_teacher(
    recipe: Recipe,
    form: Form,
    record: Mapping[str, str],
    open_source: Callable[[], Source],
    more: Mapping[str, str] = MappingProxyType({}),
) -> CachedTeacher:
    """Return the teacher of a recipe with a cache; `prepare` makes or opens it.

    Args:
        recipe: its `distill` and `loss`.
        form: how the cache keeps what the teacher says.
        record: see `Teacher`; that of the teacher itself.
        open_source: opens the teacher.
        more: what the cache depends on besides, by the names of `NAMES`.
    """
    config, loss = recipe.distill, recipe.loss
    assert config.cache is not None
    kept: dict[str, object] = {"k": config.k, "temperature": loss.temperature}
    if isinstance(form, Everything):
        kept = {"dtype": form.weights}
    return CachedTeacher(
        _path(config.cache),
        form,
        {**record, "cache": config.form},
        {"form": config.form, **kept, **more},
        open_source,
        batch_size=recipe.trainer.batch_size,
    )


def default_device(recipe: Recipe) -> torch.device:
    """Return the device that a teacher runs on alone."""
    on_gpu = torch.cuda.is_available() and recipe.trainer.accelerator != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


def _check_served(recipe: Recipe) -> tuple[str, TeacherShape]:
    """Return the name and the shape of a served teacher, which answers and cuts a text as the run does."""
    url = recipe.loss.teacher or ""
    shown = f"loss.teacher={url}"
    if recipe.data.tokenizer == "bpe":
        raise UsageError(
            f"{shown}: a server keeps its tokenizer to itself; set data.tokenizer to that of its model"
        )
    if recipe.distill.form != "topk":
        raise UsageError(
            f"distill.form={recipe.distill.form}: {shown} tells its most likely tokens alone; set it to topk"
        )
    if recipe.loss.temperature != 1:
        raise UsageError(
            f"loss.temperature={recipe.loss.temperature:g}: {shown} tells its probabilities at 1; set it to 1"
        )
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    name = _name_in_cache(recipe) or check_endpoint(
        Endpoint(url, recipe.distill.timeout), recipe.distill.model, tokenizer
    )
    note = "is asked for each row, which is slow; keep its answers with --cache"
    shape = TeacherShape(vocab_size=tokenizer.vocab_size, note="" if recipe.distill.cache else note)
    return name, shape


def _name_in_cache(recipe: Recipe) -> str | None:
    """Return the name of the served model whose words a cache holds: its server need not run any more."""
    if recipe.distill.cache is None or not (_path(recipe.distill.cache) / FILE).is_file():
        return None
    kept = read_json(_path(recipe.distill.cache) / FILE)
    name = kept.get("model")
    same = kept.get("path") == (recipe.loss.teacher or "").rstrip("/") and recipe.distill.model in (
        None,
        name,
    )
    return name if same and isinstance(name, str) else None


def _open_served(recipe: Recipe) -> Teacher:
    name, shape = _check_served(recipe)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    form = make_form(recipe, shape.vocab_size, "fp32")
    assert isinstance(form, TopK)
    endpoint = Endpoint(recipe.loss.teacher or "", recipe.distill.timeout)
    teacher = EndpointTeacher(endpoint, name, form, tokenizer)
    if recipe.distill.cache is None:
        return teacher
    return make_cached_teacher(recipe, form, teacher.record, lambda: teacher)


def _read_shape(path: Path) -> TeacherShape:
    """Read what the model is; one that our own class cannot hold runs in transformers."""
    try:
        return TeacherShape.of(read_config(path))
    except NestlingError as error:
        stock = None if is_gguf(path) else read_stock_shape(path)
        if stock is None:
            raise
        note = f"runs in transformers' own forward pass, which is slower ({error})"
        return replace(stock, note=note)


def _device(recipe: Recipe) -> torch.device | None:
    name = recipe.distill.device
    if name == "auto":
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(
            f"distill.device={name}: is no device of this machine; give cpu, cuda or auto"
        ) from None
    return device


def _path(path: str) -> Path:
    return Path(path).expanduser()
