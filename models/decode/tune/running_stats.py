"""Running statistics of a request's rounds: how often drafts are kept, what rounds cost."""

from collections import deque
from collections.abc import Mapping
from statistics import median_low

from models.decode.engine.costs import Costs
from models.decode.engine.policy import Round

# What was seen 20 tokens ago weighs a third of what is seen now.
MEMORY = 0.95
# The prior acceptance counts as this many tokens seen before.
PRIOR_WEIGHT = 3.0
# Where nothing is known: a draft step, and each further token of a target pass, in plain steps.
PRIOR_STEP, PRIOR_SLOPE = 0.3, 0.1
# A cost is the median of this many rounds: one that other programs held up does not move it.
NUM_RECENT = 9
# A clock that stood still must not divide by zero.
TINY = 1e-9


class Rates:
    """The rate at which a drafted token is kept if all before it were, by position in the round.

    >>> rates = Rates(alpha=0.8, most=2)
    >>> rates.observe(num_drafted=2, num_accepted=0)  # the second position was not reached
    >>> [round(rate, 3) for rate in rates.values]
    [0.592, 0.8]
    """

    def __init__(self, alpha: float, most: int) -> None:
        self.values = [alpha] * most
        self._kept, self._seen = [PRIOR_WEIGHT * alpha] * most, [PRIOR_WEIGHT] * most

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from a round."""
        for position in range(min(num_accepted + 1, num_drafted)):
            self._kept[position] = MEMORY * self._kept[position] + (position < num_accepted)
            self._seen[position] = MEMORY * self._seen[position] + 1.0
            self.values[position] = self._kept[position] / self._seen[position]


class Clocks:
    """Costs of rounds in plain steps: as measured where they were seen, else in proportion to that.

    Args:
        steps: by draft, the cost of a drafted token in plain steps, if it is known apart from `costs`.
        costs: measured before, if they were.
        most: the most drafted tokens a round.
    """

    def __init__(self, steps: Mapping[str, float | None], costs: Costs | None, most: int) -> None:
        target = costs.target if costs else {1: 1.0}
        drafts = costs.drafts if costs else {}
        known = {name: drafts[name] / target[1] if name in drafts else steps[name] for name in steps}
        numbers = range(1, most + 2)
        # Passes by number of tokens; there are none on 0.
        shape = [target[m] / target[1] if m in target else 1.0 + PRIOR_SLOPE * (m - 1) for m in numbers]
        self._shape = [0.0, *shape]
        self._passes = list(self._shape)
        self._steps = {name: PRIOR_STEP if step is None else step for name, step in known.items()}
        self._trusted = costs is not None
        self._plain = target[1] if costs else None
        self._recent: dict[int | str, deque[float]] = {}
        self._pass_seconds: dict[int, float] = {}
        self._step_seconds: dict[str, float] = {}
        self._nearest = [1, *numbers]
        self.longest = {name: most if costs and step is not None else 1 for name, step in known.items()}
        """The longest round of each draft: where costs are not known, twice as long as any was."""

    @property
    def ready(self) -> bool:
        """True if a plain step's cost is known. The first one may be slow, so two are measured."""
        return self._trusted or len(self._recent.get(1, ())) > 1

    def cost(self, name: str, num_drafted: int) -> float:
        """Return the cost of a round that drafts `num_drafted` tokens, in plain steps.

        >>> clocks = Clocks({"S": 0.25}, Costs({1: 2.0, 2: 2.2, 3: 2.4}, {}), most=2)
        >>> clocks.cost("S", 2)
        1.7
        """
        return self._passes[num_drafted + 1] + (num_drafted * self._steps[name] if num_drafted else 0.0)

    def observe(self, done: Round) -> None:
        """Take over what a round took."""
        num_drafted, num_tokens = done.num_drafted, done.num_drafted + 1
        new = num_tokens not in self._pass_seconds
        self._pass_seconds[num_tokens] = self._note(num_tokens, done.target_seconds, self._passes[num_tokens])
        if num_drafted:
            self._step_seconds[done.draft] = self._note(
                done.draft, done.draft_seconds / num_drafted, self._steps[done.draft]
            )
            longest = min(2 * num_drafted, len(self._passes) - 2)
            self.longest[done.draft] = max(self.longest[done.draft], longest)
        if new:
            seen = list(self._pass_seconds)
            self._nearest = [min(seen, key=lambda m: abs(m - num)) for num in range(len(self._passes))]
        self._rescale()

    def _note(self, cell: int | str, seconds: float, expected: float) -> float:
        """Return the cell's cost in seconds, now that it took `seconds` once more."""
        if cell not in self._recent:
            # What was expected counts as seen once: a first run that is slow must not be the last.
            first = [] if self._plain is None else [expected * self._plain]
            self._recent[cell] = deque(first, maxlen=NUM_RECENT)
        self._recent[cell].append(max(seconds, TINY))
        return median_low(self._recent[cell])

    def _rescale(self) -> None:
        shape, measured = self._shape, self._pass_seconds
        seconds = [measured[near] * shape[m] / shape[near] for m, near in enumerate(self._nearest)]
        self._plain = plain = seconds[1]
        self._passes = [each / plain for each in seconds]
        for name, step in self._step_seconds.items():
            self._steps[name] = step / plain
