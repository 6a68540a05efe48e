"""Rotary frequencies (https://arxiv.org/abs/2104.09864) and the ways to stretch them to longer contexts.

linear    every position divided by the factor       Position Interpolation, https://arxiv.org/abs/2306.15595
llama3    long wavelengths divided, short ones kept   Llama 3.1, https://arxiv.org/abs/2407.21783
yarn      a ramp between the two by dimension         YaRN, https://arxiv.org/abs/2309.00071, section 3.2
"""

import math

import torch
from torch import Tensor

from models.elastic.rope_scaling import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Return the angle per position [K/2] of each pair of a head's dimensions, in radians, fp32.

    >>> rope_frequencies(4, 100.0).tolist()
    [1.0, 0.10000000149011612]
    >>> rope_frequencies(4, 100.0, RopeScaling(rope_type="linear", factor=2)).tolist()
    [0.5, 0.05000000074505806]
    """
    plain_K = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return plain_K
    if scaling.rope_type == "linear":
        return plain_K / scaling.factor
    if scaling.rope_type == "llama3":
        kept_K = _kept_by_wavelength(plain_K, scaling)
    else:
        kept_K = _kept_by_dimension(head_dim, theta, scaling)
    return plain_K / scaling.factor * (1 - kept_K) + plain_K * kept_K


def _kept_by_wavelength(plain_K: Tensor, scaling: RopeScaling) -> Tensor:
    turns_K = scaling.original_max_position_embeddings * plain_K / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_K - low) / (high - low)).clamp(0, 1)


def _kept_by_dimension(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    def dimension(turns: float) -> float:
        """Return the dimension whose frequency makes this many turns in the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # a ramp of no width would divide by zero
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
