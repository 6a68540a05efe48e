"""A console whose output also reads well in a file."""

import sys

from rich.console import Console

# Wide enough for every table: in a file or a pipe nothing is cut off.
WIDTH_OF_A_FILE = 160


def make_console(*, stderr: bool = False) -> Console:
    """Return a rich console; without a terminal, or with NO_COLOR, its output is plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDTH_OF_A_FILE, highlight=False)
