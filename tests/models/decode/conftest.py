"""Tiny models whose branches can all be walked, a byte tokenizer."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from models.config import ElasticConfig
from models.elastic import ElasticLM


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
