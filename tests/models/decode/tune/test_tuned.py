"""What a search found is found again, for the very model, dtype and kind of distribution that it is about."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from models.checkpoint.folder import load_model, save_model
from models.decode.engine.costs import Costs
from models.decode.engine.draft import NestedDraft
from models.decode.engine.trimmed_head import TrimmedHead
from models.decode.sampling.params import SamplingParams
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed
from models.decode.tune.resolve import choose_drafting
from models.decode.tune.tuned import Plans, find_draft, searched_path, write_searched
from models.elastic.model import ElasticLM
from models.elastic.view import Scorer
from models.packed.quantize import PackedLM

GREEDY, WARM = SamplingParams(), SamplingParams(temperature=1.0)


@pytest.fixture
def folder(tiny_model: ElasticLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return save_model(tmp_path / "model", tiny_model)


def found(verifier: str = "block", draft: str = "layers=0") -> DraftPlan:
    spec = DraftSpec.parse(draft, vocabulary=(1, 5))
    return DraftPlan(spec=spec, gamma=3, verifier=verifier, speed=Speed(1.5))


def keep(folder: Path, plans: Plans, dtype: str = "fp32") -> Path:
    path = searched_path(folder, dtype)
    write_searched(path, plans, {"note": "anything"})
    return path


def test_nothing_is_found_where_nothing_was_searched(folder: Path) -> None:
    assert find_draft(folder, "fp32", GREEDY) is None


def test_it_reads_what_was_written_for_this_dtype(folder: Path) -> None:
    keep(folder, {0.0: [found()]})
    assert find_draft(folder, "fp32", GREEDY) == found()
    assert find_draft(folder, "bf16", GREEDY) is None


def test_greedy_and_sampling_are_told_apart_and_the_nearest_temperature_is_taken(folder: Path) -> None:
    keep(folder, {0.0: [found(draft="a")], 0.5: [found(draft="b")], 1.0: [found(draft="c")]})
    samplings = {"a": GREEDY, "b": SamplingParams(temperature=0.1), "c": SamplingParams(temperature=0.8)}
    for draft, params in samplings.items():
        assert find_draft(folder, "fp32", params) == found(draft=draft)
    keep(folder, {0.0: [found()]})
    assert find_draft(folder, "fp32", WARM) is None


def test_a_verifier_that_was_asked_for_is_kept_to_and_coupled_is_never_chosen_unasked(folder: Path) -> None:
    coupled, token, block = found("coupled", "a"), found("token", "b"), found("block", "c")
    keep(folder, {1.0: [coupled, token, block]})
    for verifier, plan in {"coupled": coupled, "block": block, None: token}.items():
        assert find_draft(folder, "fp32", WARM, verifier) == plan
    keep(folder, {0.0: [block]})
    assert find_draft(folder, "fp32", GREEDY, "coupled") == block


def test_other_weights_are_another_model(folder: Path, tiny_model: ElasticLM) -> None:
    keep(folder, {0.0: [found()]})
    tiny_model.model.norm.weight.data[0] += 1
    save_model(folder, tiny_model)
    assert find_draft(folder, "fp32", GREEDY) is None


@pytest.mark.parametrize("text", ["{", '{"format": 1}', '{"format": 1, "choices": [{"gamma": "x"}]}', "[]"])
def test_a_damaged_file_is_told_and_counts_as_none(
    text: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(folder, {0.0: [found()]}).write_text(text)
    assert find_draft(folder, "fp32", GREEDY) is None
    assert "run nestling search again" in caplog.text


def test_what_is_timed_before_decoding_is_the_draft_that_was_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its precision, with its part of the vocabulary, under the distribution that was asked for."""
    timed: list[Any] = []

    def measure(_: ElasticLM, drafts: Mapping[str, Scorer], *kind: Any) -> Costs:
        timed.extend([*drafts.values(), kind])
        return Costs({1: 1.0}, dict.fromkeys(drafts, 0.1))

    monkeypatch.setattr("models.decode.tune.resolve.measure_costs", measure)
    keep(folder, {1.0: [found("token", "layers=0@int8")]})
    opened = load_model(folder)
    drafting = choose_drafting(opened, "auto", None, WARM, dtype="fp32")
    scorer, kind = timed
    assert isinstance(scorer, TrimmedHead)
    assert isinstance(drafting.draft, NestedDraft)
    assert scorer is drafting.draft.scorer
    assert isinstance(scorer.full, PackedLM)
    assert kind == (WARM, "token")
