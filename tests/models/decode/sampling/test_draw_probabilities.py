"""The shipped verifiers with their shipped random numbers, by counts: vocabulary 16, a reversed draft.

Exact enumeration (test_accept.py) integrates the random numbers out; here they are drawn. p and q differ
from position to position; judged are the joint counts of both neighbouring pairs, the second with the
bonus. Each count fails by chance with probability P_VALUE at most, all of them together under 1e-6.
"""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import Random, SeededRandom
from models.decode.sampling.samplers import VERIFIER_NAMES, Proposal, make_sampler
from models.decode.sampling.verifiers import VERIFIERS, Verifier
from models.verify.exact import Distribution, Output, chi_square

VOCAB_SIZE = 16
GAMMA = 2
P_VALUE = 1e-7
WARM = SamplingParams(temperature=1.0)


def distributions() -> tuple[Tensor, Tensor]:
    """p of gamma + 1 positions; q of gamma of them, which likes best what p likes least."""
    slopes_T1 = torch.tensor([[0.12], [-0.2], [0.3]])
    p_TV = (slopes_T1 * torch.arange(VOCAB_SIZE)).softmax(-1)
    return p_TV, p_TV[:GAMMA].flip(-1)


def gamma_plus_one_tokens(verifier: str | Verifier, random: Random) -> list[int]:
    """A round as the engine runs it; if it ends early, plain decoding goes on."""
    p_TV, q_TV = distributions()
    sampler, proposal = make_sampler(WARM, random, verifier), Proposal([0])
    for q_V in q_TV:
        sampler.draft(q_V.log(), proposal)
    tokens = sampler.verify(p_TV.log(), proposal).kept
    while len(tokens) <= GAMMA:
        rest = Proposal([0, *tokens])
        tokens = [*tokens, *sampler.verify(p_TV[len(tokens), None].log(), rest).kept]
    return tokens


def p_values(verifier: str | Verifier, num_trials: int) -> list[float]:
    """One for each pair of neighbours."""
    p_TV, _ = distributions()
    rounds = [gamma_plus_one_tokens(verifier, SeededRandom(trial)) for trial in range(num_trials)]
    found = []
    for t in range(GAMMA):
        counts: Counter[Output] = Counter((tokens[t], tokens[t + 1]) for tokens in rounds)
        joint_VV = torch.outer(p_TV[t].double(), p_TV[t + 1].double())
        distribution: Distribution = {
            (first, second): float(joint_VV[first, second])
            for first in range(VOCAB_SIZE)
            for second in range(VOCAB_SIZE)
        }
        found.append(chi_square(counts, distribution))
    return found


@pytest.mark.parametrize("num_trials", [1_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verifier", VERIFIER_NAMES)
def test_the_counts_of_neighbouring_tokens_are_those_of_the_target(verifier: str, num_trials: int) -> None:
    assert min(p_values(verifier, num_trials)) > P_VALUE


def test_a_draft_that_is_believed_is_seen() -> None:
    def believing(p_TV: Tensor, q_TV: Tensor, drafted: Sequence[int], random: Random) -> list[int]:
        return VERIFIERS["token"](torch.cat([q_TV, p_TV[-1:]]), q_TV, drafted, random)

    assert max(p_values(believing, 1_000)) < P_VALUE
