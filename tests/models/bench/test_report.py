from collections.abc import Callable
from typing import Any

import pytest

from models.bench.contenders import Label
from models.bench.engines import Sample
from models.bench.report import add_utilisation, make_notes, make_rows, speed_table
from models.bench.run import Runs
from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters

MakeSample = Callable[..., Sample]


def label(
    engine: str = "nestling",
    mode: str = "plain",
    *,
    dtype: str = "fp32",
    temperature: float = 0.0,
    **more: Any,
) -> Label:
    return Label(engine=engine, mode=mode, dtype=dtype, temperature=temperature, threads=1, **more)


def test_figures_are_those_of_the_definitions(make_sample: MakeSample) -> None:
    slow = make_sample(seconds=5.0)
    (row,) = make_rows(Runs({label(): [[make_sample()], [slow], [slow]]}))
    assert row["tokens_per_second"] == 4 / 5
    assert row["tokens_per_second_range"] == [4 / 5, 4 / 3]
    assert row["decode_tokens_per_second"] == 3 / 4
    assert row["decode_tokens_per_second_range"] == [3 / 4, 3 / 2]
    assert row["seconds_to_first_token"] == 1.0
    assert row["tau"] == 1.5
    assert row["speedup"] == row["decode_speedup"] == 1.0
    assert row["alpha"] is None


def test_a_round_counts_all_its_tokens_by_all_its_seconds(make_sample: MakeSample) -> None:
    one = make_sample(overlap=1.5, reached=2)
    other = make_sample(seconds=9.0, first_seconds=3.0, passes=3, overlap=0.5, reached=6)
    (row,) = make_rows(Runs({label(): [[one, other]]}))
    assert row["tokens_per_second"] == 8 / 12
    assert row["decode_tokens_per_second"] == 6 / 8
    assert row["seconds_to_first_token"] == 2.0
    assert row["tau"] == 6 / 5
    assert row["alpha"] == 2 / 8


def test_speed_is_compared_with_ours_plain_of_the_same_kind(make_sample: MakeSample) -> None:
    runs = Runs(
        {
            label(): [[make_sample()]],
            label(mode="speculative", draft="S", gamma=4): [[make_sample(seconds=2.0)]],
            label(dtype="bf16"): [[make_sample(seconds=2.0)]],
            label("transformers", dtype="bf16", cache="dynamic"): [[make_sample(seconds=6.0)]],
            label(temperature=1.0): [[make_sample(seconds=4.0)]],
        }
    )
    rows = make_rows(runs)
    assert [row["speedup"] for row in rows] == [1.0, 1.5, 1.0, pytest.approx(1 / 3), 1.0]
    assert rows[1]["decode_speedup"] == 2.0
    assert [row["num_identical"] for row in rows] == [1, 1, 1, 1, None]


def test_a_prompt_counts_as_identical_only_if_it_is_in_every_round(make_sample: MakeSample) -> None:
    good, bad = make_sample(), make_sample(ids=[1, 2, 3, 9])
    runs = Runs(
        {
            label(): [[good, good, good], [good, good, good]],
            label("transformers", cache="static"): [[good, good, bad], [good, bad, bad]],
        },
        busy=[False, False],
    )
    rows = make_rows(runs)
    assert [row["num_identical"] for row in rows] == [3, 1]
    (note,) = make_notes(rows, runs, num_prompts=3)
    assert note.startswith("transformers plain static: greedy ids equal those of nestling plain on 1 of 3")
    for row in rows:
        row["dtype"] = "bf16"  # there, near-ties are expected
    assert make_notes(rows, runs, num_prompts=3) == []


def test_the_best_of_each_engine_and_mode_is_marked_and_compared_with(make_sample: MakeSample) -> None:
    def seconds(number: float) -> list[list[Sample]]:
        return [[make_sample(seconds=number)]]

    assisted: dict[str, Any] = {"draft": "S", "schedule": "constant"}
    runs = Runs(
        {
            label(): seconds(4.0),
            label(mode="speculative", draft="S", gamma=4): seconds(2.0),
            label(mode="speculative", draft="M", gamma=4): seconds(3.0),
            label("transformers", cache="dynamic"): seconds(5.0),
            label("transformers", cache="static"): seconds(6.0),
            label("transformers", "assisted", **assisted, gamma=2): seconds(4.0),
            label("transformers", "assisted", **assisted, gamma=8): seconds(3.0),
            label(temperature=1.0): seconds(9.0),
        }
    )
    rows = make_rows(runs)
    assert [row["best"] for row in rows] == [True, True, False, True, False, False, True, True]
    (note,) = make_notes(rows, runs, num_prompts=1)
    assert note == (
        "fp32, T=0: nestling speculative by S (4) is 2.00x nestling plain, 2.50x transformers plain dynamic, "
        "1.50x transformers assisted by S constant (8)"
    )


def test_a_busy_machine_is_noted(make_sample: MakeSample) -> None:
    runs = Runs({label(): [[make_sample()]] * 2}, busy=[False, True])
    (note,) = make_notes(make_rows(runs), runs, num_prompts=1)
    assert "busy in 1 of 2 rounds" in note


def test_there_is_no_decoding_speed_where_the_first_pass_gave_everything(make_sample: MakeSample) -> None:
    at_once = make_sample(first_tokens=4, first_seconds=2.5, passes=0)
    runs = Runs({label(): [[make_sample()]], label("transformers", "assisted"): [[at_once]]})
    rows = make_rows(runs)
    nothing = ("decode_tokens_per_second", "decode_tokens_per_second_range", "decode_speedup", "tau")
    assert [rows[1][name] for name in nothing] == [None] * 4
    assert speed_table(rows, num_prompts=1).rows[1][9:] == ("-", "-", "2500.0 ms", "-", "-", "-", "1/1")


def test_the_table_says_what_drafts_and_by_which_schedule(make_sample: MakeSample) -> None:
    labels = [
        label(),
        label(mode="speculative", draft="S", gamma=3),
        label("transformers", cache="static", temperature=0.5),
        label(temperature=0.5),
        label("transformers", "assisted", draft="S", schedule="default"),
        label("transformers", "assisted", draft="S", schedule="constant", gamma=3),
    ]
    table = speed_table(
        make_rows(Runs({one: [[make_sample(overlap=1.0, reached=2)]] for one in labels})), num_prompts=1
    )
    assert all(len(row) == len(table.header) for row in table.rows)
    assert [row[1:5] for row in table.rows] == [
        ("plain", "-", "-", "0"),
        ("speculative", "S", "3", "0"),
        ("plain static", "-", "-", "0.5"),
        ("plain", "-", "-", "0.5"),
        ("assisted", "S", "default", "0"),
        ("assisted", "S", "3", "0"),
    ]
    assert table.rows[0][6:] == (
        "1.3*", "1.3-1.3", "1.00", "1.5", "1.00", "1000.0 ms", "1.50", "0.500", "-", "1/1",
    )  # fmt: skip


def test_utilisation_counts_weights_and_cache_once_a_token(
    tiny_config: ElasticConfig, make_sample: MakeSample
) -> None:
    labels = [label(), label(mode="speculative"), label(dtype="int8")]
    rows = make_rows(Runs({one: [[make_sample()]] for one in labels}))
    add_utilisation(rows, tiny_config, num_positions=10, read_gbps=1.0)
    kv_numbers = 2 * 4 * 2 * 8 * 10  # keys and values, layers, groups, head size, positions
    weights = count_parameters(tiny_config)
    assert rows[0]["mbu"] == pytest.approx(1.5 * 4 * (weights + kv_numbers) / 1e9)
    assert rows[1]["mbu"] is None
    assert rows[2]["mbu"] == pytest.approx(1.5 * (weights + 2 * kv_numbers) / 1e9)
