"""The commands as a user gives them: `main([...])` in this process, and a tiny family trained once."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.machine import card as machine
from train.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = str(CONFIGS / "tiny.yaml")

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that must fail with this exit code; gives its one line on stderr."""

    def run(*arguments: object, code: int) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("nestling: error: ")
        return line

    return run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True, scope="session")
def quick_machine(cache: Path) -> Iterator[None]:
    """Nothing outside the tests' own folders is written, and the machine is measured in no time."""
    quick = functools.cache(functools.partial(machine.measure_card, num_matrices=1, budget=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr("models.machine.card.measure_card", quick)
        patch.setattr("train.run.dryrun.measure_card", quick)
        # Cores are shared with whatever else runs: a second thread would mostly wait.
        for module in ("models.machine.card", "models.decode.open"):
            patch.setattr(f"{module}.num_threads", lambda *_, **__: 1)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, quick_machine: None) -> Path:
    """The run folder of configs/tiny.yaml, in fp32 so that greedy decoding is exact."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "--config", TINY, "--out", str(out), "dtype=fp32"]) == 0
    return out


@pytest.fixture(scope="session")
def model(run: Path) -> Path:
    return run / "model"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("def area(width, height):\n    return width * height\n" * 40)
    return path
