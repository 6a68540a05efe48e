"""A policy that is never slower than plain decoding by more than a stated fraction, whatever drafts.

Before each round it picks the arm, which is a draft, and the number of tokens gamma with the highest
expected speed, plain decoding (gamma = 0) among them:

    (1 + a_1 + a_1 a_2 + ... + a_1 .. a_gamma) / (gamma c + v(gamma + 1))

a_i is the chance that the i-th drafted token is kept if all before it were, a running estimate of its
own for each arm and position; c and v are its own clocked rounds, in units of a plain step. Two
ledgers in that unit keep it honest:

    budget     Every round pays in what it gained over plain decoding and SLACK of what it took, up to
               BUDGET, with which it starts. Nothing is drafted that could overdraw it, were every token
               rejected. Hence time <= tokens + BUDGET + SLACK x time, over the whole text and over any
               stretch of it: 0.97 of plain decoding's speed from 200 tokens on. (A conservative bandit:
               Wu et al., https://arxiv.org/abs/1602.04282.) This holds as far as costs are known: a draft's
               first rounds may be dearer than was guessed, which is why they are short.
    explored   What was lost by trying other choices than the best: at most EXPLORE_FRACTION of the time.

Where plain decoding is the best for long, tries that find nothing become rarer and rarer, and the rounds
between them are decided at once, unless there is something to copy.

Only time hangs on all this: see `models/decode/engine/policy.py` for why the output distribution cannot.
"""

from collections.abc import Mapping
from math import ceil
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft
from models.decode.engine.policy import NO_DRAFT, PLAIN, Round, RoundPlan
from models.decode.engine.state import State
from models.decode.tune.predict import MAX_GAMMA
from models.decode.tune.running_stats import Clocks, Rates
from models.elastic.view import Model

SLACK = 0.01
BUDGET = 3.5
EXPLORE_FRACTION = 0.02
# Positions that are reached more rarely are not worth the time to think of them.
LEAST_REACH = 0.02
# While plain decoding is the best choice and tries find nothing, they become ever rarer, at last after this
# many rounds: a try drives the target's weights out of the caches, for which plain rounds after it pay.
LONGEST_PAUSE = 64


NOTHING_KNOWN: Mapping[str, float] = MappingProxyType({})


class Controller:
    """Chooses among drafts and numbers of tokens for one request; the next one gets its own.

    Args:
        drafts: the arms of the bandit, by name.
        costs: measured before, of the target and of drafts by name. Where both are known long drafts are
            trusted from the start; else gamma begins with 1 and doubles.
        alphas: acceptance by name, where it is known before the first round.
        most: the most drafted tokens a round.
    """

    def __init__(
        self,
        drafts: Mapping[str, Draft],
        costs: Costs | None = None,
        *,
        alphas: Mapping[str, float] = NOTHING_KNOWN,
        most: int = MAX_GAMMA,
    ) -> None:
        self.costs = costs
        self.budget = BUDGET
        self.spent = self.explored = 0.0
        self._drafts = drafts
        self._clocks = Clocks({name: draft.prior.step for name, draft in drafts.items()}, costs, most)
        self._rates = {
            name: Rates(alphas.get(name, draft.prior.alpha), most) for name, draft in drafts.items()
        }
        self._last_try = dict.fromkeys([NO_DRAFT, _LONGER, *self._rates], 0)
        self._num_rounds = self._last_explored = 0
        self._exploring_from: float | None = None  # the best choice's speed, in a round that tries another
        self._pause = 1  # rounds between tries, while plain decoding is the best
        self._rest = 0  # plain rounds that are decided: to think costs a twentieth of a small model's pass
        self._rests = False

    def check(self, target: Model) -> None:
        """See `Policy`."""
        for draft in self._drafts.values():
            draft.check(target)

    def choose(self, state: State, most: int) -> RoundPlan:
        """See `Policy`."""
        self._num_rounds += 1
        self._exploring_from = None
        self._rests = self._rest > 0 and not any(draft.room(state) for draft in self._drafts.values())
        if self._rests or not self._clocks.ready or most < 1:
            return PLAIN
        self._rest = 0
        ladders = [ladder for name in self._drafts if (ladder := self._ladder(name, state, most))]
        tops = [_PLAIN_OFFER, *(max(ladder, key=_speed) for ladder in ladders)]
        best = max(tops, key=_speed)
        ladder = next((ladder for ladder in ladders if best in ladder), [])
        if best.cost - 1.0 > self.budget:  # it is saved for; a shorter round of it may be in reach
            return max(
                [_PLAIN_OFFER, *(each for each in ladder if each.cost - 1.0 <= self.budget)], key=_speed
            ).plan
        others = [(top.plan.name, top) for top in tops if top is not best]
        others += [(_LONGER, offer) for offer in ladder[best.plan.gamma :][:1]]
        return self._explore(best, others).plan

    def observe(self, done: Round) -> None:
        """See `Policy`."""
        if self._rests:
            self._rest -= 1  # a plain round, whose time is not needed
        else:
            self._learn(done)
        cost, num_tokens = self._clocks.cost(done.draft, done.num_drafted), done.num_accepted + 1
        self.spent += cost
        self.budget = min(BUDGET, self.budget + SLACK * cost + num_tokens - cost)
        if self._exploring_from is not None:
            self.explored += max(0.0, cost - num_tokens / self._exploring_from)

    def _learn(self, done: Round) -> None:
        """Learn what the round cost and what was kept."""
        self._clocks.observe(done)
        self._last_try[done.draft] = self._num_rounds
        if done.num_drafted:
            self._rates[done.draft].observe(done.num_drafted, done.num_accepted)
            self._pause = 1 if done.num_accepted else min(2 * self._pause, LONGEST_PAUSE)

    def _ladder(self, name: str, state: State, most: int) -> "list[_Offer]":
        """Return what this draft offers after this state, by number of tokens from one on."""
        draft = self._drafts[name]
        most = min(most, self._clocks.longest[name])
        if (room := draft.room(state)) is not None:
            most = min(most, room)
        ladder, tokens, reach = [], 1.0, 1.0
        for gamma, rate in enumerate(self._rates[name].values[:most], start=1):
            cost = self._clocks.cost(name, gamma)
            reach *= rate
            tokens += reach
            ladder.append(_Offer(tokens / cost, tokens, cost, RoundPlan(draft, gamma, name)))
            if reach < LEAST_REACH:
                break
        return ladder

    def _explore(self, best: "_Offer", others: "list[tuple[str, _Offer]]") -> "_Offer":
        """Return the best; or what was not tried for longest, as soon as both ledgers have room for it.

        Plain decoding is tried for its cost, another arm for its acceptance, one token more than the
        best for both. Only one is saved for at a time: cheap tries must not starve a dear one.
        """
        if not others:
            return best
        name, offer = min(others, key=lambda other: self._last_try[other[0]])
        loss = offer.cost - offer.tokens / best.speed
        # A pause is not made up for: one try is saved for, not a row of them.
        self.explored = max(self.explored, EXPLORE_FRACTION * self.spent - max(loss, 1.0))
        early = (self.explored + loss) / EXPLORE_FRACTION - self.spent
        dear = offer.cost - 1.0 - self.budget
        if best is _PLAIN_OFFER:
            early = max(early, self._last_explored + self._pause - self._num_rounds)
        if early > 0 or dear > 0:
            if best is _PLAIN_OFFER:
                self._rest = min(LONGEST_PAUSE, ceil(max(early, dear / SLACK)))
            return best
        self._last_explored = self._num_rounds
        self._exploring_from, self._last_try[name] = best.speed, self._num_rounds
        return offer


class _Offer(NamedTuple):
    speed: float
    """Expected speed over plain decoding."""
    tokens: float
    """Expected tokens of the round."""
    cost: float
    """Expected cost in plain steps."""
    plan: RoundPlan


_PLAIN_OFFER = _Offer(1.0, 1.0, 1.0, PLAIN)
_LONGER = "one token more"
_speed = attrgetter("speed")
