"""A request in a batch gives what it gives alone, whatever its companions are and when they end."""

from collections.abc import Callable

import pytest
from torch import Tensor

from models.decode.engine.draft import ModelDraft, NestedDraft
from models.decode.engine.engine import Stream, stream, stream_batch
from models.decode.engine.lookup import LookupDraft
from models.decode.engine.policy import Fixed, Policy
from models.decode.engine.scheduler import BatchScheduler, Events, Pass
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View

PROMPTS = ([5, 6, 7], [1], [9, 8, 7, 6, 5, 4, 3, 2, 9, 8], [1, 2, 1, 2, 1])
SAMPLINGS = {
    "greedy": (SamplingParams(), "block"),
    "token": (SamplingParams(temperature=1.0), "token"),
    "block": (SamplingParams(temperature=0.7, top_k=9), "block"),
    "coupled": (SamplingParams(temperature=1.3, repetition_penalty=1.2), "coupled"),
}


@pytest.fixture
def model(tiny_model: ElasticLM) -> ElasticLM:
    return tiny_model.double().requires_grad_(False)  # rounding must not decide a token


def policies(model: ElasticLM) -> dict[str, Callable[[], Policy]]:
    exit_ = NestedDraft(View(model, Granularity.parse("layers=0-1")))
    narrow = View(model, Granularity.parse("ffn=0.25,heads=0.5"))
    return {
        "plain": lambda: Fixed(None, 0),
        "exit": lambda: Fixed(exit_, 3),
        "narrow": lambda: Fixed(NestedDraft(narrow), 2),
        "own cache": lambda: Fixed(ModelDraft(narrow), 4),
        "lookup": lambda: Fixed(LookupDraft(), 3),
    }


def taken_in_turn(streams: list[Stream]) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in streams]
    going = list(range(len(streams)))
    while going:
        for row in list(going):
            token = next(streams[row], None)
            if token is None:
                going.remove(row)
            else:
                ids[row].append(token.id)
    return ids


@pytest.mark.parametrize("name", ["plain", "exit", "narrow", "own cache", "lookup"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_each_row_is_what_it_is_alone(sampling: str, name: str, model: ElasticLM) -> None:
    params, verifier = SAMPLINGS[sampling]
    new_policy = policies(model)[name]
    together = stream_batch(
        model,
        PROMPTS,
        new_policy=new_policy,
        params=params,
        verifier=verifier,
        max_new_tokens=21,
        eos_token_ids=(3, 11),  # some end early
        randoms=[SeededRandom(1, row) for row in range(len(PROMPTS))],
    )
    alone = [
        stream(
            model,
            prompt,
            policy=new_policy(),
            params=params,
            verifier=verifier,
            max_new_tokens=21,
            eos_token_ids=(3, 11),
            random=SeededRandom(1, row),
        )
        for row, prompt in enumerate(PROMPTS)
    ]
    assert taken_in_turn(together) == [[token.id for token in tokens] for tokens in alone]
    for ours, theirs in zip(together, alone, strict=True):
        counts = ("num_tokens", "rounds", "drafted", "accepted", "finish_reason", "kv_bytes")
        assert [getattr(ours.report, each) for each in counts] == [
            getattr(theirs.report, each) for each in counts
        ]


def test_coupled_text_does_not_depend_on_drafts_nor_companions(model: ElasticLM) -> None:
    params = SamplingParams(temperature=1.0)
    plain = [
        [
            token.id
            for token in stream(model, prompt, params=params, verifier="coupled", random=SeededRandom(4, row))
        ]
        for row, prompt in enumerate(PROMPTS)
    ]
    for rows in ([0, 1, 2, 3], [3, 1], [2]):
        for new_policy in policies(model).values():
            streams = stream_batch(
                model,
                [PROMPTS[row] for row in rows],
                new_policy=new_policy,
                params=params,
                verifier="coupled",
                randoms=[SeededRandom(4, row) for row in rows],
            )
            assert taken_in_turn(streams) == [plain[row] for row in rows]


def test_rows_share_their_passes(model: ElasticLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    states = ElasticLM.states

    def counted(self: ElasticLM, tokens_BT: Tensor, *rest: object, **more: object) -> list[Tensor]:
        calls.append(tokens_BT.numel())
        return states(self, tokens_BT, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ElasticLM, "states", counted)
    new_policy = policies(model)["plain"]
    streams = stream_batch(model, PROMPTS, new_policy=new_policy, max_new_tokens=8, eos_token_ids=())
    taken_in_turn(streams)
    assert calls == [sum(map(len, PROMPTS)), *[len(PROMPTS)] * 7]


def test_a_closed_row_ends_and_the_others_go_on(model: ElasticLM) -> None:
    options = {"max_new_tokens": 12, "eos_token_ids": ()}
    whole = taken_in_turn(stream_batch(model, PROMPTS, **options))  # type: ignore[arg-type]
    streams = stream_batch(model, PROMPTS, **options)  # type: ignore[arg-type]
    first = next(streams[1]).id
    streams[1].close()
    assert taken_in_turn(streams) == [whole[0], [], whole[2], whole[3]]
    assert first == whole[1][0]
    assert streams[1].report.num_tokens == 1


def test_one_stream_may_be_taken_whole_before_the_others(model: ElasticLM) -> None:
    whole = taken_in_turn(stream_batch(model, PROMPTS, max_new_tokens=9))
    streams = stream_batch(model, PROMPTS, max_new_tokens=9)
    for row in (2, 0, 3, 1):
        assert [token.id for token in streams[row]] == whole[row]


def test_of_prompts_a_pass_reads_a_few_tokens_and_of_rounds_all(make_model: Callable[..., ElasticLM]) -> None:
    model = make_model(max_position_embeddings=512)
    sizes = list[list[int]]()

    def request(*counts: int) -> Events[int]:
        for count in counts:
            yield Pass(model, [0] * count, model.new_cache(count), num_last=1)
        yield [sum(counts)]

    scheduler = BatchScheduler[int](prompt_tokens=100)
    for number, counts in enumerate([(1, 1), (60,), (60,), (5,), (200,), (40,)]):
        assert scheduler.add(number, request(*counts)) == []
    events = list[tuple[int, int]]()
    while len(scheduler):
        before = {number: len(one.ids) for number, one in scheduler._waiting.items()}
        events += scheduler.step()
        after = scheduler._waiting
        sizes.append(sorted(count for number, count in before.items() if number not in after))
    assert sizes[0] == [5, 60], "and the first token of the request that goes on"
    assert sorted(events) == [(0, 2), (1, 60), (2, 60), (3, 5), (4, 200), (5, 40)]
    assert [200] in sizes, "a request with more than the limit runs all the same"
