"""`nestling verify`: a line for each distribution test, 1 if one fails; mistakes in one line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.folder import save_model
from models.decode.sampling.verifiers import VERIFIERS
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.verify import effort
from models.verify import plan as verify
from models.verify.checks import SAMPLINGS
from train.cli import main

Fails = Callable[..., str]

FAMILY = {"S": Granularity.parse("ffn=0.5"), "XL": Granularity.parse("full")}


@pytest.fixture
def folder(tmp_path: Path, tiny_model: ElasticLM) -> Path:
    """Random weights and no tokenizer: the distributions hold for any model."""
    return save_model(tmp_path / "model", tiny_model, family=FAMILY)


@pytest.fixture(autouse=True)
def short_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    short = dataclasses.replace(effort.FULL, num_tokens={1: 2, 2: 2, 3: 2})
    monkeypatch.setattr(verify, "FULL", short)
    monkeypatch.setattr(verify, "SAMPLINGS", {name: SAMPLINGS[name] for name in ("T=1", "all", "greedy")})


def flags(folder: Path) -> list[str]:
    results = folder.parent / "verify.json"
    numbers = ["--trials", "200", "--max-new-tokens", "8", "--dtype", "fp32"]
    return ["verify", str(folder), *numbers, "--json", str(results)]


def test_every_test_is_a_line_and_a_record(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags(folder), "--verifier", "block", "--verifier", "coupled"]) == 0
    shown = capsys.readouterr()
    results: dict[str, Any] = json.loads((folder.parent / "verify.json").read_text())
    assert results["passed"] is True
    assert f"{len(results['checks'])} of {len(results['checks'])} hold" in shown.out
    assert f"{len(results['checks'])} tests (full), about " in shown.out
    drafts = {check["draft"] for check in results["checks"]}
    assert drafts == {"S", "adversarial", "lookup", "any", "S,adversarial,lookup,any"}
    assert {check["verifier"] for check in results["checks"]} == {"block", "coupled", ""}
    fields = {
        "test",
        "verifier",
        "draft",
        "gamma",
        "sampling",
        "dtype",
        "batch",
        "value",
        "bound",
        "note",
        "passed",
    }
    assert all(check.keys() == fields for check in results["checks"])
    assert results.keys() >= {"model", "false_alarm", "effort", "trials", "max_new_tokens", "seed", "card"}
    assert results["card"]["dtypes"] == {"model": "fp32"}
    assert "\x1b" not in shown.out + shown.err


def test_a_slow_model_gets_small_tests_unless_all_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The time is said before they run."""
    monkeypatch.setattr(verify, "time_pass", lambda _: 1.0)
    words = [
        *flags(folder)[:2],
        "--dtype",
        "fp32",
        "--verifier",
        "coupled",
        "--json",
        str(folder.parent / "x.json"),
    ]
    assert main(words) == 0
    assert "tests (quick), about " in capsys.readouterr().out
    results = json.loads((folder.parent / "x.json").read_text())
    assert (results["effort"], results["trials"], results["max_new_tokens"]) == ("quick", 2000, 24)


def test_another_folder_drafts_unless_its_tokens_are_others(
    folder: Path, tiny_config: ElasticConfig, fails: Fails
) -> None:
    def other(name: str, **fields: int) -> Path:
        model = ElasticLM(dataclasses.replace(tiny_config, **fields))  # type: ignore[arg-type]
        model.init_weights(torch.Generator().manual_seed(1))
        return save_model(folder.parent / name, model)

    small, odd = other("small", num_hidden_layers=1), other("odd", num_hidden_layers=1, vocab_size=32)
    words = [*flags(folder), "--verifier", "block", "--verifier", "coupled"]
    assert main([*words, "--draft", f"{small}@int8", "--draft", "lookup"]) == 0
    checks = json.loads((folder.parent / "verify.json").read_text())["checks"]
    tests = {check["test"] for check in checks if check["draft"] == f"{small}@int8"}
    assert tests == {"exact", "dtype", "counts", "greedy", "coupled"}
    assert "vocabulary of 32 tokens" in fails(*words, "--draft", odd, code=2)
    large = other("large", num_hidden_layers=9)
    assert "more than its target's" in fails(*words, "--draft", large, code=2)


def test_a_broken_verifier_ends_in_exit_code_1(
    folder: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    def believes(p_TV: Any, q_TV: Any, drafted: Any, random: Any) -> list[int]:
        return [*drafted, random.target(p_TV[-1])]

    monkeypatch.setitem(VERIFIERS, "token", believes)
    line = fails(*flags(folder), "--verifier", "token", "--draft", "ffn=0.25", code=1)
    assert "tests failed, first exact token with draft ffn=0.25" in line
    results: dict[str, Any] = json.loads((folder.parent / "verify.json").read_text())
    assert results["passed"] is False
    failed = {check["test"] for check in results["checks"] if not check["passed"]}
    assert failed >= {"exact", "dtype"}


@pytest.mark.parametrize(
    ("words", "named", "code"),
    [
        (["--verifier", "blocks"], "--verifier 'blocks' is not one of token, block, coupled", 2),
        (["--effort", "some"], "--effort some: give auto, quick or full", 2),
        (["--trials", "10"], "--trials must be at least 100, got 10", 2),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0", 2),
        (["--draft", "Q"], "--draft Q is neither a member of the family nor a folder", 2),
        (["--draft", "auto"], "--draft auto is no draft to test; name a member, a folder or lookup", 2),
        (["--draft", "nowhere/model"], "--draft nowhere/model is neither", 2),
        (["--draft", "S@int9"], "'int9' is not a precision", 2),
        (["--draft", "layers=0:9"], "layer 9", 2),
        (["--prompt", "Once"], "has no tokenizer.json", 1),
        (["--json", "missing/x.json"], "--json missing/x.json", 2),
    ],
)
def test_what_cannot_be_tested_is_named(
    words: list[str], named: str, code: int, folder: Path, fails: Fails
) -> None:
    assert named in fails(*flags(folder)[:-2], *words, code=code)
