"""The demo's third step: complete a function plainly and with the family's own draft.

The text is sampled: greedy text of so small a model soon repeats itself, and a draft of it is right too
easily. That a draft changes no text is checked greedily, where it can be seen token by token.
"""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models.base.errors import NestlingError
from models.base.numbers import NOTHING, fixed, optional
from models.base.table import Table
from models.decode.decoder import Decoder, open_decoder
from models.decode.sampling.params import SamplingParams
from models.decode.text import GenerationResult
from models.decode.tune.predict import known_acceptance

# No line break at its end: a token holds the break and the indent that follows.
PROMPT = 'def read_config(path, encoding="utf-8"):'
SAMPLED = SamplingParams(temperature=0.8)
NUM_TOKENS = 128
NUM_RUNS = 7
GAMMAS = (2, 4, 6)


def complete_function(path: Path, console: Console) -> dict[str, Any]:
    """Print a text and how fast it is written with and without a draft.

    Returns:
        What was measured, for JSON.

    Raises:
        NestlingError: if the draft changed greedy text.
    """
    plain = open_decoder(path, draft="none", params=SAMPLED)
    name, gamma = _fastest_draft(path, plain)
    drafted = open_decoder(path, draft=name, gamma=gamma, params=SAMPLED)
    pairs = [(_write(plain, seed), _write(drafted, seed)) for seed in range(NUM_RUNS)]
    alone, helped = ([pair[place] for pair in pairs] for place in (0, 1))
    console.print(PROMPT, end="", style="dim", markup=False)
    console.print(helped[0].text, markup=False)
    console.print(_speed_table(f"drafted by {name}, gamma {gamma}", alone, helped).to_rich())
    _check_same_greedy_text(path, name, gamma)
    console.print(
        f"sampled at temperature {SAMPLED.temperature:g}, {plain.dtype}; medians of {NUM_RUNS} alternating "
        "texts of their own seeds; greedily both wrote the same tokens"
    )
    if _median_speed(helped) < _median_speed(alone):
        console.print("so small a model is plainly decoded faster than its draft can pay; larger ones gain")
    return {
        "ids_equal": True,
        "dtype": plain.dtype,
        "temperature": SAMPLED.temperature,
        "draft": name,
        "gamma": gamma,
        "plain_tokens_per_second": _median_speed(alone),
        "tokens_per_second": _median_speed(helped),
        "tau": helped[0].report.tau,
        "alpha": helped[0].report.alpha,
        "text": helped[0].text,
    }


def _fastest_draft(path: Path, plain: Decoder) -> tuple[str, int]:
    """Return the member and draft length that write fastest here; seeds are others than the measured ones."""
    speeds = {}
    for name, gamma in itertools.product(known_acceptance(plain.folder.members, SAMPLED), GAMMAS):
        decoder = open_decoder(path, draft=name, gamma=gamma, params=SAMPLED)
        speeds[name, gamma] = _median_speed([_write(decoder, NUM_RUNS + seed) for seed in range(3)])
    return max(speeds, key=lambda key: speeds[key])


def _write(decoder: Decoder, seed: int) -> GenerationResult:
    return decoder.generate(PROMPT, max_new_tokens=NUM_TOKENS, seed=seed)


def _check_same_greedy_text(path: Path, name: str, gamma: int) -> None:
    plain, drafted = open_decoder(path, draft="none"), open_decoder(path, draft=name, gamma=gamma)
    if _write(plain, 0).ids != _write(drafted, 0).ids:
        raise NestlingError("speculative decoding wrote other tokens than plain; please report this")


def _speed_table(label: str, plain: Sequence[GenerationResult], drafted: Sequence[GenerationResult]) -> Table:
    report, before, after = drafted[0].report, _median_speed(plain), _median_speed(drafted)
    ours = f"{after:.0f}", f"{after / before:.2f}x", f"{report.tau or 1:.2f}"
    header = ("decoding", "tokens/s", "speed-up", "tau", "alpha")
    alpha = optional(report.alpha, fixed(3))
    return Table(header, (("plain", f"{before:.0f}", "1.00x", "1.00", NOTHING), (label, *ours, alpha)))


def _median_speed(results: Sequence[GenerationResult]) -> float:
    return statistics.median(result.report.tokens_per_second or 0.0 for result in results)
