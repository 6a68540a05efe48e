"""The report of a request: its costs, and how well its drafts did."""

from dataclasses import dataclass, field, fields
from statistics import median

from models.decode.engine.costs import Costs
from models.decode.engine.policy import Round

_Kind = tuple[str, int]
"""A kind of round: the draft's name and how many tokens it drafted."""


@dataclass
class _Rounds:
    """All rounds of one kind."""

    accepted: int = 0
    overlap: float = 0.0
    reached: int = 0
    draft_seconds: list[float] = field(default_factory=list)
    target_seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.target_seconds)


@dataclass
class Report:
    """Grows while tokens are taken from a stream: it counts what was taken, not what lay ready."""

    num_tokens: int = 0
    """Tokens delivered, the end-of-text token included."""
    rounds: int = 0
    """Target passes after the prefill."""
    drafted: int = 0
    """Tokens that the draft proposed."""
    accepted: int = 0
    """Drafted tokens that were delivered."""
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    """The same two, by position in the round."""
    overlap: float = 0.0
    """Sum of sum_v min(p, q) over the drafted positions that were reached."""
    reached: int = 0
    """Drafted positions whose whole prefix was kept, so that p and q are distributions of the output."""
    prefill_seconds: float = 0.0
    """Time until the first token was known."""
    decode_seconds: float = 0.0
    """Time in rounds; waiting for whoever takes the tokens is not counted."""
    kv_bytes: int = 0
    """Size of the target's store of keys and values, which drafts in place share."""
    finish_reason: str = ""
    """`eos`, `stop` (a stop string) or `length`; empty while unfinished or cancelled."""
    known_costs: Costs | None = None
    """Measured before the request, if they were."""
    _kinds: dict[_Kind, _Rounds] = field(default_factory=dict)

    @property
    def tau(self) -> float | None:
        """Tokens per target pass. The first token is the prefill's and is not counted."""
        return (self.num_tokens - 1) / self.rounds if self.rounds else None

    @property
    def alpha(self) -> float | None:
        """Expected acceptance of a drafted token: mean of sum_v min(p, q) over reached positions.

        For greedy decoding this is accepted / reached, since both distributions are certain.
        """
        return self.overlap / self.reached if self.reached else None

    @property
    def tokens_per_second(self) -> float | None:
        """Delivered tokens by the time they took, prefill included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.num_tokens / seconds if seconds else None

    @property
    def plain_seconds(self) -> float | None:
        """A target pass on one token: the median of this request's, where one on more tokens took no less.

        Without any, what the known costs make of the most frequent pass; None if nothing is known.
        """
        num_rounds = {num: count for _, num in self._kinds if (count := len(self._passes(num + 1)))}
        if not num_rounds:  # the prefill wrote all there is
            return None
        if 0 in num_rounds:  # of a few, one after a pause would make drafts look better than they are
            return min(median(self._passes(num + 1)) for num in num_rounds)
        m = max(num_rounds, key=num_rounds.__getitem__) + 1
        if self.known_costs is None or m not in self.known_costs.target:
            return None
        return median(self._passes(m)) * self.known_costs.target[1] / self.known_costs.target[m]

    @property
    def c(self) -> dict[str, float] | None:
        """Seconds of a drafted token over those of a plain step, by draft."""
        plain = self.plain_seconds
        steps: dict[str, list[float]] = {}
        for (name, num), rounds in self._kinds.items():
            steps.setdefault(name, []).extend(seconds / num for seconds in rounds.draft_seconds if num)
        return {name: median(each) / plain for name, each in steps.items() if each} if plain else None

    @property
    def v(self) -> dict[int, float] | None:
        """Seconds of a target pass over those of a plain step, by number of tokens."""
        plain, numbers = self.plain_seconds, sorted({num + 1 for _, num in self._kinds})
        return {m: median(self._passes(m)) / plain if m > 1 else 1.0 for m in numbers} if plain else None

    @property
    def speedup(self) -> float | None:
        """Speed over plain decoding, which takes a plain step for each token after the first."""
        plain = self.plain_seconds
        return (self.num_tokens - 1) * plain / self.decode_seconds if plain and self.decode_seconds else None

    @property
    def predicted_speedup(self) -> float | None:
        """The speed-up that the formula of `models/decode/tune/predict.py` gives for these rounds.

        It takes each draft's alpha, and the costs known before the request where they were, else its own.
        """
        c, v, known = self.c, self.v, self.known_costs
        if c is None or v is None:
            return None
        if known is not None:
            c |= {name: known.drafts[name] / known.target[1] for name in c if name in known.drafts}
            v |= {m: known.target[m] / known.target[1] for m in v if m in known.target}
        num_tokens = cost = 0.0
        for (name, num), rounds in self._kinds.items():
            alpha = self._alpha(name)
            num_tokens += len(rounds) * sum(alpha**position for position in range(num + 1))
            cost += len(rounds) * (num * c.get(name, 0.0) + v[num + 1])
        return num_tokens / cost

    def _passes(self, num_tokens: int) -> list[float]:
        """Return the seconds of the target's passes on `num_tokens` tokens, whoever drafted them."""
        kinds = ((num, rounds) for (_, num), rounds in self._kinds.items())
        return [each for num, rounds in kinds if num + 1 == num_tokens for each in rounds.target_seconds]

    def _alpha(self, draft: str) -> float:
        kinds = [rounds for (name, _), rounds in self._kinds.items() if name == draft]
        return sum(rounds.overlap for rounds in kinds) / max(1, sum(rounds.reached for rounds in kinds))

    def count_round(self, done: Round) -> None:
        """Count one target pass."""
        self.rounds += 1
        self.drafted += done.num_drafted
        self.overlap += sum(done.overlaps)
        self.reached += len(done.overlaps)
        missing = done.num_drafted - len(self.drafted_by_position)
        self.drafted_by_position += [0] * missing
        self.accepted_by_position += [0] * missing
        for position in range(done.num_drafted):
            self.drafted_by_position[position] += 1
        rounds = self._kinds.setdefault((done.draft, done.num_drafted), _Rounds())
        rounds.accepted += done.num_accepted
        rounds.overlap += sum(done.overlaps)
        rounds.reached += len(done.overlaps)
        rounds.draft_seconds.append(done.draft_seconds)
        rounds.target_seconds.append(done.target_seconds)

    def count_token(self, accepted_position: int | None) -> None:
        """Count one delivered token; drafted ones with their position in the round."""
        self.num_tokens += 1
        if accepted_position is not None:
            self.accepted += 1
            self.accepted_by_position[accepted_position] += 1

    def choices(self) -> list[dict[str, object]]:
        """Return the rounds by draft and number of tokens: how many there were, and what they took."""
        return [
            {
                "draft": name,
                "gamma": num,
                "rounds": len(rounds),
                "accepted": rounds.accepted,
                "draft_seconds": median(rounds.draft_seconds),
                "target_seconds": median(rounds.target_seconds),
            }
            for (name, num), rounds in sorted(self._kinds.items())
        ]

    def as_dict(self) -> dict[str, object]:
        """Return the ratios, the rounds by kind and the counts, for JSON."""
        counts = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _NOT_SHOWN}
        return {name: getattr(self, name) for name in _RATIOS} | {"choices": self.choices()} | counts


_NOT_SHOWN = {"known_costs", "_kinds"}
_RATIOS = ("tokens_per_second", "tau", "alpha", "plain_seconds", "c", "v", "speedup", "predicted_speedup")
