"""Token identities of a whole model: what it writes with drafts is what it writes alone without one.

See models/verify/plan.py.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from models.base.dtypes import DTYPES
from models.decode.engine.engine import stream, stream_batch
from models.decode.engine.policy import Policy
from models.decode.sampling.params import SamplingParams, law, penalise
from models.decode.sampling.rng import SeededRandom, gumbel_noise
from models.decode.sampling.samplers import COUPLED
from models.elastic.model import ElasticLM
from models.packed.quantize import INT8
from models.verify.checks import GREEDY, LAWS, Check
from models.verify.drafts import Gamma

NEAR_TIE = 8.0
"""Two logits are tied if they differ by so many roundings of the largest one: each is a long sum. Seen were
up to 6.5, in fp32, of weights whose partial sums exceed the logits."""

GAMMAS = (1, 2, 4, 7)
"""Of identities, in turn."""


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
        """The tokens by `coupled`, for which greedy parameters have no use."""
        tokens = stream(
            self.model, prompt, policy=policy, random=SeededRandom(self.seed), **self._options(params)
        )
        return [token.id for token in tokens]

    def decode_together(self, params: SamplingParams, policies: Iterable[Policy]) -> list[list[int]]:
        """The tokens of every prompt, in one batch with a policy for each."""
        streams = stream_batch(
            self.model,
            self.prompts,
            new_policy=iter(policies).__next__,
            randoms=[SeededRandom(self.seed) for _ in self.prompts],
            **self._options(params),
        )
        return [[token.id for token in tokens] for tokens in streams]

    def plain(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """The same without a draft, alone."""
        key = (tuple(prompt), params)
        if key not in self._plain:
            self._plain[key] = self.decode(prompt, params)
        return self._plain[key]

    def _options(self, params: SamplingParams) -> "_Options":
        return {
            "params": params,
            "max_new_tokens": self.length,
            "eos_token_ids": (),
            "verifier": COUPLED,
        }


class _Options(TypedDict):
    params: SamplingParams
    max_new_tokens: int
    eos_token_ids: Collection[int]
    verifier: str


MakePolicy: TypeAlias = Callable[[Gamma], Policy]
"""Of a text, by its number of drafted tokens."""


def check_identity(
    whole: Whole, name: str, make_policy: MakePolicy, *, law: str, gammas: Sequence[Gamma] = GAMMAS
) -> Check:
    """Tokens with a draft and without one: the same, or tied where they first differ.

    Args:
        whole: the model and its prompts.
        name: of the draft.
        make_policy: gives it to a text.
        law: a name in `LAWS`.
        gammas: drafted tokens a round, in turn over the prompts.
    """
    params, turns = LAWS[law], cycle(gammas)
    ours = [
        whole.decode(prompt, params, make_policy(gamma))
        for prompt, gamma in zip(whole.prompts, turns, strict=False)
    ]
    shown = ",".join(map(str, gammas[: len(whole.prompts)]))
    return _compare(whole, ours, law, draft=name, gamma=shown, batch=1)


def check_batch(whole: Whole, policies: Mapping[tuple[str, Gamma], MakePolicy], *, law: str) -> Check:
    """Tokens of all prompts decoded together, a draft each in turn, and of each alone without one.

    Args:
        whole: the model and its prompts.
        policies: by name and gamma.
        law: a name in `LAWS`.
    """
    rows = [row for _, row in zip(whole.prompts, cycle(policies.items()), strict=False)]
    ours = whole.decode_together(LAWS[law], (make(gamma) for (_, gamma), make in rows))
    names, gammas = zip(*dict.fromkeys(key for key, _ in rows), strict=True)
    shown = ",".join(map(str, gammas))
    return _compare(whole, ours, law, draft=",".join(names), gamma=shown, batch=len(rows))


def _compare(whole: Whole, ours: Sequence[list[int]], law: str, **case: Any) -> Check:
    """Texts of all prompts and plain ones."""
    params = LAWS[law]
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
        law=law,
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
    """By how much what is compared after `ids` tells two tokens apart, and how much is still a tie."""
    device = whole.model.device
    logits_V: Tensor = whole.model(torch.tensor([list(ids)], device=device), num_last=1)[0, -1]
    tie = NEAR_TIE * _rounding(whole.dtype) * float(logits_V.abs().max())
    keys_V = penalise(logits_V.double().cpu().unsqueeze(0), params, ids)[0]
    if not params.is_greedy:
        tie /= params.temperature
        keys_V = law(keys_V, params).log() + gumbel_noise(whole.seed, len(ids), len(keys_V))
    return float((keys_V[tokens[0]] - keys_V[tokens[1]]).abs()), tie


def _rounding(dtype: str) -> float:
    """Of one number, relative to it; an int8 model rounds its activations to 8 bits."""
    return 2.0**-7 if dtype == INT8 else torch.finfo(DTYPES[dtype]).eps
