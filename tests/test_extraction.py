"""The page about searches says what was measured."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.measure.token_losses import TokenLosses
from train.search.found import Found

NARROW, MIDDLE, WIDE = (Granularity(ffn=(fraction,)) for fraction in (0.25, 0.5, 1.0))


@pytest.fixture(scope="module")
def extraction() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "docs"))  # as `python docs/extraction.py` does
        yield importlib.import_module("extraction")


def test_the_page_is_what_was_measured(extraction: ModuleType) -> None:
    assert extraction.main(["--check"]) == 0


class MadeUp(TokenLosses):
    """Losses of 4, 2.5 and 2 nats, the same at every token but for one."""

    def _run(self, member: Granularity) -> Tensor:
        losses_N = torch.full((self.num_tokens,), {NARROW: 4.0, MIDDLE: 2.5, WIDE: 2.0}[member])
        losses_N[0] += float(member == MIDDLE)
        return losses_N


def found(member: Granularity, cost: float) -> Found:
    return Found(
        name=None,
        member=member,
        origin="trained",
        costs={"params": cost},
        predicted=None,
        loss=0.0,
        above=0.0,
        error=0.0,
        fits=True,
    )


def test_a_member_is_compared_with_the_line_between_two_at_each_token(
    extraction: ModuleType, tiny_model: ElasticLM
) -> None:
    tokens_BT = torch.zeros(2, 8, dtype=torch.long)
    losses = MadeUp(tiny_model, [(tokens_BT, tokens_BT)])
    ends = [found(NARROW, 1.0), found(WIDE, 3.0)]
    beside = extraction.beside_line(found(MIDDLE, 2.0), ends, "params", losses)
    assert beside["mean"] == pytest.approx(-0.5 + 1 / 16)  # 3 on the line, 2.5 and once 3.5 found
    assert beside["error"] == pytest.approx(1 / 16)  # the standard deviation of one 1 among 16 is 1/4
    assert extraction.beside_line(found(MIDDLE, 0.5), ends, "params", losses) is None
