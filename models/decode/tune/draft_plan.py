"""Plans of decoding: what drafts, how it is used, how fast that is. A search writes what decoding reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.decode.engine.policy import NO_DRAFT
from models.packed.quantize import split_precision


@dataclass(frozen=True, kw_only=True)
class DraftSpec:
    """A draft in place: a member of the target, how its weights are stored, and which tokens it may draft.

    >>> str(DraftSpec.parse("S@int8", vocabulary=(1, 5)))
    'S@int8, 2 tokens'
    """

    member: str
    """A name of the family, or a granularity."""
    precision: str | None = None
    """Precision of its weights; None is the target's."""
    vocabulary: tuple[int, ...] | None = None
    """Ids of a trimmed vocabulary (FR-Spec, https://arxiv.org/abs/2502.14856); None drafts any token."""

    @staticmethod
    def parse(text: str, vocabulary: tuple[int, ...] | None = None) -> "DraftSpec":
        """Read what `--draft` takes: a member, with its precision behind an `@` if it has one of its own."""
        member, precision = split_precision(text)
        return DraftSpec(member=member, precision=precision, vocabulary=vocabulary)

    @property
    def text(self) -> str:
        """The spec as `--draft` takes it, without the vocabulary."""
        return f"{self.member}@{self.precision}" if self.precision else self.member

    def __str__(self) -> str:
        return self.text if self.vocabulary is None else f"{self.text}, {len(self.vocabulary)} tokens"


@dataclass(frozen=True)
class Speed:
    """Speed over plain decoding.

    >>> str(Speed(1.5)), Speed(1.5, 1.25).best
    ('1.50x predicted', 1.25)
    """

    predicted: float
    measured: float | None = None
    """From real decoding; None where only the prediction is known."""

    @property
    def best(self) -> float:
        """The measured speed, else the predicted one."""
        return self.predicted if self.measured is None else self.measured

    def __str__(self) -> str:
        return f"{self.best:.2f}x {'predicted' if self.measured is None else 'measured'}"


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """A draft, its tokens a round, how they are verified, and how fast that is."""

    spec: DraftSpec | None
    """The draft; None decodes plainly."""
    gamma: int
    verifier: str
    speed: Speed

    @staticmethod
    def plain(verifier: str) -> "DraftPlan":
        """Return the plan without a draft."""
        return DraftPlan(spec=None, gamma=0, verifier=verifier, speed=Speed(1.0))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that `from_dict` reads back, for JSON."""
        return {
            "verifier": self.verifier,
            "draft": NO_DRAFT if self.spec is None else self.spec.text,
            "vocabulary": None if self.spec is None else self.spec.vocabulary,
            "gamma": self.gamma,
            "predicted": self.speed.predicted,
            "measured": self.speed.measured,
        }

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "DraftPlan":
        """Read what `as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError, UsageError: if these are no such fields.
        """
        draft, ids, measured = str(fields["draft"]), fields["vocabulary"], fields["measured"]
        vocabulary = None if ids is None else tuple(map(int, ids))
        return DraftPlan(
            spec=None if draft == NO_DRAFT else DraftSpec.parse(draft, vocabulary),
            gamma=int(fields["gamma"]),
            verifier=str(fields["verifier"]),
            speed=Speed(float(fields["predicted"]), None if measured is None else float(measured)),
        )
