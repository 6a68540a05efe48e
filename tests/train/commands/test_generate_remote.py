"""`nestling generate --remote` and `nestling relay` on the command line."""

from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--window", "2"], "--window has an effect with --remote only"),
        (["--remote", "ws://127.0.0.1:1", "--window", "0"], "--window must be from 1 to 64"),
        (["--remote", "ws://127.0.0.1:1", "--window", "65"], "--window must be from 1 to 64"),
        (["--remote", "ws://127.0.0.1:1", "--gamma", "65"], "--gamma must be from 0 to 64"),
        (["--remote", "ws://127.0.0.1:1", "--draft", "S"], "--draft has no effect with --remote"),
        (["--remote", "ws://127.0.0.1:1", "--token-file", "none"], "--token-file none does not exist"),
    ],
)
def test_flags_that_do_not_go_together_are_told_before_any_work(
    flags: list[str], named: str, fails: Callable[..., str]
) -> None:
    assert named in fails("generate", "some/model", "--prompt", "a", *flags, code=2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--to", "somewhere"], "--to somewhere"),
        (["--to", "127.0.0.1:9", "--rtt", "-1"], "--rtt must be 0 or more"),
        (["--to", "127.0.0.1:9", "--cut-after", "-1"], "--cut-after must be 0 or more"),
    ],
)
def test_a_relay_that_cannot_be_is_told(flags: list[str], named: str, fails: Callable[..., str]) -> None:
    assert named in fails("relay", *flags, code=2)
