"""`nestling bench` as a user meets it: a card, a table, a last line of JSON; errors of one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from models.checkpoint import save_model
from models.elastic import ElasticLM
from models.family import Member
from models.files import write_json
from models.granularity import DEFAULT_FAMILY
from models.machine import MachineCard, this_machine
from models.probe import DTYPES, DeviceRates, DtypeRates
from train.cli import main

ROW = {
    "engine", "mode", "dtype", "temperature", "draft", "gamma", "schedule", "cache",
    "tokens_per_second", "tokens_per_second_range", "speedup",
    "decode_tokens_per_second", "decode_tokens_per_second_range", "decode_speedup",
    "seconds_to_first_token", "tau", "alpha", "num_identical", "mbu",
}  # fmt: skip
BRIEF = ("--num-prompts", "2", "--max-new-tokens", "6", "--rounds", "2")

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def known_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was measured before: its card lies in the cache."""
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


def test_it_ends_with_a_card_a_table_and_a_line_of_json(folder: Path, tmp_path: Path, bench: Bench) -> None:
    code, out, err = bench(
        folder, "--draft", "S", "--gamma", 2, "--dtype", "fp32", *BRIEF, "--json", tmp_path / "out.json"
    )
    assert code == 0, err
    assert "[transformers]" not in err
    *shown, last = out.splitlines()
    document = json.loads(last)
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert rows_of(document) == [
        ("nestling", "plain", None, None),
        ("nestling", "speculative", "S", None),
        ("transformers", "plain", None, "dynamic"),
        ("transformers", "plain", None, "static"),
        ("transformers", "assisted", "S", "default"),
        ("transformers", "assisted", "S", "constant"),
        ("transformers", "lookup", None, None),
    ]
    for row in document["results"]:
        assert set(row) == ROW
        assert row["num_identical"] == 2, row
        least, most = row["tokens_per_second_range"]
        assert 0 < least <= row["tokens_per_second"] <= most
        assert (row["mbu"] is not None) == (row["mode"] == "plain")
    assert [row["gamma"] for row in document["results"]] == [None, 2, None, None, None, 2, 10]
    assert document["results"][1]["alpha"] is not None
    assert {name: document[name] for name in ("num_prompts", "max_new_tokens", "rounds", "threads")} == {
        "num_prompts": 2,
        "max_new_tokens": 6,
        "rounds": 2,
        "threads": {"fp32": 1},
    }
    assert {"commit", "command", "hardware", "threads", "dtypes", "versions", "date"} <= set(document["card"])
    text = "\n".join(shown)
    assert all(word in text for word in ("hardware", "threads", "fp32 1", "tokens/s", "assisted", "2/2"))


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
    assert len(rows) == 4 * 4
    assert {row["mode"] for row in rows} == {"plain", "lookup"}
    assert {row["num_identical"] for row in rows if row["temperature"]} == {None}


def test_auto_says_what_it_chose(folder: Path, bench: Bench) -> None:
    code, out, err = bench(folder, *BRIEF)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    assert document["results"][0]["dtype"] == "fp32"
    note = "--draft auto (fp32, T=0) is none: plain decoding is faster here"
    assert note in document["notes"]
    assert note in out
    assert not [row for row in rows_of(document) if row[2]]


def test_unequal_layers_draft_here_and_are_noted_as_no_assistant(folder: Path, bench: Bench) -> None:
    code, out, err = bench(folder, "--draft", "ffn=1:0.5,layers=0:1", *BRIEF)
    assert code == 0, err
    document = json.loads(out.splitlines()[-1])
    modes = [row[1] for row in rows_of(document)]
    assert modes == ["plain", "speculative", "plain", "plain", "lookup"]
    assert any(note.startswith("ffn=1:0.5,layers=0:1 has unequal layers") for note in document["notes"])


def test_another_folder_drafts_for_both_engines(
    folder: Path, tmp_path: Path, tiny_model: ElasticLM, bench: Bench
) -> None:
    other = save_model(tmp_path / "other", tiny_model)
    code, out, err = bench(folder, "--draft", other, *BRIEF)
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["results"]
    drafted = [row for row in rows if row["draft"]]
    assert [row["mode"] for row in drafted] == ["speculative", "assisted", "assisted"]
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


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--rounds", "0"], 2, "--rounds must be at least 1, got 0"),
        (["--num-prompts", "0"], 2, "--num-prompts must be at least 1, got 0"),
        (["--max-new-tokens", "1"], 2, "--max-new-tokens must be at least 2, got 1"),
        (["--gamma", "0"], 2, "--gamma must be at least 1, got 0"),
        (["--temperature", "-1"], 2, "--temperature must be 0 or more, got -1.0"),
        (["--dtype", "fp8"], 2, "dtype=fp8 is not known"),
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
