"""`import nestling`: its names are there when they are asked for, and a wheel has all that it needs."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import nestling

ROOT = Path(__file__).parents[1]
PATHLESS = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
FIRST_STEPS = """
import nestling
model = nestling.train("demo", overrides={overrides!r}, out="run")
folder = nestling.load_model(model)
assert nestling.extract(model, "S", "S").joinpath("config.json").exists()
decoder = nestling.open_decoder(model, draft="S", gamma=2, dtype="fp32")
assert decoder.generate("def main(", max_new_tokens=4).report.num_tokens == 4
print(nestling.__file__)
"""
OVERRIDES = [
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "data.max_documents=20",
    "data.valid_fraction=0.2",
    "data.sequence_length=64",
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "trainer.limit_val_batches=1",
    "tracking.wandb=disabled",
]


def python(code: str, cwd: Path, *, program: str = sys.executable, **env: str) -> tuple[int, str]:
    """Run code in a folder; return the exit code and the last line of what was written."""
    done = subprocess.run(
        [program, "-c", code], cwd=cwd, env=PATHLESS | env, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stdout + done.stderr).strip().rpartition("\n")[2]


@pytest.mark.parametrize("name", nestling.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(nestling, name).__name__ == name
    assert name in dir(nestling)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'opne_decoder'"):
        nestling.opne_decoder  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, nestling; print({'torch', 'models', 'train'} & set(sys.modules))"
    assert python(code, ROOT, PYTHONPATH=str(ROOT)) == (0, "set()")


@pytest.mark.parametrize("name", ["models/__init__.py", "train.py"])
def test_a_file_of_the_users_own_that_hides_ours_is_named(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("")
    code, line = python("import nestling; nestling.open_decoder", tmp_path, PYTHONPATH=str(ROOT))
    assert code == 1
    assert line.startswith(f"ImportError: {theirs} hides nestling's own package")
    code, line = python("import nestling; raise SystemExit(nestling.main())", tmp_path, PYTHONPATH=str(ROOT))
    assert (code, line.startswith(f"nestling: error: {theirs} hides")) == (1, True)


@pytest.mark.parametrize("name", ["tokenizers.py", "torch/__init__.py", "rich.py"])
def test_a_file_that_hides_a_package_we_need_is_named(name: str, tmp_path: Path) -> None:
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("")
    (tmp_path / "wandb").mkdir()  # a folder without code hides nothing
    for code in ("nestling.open_decoder", "raise SystemExit(nestling.main())"):
        failed, line = python(f"import nestling; {code}", tmp_path, PYTHONPATH=str(ROOT))
        assert failed == 1
        assert (
            f"{theirs} hides the package `{theirs.relative_to(tmp_path).parts[0].removesuffix('.py')}`"
            in line
        )
    theirs.unlink()
    code = "import nestling; nestling.SamplingParams"
    assert python(code, tmp_path, PYTHONPATH=str(ROOT))[0] == 0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has our wheel and, by a path, this one's other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run([*pip, *build], check=True, env=PATHLESS)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    program = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    install = ["--python", str(program), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, env=PATHLESS)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files are not read
    return program


def test_the_demos_first_steps_run_from_a_wheel_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code, line = python(FIRST_STEPS.format(overrides=OVERRIDES), tmp_path, program=str(installed))
    assert code == 0, line
    assert Path(line).is_relative_to(installed.parents[1])


def test_recipes_are_known_by_name_and_by_the_readmes_path_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    for name in ("configs/tiny.yaml", "demo"):
        done = subprocess.run(
            [installed.parent / "nestling", "train", "--config", name, "--dry-run"],
            cwd=tmp_path,
            env=PATHLESS,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_editable_install_points_at_the_checkout_and_copies_nothing(tmp_path: Path) -> None:
    code = f"import hatchling.build as build; print(build.build_editable({str(tmp_path)!r}))"
    status, name = python(code, ROOT)
    assert status == 0, name
    with zipfile.ZipFile(tmp_path / name) as wheel:
        ours = [file for file in wheel.namelist() if ".dist-info/" not in file]
        assert [Path(file).suffix for file in ours] == [".pth"]
        assert wheel.read(ours[0]).decode().strip() == str(ROOT)
