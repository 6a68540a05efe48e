"""Tables that the page and Markdown share."""

from models.family import Member
from train.report.tables import NOTHING, family_table, speed_table


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
