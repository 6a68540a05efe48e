"""What one request cost and how well its draft did: counts, clocks, and ratios of them."""

from dataclasses import asdict, dataclass, field


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
    """Of these, the ones delivered."""
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    """The same two, by position in the round."""
    overlap: float = 0.0
    """Sum of sum_v min(p, q) over the drafted positions that were reached."""
    reached: int = 0
    """Drafted positions whose whole prefix was kept, so that p and q are laws of the output."""
    prefill_seconds: float = 0.0
    """Until the first token was known."""
    decode_seconds: float = 0.0
    """In rounds; waiting for whoever takes the tokens is not counted."""
    finish_reason: str = ""
    """`eos`, `stop` (a stop string) or `length`; empty while unfinished or cancelled."""

    @property
    def tau(self) -> float | None:
        """Tokens per target pass. The first token is the prefill's and is not counted."""
        return (self.num_tokens - 1) / self.rounds if self.rounds else None

    @property
    def alpha(self) -> float | None:
        """Expected acceptance of a drafted token: mean of sum_v min(p, q) over reached positions.

        For greedy decoding this is accepted / reached, since both laws are certain.
        """
        return self.overlap / self.reached if self.reached else None

    @property
    def tokens_per_second(self) -> float | None:
        """Delivered tokens by the time they took, prefill included."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.num_tokens / seconds if seconds else None

    def count_round(self, num_drafted: int, overlaps: list[float]) -> None:
        """Count one target pass."""
        self.rounds += 1
        self.drafted += num_drafted
        self.overlap += sum(overlaps)
        self.reached += len(overlaps)
        missing = num_drafted - len(self.drafted_by_position)
        self.drafted_by_position += [0] * missing
        self.accepted_by_position += [0] * missing
        for position in range(num_drafted):
            self.drafted_by_position[position] += 1

    def count_token(self, accepted_position: int | None) -> None:
        """Count one delivered token; drafted ones with their position in the round."""
        self.num_tokens += 1
        if accepted_position is not None:
            self.accepted += 1
            self.accepted_by_position[accepted_position] += 1

    def as_dict(self) -> dict[str, object]:
        """The fields and the ratios, for JSON."""
        ratios = {name: getattr(self, name) for name in ("tokens_per_second", "tau", "alpha")}
        return ratios | asdict(self)
