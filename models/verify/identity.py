"""Token identities of a whole model: what it writes with drafts is what it writes alone without one.

See models/verify/plan.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.base.dtypes import DTYPES
from models.decode.engine.engine import stream, stream_batch
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.policy import Policy
from models.decode.sampling.params import SamplingParams, penalise, sampling_probs
from models.decode.sampling.rng import SeededRandom, gumbel_noise
from models.decode.sampling.samplers import COUPLED
from models.elastic.model import ElasticLM
from models.packed.quantize import FILE, INT8
from models.verify.checks import GREEDY, SAMPLINGS, Check
from models.verify.drafts import Gamma

NEAR_TIE = 8.0
"""Roundings of the largest logit by which tied logits may differ: each is a long sum. Seen were
up to 6.5, in fp32, of weights whose partial sums exceed the logits."""

GAMMAS = (1, 2, 4, 7)
"""Drafted tokens a round that identities take in turn."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The whole model in a dtype, and prompts to continue; plain texts are made once."""

    model: ElasticLM
    dtype: str
    prompts: Sequence[Sequence[int]]
    length: int
    seed: int = 0
    _plain: dict[Any, list[int]] = field(default_factory=dict)

    def decode(
        self, prompt: Sequence[int], params: SamplingParams, policy: Policy | None = None
    ) -> list[int]:
        """Return the tokens by `coupled`, for which greedy parameters have no use."""
        tokens = stream(self.model, prompt, self._config(params), policy=policy)
        return [token.id for token in tokens]

    def decode_batch(self, params: SamplingParams, policies: Iterable[Policy]) -> list[list[int]]:
        """Return the tokens of every prompt, in one batch with a policy for each."""
        streams = stream_batch(
            self.model,
            self.prompts,
            self._config(params),
            new_policy=iter(policies).__next__,
            randoms=[SeededRandom(self.seed) for _ in self.prompts],
        )
        return [[token.id for token in tokens] for tokens in streams]

    def plain(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """Return the same without a draft, alone."""
        key = (tuple(prompt), params)
        if key not in self._plain:
            self._plain[key] = self.decode(prompt, params)
        return self._plain[key]

    def _config(self, params: SamplingParams) -> GenerationConfig:
        return GenerationConfig(
            params=params, verifier=COUPLED, max_new_tokens=self.length, eos_token_ids=(), seed=self.seed
        )


MakePolicy: TypeAlias = Callable[[Gamma], Policy]
"""Makes the policy of a text, given its drafted tokens a round."""


def check_identity(
    whole: Whole, name: str, make_policy: MakePolicy, *, sampling: str, gammas: Sequence[Gamma] = GAMMAS
) -> Check:
    """Check that tokens with a draft and without one are the same, or tied where they first differ.

    Args:
        whole: the model and its prompts.
        name: the draft's name.
        make_policy: gives it to a text.
        sampling: a name in `SAMPLINGS`.
        gammas: drafted tokens a round, in turn over the prompts.
    """
    params, turns = SAMPLINGS[sampling], cycle(gammas)
    ours = [
        whole.decode(prompt, params, make_policy(gamma))
        for prompt, gamma in zip(whole.prompts, turns, strict=False)
    ]
    shown = ",".join(map(str, gammas[: len(whole.prompts)]))
    return _compare(whole, ours, sampling, draft=name, gamma=shown, batch=1)


def check_batch(whole: Whole, policies: Mapping[tuple[str, Gamma], MakePolicy], *, sampling: str) -> Check:
    """Check that prompts decoded in a batch, a draft each in turn, give the tokens of each alone.

    Args:
        whole: the model and its prompts.
        policies: policies by name and gamma.
        sampling: a name in `SAMPLINGS`.
    """
    rows = [row for _, row in zip(whole.prompts, cycle(policies.items()), strict=False)]
    ours = whole.decode_batch(SAMPLINGS[sampling], (make(gamma) for (_, gamma), make in rows))
    names, gammas = zip(*dict.fromkeys(key for key, _ in rows), strict=True)
    shown = ",".join(map(str, gammas))
    return _compare(whole, ours, sampling, draft=",".join(names), gamma=shown, batch=len(rows))


def _compare(whole: Whole, ours: Sequence[list[int]], sampling: str, **case: Any) -> Check:
    """Compare texts of all prompts with plain ones."""
    params = SAMPLINGS[sampling]
    num_same, num_total, gaps = 0, 0, []
    for prompt, text in zip(whole.prompts, ours, strict=True):
        plain = whole.plain(prompt, params)
        same = next((t for t, (a, b) in enumerate(zip(text, plain, strict=True)) if a != b), len(plain))
        num_same, num_total = num_same + same, num_total + len(plain)
        if same < len(plain):
            gaps.append(gap_between(whole, [*prompt, *plain[:same]], (text[same], plain[same]), params))
    # The text that is furthest from a tie is shown.
    gap, bound = max(gaps, key=lambda found: found[0] - found[1], default=(0.0, 0.0))
    note = f"{num_same} tokens of {num_total} alike"
    if gaps:
        note += f"; texts that differ: {len(gaps)}"
    return Check(
        test=GREEDY if params.is_greedy else COUPLED,
        verifier="" if params.is_greedy else COUPLED,
        sampling=sampling,
        dtype=whole.dtype,
        value=gap,
        bound=bound,
        note=note,
        passed=gap <= bound,
        **case,
    )


@torch.inference_mode()
def gap_between(
    whole: Whole, ids: Sequence[int], tokens: tuple[int, int], params: SamplingParams
) -> tuple[float, float]:
    """Return the score gap of two tokens after `ids`, and the largest gap that is still a numerical tie."""
    device = whole.model.device
    logits_V: Tensor = whole.model(torch.tensor([list(ids)], device=device), num_last=1)[0, -1]
    tie = NEAR_TIE * _rounding(whole.dtype) * float(logits_V.abs().max())
    keys_V = penalise(logits_V.double().cpu().unsqueeze(0), params, ids)[0]
    if not params.is_greedy:
        tie /= params.temperature
        keys_V = sampling_probs(keys_V, params).log() + gumbel_noise(whole.seed, len(ids), len(keys_V))
    return float((keys_V[tokens[0]] - keys_V[tokens[1]]).abs()), tie


def _rounding(dtype: str) -> float:
    """Return the relative rounding of a number; quantized models round their activations to 8 bits."""
    return 2.0**-7 if dtype in (INT8, FILE) else torch.finfo(DTYPES[dtype]).eps
