"""Recipes that come with the package: `configs/` of a checkout, the same files inside an installed wheel."""

from pathlib import Path

_HERE = Path(__file__).parent
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parents[1] / "configs"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package.

    >>> "tiny" in recipe_names()
    True
    """
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_recipe(path: Path) -> Path:
    """Return the recipe at a path or, where there is no such file, ours of that name.

    >>> find_recipe(Path("tiny")) == find_recipe(Path("configs/tiny.yaml")).resolve() == CONFIGS / "tiny.yaml"
    True
    >>> find_recipe(Path("nowhere/tiny.yaml"))
    PosixPath('nowhere/tiny.yaml')
    """
    ours = CONFIGS / f"{path.stem}.yaml"
    named = path.parent in (Path(), Path("configs")) and path.suffix in ("", ".yaml")
    return ours if named and not path.is_file() and ours.exists() else path
