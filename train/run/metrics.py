"""`metrics.jsonl`: append-only, one JSON object a line, the source of truth; loggers mirror it.

{"kind": "train", "step": 10, "tokens": 40960, "loss/XL": 3.1, "loss/S": 0.8, "lr": 0.001, ...}
{"kind": "valid", "step": 50, "tokens": 204800, "valid/XL/loss": 2.9, "valid/S/alpha": 0.71, ...}
{"kind": "gradient", "step": 50, "tokens": 204800, "gradient/S/norm": 0.9, "gradient/S/cosine": 0.4, ...}
{"kind": "sample", "step": 50, "member": "S", "prompt": "...", "text": "..."}

A value that is not finite is null. All names: docs/json.md.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from models.base.files import finite, sync, write_text

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

Line = dict[str, Any]
"""One object of the file."""


@runtime_checkable
class Tabular(Protocol):
    """A logger that shows tables of text, as Lightning's of wandb does."""

    def log_table(
        self, key: str, columns: list[str] | None, data: list[list[Any]] | None, *, step: int | None
    ) -> None:
        """Show a table, given by the names of its columns and its rows."""
        ...


class MetricsLog:
    """Appends lines, and passes numbers on to loggers, which may fail without harm.

    Args:
        path: the file; None in a process that writes nothing.
        mirrors: Lightning loggers (wandb, TensorBoard, ...).
        first_step: lines beyond this step belong to a history that a resumed run replaces.
    """

    def __init__(self, path: Path | None, mirrors: "Sequence[Logger]" = (), *, first_step: int = 0) -> None:
        self.path = path
        self.mirrors = list(mirrors)
        if path is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers go to the mirrors under the line's step as well."""
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(finite({"kind": kind, "step": step, **values})) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if numbers:
            self._mirror(lambda logger: logger.log_metrics(numbers, step=step))

    def mirror_table(self, key: str, step: int, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table of what was written in mirrors that can."""

        def tell(logger: "Logger") -> None:
            if isinstance(logger, Tabular):
                logger.log_table(key, columns, rows, step=step)

        self._mirror(tell)

    def sync(self) -> None:
        """Force the lines to disk."""
        if self.path is not None:
            sync(self.path)

    def close(self) -> None:
        """Let the mirrors finish."""
        self._mirror(lambda logger: logger.finalize("success"))

    def _mirror(self, tell: "Callable[[Logger], None]") -> None:
        for logger in list(self.mirrors):
            try:
                tell(logger)
            except Exception as error:  # noqa: BLE001 - a mirror may fail in any way, once
                self.mirrors.remove(logger)
                warnings.warn(f"{type(logger).__name__} failed and is dropped: {error}", stacklevel=3)


def read_metrics(path: Path) -> list[Line]:
    """Return the lines of a metrics file that name their step; none if there is no file.

    A line torn by a kill is skipped.
    """
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
