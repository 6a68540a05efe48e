"""Prompts: a few Python headings, or those of a file of JSON lines."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.base.errors import NestlingError, UsageError
from models.base.files import parse_json
from models.decode.detokenize import Tokenizer

PROMPT_TOKENS = 32
"""Tokens of a document that make a prompt."""
PROMPT_CHARS = 4096
"""Characters of a document that are read for its prompt: it may be a book."""
FIELDS = ("prompt", "turns", "text")

HEADINGS = (
    'def read_config(path, encoding="utf-8"):\n    """Read a configuration file into a dictionary."""\n',
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self, items=()):\n',
    "def merge_sorted(left, right):\n    result = []\n    while left and right:\n",
    'def parse_header(line):\n    """Split a header line into its name and its value."""\n',
    'class Node:\n    def __init__(self, value, parent=None):\n        """Make a node of a tree."""\n',
    'def find_files(root, pattern="*"):\n    """Yield the files below root whose names match."""\n',
    "def main(argv=None):\n    parser = argparse.ArgumentParser(description=__doc__)\n",
    "def test_round_trip(self):\n    for value in (0, 1, -1):\n        with self.subTest(value=value):\n",
)
"""Written for this project; for a model of code such as the demo's."""


class Prompt(NamedTuple):
    """A text to continue."""

    text: str
    where: str
    """How an error names it, as in `--prompts FILE, line 3`."""


def read_prompts(path: Path, num_prompts: int | None = None) -> list[Prompt]:
    """Read the prompts of a file, or the first ones: each line's `prompt`, first of `turns`, or `text`.

    Raises:
        NestlingError: naming the line that holds no prompt, or the file if it is empty.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            prompts = list(itertools.islice(_prompts(file, path), num_prompts))
    except UnicodeDecodeError as error:
        raise NestlingError(f"--prompts {path} is not UTF-8 text ({error.reason}); encode it so") from None
    if not prompts:
        raise NestlingError(f"--prompts {path} is empty; give one JSON object a line")
    return prompts


def beginnings(documents: Iterable[str], tokenizer: Tokenizer, num_prompts: int) -> list[list[int]]:
    """Return the first tokens of the first documents that leave something to continue.

    Raises:
        NestlingError: if there is no such document.
    """
    found: list[list[int]] = []
    for text in documents:
        ids = tokenizer.encode(text[:PROMPT_CHARS]).ids
        if len(ids) > PROMPT_TOKENS:
            found.append(ids[:PROMPT_TOKENS])
        if len(found) == num_prompts:
            break
    if not found:
        raise NestlingError(
            f"--data: no document has more than {PROMPT_TOKENS} tokens; give shorter ones as --prompts"
        )
    return found


def encode_prompts(prompts: Iterable[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of each text.

    Raises:
        NestlingError: if a text has no tokens.
    """
    encoded = []
    for text, where in prompts:
        encoded.append(tokenizer.encode(text).ids)
        if not encoded[-1]:
            raise NestlingError(f"{where} is empty; give at least one token to continue")
    return encoded


def check_prompts(
    prompts: Sequence[Prompt], encode: Callable[[str], Sequence[int]], *, context: int, has_start: bool
) -> None:
    """Check that each prompt leaves room for a new token, before any of them is decoded.

    Args:
        prompts: the texts.
        encode: makes tokens of a text.
        context: tokens that the model's context holds.
        has_start: whether a token stands for an empty text.

    Raises:
        UsageError: naming the first line that cannot be continued, and how many more there are.
    """
    wrong = []
    for text, where in prompts:
        size = len(encode(text))
        if size >= context:
            remedy = f"the model's context holds {context}: shorten it to at most {context - 1}"
            wrong.append(f"{where} has {size} tokens, but {remedy}")
        elif size == 0 and not has_start:
            wrong.append(f"{where} is empty, and the model has no bos or eos token to start from")
    if wrong:
        lines = [one.partition(", line ")[2].partition(" ")[0] for one in wrong[1:6]]
        more = f" (so are {len(wrong) - 1} more, as in line {', '.join(lines)})" if lines else ""
        raise UsageError(f"{wrong[0]}{more}; nothing was decoded")


def check_room(
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    context: int,
    names: Sequence[str] | None = None,
) -> None:
    """Check that every continuation fits into the context: engines differ in what they do beyond it.

    Args:
        prompts: token ids of each.
        max_new_tokens: tokens that are to follow.
        context: tokens that the model's context holds.
        names: how an error names each; None counts them.

    Raises:
        UsageError: naming the longest prompt.
    """
    longest = max(range(len(prompts)), key=lambda number: len(prompts[number]))
    room = context - len(prompts[longest])
    if max_new_tokens > room:
        remedy = f"give at most {room}" if room > 1 else "shorten the prompt"
        name = names[longest] if names else f"prompt {longest + 1}"
        raise UsageError(
            f"--max-new-tokens {max_new_tokens}: {name} has {len(prompts[longest])} tokens "
            f"and the model's context holds {context}; {remedy}"
        )


def _prompts(lines: Iterable[str], path: Path) -> Iterator[Prompt]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--prompts {path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise NestlingError(f"{where} is not JSON ({error}); repair the line") from None
        yield Prompt(_prompt(record, where), where)


def _prompt(record: Any, where: str) -> str:
    names = [name for name in FIELDS if isinstance(record, dict) and name in record]
    if not names:
        raise NestlingError(f"{where} has none of the fields {', '.join(FIELDS)}; name the prompt so")
    value = record[names[0]]
    if isinstance(value, list) and value:  # a dialogue: what its user says first
        value = value[0]
    if not isinstance(value, str):
        raise NestlingError(
            f"{where}: {names[0]} holds {type(value).__name__}, not text; put the prompt there"
        )
    # half a surrogate pair, which JSON can hold and UTF-8 cannot, is replaced
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
