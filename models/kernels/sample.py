"""Tokens that a compiled pass chooses by itself: what models/kernels/sample.h is told, and gives.

C tokens that are chosen, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

MOST = 2**31 - 1  # of a number of 32 bits


class Law(ctypes.Structure):
    """How tokens are chosen, as decode_step.c takes it."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
        ("top_k", ctypes.c_int32),
        ("uniforms", ctypes.POINTER(ctypes.c_double)),
        ("races", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Tokens that a pass chooses by itself, each after reading the one before.

    Args:
        count: how many, 1 or more.
        temperature: as the other three see `SamplingParams`; 0 takes the likeliest token.
        top_k: see there.
        top_p: see there.
        min_p: see there.
        uniforms: a number in [0, 1) for each token, that draws it; or
        races_CV: [count, V] in float64, of which times its probability the largest wins.
    """

    count: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniforms: Sequence[float] = ()
    races_CV: Tensor | None = None
    ids: list[int] = field(default_factory=list)
    """The tokens, once the pass has run."""

    @property
    def num_read(self) -> int:
        """All but the last are read, and scored."""
        return self.count - 1

    def as_law(self) -> Law:
        """For decode_step.c; good as long as this object is."""
        law = Law(self.temperature, self.top_p, self.min_p, min(self.top_k, MOST))
        if self.uniforms:
            law.uniforms = (ctypes.c_double * self.count)(*self.uniforms)
        if self.races_CV is not None:
            law.races, law.vocabulary = self.races_CV.data_ptr(), self.races_CV.shape[1]
        return law
