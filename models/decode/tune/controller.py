"""A policy that is never slower than plain decoding by more than a stated share, whatever drafts.

Before each round it picks the arm, which is a draft, and the number of tokens gamma with the highest
expected speed, plain decoding (gamma = 0) among them:

    (1 + a_1 + a_1 a_2 + ... + a_1 .. a_gamma) / (gamma c + v(gamma + 1))

a_i is the chance that the i-th drafted token is kept if all before it were, a running estimate of its
own for each arm and position; c and v are its own clocked rounds, in units of a plain step. Two
ledgers in that unit keep it honest:

    purse      Every round pays in what it gained over plain decoding and SHARE of what it took, up to
               PURSE, with which it starts. Nothing is drafted that could overdraw it, were every token
               rejected. Hence time <= tokens + PURSE + SHARE x time, over the whole text and over any
               stretch of it: 0.97 of plain decoding's speed from 200 tokens on. (A conservative bandit:
               Wu et al., https://arxiv.org/abs/1602.04282.) This holds as far as costs are known: a draft's
               first rounds may be dearer than was guessed, which is why they are short.
    explored   What looks at other choices than the best lost against it: at most LOOKS of the time.

Where plain decoding is the best for long, looks that find nothing become rarer and rarer, and the rounds
between them are settled without a thought, unless there is something to copy.

Only time hangs on all this: see `models/decode/engine/policy.py` for why the output law cannot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from operator import attrgetter
from typing import NamedTuple

from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft
from models.decode.engine.policy import NO_DRAFT, PLAIN, Plan, Round
from models.decode.engine.state import Model, State
from models.decode.tune.predict import MAX_GAMMA
from models.decode.tune.running_stats import Clocks, Rates

SHARE = 0.01
PURSE = 3.5
LOOKS = 0.02
# Positions that are reached more rarely are not worth the time to think of them.
LEAST_REACH = 0.02
# While plain decoding is the best choice and looks find nothing, they become ever rarer, at last after so
# many rounds: a look drives the target's weights out of the caches, for which plain rounds after it pay.
LONGEST_PAUSE = 64
# Without a measurement: high enough that every position is tried before it is given up.
PRIOR_ALPHA = 0.8


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Something that can draft."""

    name: str
    draft: Draft
    alpha: float = PRIOR_ALPHA
    """Its acceptance, as far as it is known before the first round."""
    step: float | None = None
    """What a drafted token costs in plain steps, if that is known."""
    room: Callable[[State], int] | None = None
    """How many tokens it could propose after a state, if there is a limit; settled tokens alone decide."""


class Controller:
    """Chooses among arms and numbers of tokens for one request; the next one gets its own.

    Args:
        arms: what can draft.
        costs: measured before, of the target and of arms by name. Where both are known long drafts are
            trusted from the start; else gamma begins with 1 and doubles.
        most: the most drafted tokens a round.
    """

    def __init__(self, arms: Sequence[Arm], costs: Costs | None = None, *, most: int = MAX_GAMMA) -> None:
        self.costs = costs
        self.purse = PURSE
        self.spent = self.explored = 0.0
        self._arms = arms
        self._clocks = Clocks({arm.name: arm.step for arm in arms}, costs, most)
        self._rates = {arm.name: Rates(arm.alpha, most) for arm in arms}
        self._last_try = dict.fromkeys([NO_DRAFT, _LONGER, *self._rates], 0)
        self._num_rounds = self._last_look = 0
        self._looking_from: float | None = None  # the best choice's speed, in a round that tries another
        self._pause = 1  # rounds between looks, while plain decoding is the best
        self._rest = 0  # plain rounds that are settled: to think costs a twentieth of a small model's pass
        self._rests = False

    def check(self, target: Model) -> None:
        """See `Policy`."""
        for arm in self._arms:
            arm.draft.check(target)

    def choose(self, state: State, most: int) -> Plan:
        """See `Policy`."""
        self._num_rounds += 1
        self._looking_from = None
        copies = (arm.room(state) for arm in self._arms if arm.room is not None)
        self._rests = self._rest > 0 and not any(copies)
        if self._rests or not self._clocks.ready or most < 1:
            return PLAIN
        self._rest = 0
        ladders = [ladder for arm in self._arms if (ladder := self._ladder(arm, state, most))]
        tops = [_PLAIN, *(max(ladder, key=_speed) for ladder in ladders)]
        best = max(tops, key=_speed)
        ladder = next((ladder for ladder in ladders if best in ladder), [])
        if best.cost - 1.0 > self.purse:  # it is saved for; a shorter round of it may be in reach
            return max([_PLAIN, *(each for each in ladder if each.cost - 1.0 <= self.purse)], key=_speed).plan
        looks = [(top.plan.name, top) for top in tops if top is not best]
        looks += [(_LONGER, option) for option in ladder[best.plan.gamma :][:1]]
        return self._look(best, looks).plan

    def observe(self, done: Round) -> None:
        """See `Policy`."""
        if self._rests:
            self._rest -= 1  # a plain round, whose time is not needed
        else:
            self._learn(done)
        cost, num_tokens = self._clocks.cost(done.draft, done.num_drafted), done.num_accepted + 1
        self.spent += cost
        self.purse = min(PURSE, self.purse + SHARE * cost + num_tokens - cost)
        if self._looking_from is not None:
            self.explored += max(0.0, cost - num_tokens / self._looking_from)

    def _learn(self, done: Round) -> None:
        """What it cost and what was kept."""
        self._clocks.observe(done)
        self._last_try[done.draft] = self._num_rounds
        if done.num_drafted:
            self._rates[done.draft].observe(done.num_drafted, done.num_accepted)
            self._pause = 1 if done.num_accepted else min(2 * self._pause, LONGEST_PAUSE)

    def _ladder(self, arm: Arm, state: State, most: int) -> "list[_Option]":
        """What this arm offers after this state, by number of tokens from one on."""
        most = min(most, self._clocks.longest[arm.name])
        if arm.room is not None:
            most = min(most, arm.room(state))
        ladder, tokens, reach = [], 1.0, 1.0
        for gamma, rate in enumerate(self._rates[arm.name].values[:most], start=1):
            cost = self._clocks.cost(arm.name, gamma)
            reach *= rate
            tokens += reach
            ladder.append(_Option(tokens / cost, tokens, cost, Plan(arm.draft, gamma, arm.name)))
            if reach < LEAST_REACH:
                break
        return ladder

    def _look(self, best: "_Option", looks: "list[tuple[str, _Option]]") -> "_Option":
        """The best; or what was not tried for longest, as soon as both ledgers have room for it.

        Plain decoding is looked at for its cost, another arm for its acceptance, one token more than the
        best for both. Only one is saved for at a time: cheap looks must not starve a dear one.
        """
        if not looks:
            return best
        name, option = min(looks, key=lambda look: self._last_try[look[0]])
        loss = option.cost - option.tokens / best.speed
        # What was not looked at in a pause is not made up for: one look is saved for, not a row of them.
        self.explored = max(self.explored, LOOKS * self.spent - max(loss, 1.0))
        early = (self.explored + loss) / LOOKS - self.spent
        dear = option.cost - 1.0 - self.purse
        if best is _PLAIN:
            early = max(early, self._last_look + self._pause - self._num_rounds)
        if early > 0 or dear > 0:
            if best is _PLAIN:
                self._rest = min(LONGEST_PAUSE, ceil(max(early, dear / SHARE)))
            return best
        self._last_look = self._num_rounds
        self._looking_from, self._last_try[name] = best.speed, self._num_rounds
        return option


class _Option(NamedTuple):
    speed: float
    """Expected, over plain decoding's."""
    tokens: float
    """Expected."""
    cost: float
    """In plain steps."""
    plan: Plan


_PLAIN = _Option(1.0, 1.0, 1.0, PLAIN)
_LONGER = "one token more"
_speed = attrgetter("speed")
