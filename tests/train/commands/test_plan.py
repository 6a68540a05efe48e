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
