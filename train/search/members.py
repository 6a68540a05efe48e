"""The member that loses least within a budget, and the frontier of all sizes.

    proxy       what each layer's widths cost in loss, from members with one layer changed
    knapsack    the best choice of options at every cost, for each set of layers
    measure     some of the frontier, the paper's heuristic, the trained members and the uniform ones
    correct     the proxy by what was measured; again knapsack and measure
    switch      one layer narrower, another wider, around the best

What is chosen is chosen by measured losses; the proxy only says what is worth measuring.
"""

import bisect
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from models.base.errors import UsageError
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.measure.token_losses import Report, TokenLosses
from train.search.budgets import Budget, Cost, show_cost
from train.search.found import Found, Margin, Result, mean_distance, spearman
from train.search.knapsack import knapsack_frontier
from train.search.proxy import Proxy, find_layer_sets, measure_proxy
from train.search.space import Choice, Option, Space

NUM_TARGETS = 12
"""Costs at which the frontier is measured."""
NEAR = (1.0, 0.97, 0.94)
"""Fractions of a budget at which it is measured, too."""
ROUNDS = 3
"""Times that candidates are found, measured and the proxy corrected."""
SETS = 4
"""Sets of layers whose best member is measured in each round."""
SWITCHES = 4
"""Switches of two layers that are measured at a time."""


class MemberSearch:
    """A search under budgets; see this file's docstring.

    Args:
        losses: measures members on the text.
        family: trained members by name.
        space: options of a layer.
        budgets: all of which a member must keep; the first one's cost is the frontier's.
        costs: kind of budget -> what a member costs.
        report: told how far the work is.
    """

    def __init__(
        self,
        losses: TokenLosses,
        family: Mapping[str, Granularity],
        space: Space,
        budgets: Sequence[Budget],
        costs: Mapping[str, Cost],
        report: Report | None = None,
    ) -> None:
        self.losses, self.space, self.report = losses, space, report
        self.family, self.budgets, self.costs = dict(family), budgets, costs
        self.kind = budgets[0].kind
        self.limits = {
            one.kind: limit for one in budgets if (limit := one.limit(costs[one.kind])) is not None
        }
        self.origins: dict[Choice, str] = {}
        self.predicted: dict[Choice, float] = {}
        self._seen: dict[Choice, dict[str, float]] = {}

    def run(self, num_evaluations: int = 60) -> Result:
        """Search.

        Raises:
            UsageError: if no member keeps the budgets.
        """
        before = self.losses.num_measured
        trained_sets = [one.layers for one in self.family.values() if one.layers is not None]
        self._check_budget(trained_sets)
        sets = find_layer_sets(self.losses, self.space, trained_sets, self.report)
        proxy = measure_proxy(self.losses, self.space, [self.space.all_layers, *sets], self.report)
        every = self.space.all_layers
        self._add("uniform", [self.space.uniform(every, one) for one in self.space.options], proxy)
        most = len(self.origins) + num_evaluations  # the uniform ones are known already
        self._add("heuristic", self._heuristics()[: max(1, num_evaluations // 4)], proxy)
        last: set[Choice] = set()
        for _ in range(ROUNDS):
            earlier = set(self.origins)
            self._add("found", self._picks(proxy)[: max(1, most - len(earlier))], proxy)
            if self.origins.keys() == earlier:
                break
            self._measure()
            last = self.origins.keys() - earlier
            proxy = proxy.corrected(self._known())
        if self.limits:
            self._switch(proxy, most)
        return self._result(before, last)

    def _check_budget(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Say before anything is measured that no member can keep a budget."""
        num = self.space.num_layers
        few = min([*map(len, sets), max(1, num // 2 if num <= 12 else num - num // 4)])
        least_sets = [one for one in [*sets, tuple(range(few))] if len(one) == few]
        smallest = self.space.uniform(least_sets[0], self.space.least).member(num)
        for kind, limit in self.limits.items():
            cost = self.costs[kind](smallest)
            if cost > limit:
                raise UsageError(
                    f"--budget {next(one.text for one in self.budgets if one.kind == kind)} allows "
                    f"{show_cost(kind, limit)}, and the smallest member, {smallest}, takes "
                    f"{show_cost(kind, cost)}; allow that much"
                )

    def _cost(self, choice: Choice) -> dict[str, float]:
        if choice not in self._seen:
            member = choice.member(self.space.num_layers)
            self._seen[choice] = {kind: cost(member) for kind, cost in self.costs.items()}
        return self._seen[choice]

    def _fits(self, choice: Choice) -> bool:
        costs = self._cost(choice)
        return all(costs[kind] <= limit * (1 + 1e-9) for kind, limit in self.limits.items())

    def _add(self, origin: str, choices: Iterable[Choice], proxy: Proxy) -> None:
        for choice in choices:
            if choice not in self.origins:
                self.origins[choice], self.predicted[choice] = origin, proxy.predict(choice)

    def _measure(self) -> None:
        members = [choice.member(self.space.num_layers) for choice in self.origins]
        self.losses.measure([FULL, *self.family.values(), *members], self.report, "measuring candidates")

    def _known(self) -> dict[Choice, float]:
        return {one: self._loss(one) for one in self.origins}

    def _loss(self, choice: Choice) -> float:
        return self.losses.mean(choice.member(self.space.num_layers))

    def _targets(self) -> list[float]:
        """Return the costs at which members are picked."""
        full = self._cost(self.space.uniform(self.space.all_layers, self.space.full))[self.kind]
        least = self._cost(self.space.uniform(self.space.all_layers, self.space.least))[self.kind]
        spaced = np.linspace(least, full, NUM_TARGETS + 1)[1:]
        limit = self.limits.get(self.kind)
        return [*(limit * near for near in NEAR if limit is not None), *spaced]

    def _picks(self, proxy: Proxy) -> list[Choice]:
        """Return the best member by the proxy at each target, and within all budgets."""
        kinds = [self.kind] if len(self.limits) < 2 else list(self.limits)
        found: list[Choice] = []
        for weights in _mixtures(kinds):
            points = self._frontier(proxy, weights)
            found += self._at_targets(points) if weights == {self.kind: 1.0} else []
            fitting = [choice for _, choice in points if self._fits(choice)]
            found = [*fitting[-1:], *found] if self.limits else found
        return list(dict.fromkeys([*self._of_each_set(proxy), *found]))

    def _of_each_set(self, proxy: Proxy) -> list[Choice]:
        """Return the best members within the budgets of a few sets of layers, which no sum compares well."""
        best = []
        for layers in proxy.offsets if self.limits else ():
            points = self._frontier(proxy, {self.kind: 1.0}, [layers])
            fitting = [choice for _, choice in points if self._fits(choice)]
            best += fitting[-1:]
        return sorted(best, key=proxy.predict)[:SETS]

    def _frontier(
        self, proxy: Proxy, weights: Mapping[str, float], sets: Iterable[tuple[int, ...]] | None = None
    ) -> list[tuple[float, Choice]]:
        """Return costs and members of the proxy's frontier over sets of layers, the cheapest first."""
        candidates: list[tuple[float, float, Choice]] = []
        for layers in proxy.offsets if sets is None else sets:
            for options in self.space.groups_of_options():
                candidates += self._points(proxy, layers, options, weights)
        kept, best = [], float("inf")
        for cost, loss, choice in sorted(candidates, key=lambda one: one[:2]):
            if loss < best:
                best = loss
                kept.append((cost, choice))
        return kept

    def _points(
        self, proxy: Proxy, layers: tuple[int, ...], options: Sequence[Option], weights: Mapping[str, float]
    ) -> list[tuple[float, float, Choice]]:
        """Return the frontier of one set of layers: costs, predicted losses, and members."""
        if not (self.space.unequal_ffn or self.space.unequal_heads):
            choice = self.space.uniform(layers, options[0])
            return [(self._uniform_cost(choice, weights), proxy.predict(choice), choice)]
        uniform = [self._uniform_cost(self.space.uniform(layers, one), weights) for one in options]
        # Latency is no sum over layers, but rises with their parameters.
        sums = [self._parameters(layers, one) for one in options] if set(weights) == {"latency"} else uniform
        losses = [
            [proxy.factors[layers] * proxy.sensitivities[layer][one] for one in options] for layer in layers
        ]
        least = min(sums)
        exact = set(weights) <= {"params", "flops", "latency"} and len(weights) == 1
        added = [(one - least) / len(layers) for one in sums]
        points = knapsack_frontier([added] * len(layers), losses, exact=exact)
        known = sorted(zip(sums, uniform, strict=True))
        costs = np.interp([least + one.cost for one in points], *np.array(known).T)
        base = proxy.full + proxy.offsets[layers]
        return [
            (float(cost), base + one.loss, Choice(layers, tuple(options[place] for place in one.choice)))
            for cost, one in zip(costs, points, strict=True)
        ]

    def _parameters(self, layers: tuple[int, ...], option: Option) -> int:
        member = self.space.uniform(layers, option).member(self.space.num_layers)
        return count_parameters(self.losses.model.config, member)

    def _uniform_cost(self, choice: Choice, weights: Mapping[str, float]) -> float:
        """Return what a member costs; several budgets are mixed."""
        costs = self._cost(choice)
        if len(weights) == 1:
            return costs[next(iter(weights))]
        return sum(weight * costs[kind] / self.limits[kind] for kind, weight in weights.items())

    def _heuristics(self) -> list[Choice]:
        """Return the paper's heuristic at each target."""
        choices = sorted(self.space.heuristics(), key=lambda one: self._cost(one)[self.kind])
        return self._at_targets([(self._cost(one)[self.kind], one) for one in choices])

    def _at_targets(self, points: Sequence[tuple[float, Choice]]) -> list[Choice]:
        """Return the most expensive member up to each target."""
        costs = [cost for cost, _ in points]
        places = (bisect.bisect_right(costs, target * (1 + 1e-9)) for target in self._targets())
        return list(dict.fromkeys(points[place - 1][1] for place in places if place))

    def _switch(self, proxy: Proxy, most: int) -> None:
        """Measure members around the best one until none is better, or enough are measured."""
        while len(self.origins) < most:
            fitting = {one: loss for one, loss in self._known().items() if self._fits(one)}
            if not fitting:
                return
            best = min(fitting, key=fitting.__getitem__)
            near = [one for one in self._neighbours(best) if one not in self.origins and self._fits(one)]
            few = sorted(near, key=proxy.predict)[: min(SWITCHES, most - len(self.origins))]
            self._add("found", few, proxy)
            self._measure()
            proxy = proxy.corrected(self._known())
            known = self._known()
            if not few or min(known[one] for one in few) >= known[best]:
                return

    def _neighbours(self, choice: Choice) -> list[Choice]:
        """Return members of which one layer is a step wider, or another one narrower as well."""
        if not self.space.unequal_ffn:
            return []
        steps, widths = self.space.ffn, [option.ffn for option in choice.options]

        def moved(ups: Sequence[int], downs: Sequence[int]) -> Choice | None:
            new = list(choice.options)
            for places, change in ((ups, 1), (downs, -1)):
                for place in places:
                    index = steps.index(widths[place]) + change
                    if not 0 <= index < len(steps):
                        return None
                    new[place] = Option(steps[index], new[place].heads)
            return Choice(choice.layers, tuple(new))

        places = range(len(widths))
        moves = [moved([up], []) for up in places]
        moves += [moved([up], [down]) for up, down in itertools.permutations(places, 2)]
        return [one for one in dict.fromkeys(moves) if one is not None]

    def _result(self, before: int, last: Collection[Choice]) -> Result:
        found = [self._found(choice, origin) for choice, origin in self.origins.items()]
        known = {str(one.member): one for one in found}
        for name, member in {**self.family, "full": FULL}.items():
            same = known.get(str(member))
            if same is None or same.name is None:
                known[str(member)] = self._found(self.space.choice_of(member), "trained", name)
        rows = sorted(known.values(), key=lambda one: (one.costs[self.kind], one.loss))
        fitting = [one for one in rows if one.fits] if self.limits else []
        best = min(fitting, key=lambda one: one.loss, default=None)
        unequal = [one for one in self.predicted if len({*one.options}) > 1]
        pairs = {one: (self.predicted[one], self._loss(one)) for one in unequal}
        return Result(
            found=rows,
            best=best,
            margins=[] if best is None else self._margins(best, fitting),
            rank_correlation=spearman(list(pairs.values())),
            prediction_error=mean_distance(pairs.values()),
            last_error=mean_distance(pair for one, pair in pairs.items() if one in last),
            num_evaluated=len(rows),
            num_measured=self.losses.num_measured - before,
        )

    def _margins(self, best: Found, fitting: Sequence[Found]) -> list[Margin]:
        found = []
        for origin in ("trained", "uniform", "heuristic"):
            others = [one for one in fitting if one.origin == origin and one is not best]
            if others:
                other = min(others, key=lambda one: one.loss)
                found.append(Margin(other=other, difference=self.losses.compare(best.member, other.member)))
        return found

    def _found(self, choice: Choice, origin: str, name: str | None = None) -> Found:
        member = choice.member(self.space.num_layers)
        difference = self.losses.compare(member, FULL)
        return Found(
            name=name,
            member=member,
            origin=origin,
            costs=self._cost(choice),
            predicted=self.predicted.get(choice),
            loss=self.losses.mean(member),
            above=difference.mean,
            error=difference.error,
            fits=self._fits(choice),
        )


def _mixtures(kinds: Sequence[str]) -> list[dict[str, float]]:
    """Return weights by which several budgets are one."""
    mixed = [] if len(kinds) == 1 else [{kind: 1 / len(kinds) for kind in kinds}]
    return [*({kind: 1.0} for kind in kinds), *mixed]
