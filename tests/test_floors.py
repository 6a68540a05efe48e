"""A device can serve without the training stack, and a command starts without torch.

import-linter holds the floors by reading the imports; here the modules really are imported, with
every package outside the minimal set made unimportable.
"""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAINING_STACK = ("lightning", "pytorch_lightning", "datasets", "wandb", "omegaconf", "train")
NOT_NEEDED_TO_SERVE = (*TRAINING_STACK, "transformers", "typer", "altair", "pandas", "hypothesis")
HEAVY = ("torch", "numpy", "lightning", "transformers", "datasets", "wandb", "altair")
LIGHT_MODULES = ("models.base.errors", "models.elastic.granularity", "models.elastic.config", "train.cli")

# Each module is imported as if it were the first, so that no import order hides a cycle.
IMPORT_EACH_ALONE = """
import sys

refused, modules = {refused!r}, {modules!r}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"{{name}} is not a dependency here", name=name)

sys.meta_path.insert(0, Refuse())
for module in modules:
    for loaded in [name for name in sys.modules if name.partition(".")[0] in ("models", "train")]:
        del sys.modules[loaded]
    try:
        __import__(module)
    except ImportError as error:
        raise SystemExit(f"{{module}}: {{error}}")
"""


def modules_of(package: str) -> list[str]:
    """Names of the package's modules, from the files, without importing one."""
    found = pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.", onerror=None)
    return sorted(module.name for module in found)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def import_each_alone(modules: list[str], refused: tuple[str, ...]) -> str:
    """What went wrong, empty if nothing."""
    result = run(IMPORT_EACH_ALONE.format(refused=refused, modules=modules))
    return result.stderr if result.returncode else ""


def test_every_module_of_models_imports_with_the_minimal_dependencies() -> None:
    modules = modules_of("models")
    assert "models.elastic.model" in modules
    assert import_each_alone(modules, refused=NOT_NEEDED_TO_SERVE) == ""


def test_a_refused_dependency_is_noticed() -> None:
    problem = import_each_alone(["models.elastic.model"], refused=("torch",))
    assert "models.elastic.model: torch is not a dependency here" in problem


def test_every_module_of_train_imports() -> None:
    assert import_each_alone(modules_of("train"), refused=()) == ""


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_a_light_module_loads_nothing_heavy(module: str) -> None:
    result = run(f"import sys, {module}; print(*(set({HEAVY!r}) & set(sys.modules)))")
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr
