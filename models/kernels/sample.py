"""Tokens that a compiled pass draws by itself: the arguments and results of models/kernels/sample.h.

C tokens that are drawn, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

MAX_INT32 = 2**31 - 1


class Sampling(ctypes.Structure):
    """The C struct of sampling parameters and random numbers."""

    _fields_ = (
        *((name, ctypes.c_float) for name in ("temperature", "top_p", "min_p")),
        ("top_k", ctypes.c_int32),
        ("uniforms", ctypes.POINTER(ctypes.c_double)),
        ("races", ctypes.c_void_p),
        ("vocabulary", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Tokens that a pass draws by itself, each after reading the one before.

    Args:
        count: number of tokens, 1 or more.
        temperature: like the next three as in `SamplingParams`; 0 takes the likeliest token.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        uniforms: a number in [0, 1) for each token, that draws it; or
        races_CV: [count, V] in float64: the token with the largest product of probability and race is drawn.
    """

    count: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniforms: Sequence[float] = ()
    races_CV: Tensor | None = None
    ids: list[int] = field(default_factory=list)
    """The drawn tokens, once the pass has run."""

    @property
    def num_read(self) -> int:
        """Number of drawn tokens that are read and scored: all but the last."""
        return self.count - 1

    def as_struct(self) -> Sampling:
        """Return the C struct; it is valid while this object lives."""
        sampling = Sampling(self.temperature, self.top_p, self.min_p, min(self.top_k, MAX_INT32))
        if self.uniforms:
            sampling.uniforms = (ctypes.c_double * self.count)(*self.uniforms)
        if self.races_CV is not None:
            sampling.races, sampling.vocabulary = self.races_CV.data_ptr(), self.races_CV.shape[1]
        return sampling
