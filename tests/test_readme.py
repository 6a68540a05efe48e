"""The documents are true: rooms, files, commands and recipes that they name exist, and their Python runs."""

import re
from pathlib import Path

import pytest

import nestling
from train.cli import app
from train.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md"]


def rooms() -> list[Path]:
    """Every folder of code in both packages."""
    return sorted({path.parent for name in ("models", "train") for path in ROOT.glob(f"{name}/**/*.py")})


def tree() -> dict[str, str]:
    """The rooms as the page draws them: path -> what stands beside it."""
    lines, above = {}, [""]
    block = next(part for part in ARCHITECTURE.split("```") if part.startswith("\nmodels/"))
    for indent, name, text in re.findall(r"^( *)(\w+)/ *(.*)$", block, re.MULTILINE):
        above = [*above[: len(indent) // 2], f"{name}/"]
        lines["".join(above).rstrip("/")] = text
    return lines


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.split()) <= 1500
    first, second = (part.split("<!-- results:end")[0] for part in README.split("<!-- results:begin")[1:])
    for block, most in ((first, 5), (second, 6)):
        assert 0 < len([line for line in block.splitlines() if line.startswith("| ")][1:]) <= most
    assert README.count("\n|---") == 2


@pytest.mark.parametrize("room", rooms(), ids=lambda room: str(room.relative_to(ROOT)))
def test_every_room_has_its_line(room: Path) -> None:
    assert str(room.relative_to(ROOT)) in tree()


def test_the_tree_names_no_room_and_no_file_that_is_gone() -> None:
    for room, text in tree().items():
        names = re.findall(r"[\w-]+\.(?:py|c|h)\b", text)
        assert [name for name in ["", *names] if not (ROOT / room / name).exists()] == [], room


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:models|train|tests|docs|configs)/[\w./-]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert missing == []


def test_every_command_of_the_readme_exists_and_every_command_is_told() -> None:
    commands = {
        info.name or info.callback.__name__
        for info in app.registered_commands
        if info.callback and not info.hidden
    }
    told = set(re.findall(r"\bnestling (\w+)", README))
    assert {word for word in told if word in commands} == commands - {"demo"}
    assert "make demo" in README


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_told_and_loads(path: Path) -> None:
    assert load_recipe([path]).granularities
    assert path.name in README


def test_the_python_of_the_readme_uses_what_there_is() -> None:
    code = README.split("```python")[1].split("```")[0]
    compile(code, "README.md", "exec")
    names = re.findall(r"nestling\.(\w+)", code)
    assert set(names) <= set(nestling.__all__)
    assert names
