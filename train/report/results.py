"""Turns docs/results/*.json into what people read: a page and a picture each, and the README's tables.

    python -m train.report.results            # write what is out of date
    python -m train.report.results --check    # only say so: exit code 1

A result is {"title", "command", "card", "members": [...], "speed": [...], "training": [...], "alone": [...]}:
what `evaluate --json`, `bench --json`, `bench --train --json` and docs/study.py measure, with at least one of
the lists. In
README.md everything between `<!-- results:begin NAME -->` and `<!-- results:end -->` comes from NAME.json, so
no number there is typed; of a bench it shows the fastest ways only.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from models.base.errors import NestlingError
from models.base.files import read_json
from models.base.numbers import NOTHING
from models.base.table import Table
from models.checkpoint.family import Member
from train.report.tables import (
    alone_table,
    brief_speed_table,
    family_table,
    flatten,
    speed_table,
    training_table,
)
from train.report.write import write_text

FOLDER = Path("docs/results")
LISTS = ("members", "speed", "training", "alone")
README = Path("README.md")
BLOCK = re.compile(r"(<!-- results:begin (\S+) -->\n)(.*?)(<!-- results:end -->)", re.DOTALL)
BEGIN = "<!-- results:begin"
NOTE = "<!-- generated from {name}.json by `python -m train.report.results`; do not edit -->"
PICTURE = re.compile(r"<!-- chart [0-9a-f]+ -->")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One result file, read; the first four fields are its own."""

    name: str
    title: str
    command: str
    card: dict[str, Any]
    members: list[Member]
    speed: list[dict[str, Any]]
    training: list[dict[str, Any]]
    alone: list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, or with `--check` only name, the files that are out of date."""
    parser = argparse.ArgumentParser(prog="python -m train.report.results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if out of date")
    parser.add_argument("--root", type=Path, default=Path(), help="Root of the repository.")
    options = parser.parse_args(arguments)
    try:
        stale = stale_files(options.root)
    except NestlingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return bring_up_to_date(stale, check=options.check, command="python -m train.report.results")


def bring_up_to_date(stale: Mapping[Path, str], *, check: bool, command: str) -> int:
    """Write the files that are out of date, or with `check` only name them and what would; the exit code."""
    for path, text in stale.items():
        if not check:
            write_text(path, text)
        print(f"{path} is out of date; run {command}" if check else path)
    return 1 if stale and check else 0


def stale_files(root: Path) -> dict[Path, str]:
    """Return every generated file that is not what the result files say, with what it should hold.

    Raises:
        NestlingError: if a result file is damaged, or README.md names one that is not there.
    """
    results = [read_result(path) for path in sorted((root / FOLDER).glob("*.json"))]
    wanted = {path: text for result in results for path, text in _files(root, result).items()}
    if (root / README).is_file():
        text = (root / README).read_text(encoding="utf-8")
        wanted[root / README] = fill_readme(text, {result.name: result for result in results})
    return not_current(wanted)


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        NestlingError: naming the file and what it lacks.
    """
    content = read_json(path)
    kinds = {"title": str, "command": str, "card": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
    if not any(content.get(name) for name in LISTS):
        wrong.append("members, speed, training or alone")
    for name in LISTS:
        rows = content.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            wrong.append(f"list of objects as {name}")
    if wrong:
        raise NestlingError(f"{path} has no {', no '.join(wrong)}; measure again, or add it")
    return Result(
        name=path.stem,
        members=[_member(path, item) for item in content.get("members", [])],
        speed=content.get("speed", []),
        training=content.get("training", []),
        alone=content.get("alone", []),
        **{name: content[name] for name in kinds},
    )


def fill_readme(text: str, results: Mapping[str, Result]) -> str:
    """Return README.md with every marked block replaced by its result.

    Raises:
        NestlingError: if a block does not end, or names a result that is not there.
    """

    def block(found: re.Match[str]) -> str:
        name = found[2]
        if name not in results:
            raise NestlingError(f"{README}: results:begin {name}, but there is no {FOLDER / name}.json")
        return f"{found[1]}{_readme_block(results[name])}{found[4]}"

    if text.count(BEGIN) != len(BLOCK.findall(text)):
        raise NestlingError(f"{README}: a `{BEGIN} NAME -->` has no `<!-- results:end -->`; add it")
    return BLOCK.sub(block, text)


def _files(root: Path, result: Result) -> dict[Path, str]:
    from train.report.charts import family_chart
    from train.report.style import to_svg

    path = root / FOLDER / result.name
    files = {path.with_suffix(".md"): _page(result)}
    if result.members:
        files[path.with_suffix(".svg")] = to_svg(family_chart(result.members))
    return files


def _page(result: Result) -> str:
    card = Table(("card", ""), tuple(flatten(result.card).items()), num_labels=2)
    parts = [
        NOTE.format(name=result.name),
        f"# {result.title}",
        *_tables(result, Path()),
        f"Measured by\n\n```\n{result.command}\n```",
        card.to_markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def _readme_block(result: Result) -> str:
    """Return the picture, one short table, and where to read on."""
    if result.speed:
        table = brief_speed_table(result.speed)
    elif result.training:
        table = training_table(result.training)
    elif result.alone:
        table = alone_table(result.alone)
    else:
        table = family_table(result.members)
    details = f"[Everything about this result]({(FOLDER / result.name).as_posix()}.md)"
    source = f"{result.title}{_where(result.card)}. {details}."
    return "\n\n".join([*_picture(result, FOLDER), table.to_markdown(), source]) + "\n"


def _picture(result: Result, folder: Path) -> list[str]:
    picture = (folder / f"{result.name}.svg").as_posix()
    return [f"![{result.title}: loss and alpha against parameters]({picture})"] if result.members else []


def _tables(result: Result, folder: Path) -> list[str]:
    parts = _picture(result, folder)
    if result.members:
        parts.append(family_table(result.members).to_markdown())
    if result.speed:
        parts.append(speed_table(result.speed).to_markdown())
    if result.alone:
        parts.append(alone_table(result.alone).to_markdown())
    return [*parts, training_table(result.training).to_markdown()] if result.training else parts


def _where(card: Mapping[str, Any]) -> str:
    """Return hardware, commit and date, as far as the card knows them."""
    known = {name: value for name, value in flatten(card).items() if value != NOTHING}
    hardware = [known[name] for name in ("hardware.gpu", "hardware.cpu", "hardware") if name in known][:1]
    commit = [f"commit {known['commit'][:12]}"] if "commit" in known else []
    date = [known["date"][:10]] if "date" in known else []
    return "".join(f", {text}" for text in [*hardware, *commit, *date])


def _member(path: Path, item: Any) -> Member:
    names = {field.name for field in fields(Member)}
    measured = {"name", "granularity", "parameters", "loss"}
    if not isinstance(item, dict) or not measured <= set(item) <= names or item["loss"] is None:
        raise NestlingError(
            f"{path}: {item!r} is not a measured member; it needs {', '.join(sorted(measured))}"
        )
    return Member(**item)


def not_current(wanted: Mapping[Path, str]) -> dict[Path, str]:
    """Return the files that do not say what they should."""
    return {path: text for path, text in wanted.items() if not _is_current(path, text)}


def _is_current(path: Path, text: str) -> bool:
    """Return True if the file says the same; of a picture the data, since fonts differ by machine."""
    if not path.is_file():
        return False
    there = path.read_text(encoding="utf-8")
    return there == text or (path.suffix == ".svg" and PICTURE.findall(there) == PICTURE.findall(text) != [])


if __name__ == "__main__":
    sys.exit(main())
