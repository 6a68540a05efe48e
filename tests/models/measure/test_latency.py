"""The arithmetic of latencies, by clocks that are made up."""

import itertools
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig
from models.elastic.count import count_layer_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.measure import latency
from models.measure.latency import LatencyTable, measure_latency, shape_of, time_decoding

WIDTHS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0)
OPTIONS = list(itertools.product(WIDTHS, (0.5, 1.0)))
CONFIG = ElasticConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def cached(member: Granularity) -> float:
    """Return seconds of a machine that reads ever more slowly what does not stay in its cache."""
    layers = member.resolve(CONFIG).layers
    size = count_layer_parameters(CONFIG, layers)
    missed = sum(max(0, size - cache) for cache in (30_000, 45_000, 60_000, 75_000))
    return 10.0 + len(layers) + size / 3000 + missed / 6000


def table_of_a_cache(monkeypatch: pytest.MonkeyPatch, checks: Iterable[Granularity] = ()) -> LatencyTable:
    def timed(_: object, members: Iterable[Granularity], **__: object) -> dict[Granularity, float]:
        return {one: cached(one) for one in members}

    monkeypatch.setattr(latency, "time_decoding", timed)
    model: Any = type("Model", (), {"config": CONFIG})
    return measure_latency(model, OPTIONS, [*checks], machine="made up", dtype="bf16")


def test_members_of_any_widths_and_depth_are_within_a_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    table, draw = table_of_a_cache(monkeypatch), random.Random(0)
    for _ in range(200):
        layers = tuple(sorted(draw.sample(range(12), draw.randint(1, 12))))
        ffn = tuple(draw.choice(WIDTHS) for _ in layers)
        heads = tuple(draw.choice((0.5, 1.0)) for _ in layers)
        member = Granularity(ffn=ffn, heads=heads, layers=layers)
        assert table.seconds(CONFIG, member) == pytest.approx(cached(member), rel=0.1)


@pytest.mark.parametrize("depth", [1, 2, 5, 9, 12])
def test_what_was_timed_is_told_as_it_was(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of_a_cache(monkeypatch)
    layers = tuple(range(depth))
    narrowest = Granularity(ffn=(0.125,), heads=(0.5,), layers=layers)
    for member in (narrowest, Granularity(layers=layers)):
        assert table.seconds(CONFIG, member) == pytest.approx(cached(member))


def test_the_residual_is_the_largest_error_of_the_members_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Granularity(ffn=(1.0,) * 4 + (0.125,) * 8), Granularity(layers=(0, 1, 2, 3))]
    table = table_of_a_cache(monkeypatch, checks)
    errors = [abs(table.seconds(CONFIG, one) / cached(one) - 1) for one in checks]
    assert 0 < table.residual == max(errors)


def test_a_busy_moment_makes_no_wide_member_faster_than_a_narrow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def timed(_: object, members: Iterable[Granularity], **__: object) -> dict[Granularity, float]:
        return {one: 99.0 if one == Granularity(ffn=(0.125,), heads=(0.5,)) else 1.0 for one in members}

    monkeypatch.setattr(latency, "time_decoding", timed)
    model: Any = type("Model", (), {"config": CONFIG})
    table = measure_latency(model, OPTIONS, [], machine="made up", dtype="bf16")
    times = [table.seconds(CONFIG, Granularity(ffn=(ffn,))) for ffn in WIDTHS]
    assert times == sorted(times)


def test_a_token_is_timed_alone_by_decoding(
    tiny_model: ElasticLM, tiny_config: ElasticConfig, commits: Callable[[], float]
) -> None:
    """By a clock that counts what is committed: one for each token, also of unequal layers."""
    unequal = Granularity(ffn=(1.0, *[0.5] * (tiny_config.num_hidden_layers - 1)))
    found = time_decoding(tiny_model, [FULL, unequal], budget=0, clock=commits)
    assert found == {FULL: 1.0, unequal: 1.0}


def test_it_reads_back_what_it_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of_a_cache(monkeypatch)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert table.shape == shape_of(CONFIG)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format": 1}, "another release"),
        ({"residual": float("nan")}, "not above 0"),
        (
            {"members": [{"layers": layers, "layer_parameters": 8, "seconds": -1.0} for layers in (1, 12)]},
            "not above 0",
        ),
    ],
)
def test_a_table_of_another_release_or_of_no_times_is_none(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NestlingError, match=named):
        LatencyTable.from_json(table_of_a_cache(monkeypatch).to_json() | changes)


def test_a_table_that_lacks_members_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = table_of_a_cache(monkeypatch).to_json()
    for missing in (1, 12):
        fewer = [one for one in fields["members"] if one["layers"] != missing]
        with pytest.raises(NestlingError, match="of one layer or of all"):
            LatencyTable.from_json(fields | {"members": fewer})
