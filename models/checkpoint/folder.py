"""A model folder on disk: what stock `transformers` expects, plus the family.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    nestling.json    format; family: name -> granularity; members: what was measured; provenance
    owned.safetensors    what members have for themselves, if anything

An elastic folder *is* a stock model, the full one, and a stock folder without `nestling.json` opens
as well. Nothing is pickled; a save is whole or absent.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.base.files import naming, read_json, write_folder, write_json, write_text
from models.base.kinds import one_path
from models.checkpoint.chat import TEMPLATE_FILE, read_chat_template
from models.checkpoint.compressed import decompress, uncompressed_fields
from models.checkpoint.family import FAMILY_FILE, Member, read_family, write_family
from models.checkpoint.gguf_read import is_gguf, read_gguf, read_gguf_config
from models.checkpoint.huggingface_config import (
    SPELLING,
    config_from_hugging_face,
    config_to_hugging_face,
    end_tokens,
    json_eos,
)
from models.checkpoint.layout import PER_LAYER, Layout, pad, stock_architectures
from models.checkpoint.owned_file import read_owned, write_owned
from models.checkpoint.tensor_file import write_tensor_file
from models.checkpoint.tokenizer import open_tokenizer
from models.checkpoint.weights import (
    WEIGHTS,
    dtype_name,
    model_from,
    read_weights,
    weights_of,
)
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, FULL, Granularity
from models.elastic.model import ElasticLM

__all__ = ["Member", "ModelFolder", "load_model", "read_config", "save_model"]

GENERATION = "generation_config.json"
NOT_APPLIED = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "no_repeat_ngram_size",
    "sequence_bias",
)
"""Settings of generation_config.json that would change which tokens are allowed."""
logger = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model folder or a GGUF file, opened."""

    path: Path
    model: ElasticLM
    tokenizer: Tokenizer | None
    chat_template: str | None
    family: dict[str, Granularity]
    members: list[Member]
    provenance: dict[str, Any]


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    in_blocks: bool = False,
    mapped: bool = False,
) -> ModelFolder:
    """Open a model folder of ours, a stock one or a GGUF file (the family is then the default one).

    Args:
        path: the folder, sharded or not, or the file.
        dtype: dtype of the model; None keeps the one on disk.
        in_blocks: keep quantized weights of a GGUF file as they are, where decoding runs them so; see
            `read_gguf`.
        mapped: read weights where their files are mapped, for a model that decodes and that nobody changes;
            weights in blocks always are.

    Returns:
        The model in evaluation mode, on the CPU, with all that is known about it.

    Raises:
        UsageError: if there is no folder at `path`.
        NestlingError: naming the file that is missing, damaged or of a kind that cannot be held.
    """
    path = one_path("path", path)
    if is_gguf(path):
        return _load_gguf(path, dtype, in_blocks, mapped)
    config = read_config(path)
    tensors, fields = read_weights(path), read_json(path / "config.json")
    with naming(path):
        tensors = decompress(tensors, fields)
        if fields.get(PER_LAYER):  # unequal layers run here as padded ones
            tensors = pad(tensors, config)
        model = model_from(config, tensors, dtype=dtype, mapped=mapped).eval()
    read_owned(path / FAMILY_FILE, model)
    family, members, provenance = read_family(path / FAMILY_FILE, config)
    return ModelFolder(
        path=path,
        model=model,
        tokenizer=_read_tokenizer(path / TOKENIZER, config),
        chat_template=read_chat_template(path),
        family=family,
        members=members,
        provenance=provenance,
    )


def _load_gguf(path: Path, dtype: torch.dtype | None, in_blocks: bool, mapped: bool) -> ModelFolder:
    file = read_gguf(path, dtype=dtype, in_blocks=in_blocks, mapped=mapped)
    mapped = mapped or file.in_blocks
    if file.tokenizer is not None:
        _check_vocabulary(file.tokenizer, file.config, str(path))
    with naming(path):
        kept = None if file.in_blocks else dtype
        model = model_from(file.config, file.tensors, dtype=kept, mapped=mapped, copy=False).eval()
    return ModelFolder(
        path=path,
        model=model,
        tokenizer=file.tokenizer,
        chat_template=file.chat_template,
        family=dict(DEFAULT_FAMILY) if file.is_equal else {"full": FULL},
        members=[],
        provenance={"gguf": path.name, "quantizations": list(file.quantizations)},
    )


def read_config(path: Path) -> ElasticConfig:
    """Read the shape of the model in a folder or a GGUF file, with every end token that it states.

    Raises:
        UsageError: if there is neither at `path`.
        NestlingError: if its config.json is missing, damaged or of a kind that cannot be held.
    """
    if is_gguf(path):
        return read_gguf_config(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UsageError(
            f"{path} {what}; give a model folder, one with config.json and model.safetensors, or a GGUF file"
        )
    config_path = path / "config.json"
    fields = read_json(config_path)
    with naming(config_path):
        config = config_from_hugging_face(uncompressed_fields(stock_architectures(fields)))
    generation_path = path / GENERATION
    if not generation_path.is_file():
        return config
    with naming(generation_path):
        generation = read_json(generation_path)
        more = end_tokens(generation)
    _tell_what_is_not_applied(generation_path, generation)
    return replace(config, eos_token_id=(*config.eos_token_ids, *more))


def _tell_what_is_not_applied(path: Path, generation: Mapping[str, Any]) -> None:
    stated = [f"{name}={generation[name]}" for name in NOT_APPLIED if generation.get(name)]
    if stated:
        logger.warning(
            "%s: %s has no effect here, unlike in transformers; the text may differ", path, ", ".join(stated)
        )


def save_model(
    path: str | Path,
    model: ElasticLM,
    *,
    tokenizer: Tokenizer | None = None,
    family: Mapping[str, Granularity] = DEFAULT_FAMILY,
    members: Iterable[Member] = (),
    provenance: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    like: Path | None = None,
    layout: Layout | None = None,
    finish: Callable[[Path], object] | None = None,
) -> Path:
    """Write a model folder, whole or not at all; an existing model folder is replaced.

    Args:
        path: the folder.
        model: the full model.
        tokenizer: the one it was trained with, if any.
        family: named granularities.
        members: measurements of members.
        provenance: recipe, commit, versions, data hash: anything that JSON holds.
        chat_template: Jinja that makes a text of a conversation, if the model has one.
        like: a model folder whose tokenizer and generation files are carried over unchanged,
            in place of `tokenizer` and `chat_template`.
        layout: configuration, weights and further files in place of the model's own.
        finish: called with the folder before it appears; what it raises leaves nothing.

    Raises:
        UsageError: if something that we did not write stands at `path`, or the family does not fit.
        NestlingError: if no stock architecture holds the model, or the disk refuses.
    """
    if layout is None:
        fields: Mapping[str, Any] = config_to_hugging_face(model.config, dtype=dtype_name(model))
    else:
        fields = layout.fields
    for granularity in family.values():
        granularity.resolve(model.config)
    if tokenizer is not None and not (like and (like / TOKENIZER).is_file()):  # which was checked when read
        _check_vocabulary(tokenizer, model.config, "the tokenizer")
    with write_folder(path, marker=FAMILY_FILE) as folder:
        write_json(folder / "config.json", fields)
        write_tensor_file(folder / WEIGHTS, weights_of(model) if layout is None else layout.stored)
        for name, text in () if layout is None else layout.files.items():
            write_text(folder / name, text)
        owned = write_owned(folder, model)
        carried = _carry(like, folder)
        if tokenizer is not None and TOKENIZER not in carried:
            _write_tokenizer(folder, tokenizer, model.config)
            if chat_template is not None:
                write_text(folder / TEMPLATE_FILE, chat_template)
        if GENERATION not in carried:
            write_json(folder / GENERATION, _generation(model.config))
        write_family(folder / FAMILY_FILE, family, members, provenance or {}, owned)
        if finish is not None:
            finish(folder)
    return Path(path)


def _read_tokenizer(path: Path, config: ElasticConfig) -> Tokenizer | None:
    if not path.is_file():
        return None
    tokenizer = open_tokenizer(path)
    _check_vocabulary(tokenizer, config, str(path))
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, config: ElasticConfig, what: str) -> None:
    around = tokenizer.encode("").ids  # a post_processor may add ids that the vocabulary has not
    highest = max([*tokenizer.get_vocab().values(), *around], default=-1)
    if highest >= config.vocab_size:
        raise NestlingError(
            f"{what} has token ids up to {highest}, but vocab_size={config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, config: ElasticConfig) -> None:
    write_text(folder / TOKENIZER, tokenizer.to_str(pretty=True))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for role, token_id in (("bos_token", config.bos_token_id), ("eos_token", config.first_eos_token_id)):
        if token_id is not None and tokenizer.id_to_token(token_id) is not None:
            settings[role] = tokenizer.id_to_token(token_id)
    write_json(folder / "tokenizer_config.json", settings)


def _generation(config: ElasticConfig) -> dict[str, Any]:
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": json_eos(config)}
    return {
        **{name: value for name, value in ids.items() if value is not None},
        "transformers_version": SPELLING,
    }


def _carry(source: Path | None, folder: Path) -> set[str]:
    """Copy tokenizer and generation files; those of another folder may say more than we know."""
    if source is None:
        return set()
    names = [name for name in (*TOKENIZER_FILES, GENERATION) if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return set(names)
