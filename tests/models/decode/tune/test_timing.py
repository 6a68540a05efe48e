"""Timings of a round's parts, by a clock that counts the work itself."""

from collections.abc import Callable

import pytest
import torch

from models.decode.engine.costs import DraftCosts, HostCosts
from models.decode.sampling.params import SamplingParams
from models.decode.tune.timing import time_drafts, time_hosts, time_target
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View


class LayerClock:
    """Tells how many tokens have passed through layers so far: a machine without noise."""

    def __init__(self, model: ElasticLM) -> None:
        self.count = 0.0
        for block in model.model.layers:
            block.register_forward_hook(self.hook)

    def hook(self, _: object, arguments: tuple[torch.Tensor, ...], __: object) -> None:
        self.count += arguments[0].shape[1]

    def __call__(self) -> float:
        return self.count


def test_a_pass_on_m_tokens_is_timed_as_far_as_the_context_has_room(tiny_model: ElasticLM) -> None:
    seconds = time_target(tiny_model, 6, budget=0, clock=LayerClock(tiny_model))
    assert seconds == {m: 4.0 * m for m in range(1, 7)}
    assert max(time_target(tiny_model, 1000, budget=0, clock=LayerClock(tiny_model))) == 128


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafted_token_is_told_in_passes_of_the_target(temperature: float, tiny_model: ElasticLM) -> None:
    drafts = {text: View(tiny_model, Granularity.parse(text)) for text in ("layers=0", "layers=0-2")}
    clock, params = LayerClock(tiny_model), SamplingParams(temperature=temperature)
    steps = time_drafts(tiny_model, drafts, params, budget=0, clock=clock)
    assert steps == {"layers=0": DraftCosts(0.25, 0.25), "layers=0-2": DraftCosts(0.75, 0.75)}


def test_a_first_drafted_token_may_cost_more_than_others() -> None:
    assert [DraftCosts(first=0.5, more=0.25)(gamma) for gamma in (1, 2)] == [0.5, 0.375]


def test_the_hosts_part_is_timed_for_each_distribution_and_verifier(
    tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock counts distributions that are made: gamma + 1 to judge gamma drafted tokens."""
    made = 0.0
    real = torch.softmax

    def counting(x: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal made
        made += x.numel() / 64
        return real(x, dim)

    monkeypatch.setattr("models.decode.sampling.params.torch.softmax", counting)
    kinds = [(SamplingParams(), "block"), (SamplingParams(temperature=1.0), "coupled")]
    hosts = time_hosts(tiny_model, kinds, budget=0, clock=lambda: made)
    assert [hosts[kinds[0]](gamma) for gamma in (0, 1, 7)] == [0, 0, 0]
    assert [hosts[kinds[1]](gamma) for gamma in (0, 1, 7, 20)] == [1, 2, 8, 21]


def test_what_the_engine_does_besides_is_part_of_every_round(
    tiny_model: ElasticLM, commits: Callable[[], float]
) -> None:
    """By a clock that counts what is committed, and no pass or verification."""
    kind = (SamplingParams(), "block")
    host = time_hosts(tiny_model, [kind], budget=0, clock=commits)[kind]
    assert [host(gamma) for gamma in (0, 4)] == [1, 1]


def test_between_what_was_measured_a_verification_is_interpolated() -> None:
    assert HostCosts({0: 1.0, 2: 5.0})(1) == 3.0
