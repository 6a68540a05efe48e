"""`nestling plan split` on the command line."""

from collections.abc import Callable

import pytest

from train.cli import main

FLAGS = ["--alpha", "0.95", "--target-ms", "40", "--draft-ms", "4"]


@pytest.mark.parametrize(("rtt", "said"), [("20", "pays"), ("400", "does not pay")])
def test_split_pays_up_to_a_round_trip(rtt: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "split", "--rtt", rtt, *FLAGS]) == 0
    out = capsys.readouterr().out
    assert f"At {rtt} ms split decoding {said}" in out
    assert "server alone, plain" in out
    assert "server alone, drafted there" in out


def test_a_number_that_makes_no_sense_is_named(fails: Callable[..., str]) -> None:
    assert "--rtt must be 0 or more" in fails("plan", "split", "--rtt", "-1", *FLAGS, code=2)
    assert "--alpha" in fails("plan", "split", "--rtt", "1", *FLAGS, "--alpha", "1", code=2)


SPREAD = ["--alpha", "0.8", "--target-ms", "16", "--draft-ms", "2", "--greedy"]


def test_a_local_draft_pays_the_more_the_farther_the_stages_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "spread", "--rtt", "100", "--stages", "3", *SPREAD]) == 0
    out = capsys.readouterr().out
    assert "316.0" in out
    assert "At 100 ms a local draft is 4.4 times as fast as none" in out
    slow = ["--hidden-size", "8192", "--mbit", "100"]
    assert main(["plan", "spread", "--rtt", "100", "--stages", "3", *SPREAD, *slow]) == 0
    assert "331.7" in capsys.readouterr().out, "5.2 ms for the states of a hop"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--stages must be at least 1"),
        (["--stages", "0"], "--stages must be at least 1"),
        (["--stages", "2", "--mbit", "10"], "belong together"),
        (["--stages", "2", "--mbit", "0", "--hidden-size", "8"], "must be above 0"),
        (["--stages", "2", "--cloud-draft-ms", "1"], "--cloud-draft-ms has no effect with spread"),
    ],
)
def test_a_flag_that_makes_no_sense_for_spread_is_named(
    flags: list[str], named: str, fails: Callable[..., str]
) -> None:
    assert named in fails("plan", "spread", "--rtt", "1", *SPREAD, *flags, code=2)
    assert "--stages has no effect with split" in fails(
        "plan", "split", "--rtt", "1", *SPREAD, "--stages", "2", code=2
    )
