"""`nestling bench` as a user meets it: a card, a table, JSON where it is asked for; errors of one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from models.base.dtypes import DTYPES
from models.base.files import write_json
from models.checkpoint.family import Member
from models.checkpoint.folder import save_model
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY
from models.elastic.model import ElasticLM
from models.machine.card import MachineCard, this_machine
from models.machine.probe import DeviceRates, DtypeRates
from train.cli import main

ROW = {
    "engine", "mode", "dtype", "temperature", "draft", "gamma", "schedule", "cache",
    "tokens_per_second", "tokens_per_second_range", "speedup",
    "decode_tokens_per_second", "decode_tokens_per_second_range", "decode_speedup",
    "seconds_to_first_token", "tau", "alpha", "num_identical", "best", "mbu", "threads",
}  # fmt: skip
BRIEF = ("--num-prompts", "2", "--max-new-tokens", "6", "--rounds", "2", "--json", "-")

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def known_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was measured before: its card lies in the cache; llama.cpp is not installed."""
    monkeypatch.setattr("models.bench.llama.is_installed", lambda: False)
    rates = DtypeRates(
        product_gflops=100.0, product_threads=1, decode_threads=1, pass_seconds={1: 1.0, 4: 2.0}
    )
    cpu = DeviceRates(
        name="fake", memory_bytes=2**34, read_gbps=30.0, dtypes=dict.fromkeys(DTYPES, rates), noise=0.0
    )
    machine = this_machine()
    card = MachineCard(
        key=machine.key, cores=1, torch_version="2", measured="2026-01-01", busy=False, cpu=cpu, gpu=None
    )
    (tmp_path / "cache" / "nestling").mkdir(parents=True)
    write_json(tmp_path / "cache" / "nestling" / f"machine-{machine.key}.json", card.to_json())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path, tiny_model: ElasticLM) -> Path:
    """A family with a tokenizer of one token a character; what it has not is `?`."""
    vocabulary = {chr(code): code - 64 for code in range(64, 127)} | {"?": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    members = [
        Member(name="S", granularity=str(DEFAULT_FAMILY["S"]), parameters=1, match=0.0, alpha=0.0),
        Member(name="XL", granularity="full", parameters=2, match=100.0, alpha=1.0),
    ]
    return save_model(tmp_path / "model", tiny_model, tokenizer=tokenizer, members=members)


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def rows_of(document: dict[str, Any]) -> list[tuple[str, str, str | None, str | None]]:
    return [
        (row["engine"], row["mode"], row["draft"], row["schedule"] or row["cache"])
        for row in document["results"]
    ]


def test_it_shows_a_card_and_a_table_and_writes_json(folder: Path, tmp_path: Path, bench: Bench) -> None:
    out_file = tmp_path / "out.json"
    code, out, err = bench(
        folder, "--draft", "S", "--gamma", 2, "--dtype", "fp32", *BRIEF[:-2], "--json", out_file
    )
    assert code == 0, err
    assert "[transformers]" not in err
    assert '{"' not in out
    document = json.loads(out_file.read_text())
    assert rows_of(document) == [
        ("nestling", "plain", None, None),
        ("nestling", "speculative", "S", None),
        ("transformers", "plain", None, "dynamic"),
        ("transformers", "plain", None, "static"),
        ("transformers", "assisted", "S", "default"),
        *[("transformers", "assisted", "S", "constant")] * 3,
        *[("transformers", "lookup", None, None)] * 2,
    ]
    for row in document["results"]:
        assert set(row) == ROW
        assert row["num_identical"] == 2, row
        least, most = row["tokens_per_second_range"]
        assert 0 < least <= row["tokens_per_second"] <= most
        assert (row["mbu"] is not None) == (row["mode"] == "plain")
    assert [row["gamma"] for row in document["results"]] == [None, 2, None, None, None, 2, 4, 8, 4, 10]
    assert document["results"][1]["alpha"] is not None
    assert {name: document[name] for name in ("num_prompts", "max_new_tokens", "rounds", "threads")} == {
        "num_prompts": 2,
        "max_new_tokens": 6,
        "rounds": 2,
        "threads": {"fp32": 1},
    }
    assert {"commit", "command", "hardware", "threads", "dtypes", "versions", "date"} <= set(document["card"])
    assert any(note.startswith("llama.cpp is left out: pip install") for note in document["notes"])
    assert all(
        word in out
        for word in ("hardware", "threads", "fp32 nestling 1, fp32 transformers 1", "tokens/s", "2/2")
    )


def test_every_dtype_and_temperature_has_its_own_rows(folder: Path, bench: Bench) -> None:
    code, out, err = bench(
        folder, "--draft", "none", *BRIEF,
        "--dtype", "fp32", "--dtype", "bf16", "--temperature", 0, "--temperature", 0.7,
    )  # fmt: skip
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["results"]
    plain = [row for row in rows if (row["engine"], row["mode"]) == ("nestling", "plain")]
    assert [(row["dtype"], row["temperature"], row["speedup"]) for row in plain] == [
        ("fp32", 0.0, 1.0),
        ("fp32", 0.7, 1.0),
        ("bf16", 0.0, 1.0),
        ("bf16", 0.7, 1.0),
    ]
    assert len(rows) == 4 * 5
    assert {row["mode"] for row in rows} == {"plain", "lookup"}
    assert {row["num_identical"] for row in rows if row["temperature"]} == {None}


@pytest.mark.parametrize(
    ("asked", "modes"),
    [
        (["nestling"], {("nestling", "plain"), ("nestling", "speculative")}),
        (["llama.cpp"], {("nestling", "plain"), ("nestling", "speculative")}),  # not installed here
    ],
)
def test_only_the_engines_that_were_asked_for_run_beside_ours(
    asked: list[str], modes: set[tuple[str, str]], folder: Path, bench: Bench
) -> None:
    flags = [flag for name in asked for flag in ("--engine", name)]
    code, out, err = bench(str(folder), *BRIEF, "--draft", "S", *flags)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert {(row["engine"], row["mode"]) for row in document["results"]} == modes
    assert any("llama.cpp is left out" in note for note in document["notes"]) == ("llama.cpp" in asked)


def test_auto_says_what_it_chose(folder: Path, bench: Bench) -> None:
    code, out, err = bench(folder, *BRIEF)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document["results"][0]["dtype"] == "fp32"
    note = "--draft auto (fp32, T=0) is none: plain decoding is faster here"
    assert note in document["notes"]
    assert note in out
    assert not [row for row in rows_of(document) if row[2]]


def test_a_controller_decides_for_ours_and_numbers_for_theirs(folder: Path, bench: Bench) -> None:
    code, out, err = bench(folder, "--draft", "L", "--draft", "auto", "--gamma", "auto", *BRIEF)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["results"]
    ours = [row for row in rows if (row["engine"], row["mode"]) == ("nestling", "speculative")]
    # No member that was measured pays, but copies may: they are what auto comes to.
    assert [(row["draft"], row["gamma"]) for row in ours] == [("L", "auto"), ("lookup", "auto")]
    assert {row["num_identical"] for row in ours} == {2}
    theirs = [row["gamma"] for row in rows if row["mode"] == "assisted"]
    assert theirs == [None, 2, 4, 8]
    assert "auto" in out.partition("gamma: drafted tokens a round")[0]


def test_unequal_layers_draft_here_and_are_noted_as_no_assistant(folder: Path, bench: Bench) -> None:
    code, out, err = bench(folder, "--draft", "ffn=1:0.5,layers=0:1", *BRIEF)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    modes = [row[1] for row in rows_of(document)]
    assert modes == ["plain", "speculative", "plain", "plain", "lookup", "lookup"]
    assert any(note.startswith("ffn=1:0.5,layers=0:1 has unequal layers") for note in document["notes"])


def test_another_folder_drafts_for_both_engines(
    folder: Path, tmp_path: Path, tiny_model: ElasticLM, bench: Bench
) -> None:
    other = save_model(tmp_path / "other", tiny_model)
    code, out, err = bench(folder, "--draft", other, *BRIEF)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["results"]
    drafted = [row for row in rows if row["draft"]]
    assert [row["mode"] for row in drafted] == ["speculative", *["assisted"] * 4]
    # It is the model itself, so every drafted token stays: one pass gives the 5 after the first.
    assert (drafted[0]["tau"], drafted[0]["alpha"]) == (5.0, 1.0)


def test_prompts_come_from_a_file_of_prompts_or_of_documents(
    folder: Path, tmp_path: Path, bench: Bench
) -> None:
    prompts, text = tmp_path / "prompts.jsonl", tmp_path / "text.txt"
    prompts.write_text('{"prompt": "abc"}\n{"turns": ["wxyz", "no"]}\n')
    text.write_text("a" * 40 + "\n<|endoftext|>\nshort\n<|endoftext|>\n" + "b" * 40 + "\n")
    for flag, path, num_tokens in (("--prompts", prompts, 7), ("--data", text, 64)):
        code, out, err = bench(folder, "--draft", "none", flag, path, *BRIEF)
        assert code == 0, err
        document = json.loads(out.splitlines()[-1])
        assert (document["prompts"], document["num_prompts"]) == (str(path), 2)
        assert document["num_prompt_tokens"] == num_tokens


def test_random_weights_need_no_model_and_are_told_everywhere(
    tmp_path: Path, tiny_config: ElasticConfig, monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    monkeypatch.setattr("train.bench.contenders.SHAPES", {"tiny": tiny_config})
    monkeypatch.setattr("models.bench.random_models.SHAPES", {"tiny": tiny_config})
    plot = tmp_path / "speed.svg"
    code, out, err = bench("--random", "tiny", "--alpha", 0.7, "--temperature", 1, *BRIEF, "--plot", plot)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert (document["model"], document["prompts"]) == ("random tiny", "random tokens")
    assert (document["random"]["size"], document["random"]["alpha_asked"]) == ("tiny", 0.7)
    assert document["random"]["alpha"] == pytest.approx(0.7, abs=0.01)
    assert "weights are random" in document["notes"][0]
    assert {row["draft"] for row in document["results"]} == {None, "layers=0-1"}
    assert document["peak_memory_bytes"] > 0
    svg = plot.read_text()
    assert "random tiny" in svg
    assert "nestling speculative by layers=0-1" in svg


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "there is no MODEL; give a model folder, or --random with a size such as 125M"),
        (["--random", "7B"], "--random 7B is not a size; choose from 15M, 60M, 125M, 350M, 1B"),
        (["model", "--random", "15M"], "MODEL model and --random 15M exclude each other"),
        (["--random", "15M", "--alpha", "1.5"], "--alpha 1.5: give a fraction between 0 and 1"),
        (["model", "--alpha", "0.5"], "--alpha 0.5: give a fraction between 0 and 1, together with --random"),
        (["--random", "15M", "--draft", "ffn=0.5"], "with --random it is the first layers at full width"),
        (["--random", "15M", "--data", "a.txt"], "--data a.txt has no effect with --random"),
        (["--random", "15M", "--temperature", "0", "--temperature", "1"], "--random takes one --temperature"),
        (["model", "--plot", "out.gif"], "--plot out.gif has no known ending; choose from .svg, .png, .html"),
    ],
)
def test_a_wrong_source_or_plot_is_refused_before_any_work(
    bench: Bench, arguments: list[str], named: str
) -> None:
    assert_refused(bench(*arguments), 2, named)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--rounds", "0"], 2, "--rounds must be at least 1, got 0"),
        (["--num-prompts", "0"], 2, "--num-prompts must be at least 1, got 0"),
        (["--max-new-tokens", "1"], 2, "--max-new-tokens must be at least 2, got 1"),
        (["--gamma", "0"], 2, "--gamma must be 1 or more, or auto, got 0"),
        (["--gamma", "some"], 2, "--gamma 'some' is no number; give 1 or more, or auto"),
        (["--temperature", "-1"], 2, "--temperature must be 0 (greedy), or 1e-38 or more, got -1.0"),
        (["--dtype", "fp8"], 2, "dtype=fp8 is not known"),
        (
            ["--engine", "vllm"],
            2,
            "--engine vllm is not an engine; choose from nestling, transformers, llama.cpp",
        ),
        (
            ["--draft", "huge", "--max-new-tokens", "9"],
            2,
            "--draft huge is neither a member of the family nor a folder",
        ),
        (["--max-new-tokens", "999"], 2, "the model's context holds 128"),
        (["--prompts", "nowhere.jsonl"], 2, "--prompts nowhere.jsonl does not exist"),
        (["--data", "nowhere.txt"], 2, "--data='nowhere.txt': no such file"),
        (["--data", "a.txt", "--prompts", "b.jsonl"], 2, "exclude each other"),
        (["--json", "nowhere/out.json"], 2, "the folder nowhere does not exist"),
    ],
)
def test_a_mistake_ends_in_one_line(
    folder: Path, bench: Bench, arguments: list[str], code: int, named: str
) -> None:
    assert_refused(bench(folder, *arguments), code, named)


def test_a_model_that_cannot_be_used_is_named(tmp_path: Path, tiny_model: ElasticLM, bench: Bench) -> None:
    assert_refused(bench(tmp_path / "nowhere"), 2, "nowhere does not exist")
    assert_refused(bench(save_model(tmp_path / "mute", tiny_model)), 1, "mute has no tokenizer.json")


def assert_refused(outcome: tuple[int, str, str], code: int, named: str) -> None:
    got, out, err = outcome
    assert (got, out) == (code, "")
    assert err.startswith("nestling: error: ")
    assert named in err
    assert len(err.splitlines()) == 1, err


def test_the_number_of_threads_is_the_machine_cards(folder: Path, bench: Bench) -> None:
    torch.set_num_threads(2)
    try:
        code, _, err = bench(folder, "--draft", "none", *BRIEF)
        assert (code, torch.get_num_threads()) == (0, 1), err
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--train", "--gamma", "4"], "--gamma has no effect with --train"),
        (["model", "--steps", "4"], "--steps has an effect with --train only"),
        (["model", "--gama", "4"], "No such option: --gama; did you mean --gamma?"),
        (["--train", "optim.lrr=1"], "did you mean optim.lr?"),
        (["--train", "--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_decoding_and_training_take_flags_of_their_own(
    bench: Bench, arguments: list[str], named: str
) -> None:
    assert_refused(bench(*arguments), 2, named)
