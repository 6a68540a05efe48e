"""The controller against a clock that is simulated: never slower, whatever drafts, and soon at the best.

Time is counted in plain steps. Acceptance is drawn from seeds that are fixed, so nothing fails by chance.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import pytest

from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, Prior
from models.decode.engine.policy import NO_DRAFT, PLAIN, Round
from models.decode.engine.scheduler import Steps
from models.decode.engine.state import State
from models.decode.sampling.samplers import Proposal, Sampler
from models.decode.tune.controller import BUDGET, EXPLORE_FRACTION, SLACK, Controller
from models.decode.tune.predict import MAX_GAMMA
from models.elastic.view import Model

SECONDS = 0.004  # of a plain step
NOWHERE = cast("State", None)

ANY_PRIOR = Prior()


@dataclass
class Nobody:
    """Proposes nothing; only its room is asked for."""

    prior: Prior = ANY_PRIOR
    num_room: int | None = None

    def room(self, state: State) -> int | None:
        return self.num_room

    def check(self, target: Model) -> None:
        """Never called, like the next two."""

    def renew(self) -> Draft:
        raise NotImplementedError

    def propose(self, state: State, num_tokens: int, sampler: Sampler) -> Steps[Proposal]:
        raise NotImplementedError


class At(NamedTuple):
    """Where a token is drafted."""

    draft: str
    place: int
    """In the round."""
    now: int
    """Tokens so far."""


Rate = Callable[[At], float]
"""The chance that a drafted token is kept."""


def passes(num_tokens: int) -> float:
    return 1.0 + 0.04 * (num_tokens - 1)


@dataclass
class World:
    """What rounds take and what is kept, and the account of it."""

    steps: dict[str, float]
    rate: Rate
    seed: int = 0
    noise: float = 0.0
    time: float = 0.0
    num_tokens: int = 0
    rounds: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def known(self) -> Costs:
        target = {m: SECONDS * passes(m) for m in range(1, MAX_GAMMA + 2)}
        return Costs(target, {name: SECONDS * step for name, step in self.steps.items()})

    def controller(self, *, known: bool, alpha: float = 0.85) -> Controller:
        drafts = {name: Nobody(Prior(alpha)) for name in self.steps}
        return Controller(drafts, self.known() if known else None)

    def play(self, controller: Controller, num_tokens: int) -> float:
        """Decode so many more tokens; the speed over plain decoding."""
        tokens, time = self.num_tokens, self.time
        while self.num_tokens < tokens + num_tokens:
            self.round(controller)
        return (self.num_tokens - tokens) / (self.time - time)

    def round(self, controller: Controller) -> None:
        plan, kept = controller.choose(NOWHERE, MAX_GAMMA), 0
        while kept < plan.gamma and self.random.random() < self.rate(At(plan.name, kept, self.num_tokens)):
            kept += 1
        draft = self.held_up() * plan.gamma * self.steps.get(plan.name, 0.0)
        target = self.held_up() * passes(plan.gamma + 1)
        controller.observe(Round(plan.name, plan.gamma, kept, SECONDS * draft, SECONDS * target))
        self.time += draft + target
        self.num_tokens += kept + 1
        self.rounds[plan.name, plan.gamma] += 1

    def held_up(self) -> float:
        return 1.0 + self.noise * self.random.expovariate(1.0)


def best_speed(step: float, *rates: float) -> float:
    """Of any fixed number of tokens; the last rate holds for all positions behind."""
    speeds, tokens, reach = [1.0], 1.0, 1.0
    for gamma in range(1, MAX_GAMMA + 1):
        reach *= rates[min(gamma, len(rates)) - 1]
        tokens += reach
        speeds.append(tokens / (gamma * step + passes(gamma + 1)))
    return max(speeds)


RATES: dict[str, Rate] = {
    "adversarial": lambda _: 0.0,
    "poor": lambda _: 0.3,
    "good": lambda _: 0.85,
    "good, then adversarial": lambda at: 0.9 if at.now < 150 else 0.0,
    "adversarial, then good": lambda at: 0.0 if at.now < 150 else 0.9,
    "good at first": lambda at: 0.9 if at.place < 2 else 0.1,
    "good later on": lambda at: 0.3 if at.place < 1 else 0.95,
    "now and then": lambda at: 0.95 if at.now // 40 % 2 else 0.0,
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("step", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", RATES)
def test_it_is_never_slower_than_the_ledger_says(name: str, step: float, known: bool) -> None:
    for seed in range(5):
        world = World({"S": step}, RATES[name], seed)
        controller = world.controller(known=known)
        # Where costs were not known, the first rounds of a draft may be dearer than they were expected.
        overdraft = 0.0 if known else 1.5 * step
        while world.num_tokens < 400:
            world.round(controller)
            assert world.time <= world.num_tokens + BUDGET + SLACK * world.time + overdraft
            if world.num_tokens >= 200:
                assert world.num_tokens / world.time >= 0.97


@pytest.mark.parametrize("step", [0.05, 0.3])
def test_what_was_gained_before_is_not_lost_to_a_draft_that_turned_adversarial(step: float) -> None:
    world = World({"S": step}, lambda at: 0.9 if at.now < 1000 else 0.0)
    controller = world.controller(known=True)
    assert world.play(controller, 1000) > 1.5
    assert world.play(controller, 250) >= 0.97


def test_two_adversarial_drafts_cost_no_more_than_one() -> None:
    world = World({"S": 0.05, "D": 0.2}, RATES["adversarial"])
    assert world.play(world.controller(known=True, alpha=0.95), 250) >= 0.97


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("step", "rates"),
    [(0.05, (0.85,)), (0.2, (0.85,)), (0.5, (0.85,)), (0.2, (0.5,)), (0.2, (0.9, 0.9, 0.1)), (0.02, (0.97,))],
)
def test_it_comes_close_to_the_best_fixed_number_of_tokens(
    step: float, rates: tuple[float, ...], known: bool
) -> None:
    world = World({"S": step}, lambda at: rates[min(at.place, len(rates) - 1)])
    controller = world.controller(known=known)
    world.play(controller, 200)
    assert world.play(controller, 2000) > 0.94 * best_speed(step, *rates)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_it_finds_the_best_of_several_drafts(seed: int, known: bool) -> None:
    rates = {"adversarial": 0.0, "cheap": 0.5, "good": 0.85}
    world = World({"adversarial": 0.02, "cheap": 0.1, "good": 0.2}, lambda at: rates[at.draft], seed)
    controller = world.controller(known=known)
    world.play(controller, 300)
    world.rounds.clear()
    assert world.play(controller, 2000) > 0.92 * best_speed(0.2, rates["good"])
    shares = {name: sum(n for (who, _), n in world.rounds.items() if who == name) for name in rates}
    assert shares["good"] > 0.85 * world.rounds.total()


def test_it_comes_back_to_a_draft_that_turned_good() -> None:
    world = World({"S": 0.2}, lambda at: 0.0 if at.now < 600 else 0.9)
    controller = world.controller(known=True)
    world.play(controller, 700)
    assert world.play(controller, 500) > 0.9 * best_speed(0.2, 0.9)


def test_looks_at_other_choices_take_at_most_their_fraction() -> None:
    world = World({"S": 0.1, "D": 0.2}, lambda at: {"S": 0.2, "D": 0.85}[at.draft])
    controller = world.controller(known=True)
    for _ in range(800):
        world.round(controller)
        assert controller.explored <= EXPLORE_FRACTION * controller.spent + 2.5  # and one unlucky try
    assert world.rounds[NO_DRAFT, 0] > 3  # a plain step's cost is looked at again
    assert controller.spent == pytest.approx(world.time, rel=0.01)


def test_rounds_that_are_held_up_now_and_then_change_little() -> None:
    speeds = []
    for noise in (0.0, 0.2):
        world = World({"S": 0.2}, RATES["good"], noise=noise)
        speeds.append(world.play(world.controller(known=True), 2000) * (1 + noise))
    assert speeds[1] > 0.93 * speeds[0]


def test_a_first_step_that_is_slow_does_not_condemn_a_draft() -> None:
    world = World({"S": 0.2}, RATES["good"])
    controller = world.controller(known=True)
    plan = controller.choose(NOWHERE, MAX_GAMMA)
    controller.observe(Round("S", plan.gamma, 0, 50 * SECONDS, 50 * SECONDS))
    world.rounds.clear()
    world.play(controller, 100)
    assert sum(n for (name, _), n in world.rounds.items() if name == "S") > 0.7 * world.rounds.total()


def test_without_known_costs_it_measures_plain_steps_and_then_doubles() -> None:
    world = World({"S": 0.05}, lambda _: 1.0)
    controller = world.controller(known=False)
    gammas = []
    for _ in range(6):
        plan = controller.choose(NOWHERE, MAX_GAMMA)
        gammas.append(plan.gamma)
        taken = Round(plan.name, plan.gamma, plan.gamma, 0.05 * plan.gamma, passes(plan.gamma + 1))
        controller.observe(taken)
    assert gammas[:2] == [0, 0]
    assert [gamma for gamma in gammas if gamma][:3] == [1, 2, 4]


def test_known_costs_and_acceptance_give_the_formulas_choice_at_once() -> None:
    world = World({"S": 0.2}, RATES["good"])
    speeds = {g: best_speed(0.2, *[0.85] * g, 0.0) for g in range(1, MAX_GAMMA + 1)}
    assert world.controller(known=True, alpha=0.85).choose(NOWHERE, MAX_GAMMA).gamma == max(
        speeds, key=lambda g: (round(speeds[g], 9), -g)
    )


def test_it_keeps_to_the_room_that_there_is() -> None:
    costs = World({"S": 0.0}, RATES["good"]).known()
    two = {"S": Nobody(Prior(0.95, 0.0), num_room=2)}
    assert Controller(two, costs).choose(NOWHERE, MAX_GAMMA).gamma == 2
    assert Controller(two, costs).choose(NOWHERE, 1).gamma == 1
    assert Controller(two, costs).choose(NOWHERE, 0) == PLAIN
    nothing = {"S": Nobody(Prior(0.95, 0.0), num_room=0)}
    assert Controller(nothing, costs).choose(NOWHERE, MAX_GAMMA) == PLAIN


def test_without_a_draft_it_decodes_plainly() -> None:
    controller = Controller({})
    for _ in range(5):
        assert controller.choose(NOWHERE, MAX_GAMMA) == PLAIN
        controller.observe(Round(NO_DRAFT, 0, 0, 0.0, SECONDS))


@pytest.mark.parametrize("known", [True, False])
def test_tries_that_find_nothing_become_rare(known: bool) -> None:
    world = World({"S": 0.2, "D": 0.1}, lambda _: 0.0)
    controller = world.controller(known=known)
    world.play(controller, 600)
    world.rounds.clear()
    world.play(controller, 640)
    assert 5 <= world.rounds.total() - world.rounds[NO_DRAFT, 0] <= 11


def test_while_plain_decoding_is_best_it_hardly_thinks() -> None:
    """But a copy that becomes possible is thought of at once, and time and tries are accounted as ever."""
    thoughts = 0

    class Counting(Controller):
        def _ladder(self, *arguments: Any) -> list[Any]:
            nonlocal thoughts
            thoughts += 1
            return super()._ladder(*arguments)

    copying = Nobody(Prior(0.95, 0.0), num_room=0)
    world = World({"S": 0.2, "copy": 0.0}, lambda at: float(at.draft == "copy"))
    controller = Counting({"S": Nobody(), "copy": copying}, world.known())
    world.play(controller, 600)
    thoughts, spent = 0, controller.spent
    world.play(controller, 400)
    assert thoughts < 2 * 40
    assert controller.spent - spent == pytest.approx(400, rel=0.02)
    copying.num_room = 4
    for _ in range(4):
        world.round(controller)
    assert world.rounds["copy", 4] >= 2, "another may be a try"
