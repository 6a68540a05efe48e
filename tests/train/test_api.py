"""The commands as functions: an argument of the wrong kind is named before anything is read or made."""

from pathlib import Path
from typing import Any

import pytest

from models.base.errors import UsageError
from train import api as typed_api

api: Any = typed_api  # callers without a type checker


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda out: api.train(["tiny"], out=out), r"config=\['tiny'\] is no path"),
        (lambda _: api.train("tiny", out=None), "out=None is no path"),
        (lambda out: api.train("tiny", overrides="seed=1", out=out), "overrides='seed=1' is not a list"),
        (lambda out: api.train("tiny", overrides={"seed": 1}, out=out), "overrides=.* is not a list"),
        (lambda out: api.train("tiny", out=out, resume=True), "resume=True is no path"),
        (lambda out: api.distill(3, "tiny", out=out), "teacher=3 is no path"),
        (lambda out: api.distill("T", "tiny", out=out, cache=b"c"), "cache=b'c' is no path"),
        (lambda out: api.evaluate(out, "stdlib", granularities="S"), "granularities='S' is not a list"),
        (lambda out: api.evaluate(out, "stdlib", max_tokens=-5), "max_tokens must be 0"),
        (lambda out: api.evaluate(out, "stdlib", max_tokens=1.5), "max_tokens=1.5 is not a whole number"),
        (lambda out: api.evaluate(out, None), "data=None is no path"),
        (lambda out: api.evaluate(b"model", out), "model=b'model' is no path"),
        (lambda out: api.search(out, "stdlib", "params=0.5"), "budgets='params=0.5' is not a list"),
        (lambda out: api.search(out, "stdlib", []), "budgets=.. names none"),
        (lambda out: api.search(out, "stdlib", ["size=1"]), "'size' is not counted"),
        (lambda out: api.search(out, "stdlib", ["params=0.5"], evaluations=0), "--evaluations must be"),
        (lambda out: api.extract(out, 3, out), "granularity=3 is no text"),
        (lambda out: api.extract(out, "S", out, dtype="int2"), "is not one of int8, int4"),
        (lambda out: api.extract(None, "S", out), "model=None is no path"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(call: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=named):
        call(tmp_path / "out")
    assert not list(tmp_path.iterdir())
