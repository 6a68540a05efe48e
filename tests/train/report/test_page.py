"""The page as a whole: what stands on it, that it needs no network, and that a browser draws it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from models.base.errors import NestlingError, UsageError
from train.report.page import write_report

MakeRun = Callable[..., Path]
TextOf = Callable[..., str]

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
CHART = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def text_of(monkeypatch: pytest.MonkeyPatch) -> TextOf:
    """The page of runs, without the drawing code: it takes seconds to bundle, and nothing runs it here."""

    def keep(script: str, vl_version: str) -> str:
        return script

    monkeypatch.setattr("vl_convert.javascript_bundle", keep)
    return lambda *runs: write_report(runs, runs[0] / "report.html").read_text(encoding="utf-8")


def test_one_run_shows_family_speed_samples_provenance_and_recipe(make_run: MakeRun, text_of: TextOf) -> None:
    html = text_of(make_run())
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == [
        "At a glance",
        "The family",
        "Decoding speed",
        "Loss",
        "Closeness to the full model",
        "Gradients",
        "Samples",
        "Training",
        "Provenance",
    ]
    for cell in ("layers=0-1", "1.82×", "0123abc", "lr: 0.001", "3.28M", "6 min 00 s"):
        assert cell in html


def test_several_runs_are_named_and_what_differs_in_their_recipes_is_shown(
    make_run: MakeRun, text_of: TextOf
) -> None:
    html = text_of(make_run("first"), make_run("second", learning_rate=0.004))
    assert "2 runs compared" in html
    assert '<td class="label">optim.lr</td><td class="label">0.001</td><td class="label">0.004</td>' in html
    assert '<td class="label">seed</td>' not in html


def test_differences_to_the_full_models_text_are_marked(make_run: MakeRun, text_of: TextOf) -> None:
    html = text_of(make_run())
    assert "return <mark>lines</mark>" in html
    assert "97% the same" in html


def test_an_unfinished_run_has_no_empty_sections(make_run: MakeRun, text_of: TextOf) -> None:
    run = make_run(steps=20)
    shutil.rmtree(run / "model")
    (run / "decode.json").unlink()
    (run / "recipe.yaml").unlink()
    assert re.findall("<h2>(.*?)</h2>", text_of(run)) == ["At a glance", "Loss", "Training"]


def test_what_comes_from_a_run_cannot_become_markup(make_run: MakeRun, text_of: TextOf) -> None:
    attack = "</script><img src=x onerror=alert(1)>"
    run = make_run("<b>demo")
    lines = (run / "metrics.jsonl").read_text().replace("return line\\n", json.dumps(attack)[1:-1])
    (run / "metrics.jsonl").write_text(lines.replace('"valid/S/loss"', f'"valid/{attack[9:]}/loss"'))
    (run / "recipe.yaml").write_text(f"note: {attack!r}\n")
    html = text_of(run)
    assert "onerror" in html
    assert "<img" not in html
    assert "<b>demo" not in html


def test_every_chart_is_json_and_no_address_is_asked_for(make_run: MakeRun, text_of: TextOf) -> None:
    html = text_of(make_run())
    charts = CHART.findall(html)
    assert len(charts) == html.count('class="chart"') == 14
    for chart in charts:
        assert json.loads(chart)["layer"]
    assert not re.findall(r'(?:src|href)="(?!data:,)', html)
    assert "url(" not in html


def test_the_same_run_gives_the_same_page(make_run: MakeRun, text_of: TextOf) -> None:
    run = make_run()
    assert text_of(run) == text_of(run)


def test_a_recipe_that_is_not_yaml_is_named(make_run: MakeRun, text_of: TextOf) -> None:
    first, second = make_run("first"), make_run("second")
    (second / "recipe.yaml").write_text("a: [")
    with pytest.raises(NestlingError, match=r"recipe\.yaml of run second is not YAML"):
        text_of(first, second)


def test_a_run_that_cannot_be_read_leaves_an_older_page_as_it_was(make_run: MakeRun, tmp_path: Path) -> None:
    old = tmp_path / "report.html"
    old.write_text("old")
    with pytest.raises(UsageError, match="does not exist"):
        write_report([make_run(), tmp_path / "absent"], old)
    assert old.read_text() == "old"


@pytest.mark.usefixtures("text_of")
def test_a_folder_cannot_be_the_page(make_run: MakeRun) -> None:
    run = make_run()
    with pytest.raises(UsageError, match="is a folder"):
        write_report([run], run)


def open_in_browser(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The document after its scripts ran, and what the console said."""
    assert CHROMIUM
    flags = [f"--{flag}" for flag in f"headless no-sandbox dump-dom disable-sync {QUIET}".split()]
    more = [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    command = [CHROMIUM, *flags, *more, path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
@pytest.mark.parametrize(
    ("names", "num_charts"), [(["a"], 14), pytest.param(["a", "b"], 34, marks=pytest.mark.slow)]
)
def test_a_browser_draws_every_chart_and_has_nothing_to_say(
    make_run: MakeRun, tmp_path: Path, names: list[str], num_charts: int
) -> None:
    path = write_report([make_run(name) for name in names], tmp_path / "report.html")
    document, console = open_in_browser(path, tmp_path / "profile")
    assert console == []
    assert 'data-charts="drawn"' in document
    charts = re.findall(r'<svg[^>]*class="marks".*?</svg>', document, re.DOTALL)
    assert len(charts) == document.count('class="chart ') == num_charts
    for chart in charts:
        assert re.search(r'class="mark-(?:line|symbol) role-mark[^>]*>(?:<g>)?<path', chart)


@needs_chromium
def test_a_chart_that_cannot_be_drawn_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<script>console.error('a chart')</script>")
    _, console = open_in_browser(tmp_path / "page.html", tmp_path / "profile")
    assert len(console) == 1
