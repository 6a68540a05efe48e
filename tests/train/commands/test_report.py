"""`nestling report`: one page; mistakes in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main

Fails = Callable[..., str]


def test_a_run_gets_its_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "<html" in (run / "report.html").read_text()


def test_a_page_goes_where_it_is_asked_for(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert page.is_file()


def test_a_page_replaces_nothing_that_the_run_wrote(run: Path, fails: Fails) -> None:
    before = (run / "recipe.yaml").read_bytes()
    assert f"lies in RUN {run}" in fails("report", run, "--out", run / "recipe.yaml", code=2)
    assert (run / "recipe.yaml").read_bytes() == before


def test_what_is_no_run_is_named(tmp_path: Path, fails: Fails) -> None:
    assert "nowhere" in fails("report", tmp_path / "nowhere", code=2)
    assert str(tmp_path) in fails("report", tmp_path, code=1)
    assert list(tmp_path.iterdir()) == []
