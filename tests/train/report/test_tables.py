"""Tables that the page and Markdown share."""

from models.base.numbers import NOTHING
from models.checkpoint.family import Member
from train.report.tables import family_table, speed_table


def test_the_family_comes_largest_first_and_without_columns_that_nobody_measured() -> None:
    members = [
        Member(name="S", granularity="ffn=0.5", parameters=1000, loss=2.0),
        Member(name="XL", granularity="full", parameters=2000, loss=1.5, alpha=1.0),
    ]
    table = family_table(members)
    assert table.header == ("member", "granularity", "parameters", "loss", "alpha")
    assert table.rows == (
        ("XL", "full", "2.00k", "1.500", "1.000"),
        ("S", "ffn=0.5", "1.00k", "2.000", NOTHING),
    )


def test_speed_up_is_against_plain_decoding_of_the_same_engine_and_dtype() -> None:
    def row(engine: str, mode: str, dtype: str, speed: float) -> dict[str, object]:
        return {"engine": engine, "mode": mode, "dtype": dtype, "tokens_per_second": speed}

    rows = [
        row("nestling", "plain", "fp32", 100.0),
        row("nestling", "speculative", "fp32", 150.0),
        row("nestling", "speculative", "bf16", 300.0),
        row("transformers", "plain", "fp32", 50.0),
        row("transformers", "assisted", "fp32", 40.0),
    ]
    table = speed_table(rows)
    column = table.header.index("speed-up")
    assert [cells[column] for cells in table.rows] == ["1.00×", "1.50×", NOTHING, "1.00×", "0.80×"]
    assert table.num_labels == table.header.index("dtype") + 1


def test_rows_of_one_engine_mode_and_draft_are_told_apart() -> None:
    common = {"engine": "transformers", "dtype": "bf16", "tokens_per_second": 50.0}
    rows: list[dict[str, object]] = [
        {**common, "mode": "plain", "cache": "dynamic", "seconds_to_first_token": 0.0123, "mbu": 0.421},
        {**common, "mode": "plain", "cache": "static"},
        {**common, "mode": "assisted", "draft": "D", "schedule": "default"},
        {**common, "mode": "assisted", "draft": "D", "schedule": "constant", "gamma": 2},
    ]
    table = speed_table(rows)
    assert table.header[:5] == ("engine", "mode", "draft", "setting", "dtype")
    assert [cells[3] for cells in table.rows] == [
        "dynamic cache", "static cache", "default schedule", "2 a round",
    ]  # fmt: skip
    assert table.header[-2:] == ("first token", "bandwidth")
    assert table.rows[0][-2:] == ("12.3 ms", "42%")


def test_speed_up_is_against_the_fastest_plain_decoding() -> None:
    rows = [
        {"engine": "a", "mode": "plain", "cache": cache, "tokens_per_second": speed}
        for cache, speed in (("dynamic", 40.0), ("static", 50.0))
    ]
    table = speed_table(rows)
    assert [cells[table.header.index("speed-up")] for cells in table.rows] == ["0.80×", "1.00×"]
