"""`nestling search` from the command line: a table, JSON, and what `--draft auto` makes of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.cli import main
from train.search import drafts, measure

Fails = Callable[..., str]
BRIEF = ("--num-tokens", "200", "--confirm", "1", "--num-prompts", "2", "--rounds", "1", "--dtype", "fp32")


def test_it_shows_writes_and_keeps_what_it_found_and_auto_takes_it(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(drafts, "LEAST_SPEEDUP", 0.0)  # a draft is found, however slow this machine is today
    path = tmp_path / "search.json"
    flags = [
        "--draft",
        "--data",
        str(text),
        "--granularity",
        "ffn=1:0.5,layers=0:2",
        *BRIEF,
        "--json",
        str(path),
    ]
    assert main(["search", str(model), *flags]) == 0
    shown = capsys.readouterr().out
    assert "x plain predicted" in shown
    written = json.loads(path.read_text())
    assert {"card", "v", "results", "estimates", "choices", "num_tokens", "busy_rounds"} <= written.keys()
    assert written["results"][0]["draft"] == "none"
    drafted = written["results"][1]
    assert drafted["error"] == pytest.approx(drafted["predicted"] / drafted["measured"] - 1)
    greedy, *sampled = written["choices"]
    assert greedy["temperature"] == 0
    assert {one["verifier"] for one in sampled} == {"token", "block", "coupled"}
    generated = tmp_path / "generate.json"
    flags = ["--prompt", "def area", "--max-new-tokens", "4", "--dtype", "fp32", "--json", str(generated)]
    assert main(["generate", str(model), *flags]) == 0
    auto = json.loads(generated.read_text())
    assert (auto["draft"], auto["gamma"]) == (greedy["draft"], "auto")  # the controller begins with it
    assert "measured by nestling search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data", "text.txt"], "--draft is missing"),
        (["--draft", "--data", "nowhere.txt"], "--data nowhere.txt"),
        (["--draft", "--data", "text.txt", "--num-tokens", "0"], "--num-tokens must be at least 1, got 0"),
        (["--draft", "--data", "text.txt", "--granularity", "layers=0:9"], "layer 9"),
        (
            ["--budget", "params=0.7", "--data", "text.txt", "--granularity", "S"],
            "--granularity S goes with --draft, not with --budget; leave it out",
        ),
        (
            ["--draft", "--data", "text.txt", "--for", "hf"],
            "--for hf goes with --budget, not with --draft; leave it out",
        ),
        (
            ["--draft", "--data", "text.txt", "--temperature", "-1"],
            "--temperature must be 0 (greedy), or 1e-38 or more",
        ),
    ],
)
def test_what_cannot_be_searched_is_named(
    flags: list[str], named: str, model: Path, text: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    assert named in fails("search", model, *flags, code=2)


MEMBERS = ("--num-tokens", "300", "--evaluations", "12")


def test_a_budget_gives_a_frontier_and_a_second_one_measures_nothing_it_knows(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "search.json"
    command = ["search", str(model), "--data", str(text), *MEMBERS, "--json", str(path)]
    assert main([*command, "--budget", "params=0.7"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "heuristic" in shown
    first = json.loads(path.read_text())
    assert first["num_measured"] > 10
    assert first["best"]["costs"]["params"] <= 0.7 * 217_536
    assert {one["from"] for one in first["members"]} == {"trained", "uniform", "heuristic", "found"}
    assert main([*command, "--budget", "params=0.7"]) == 0
    again = json.loads(path.read_text())
    assert again["num_measured"] == 0
    assert again["members"] == first["members"]


def test_a_table_of_latencies_is_measured_and_can_be_given(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Fails
) -> None:
    path = tmp_path / "search.json"
    command = ["search", str(model), "--data", str(text), *MEMBERS, "--json", str(path)]
    assert main([*command, "--budget", "latency"]) == 0
    assert "latencies are of" in " ".join(capsys.readouterr().out.split())
    fields = json.loads(path.read_text())
    table = fields["latency"]
    assert fields["measured_latency"] is None  # without an amount none is chosen
    slow = tmp_path / "phone.json"
    members = [one | {"seconds": one["seconds"] + 1.0} for one in table["members"]]
    slow.write_text(json.dumps(table | {"machine": "a phone", "members": members}))
    assert main([*command, "--budget", "latency=1500ms", "--latency-table", str(slow)]) == 0
    assert "a phone" in capsys.readouterr().out
    fields = json.loads(path.read_text())
    assert fields["best"]["costs"]["latency"] >= 1.0
    assert fields["measured_latency"] is None  # it is not this machine's
    assert main([*command, "--budget", "latency=0.9"]) == 0
    assert "ms a token; the table is off by" in " ".join(capsys.readouterr().out.split())
    assert json.loads(path.read_text())["measured_latency"] > 0
    slow.write_text(json.dumps(table | {"shape": [1, 2, 3, 4, max(one["layers"] for one in members)]}))
    line = fails(*command, "--budget", "latency=0.5", "--latency-table", slow, code=1)
    assert "of another shape" in line
    slow.write_text("{}")
    assert "no table of latencies (it has no 'format')" in fails(
        *command, "--budget", "latency=0.5", "--latency-table", slow, code=1
    )


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--budget", "params=0.001"], "the smallest member"),
        (["--budget", "latency=3parsecs"], "unknown unit 'parsecs'"),
        (["--budget", "params=0.5", "--budget", "params=0.2"], "exclude each other"),
        (["--budget", "params=0.5", "--draft"], "--draft and --budget"),
        (["--draft", "--for", "vllm"], "--for vllm goes with --budget"),
        (["--budget", "params=0.5", "--for", "ollama"], "--for ollama"),
        (["--budget", "latency=0.5", "--latency-table", "nowhere.json"], "nowhere.json"),
        (["--budget", "params=0.5", "--latency-table", __file__], "counts in --budget latency"),
        (["--budget", "params=0.5", "--evaluations", "0"], "--evaluations must be at least 1, got 0"),
    ],
)
def test_a_budget_that_cannot_be_is_named(
    flags: list[str], named: str, model: Path, text: Path, fails: Fails
) -> None:
    assert named in fails("search", model, "--data", text, *flags, code=2)


def test_a_text_shorter_than_a_prompt_is_named(model: Path, tmp_path: Path, fails: Fails) -> None:
    short = tmp_path / "short.txt"
    short.write_text("a")
    assert "fewer than" in fails("search", model, "--draft", "--data", short, "--dtype", "fp32", code=1)
