"""Exact output laws without sampling, tiny models whose branches can all be walked, a byte tokenizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from models.config import ElasticConfig
from models.decode.chance import Random
from models.elastic import ElasticLM

Law = dict[tuple[int, ...], float]
Run = Callable[[Random], Sequence[int]]


class EnumeratingRandom:
    """Makes scripted choices, the first option where the script ends, and knows their joint weight."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.trail: list[tuple[int, int]] = []  # option taken, number of options
        self.weight = 1.0

    def draft(self, probs_V: Tensor) -> int:
        return self._take(probs_V.tolist())

    def accept(self, probability: float) -> bool:
        return self._take([probability, 1.0 - probability]) == 0

    def target(self, probs_V: Tensor) -> int:
        return self._take(probs_V.tolist())

    def _take(self, weights: list[float]) -> int:
        assert min(weights) >= 0, weights
        options = [option for option, weight in enumerate(weights) if weight > 0]
        step = len(self.trail)
        taken = self.script[step] if step < len(self.script) else 0
        self.trail.append((taken, len(options)))
        self.weight *= weights[options[taken]]
        return options[taken]

    def next_script(self) -> list[int] | None:
        """The script of the next branch, depth first; None after the last one."""
        trail = list(self.trail)
        while trail and trail[-1][0] + 1 == trail[-1][1]:
            trail.pop()
        return [*(taken for taken, _ in trail[:-1]), trail[-1][0] + 1] if trail else None


@pytest.fixture
def output_law() -> Callable[[Run], Law]:
    """Runs a decoder through every branch of its random choices: the exact law of what it returns."""

    def enumerate_branches(run: Run) -> Law:
        law: Law = defaultdict(float)
        script: list[int] | None = []
        while script is not None:
            random = EnumeratingRandom(script)
            law[tuple(run(random))] += random.weight
            script = random.next_script()
        assert math.isclose(sum(law.values()), 1.0, abs_tol=1e-12)
        return law

    return enumerate_branches


@pytest.fixture
def make_model() -> Callable[..., ElasticLM]:
    """A very small model in float64, with logits far from flat; every field can be set."""

    def make(*, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: int) -> ElasticLM:
        shape = {
            "vocab_size": 3,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
        config = ElasticConfig(**(shape | fields), initializer_range=0.5)  # type: ignore[arg-type]
        model = ElasticLM(config)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that characters are spread over tokens; token 256 ends the text."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer
