"""Chat templates: found in a model folder, and rendered as transformers renders them.

A template is Jinja code that came with the weights and is not trusted: it runs in a sandbox.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError
from models.base.files import read_json

Message = Mapping[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""
TEMPLATE_FILE = "chat_template.jinja"


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template of a model folder: a file of its own, or part of the tokenizer's settings."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8") or None
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(template, list):  # several, by name
        return next((one["template"] for one in template if one.get("name") == "default"), None)
    return template or None


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

    try:
        return _compiled(template).render(  # type: ignore[no-any-return]
            messages=messages,
            bos_token=bos_token,
            eos_token=eos_token,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        raise NestlingError(f"the chat template does not take this conversation: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise NestlingError(f"the chat template is damaged ({type(error).__name__}: {error})") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> str:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)
