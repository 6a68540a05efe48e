"""Stock Hugging Face models and elastic ones, both ways; their tensors have the same names.

`transformers` is imported only by the functions that need it: decoding runs without it. Which stock
class holds what: models/checkpoint/huggingface_config.py.
"""

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from models.base.errors import NestlingError
from models.base.files import read_json
from models.base.paths import utf8_path
from models.checkpoint.compressed import KEY, check_installed
from models.checkpoint.huggingface_config import (
    ARCHITECTURES,
    config_from_hugging_face,
    config_to_hugging_face,
)
from models.checkpoint.layout import MODELING, auto_map, modeling_source
from models.checkpoint.tokenizer import SETTINGS
from models.checkpoint.weights import EMBEDDING, HEAD, dtype_name, model_from, weights_of
from models.elastic.model import ElasticLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "compile_config",
    "config_from_hugging_face",
    "config_to_hugging_face",
    "from_hugging_face",
    "load_stock",
    "load_stock_tokenizer",
    "to_hugging_face",
]


def to_hugging_face(model: ElasticLM) -> "PreTrainedModel":
    """Return a stock model, in evaluation mode, that holds copies of the full model's weights.

    Raises:
        NestlingError: if no stock architecture holds it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors = weights_of(model)
    dtype = tensors[EMBEDDING].dtype
    config = AutoConfig.for_model(**config_to_hugging_face(model.config, dtype=dtype_name(model)))
    with torch.random.fork_rng(devices=[]):  # its initial weights must not move the caller's random state
        stock = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    stock.load_state_dict({HEAD: tensors[EMBEDDING], **tensors})
    return cast("PreTrainedModel", stock.to(tensors[EMBEDDING].device).eval())


def from_hugging_face(model: "PreTrainedModel") -> ElasticLM:
    """Return an elastic model that holds copies of a stock model's weights.

    Raises:
        NestlingError: naming what the elastic class cannot hold exactly.
    """
    return model_from(config_from_hugging_face(model.config.to_dict()), model.state_dict())


def load_stock(path: str | Path) -> "PreTrainedModel":
    """Open a model folder with transformers alone, as other projects do: fp32, evaluation mode.

    A modelling file is run only if it is the one that we write.

    Raises:
        NestlingError: if transformers does not open it, or found weights missing or unexpected, or the code
            is not ours.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = contextlib.nullcontext()
    is_packed = KEY in read_json(Path(path) / "config.json")
    if is_packed:
        check_installed()
        quiet = contextlib.redirect_stderr(io.StringIO())  # its bars of progress, which nothing turns off
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call] # its report of what does not fit is long
    try:
        with utf8_path(path) as spelled, quiet:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                spelled,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=has_own_code(Path(path)),
            )
            if is_packed:  # the first pass unpacks
                opened[0](torch.zeros(1, 1, dtype=torch.int64), use_cache=False)
    except (NestlingError, MemoryError):
        raise
    except Exception as error:  # safetensors, transformers and torch each raise their own kinds
        raise _does_not_open(path, error) from error
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    stock, report = opened
    wrong = {what: sorted(names) for what, names in report.items() if names}
    if wrong:
        raise NestlingError(f"{path} does not open cleanly in transformers: {wrong}")
    return cast("PreTrainedModel", stock.eval())


def has_own_code(folder: Path) -> bool:
    """Return whether a folder has a modelling file.

    Raises:
        NestlingError: if it is not the one that we write, byte for byte, or transformers would run more.
    """
    fields = read_json(folder / "config.json")
    if "auto_map" not in fields:
        return False
    path, model_type = folder / MODELING, str(fields.get("model_type"))
    expected = modeling_source(model_type) if model_type in ARCHITECTURES else None
    if not path.is_file() or path.read_text(encoding="utf-8") != expected:
        raise NestlingError(
            f"{path} is not the file that this release writes, and is not run; write it again"
        )
    # Once transformers may run code, it also runs what auto_map names, and custom_generate/generate.py.
    others = sorted(str(other) for other in folder.rglob("*.py") if other != path)
    if fields["auto_map"] != auto_map(model_type) or others:
        named = others[0] if others else f"{folder / 'config.json'}: auto_map"
        raise NestlingError(
            f"{named} makes transformers run code that this release does not write, which is not run; "
            "take it away, or extract the member again"
        )
    return True


def load_stock_tokenizer(path: str | Path) -> Any:
    """Open the tokenizer of a model folder with transformers alone, as other projects do.

    Raises:
        NestlingError: if transformers does not open it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        tokenizer("\N{GRINNING FACE}")  # a class that does not fit shows at a text, where a token is unknown
    except Exception as error:  # transformers and tokenizers each raise their own kinds
        raise _does_not_open(Path(path) / SETTINGS, error) from error
    return tokenizer


def _does_not_open(path: str | Path, error: Exception) -> NestlingError:
    reason = " ".join(str(error).split())[:120]
    return NestlingError(
        f"{path} does not open in transformers ({type(error).__name__}: {reason}); restore it"
    )


def compile_config() -> Any:
    """Return settings that make `generate` compile its decoding steps, on the CPU too."""
    from transformers import CompileConfig

    config: Any = CompileConfig(mode="default")
    config._compile_all_devices = True  # as the library's own tests do: it has no public spelling
    return config
