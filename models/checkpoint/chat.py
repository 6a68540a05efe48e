"""Chat templates: found in a model folder, and rendered as transformers renders them.

A template is Jinja code that came with the weights and is not trusted: it runs in a sandbox, within bounds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError
from models.base.files import read_json

Message = Mapping[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""
TEMPLATE_FILE = "chat_template.jinja"


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a model folder: a file of its own, or part of the tokenizer's settings.

    Raises:
        NestlingError: naming the file that is damaged.
    """
    path, settings = folder / TEMPLATE_FILE, folder / "tokenizer_config.json"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8") or None
        except UnicodeDecodeError as error:
            raise NestlingError(f"{path} is not UTF-8 ({error}); restore it") from None
    stated = read_json(settings).get("chat_template") if settings.is_file() else None
    try:
        template = _default(stated)
    except (KeyError, TypeError, AttributeError):
        template = stated
    if template is not None and not isinstance(template, str):
        raise NestlingError(
            f"{settings}: chat_template={str(template)[:50]!r} must be a text, or a list of names and "
            "templates; restore it"
        )
    return template or None


def _default(stated: Any) -> Any:
    """Return the template that is used unless another is asked for, where there are several by name."""
    if isinstance(stated, list):
        return next((one["template"] for one in stated if one.get("name") == "default"), None)
    return stated.get("default") if isinstance(stated, Mapping) else stated


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str = "",
    eos_token: str = "",
    add_generation_prompt: bool = True,
) -> str:
    """Return a conversation as the text that the model was trained on.

    Args:
        template: Jinja.
        messages: each with `role` (system, user or assistant) and `content`.
        bos_token: text of the token that begins a text.
        eos_token: text of the token that ends one.
        add_generation_prompt: append the tokens that begin an answer.

    Raises:
        NestlingError: if the template refuses the conversation, or is no template.

    >>> render_chat(
    ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ...     [{"role": "user", "content": "Hi"}],
    ... )
    '<user>Hi'
    """
    from jinja2.exceptions import TemplateError

    from models.checkpoint.chat_sandbox import render_within_bounds

    values = {
        "messages": messages,
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        text = render_within_bounds(template, values)
    except TemplateError as error:
        raise NestlingError(f"the chat template does not take this conversation: {_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - a template is code, and raises what it likes
        reason = f"{type(error).__name__}: {_line(error)}"
        raise NestlingError(f"the chat template is damaged ({reason}); restore it") from None
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair has no tokens


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
