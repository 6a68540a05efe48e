"""What a search found is found again, for the very model, dtype and kind of law that it is about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint.folder import load_model, save_model
from models.decode.engine.costs import Costs
from models.decode.engine.draft import NestedDraft
from models.decode.engine.state import Scorer
from models.decode.engine.trimmed_head import FewTokens
from models.decode.sampling.params import SamplingParams
from models.decode.tune.resolve import choose_drafting
from models.decode.tune.tuned import Found, find_draft, searched_path, write_searched
from models.elastic.model import ElasticLM
from models.packed.quantize import PackedLM

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.0)


@pytest.fixture
def folder(tiny_model: ElasticLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_model(tmp_path / "model", tiny_model)


def found(temperature: float, verifier: str = "block", draft: str = "layers=0") -> Found:
    return Found(
        temperature=temperature, verifier=verifier, draft=draft, vocabulary=(1, 5), gamma=3,
        predicted=1.5, measured=None,
    )  # fmt: skip


def keep(folder: Path, *choices: Found, dtype: str = "fp32") -> Path:
    path = searched_path(folder, dtype)
    write_searched(path, choices, {"note": "anything"})
    return path


def test_nothing_is_found_where_nothing_was_searched(folder: Path) -> None:
    assert find_draft(folder, "fp32", GREEDY) is None


def test_it_reads_what_was_written_for_this_dtype(folder: Path) -> None:
    choice = found(0.0)
    keep(folder, choice)
    assert find_draft(folder, "fp32", GREEDY) == choice
    assert find_draft(folder, "bf16", GREEDY) is None


def test_greedy_and_sampling_are_told_apart_and_the_nearest_temperature_is_taken(folder: Path) -> None:
    keep(folder, found(0.0, draft="a"), found(0.5, draft="b"), found(1.0, draft="c"))
    laws = {"a": GREEDY, "b": SamplingParams(temperature=0.1), "c": SamplingParams(temperature=0.8)}
    for draft, params in laws.items():
        choice = find_draft(folder, "fp32", params)
        assert choice is not None
        assert choice.draft == draft
    keep(folder, found(0.0))
    assert find_draft(folder, "fp32", WARM) is None


def test_a_verifier_that_was_asked_for_is_kept_to_and_coupled_is_never_chosen_unasked(folder: Path) -> None:
    keep(folder, found(1.0, "coupled", "a"), found(1.0, "token", "b"), found(1.0, "block", "c"))
    asked = {"coupled": "a", "block": "c", None: "b"}
    for verifier, draft in asked.items():
        choice = find_draft(folder, "fp32", WARM, verifier)
        assert choice is not None
        assert choice.draft == draft
    keep(folder, found(0.0, "block", "greedy"))
    assert find_draft(folder, "fp32", GREEDY, "coupled") == found(0.0, "block", "greedy")


def test_other_weights_are_another_model(folder: Path, tiny_model: ElasticLM) -> None:
    keep(folder, found(0.0))
    tiny_model.model.norm.weight.data[0] += 1
    save_model(folder, tiny_model)
    assert find_draft(folder, "fp32", GREEDY) is None


@pytest.mark.parametrize("text", ["{", '{"format": 1}', '{"format": 1, "choices": [{"gamma": "x"}]}', "[]"])
def test_a_damaged_file_is_told_and_counts_as_none(
    text: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(folder, found(0.0)).write_text(text)
    assert find_draft(folder, "fp32", GREEDY) is None
    assert "run nestling search again" in caplog.text


def test_what_is_timed_before_decoding_is_the_draft_that_was_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its precision, with its part of the vocabulary, under the law that was asked for."""
    timed: list[Any] = []

    def measure(_: ElasticLM, drafts: Mapping[str, Scorer], *law: Any) -> Costs:
        timed.extend([*drafts.values(), law])
        return Costs({1: 1.0}, dict.fromkeys(drafts, 0.1))

    monkeypatch.setattr("models.decode.tune.resolve.measure_costs", measure)
    keep(folder, found(1.0, "token", "layers=0@int8"))
    opened = load_model(folder)
    drafting = choose_drafting(opened, "auto", None, WARM, dtype="fp32")
    scorer, law = timed
    assert isinstance(scorer, FewTokens)
    assert isinstance(drafting.draft, NestedDraft)
    assert scorer is drafting.draft.scorer
    assert isinstance(scorer.model, PackedLM)
    assert law == (WARM, "token")
