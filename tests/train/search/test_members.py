"""A search under a budget finds what a search of everything finds, and says what it cannot."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.measure.token_losses import TokenLosses
from train.search.budgets import cost_of, parse_budgets
from train.search.found import Result
from train.search.members import MemberSearch
from train.search.space import Choice, Option, Space

FAMILY = {
    "S": Granularity(ffn=(0.25,)),
    "L": Granularity(ffn=(0.5,)),
    "D": Granularity(layers=(0,)),
    "XL": FULL,
}


class Additive(TokenLosses):
    """Losses that are made up: layer i at a width loses (i + 1) times what it lacks, a layer less 9 more."""

    def _run(self, member: Granularity) -> Tensor:
        layers = {one.index: one.ffn for one in member.resolve(self.model.config).layers}
        lost = sum((i + 1) * (1 - layers[i] / 64) if i in layers else 9.0 + i for i in range(4))
        noise = torch.linspace(-1, 1, self.num_tokens)
        return 2.0 + lost + 0.01 * noise


def search(
    model: ElasticLM, budgets: Sequence[str], unequal: tuple[bool, bool] = (True, True), evaluations: int = 60
) -> Result:
    tokens_BT = torch.zeros(2, 8, dtype=torch.long)
    losses = Additive(model, [(tokens_BT, tokens_BT)])
    space = Space.of(model.config, FAMILY.values(), unequal=unequal)
    parsed = parse_budgets(budgets)
    costs = {one.kind: cost_of(one.kind, model.config, weight_bytes=4, context=64) for one in parsed}
    return MemberSearch(losses, FAMILY, space, parsed, costs).run(evaluations)


@pytest.mark.parametrize(
    "budget", ["params=0.6", "params=0.7", "params=0.85", "flops=0.8", "bytes=0.7", "memory=0.8"]
)
def test_of_additive_losses_it_finds_the_very_best(tiny_model: ElasticLM, budget: str) -> None:
    result = search(tiny_model, [budget])
    assert result.best is not None
    kind = budget.partition("=")[0]
    cost = cost_of(kind, tiny_model.config, weight_bytes=4, context=64)
    limit = parse_budgets([budget])[0].limit(cost)
    assert limit is not None
    space = Space.of(tiny_model.config, FAMILY.values())
    losses = Additive(tiny_model, [(torch.zeros(2, 8, dtype=torch.long),) * 2])
    every = (
        Choice(space.all_layers, tuple(Option(ffn, 1.0) for ffn in widths)).member(4)
        for widths in itertools.product(space.ffn, repeat=4)
    )
    best = min(losses.mean(one) for one in every if cost(one) <= limit)
    assert result.best.costs[kind] <= limit
    assert result.best.loss <= best + 1e-6


def test_trained_and_uniform_members_and_the_heuristic_are_always_there(tiny_model: ElasticLM) -> None:
    result = search(tiny_model, ["params"])
    origins = {one.origin for one in result.found}
    assert origins == {"trained", "uniform", "heuristic", "found"}
    assert {one.name for one in result.found} >= {*FAMILY}
    assert result.best is None
    assert result.rank_correlation is not None
    assert result.rank_correlation > 0.95
    losses = [one.loss for one in result.frontier("params")]
    assert losses == sorted(losses, reverse=True)


def test_an_engine_of_equal_layers_is_given_members_of_equal_layers(tiny_model: ElasticLM) -> None:
    result = search(tiny_model, ["params=0.7"], unequal=(False, False))
    assert result.best is not None
    assert result.best.member.resolve(tiny_model.config).is_uniform


def test_several_budgets_are_all_kept(tiny_model: ElasticLM) -> None:
    result = search(tiny_model, ["params=0.8", "flops=0.6"])
    assert result.best is not None
    for kind, fraction in (("params", 0.8), ("flops", 0.6)):
        cost = cost_of(kind, tiny_model.config, weight_bytes=4, context=64)
        assert result.best.costs[kind] <= fraction * cost(FULL)


def test_a_budget_below_the_smallest_member_names_it(tiny_model: ElasticLM) -> None:
    with pytest.raises(UsageError, match=r"params=0\.01 allows .* the smallest member, ffn=0\.25,layers=0"):
        search(tiny_model, ["params=0.01"])


def test_a_budget_is_kept_with_few_evaluations(tiny_model: ElasticLM, tiny_config: ElasticConfig) -> None:
    result = search(tiny_model, ["params=0.7"], evaluations=1)
    assert result.best is not None
    cost = cost_of("params", tiny_config, weight_bytes=4, context=64)
    assert result.best.costs["params"] <= 0.7 * cost(FULL)
