"""When does it pay to draft on a device and verify in the cloud? Milliseconds a token, in closed form.

T is a target pass on one token, v(m) that on m tokens over it, t_d a drafted token on the device, R the round
trip. Split decoding is coupled, so that a drafted token is kept with a = alpha / (2 - alpha) at least, or
with alpha where decoding is greedy; tau(gamma) = (1 - a^(gamma + 1)) / (1 - a) tokens come of a round.

    in the cloud, plain        T, streamed: R delays the first token only
    in the cloud, drafted      (gamma t_c + v(gamma + 1) T) / tau, with alpha in place of a
    split, waiting             (gamma t_d + R + v(gamma + 1) T) / tau
    split, a window of blocks  max(t_d, v T / gamma) + (1 - a) (R + 1.5 v T): a round trip is paid for a
                               rejection only, and else the slower end decides

Both baselines belong beside every split (https://arxiv.org/abs/2606.25091 has the closed forms).

A pass of a model that is spread over H stages waits H round trips, however many tokens it reads; with S the
bytes of a token's state and B those of a second:

    spread, plain              T + H (R + 2 S / B)
    spread, drafted here       (gamma t_d + v(gamma + 1) T + H (R + (gamma + 1) 2 S / B)) / tau
"""

from dataclasses import dataclass

MOST = 32
"""The most drafted tokens of a round that are looked at."""
SLOPE = 0.012
"""How much a further token adds to a target pass where weights are what is read; measured in native bf16."""


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """Costs in milliseconds, and what follows.

    >>> plan = SplitPlan(alpha=0.85, target=13.0, draft=2.0, cloud_draft=2.0)
    >>> [round(plan.waiting(rtt)[0], 1) for rtt in (5.0, 50.0)], round(plan.windowed(50.0)[0])
    ([8.9, 22.4], 21)
    >>> round(plan.most_rtt_waiting), round(plan.most_rtt_windowed)
    (18, 21)
    """

    alpha: float
    """Acceptance of a drafted token by token or block verification."""
    target: float
    draft: float
    cloud_draft: float
    """A drafted token where the target runs."""
    slope: float = SLOPE
    greedy: bool = False

    @property
    def coupled(self) -> float:
        """Acceptance under coupled noise; with distributions of total variation d it is (1 - d) / (1 + d)."""
        return self.alpha if self.greedy else _coupled(self.alpha)

    @property
    def plain(self) -> float:
        """The cloud alone."""
        return self.target

    @property
    def drafted(self) -> tuple[float, int]:
        """The cloud with its own draft, and the best gamma."""
        rounds = {gamma: gamma * self.cloud_draft + self._pass(gamma) for gamma in range(MOST + 1)}
        return min((seconds / _tau(self.alpha, gamma), gamma) for gamma, seconds in rounds.items())

    def waiting(self, rtt: float) -> tuple[float, int]:
        """Split, one round at a time, and the best gamma."""
        rounds = {gamma: gamma * self.draft + rtt + self._pass(gamma) for gamma in range(MOST + 1)}
        return min((seconds / _tau(self.coupled, gamma), gamma) for gamma, seconds in rounds.items())

    def windowed(self, rtt: float) -> tuple[float, int]:
        """Split, with as many blocks on their way as hide the round trip, and their best gamma."""
        return min(
            (self._per_token(gamma) + (1 - self.coupled) * (rtt + 1.5 * self._pass(gamma)), gamma)
            for gamma in range(1, MOST + 1)
        )

    @property
    def most_rtt_waiting(self) -> float:
        """The longest round trip at which waiting beats the cloud's plain decoding."""
        return max(
            _tau(self.coupled, gamma) * self.target - gamma * self.draft - self._pass(gamma)
            for gamma in range(MOST + 1)
        )

    @property
    def most_rtt_windowed(self) -> float:
        """The longest round trip at which a window does."""
        return max(
            (self.target - self._per_token(gamma)) / (1 - self.coupled) - 1.5 * self._pass(gamma)
            for gamma in range(1, MOST + 1)
        )

    def _per_token(self, gamma: int) -> float:
        """Return what a token of a block takes at the slower end."""
        return max(self.draft, self._pass(gamma) / gamma)

    def _pass(self, gamma: int) -> float:
        return self.target * (1 + self.slope * gamma)


@dataclass(frozen=True, kw_only=True)
class SpreadPlan:
    """Costs of a model over several stages in milliseconds, and what follows.

    >>> plan = SpreadPlan(alpha=0.8, target=16.0, draft=2.0, stages=3, greedy=True)
    >>> round(1000 / plan.plain(100.0), 1), round(1000 / plan.drafted(100.0, 8), 1)
    (3.2, 13.0)
    """

    alpha: float
    """Acceptance of a drafted token by token or block verification."""
    target: float
    """All stages' passes on one token."""
    draft: float
    stages: int
    slope: float = SLOPE
    transfer: float = 0.0
    """States of one token to a stage and back, beside the round trip."""
    greedy: bool = False

    @property
    def acceptance(self) -> float:
        """Acceptance of a drafted token, by coupled noise where it is drawn."""
        return self.alpha if self.greedy else _coupled(self.alpha)

    def plain(self, rtt: float) -> float:
        """Without a draft."""
        return self.target + self.stages * (rtt + self.transfer)

    def drafted(self, rtt: float, gamma: int) -> float:
        """With a draft that runs beside the ends."""
        read = gamma + 1
        target = self.target * (1 + self.slope * gamma)
        network = self.stages * (rtt + read * self.transfer)
        return (gamma * self.draft + target + network) / _tau(self.acceptance, gamma)

    def best(self, rtt: float) -> tuple[float, int]:
        """With the best number of drafted tokens, and that number."""
        return min((self.drafted(rtt, gamma), gamma) for gamma in range(1, MOST + 1))


def _coupled(alpha: float) -> float:
    return alpha / (2 - alpha)


def _tau(acceptance: float, gamma: int) -> float:
    return sum(acceptance**position for position in range(gamma + 1))
