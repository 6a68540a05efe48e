"""The README is true: its tree names every file, its recipes and commands exist, its Python runs."""

import re
import subprocess
from pathlib import Path

import pytest

from train.cli import app
from train.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.split("## The tree")[1].split("```")[1]


def tracked(pattern: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listed.stdout.split() if (ROOT / path).exists()]


def test_the_tree_names_every_module_or_its_folder() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    paths = [Path(path) for path in tracked("models/*.py") + tracked("train/*.py")]
    folders_told_as_one = {"commands", "data", "report", "callbacks"}
    for path in paths:
        if path.name == "__init__.py":
            continue
        name = path.parent.name if path.parent.name in folders_told_as_one else path.name
        assert re.search(rf"\b{re.escape(name)}", TREE), f"README's tree lacks {path}"


def test_the_tree_names_nothing_that_is_gone() -> None:
    names = {path.name for path in ROOT.glob("*/**/*.*") if ".venv" not in path.parts}
    for name in re.findall(r"[\w-]+\.(?:py|yaml)\b", TREE):
        assert name in names, f"README's tree names {name}, which is gone"


def test_every_command_of_the_readme_exists_and_every_command_is_told() -> None:
    commands = {
        info.callback.__name__ for info in app.registered_commands if info.callback and not info.hidden
    }
    told = set(re.findall(r"\bnestling (\w+)", README))
    assert {word for word in told if word in commands} == commands - {"demo"}
    assert "make demo" in README


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_told_and_loads(path: Path) -> None:
    assert load_recipe([path]).granularities
    assert path.name in README


def test_the_python_of_the_readme_imports_what_there_is() -> None:
    code = README.split("```python")[1].split("```")[0]
    for line in code.splitlines():
        if line.startswith("from "):
            exec(line, {})
