"""Tokenizers as they are on disk, less the habits that a file may have kept from one use of it.

A tokenizer.json may say to cut texts, to fill them up, or to drop merges at random. transformers ignores the
first two unless a caller asks for them; dropout would give another prompt each time. All three are
switched off here, where every tokenizer passes. What stands around a text is what tokenizer.json says:
transformers 5 does not read `add_bos_token` beside one either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from models.base.errors import NestlingError, is_panic

SETTINGS = "tokenizer_config.json"


def open_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        NestlingError: naming the file that is damaged.
    """
    try:
        tokenizer: Tokenizer = Tokenizer.from_buffer(path.read_bytes())
        without_habits(tokenizer)
        tokenizer.encode("")  # what stands around every text
    except BaseException as error:  # the library raises nothing narrower, and for some files its own panic
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = " ".join(str(error).split())
        raise NestlingError(f"{path} is not a tokenizer ({reason}); restore it") from None
    return tokenizer


def without_habits(tokenizer: Tokenizer) -> None:
    """Switch off what would cut a text, fill it up, or encode it in another way each time."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None


def for_bare_text(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that puts no tokens around a text, as training encodes documents.

    A model that is trained on such text takes it along, so that a prompt is encoded in the same way.
    """
    copy: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    without_habits(copy)
    if copy.num_special_tokens_to_add(is_pair=False) == 0:
        return copy
    state: dict[str, Any] = json.loads(copy.to_str())
    return Tokenizer.from_str(json.dumps({**state, "post_processor": None}))


def token_name(value: Any) -> str | None:
    """Return the token that an entry of tokenizer_config.json names: a text, or an object that holds one."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
