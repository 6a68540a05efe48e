"""The sandbox that chat templates run in: what transformers gives them, and bounds on time and size."""

import ctypes
import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_LENGTH = 10_000_000
"""Characters, items or bits of anything that a template makes: more than any context holds."""
MAX_SECONDS = 10.0
_WIDE = re.compile(r"[%{][^%{}a-zA-Z]*[1-9]\d{7,}")
"""A width of `MAX_LENGTH` or more in the text of a format."""


class Generation(Extension):
    """The block `{% generation %}`, by which transformers finds what an assistant said: shown as it is."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are jinja's

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the body as a call, whose variables stay inside as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)

    def show(self, caller: Callable[[], str]) -> str:
        """Return the body."""
        return caller()


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja's name
        self.write("environment.concatenate((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what would fill the memory: repetition, powers, and texts that double."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    code_generator_class = _Generator

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what is not too large."""
        match operator:
            case "**":
                size = _bits(left) * right if isinstance(right, int) else 0
            case "*":
                size = max(
                    _length(left) * _times(right), _length(right) * _times(left), _bits(left) + _bits(right)
                )
            case "%":
                size = _format_width(left, right)
            case _:
                size = _length(left) + _length(right)
        _check(size)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function; a method of a text takes no width (`ljust`, `center`) beyond the bounds."""
        if isinstance(getattr(obj, "__self__", None), str):
            _check(_largest(args))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        """Return what stands for `str.format`, which takes no such width either."""
        if getattr(value, "__name__", "") in ("format", "format_map"):
            _check(_format_width(getattr(value, "__self__", None), ()))
        return super().wrap_str_format(value)

    def concatenate(self, parts: Sequence[Any]) -> str:
        """Join the texts of some values."""
        texts = [str(part) for part in parts]
        _check(sum(map(len, texts)))
        return "".join(texts)


def make_sandbox() -> Sandbox:
    """Return a sandbox with the filters and functions that transformers adds."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    for name in ("center", "indent"):
        sandbox.filters[name] = _bounded(sandbox.filters[name])
    sandbox.filters["format"] = lambda text, *args, **named: sandbox.call_binop(
        None, "%", text, named or args
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return sandbox


class _Stopped(BaseException):
    """Raised in a thread whose time is over."""


def render_within_bounds(template: str, values: dict[str, Any], *, seconds: float = MAX_SECONDS) -> str:
    """Render a template in a thread that is stopped when its time is over.

    Raises:
        TemplateError: if the template refuses, or takes too long, or writes too much.
        Exception: whatever else its code raises.
    """
    done: list[str | Exception] = []

    def render() -> None:
        try:  # _Stopped may come at any step
            done.append(_render(template, values))
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            done.append(error)
        except _Stopped:
            pass

    thread = threading.Thread(target=render, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        stop = ctypes.py_object(_Stopped)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), stop)
        raise TemplateError(f"it takes more than {seconds:g} seconds")
    if isinstance(done[0], Exception):
        raise done[0]
    return done[0]


def _render(template: str, values: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in _compiled(template).generate(values):
        size += len(part)
        _check(size)
        parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return make_sandbox().from_string(template)


def _check(size: float) -> None:
    if size > MAX_LENGTH:
        raise TemplateError(f"it makes more than {MAX_LENGTH:,} characters")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _format_width(text: Any, values: Any) -> int:
    """Return a width that a format asks for, if it is beyond the bounds."""
    if not isinstance(text, str):
        return 0
    if _WIDE.search(text):
        return MAX_LENGTH + 1
    return _largest(values) if "*" in text and isinstance(values, tuple) else 0


def _largest(values: Iterable[Any]) -> int:
    return max((value for value in values if isinstance(value, int)), default=0)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(text: Any, *args: Any, **kwargs: Any) -> Any:
        _check(_largest([*args, *kwargs.values()]))
        return function(text, *args, **kwargs)

    return call


def _refuse(message: Any) -> str:
    raise TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
