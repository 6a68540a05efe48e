"""Reported figures are recounted from what came out and from what the verifier saw."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import count

import pytest
import torch
from torch import Tensor

from models.decode.engine import engine
from models.decode.engine.costs import Costs
from models.decode.engine.draft import NestedDraft
from models.decode.engine.engine import Stream, Token, stream
from models.decode.engine.policy import Round
from models.decode.engine.report import Report
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import Random, SeededRandom
from models.decode.sampling.verifiers import verify_block, verify_tokens
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View

WARM = SamplingParams(temperature=0.8, top_k=30)


def rounds_of(tokens: Sequence[Token]) -> list[list[Token]]:
    """Every round ends with the target's own token; the first token is the prefill's."""
    rounds: list[list[Token]] = [[]]
    for token in tokens[1:]:
        rounds[-1].append(token)
        if not token.drafted:
            rounds.append([])
    assert rounds.pop() == []
    return rounds


def speculate(model: ElasticLM, **options: object) -> tuple[list[Token], Stream]:
    draft = NestedDraft(View(model, Granularity.parse("layers=0-2")))
    tokens = stream(model, [4, 2], draft=draft, gamma=3, max_new_tokens=50, **options)  # type: ignore[arg-type]
    return list(tokens), tokens


@pytest.mark.parametrize("params", [SamplingParams(), WARM])
def test_counts_are_those_of_the_tokens_that_came_out(params: SamplingParams, tiny_model: ElasticLM) -> None:
    tokens, run = speculate(tiny_model, params=params)
    report, rounds = run.report, rounds_of(tokens)
    assert report.num_tokens == len(tokens) == 50
    assert report.rounds == len(rounds)
    assert report.accepted == sum(token.drafted for token in tokens)
    assert report.accepted_by_position == [
        sum(len(kept) > position + 1 for kept in rounds) for position in range(3)
    ]
    assert report.drafted == sum(report.drafted_by_position)
    assert report.drafted_by_position[0] <= report.rounds
    assert report.tau == pytest.approx(49 / len(rounds))
    assert 1 < (report.tau or 0) < 4


def test_alpha_is_the_mean_overlap_of_the_distributions_that_the_verifier_compared(
    tiny_model: ElasticLM,
) -> None:
    overlaps: list[float] = []
    num_drafted: list[int] = []

    def verifier(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
        kept = verify_block(p_TV, q_TV, drafted, random)
        num_drafted.append(len(drafted))
        reached = range(min(len(kept), len(drafted)))
        overlaps.extend(float(torch.minimum(p_TV[t], q_TV[t]).sum()) for t in reached)
        return kept

    _, run = speculate(tiny_model, params=WARM, verifier=verifier, random=SeededRandom(5))
    assert run.report.reached == len(overlaps)
    assert run.report.alpha == pytest.approx(sum(overlaps) / len(overlaps))
    assert run.report.drafted == sum(num_drafted)
    assert 0.05 < (run.report.alpha or 0) < 0.95


def test_first_drafted_tokens_are_kept_as_often_as_the_distributions_overlap(tiny_model: ElasticLM) -> None:
    overlaps: list[float] = []
    kept = 0

    def verifier(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
        nonlocal kept
        tokens = verify_tokens(p_TV, q_TV, drafted, random)
        overlaps.append(float(torch.minimum(p_TV[0], q_TV[0]).sum()))
        kept += len(tokens) > 1
        return tokens

    for seed in range(8):
        speculate(tiny_model, params=WARM, verifier=verifier, random=SeededRandom(seed))
    sigma = math.sqrt(sum(overlap * (1 - overlap) for overlap in overlaps))
    assert 0.2 < sum(overlaps) / len(overlaps) < 0.9
    assert abs(kept - sum(overlaps)) <= 4 * sigma  # over the choice of seeds fails once in 16,000


def test_greedy_alpha_is_the_accepted_fraction_of_the_positions_reached(tiny_model: ElasticLM) -> None:
    tokens, run = speculate(tiny_model)
    num_tokens, reached = 1, 0
    for kept in rounds_of(tokens):
        reached += min(len(kept), 3, 50 - num_tokens - 1)
        num_tokens += len(kept)
    assert run.report.alpha == pytest.approx(run.report.accepted / run.report.reached)
    assert run.report.reached == reached
    assert 0 < run.report.accepted < run.report.reached


def test_plain_decoding_has_one_token_a_pass_and_no_alpha(tiny_model: ElasticLM) -> None:
    tokens = stream(tiny_model, [1], max_new_tokens=6)
    assert len(list(tokens)) == 6
    assert (tokens.report.tau, tokens.report.alpha, tokens.report.rounds) == (1.0, None, 5)
    assert (tokens.report.drafted, tokens.report.accepted_by_position) == (0, [])


def test_one_token_needs_no_round(tiny_model: ElasticLM) -> None:
    tokens = stream(tiny_model, [1], max_new_tokens=1)
    assert len(list(tokens)) == 1
    assert (tokens.report.rounds, tokens.report.tau) == (0, None)


def test_only_work_is_timed_and_not_who_takes_the_tokens(
    tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: Iterator[int] = count()
    monkeypatch.setattr(engine, "perf_counter", lambda: next(clock))
    tokens = stream(tiny_model, [1], max_new_tokens=6)
    for _ in tokens:
        next(clock)  # time passes between tokens
    report = tokens.report
    assert report.prefill_seconds == 1
    # Two ticks a round: the pass, then what is learned from it.
    assert report.decode_seconds == 2 * report.rounds == 10
    assert report.plain_seconds == 1
    assert report.tokens_per_second == 6 / 11


def test_the_report_as_a_dictionary_has_the_ratios_and_the_counts(tiny_model: ElasticLM) -> None:
    _, run = speculate(tiny_model)
    ours = run.report.as_dict()
    assert {"tokens_per_second", "tau", "alpha", "rounds", "accepted_by_position"} <= ours.keys()
    assert ours["tau"] == run.report.tau


# ---------------------------------------------------------------- what rounds took


def taken(
    draft: str, num_drafted: int, num_accepted: int, draft_seconds: float, target_seconds: float
) -> Round:
    reached = min(num_accepted + 1, num_drafted)
    overlaps = tuple(float(place < num_accepted) for place in range(reached))
    return Round(draft, num_drafted, num_accepted, draft_seconds, target_seconds, overlaps)


def counted(rounds: Sequence[Round], known_costs: Costs | None = None) -> Report:
    report = Report(known_costs=known_costs)
    report.count_token(None)
    for done in rounds:
        report.count_round(done)
        report.decode_seconds += done.draft_seconds + done.target_seconds
        for place in [*range(done.num_accepted), None]:
            report.count_token(place)
    return report


ROUNDS = [
    *[taken("none", 0, 0, 0.0, 1.0)] * 2,
    *[taken("S", 2, 2, 0.5, 1.2), taken("S", 2, 0, 0.5, 1.2)] * 2,
    taken("S", 4, 4, 1.0, 1.5),
    taken("lookup", 4, 1, 0.0, 1.5),
]


def test_c_v_and_speeds_are_those_of_the_rounds() -> None:
    report = counted(ROUNDS)
    assert report.plain_seconds == 1.0
    assert report.c == {"S": 0.25, "lookup": 0.0}
    assert report.v == {1: 1.0, 3: 1.2, 5: 1.5}
    assert report.speedup == pytest.approx(17 / (2.0 + 4 * 1.7 + 2.5 + 1.5))
    s, lookup = 8 / 10, 1 / 2  # accepted of those reached
    tokens = 2 + 4 * (1 + s + s**2) + sum(s**i for i in range(5)) + sum(lookup**i for i in range(5))
    assert report.predicted_speedup == pytest.approx(tokens / (2.0 + 4 * 1.7 + 2.5 + 1.5))


def test_a_plain_step_takes_no_longer_than_a_pass_on_more_tokens() -> None:
    """Here the only one came after a pause."""
    report = counted([taken("none", 0, 0, 0.0, 9.0), *[taken("S", 2, 2, 0.5, 1.5)] * 4])
    assert report.plain_seconds == 1.5
    assert report.v == {1: 1.0, 3: 1.0}
    assert report.speedup is not None
    assert report.tau is not None
    assert report.speedup < report.tau


def test_known_costs_predict_and_stand_in_for_a_plain_step_that_was_not_seen() -> None:
    known = Costs({1: 10.0, 3: 15.0}, {"S": 4.0})
    report = counted([taken("S", 2, 2, 1.0, 3.0)] * 3, known)
    assert report.plain_seconds == pytest.approx(2.0)  # 3.0, at v(3) = 1.5
    assert report.v == pytest.approx({3: 1.5})
    assert report.c == pytest.approx({"S": 0.25})  # measured; 0.4 was known
    assert report.predicted_speedup == pytest.approx(3 / (2 * 0.4 + 1.5))
    assert report.speedup == pytest.approx(9 * 2.0 / 12.0)


def test_without_a_plain_step_or_known_costs_nothing_is_compared() -> None:
    report = counted([taken("S", 2, 1, 1.0, 3.0)] * 3)
    assert (report.plain_seconds, report.c, report.v) == (None, None, None)
    assert (report.speedup, report.predicted_speedup) == (None, None)


def test_rounds_are_listed_by_who_drafted_and_how_much() -> None:
    rows = counted(ROUNDS).choices()
    assert [(row["draft"], row["gamma"], row["rounds"], row["accepted"]) for row in rows] == [
        ("S", 2, 4, 4),
        ("S", 4, 1, 4),
        ("lookup", 4, 1, 1),
        ("none", 0, 2, 0),
    ]
    assert (rows[0]["draft_seconds"], rows[0]["target_seconds"]) == (0.5, 1.2)


def test_the_rounds_of_a_stream_add_up_to_its_counts(tiny_model: ElasticLM) -> None:
    tokens = stream(
        tiny_model, [4, 2], draft=NestedDraft(View(tiny_model, Granularity.parse("layers=0-2"))), gamma=3
    )
    list(tokens)
    report, rows = tokens.report, tokens.report.choices()
    assert sum(row["rounds"] for row in rows) == report.rounds  # type: ignore[misc]
    assert sum(row["accepted"] for row in rows) == report.accepted  # type: ignore[misc]
    assert report.kv_bytes == 2 * 4 * 2 * (2 + 126) * 8 * 4  # keys and values, layers, groups, positions
    assert json.loads(json.dumps(report.as_dict())).keys() >= {"c", "v", "speedup", "kv_bytes", "choices"}
