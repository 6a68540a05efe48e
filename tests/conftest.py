"""What every test shares: no network, one thread, a seed, and a tiny elastic model."""

from __future__ import annotations

import os

# Before anything imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import time
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer

    from models.elastic.config import ElasticConfig
    from models.elastic.model import ElasticLM

# One thread: same sums everywhere, and parallel runs of the suite do not fight for two cores.
torch.set_num_threads(1)

# The same examples in every run; `--hypothesis-profile=random` draws others.
settings.register_profile("same", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("random", parent=settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


def pytest_sessionstart() -> None:
    """Compile once, for all workers and before a test has a cache of its own.

    Under pytest-xdist the first process comes here before it starts the workers, which find what it made.
    """
    from models.kernels.build import SOURCES, library

    for name in SOURCES:
        library(name)
    library()  # without a name it is another key of the function's cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rooms whose results are a processor's own; skip what needs a GPU where there is none."""
    for item in items:
        if item.path.name == "test_arm.py":  # cross-compiles and emulates, whatever runs beside it
            item.add_marker(pytest.mark.slow)
        elif item.path.parent.name in ("kernels", "packed") and item.path.name != "test_build.py":
            item.add_marker(pytest.mark.portable)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same global random state and one thread, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Wait for a condition, for as long as a busy machine may need; fail if it never comes true."""

    def wait(true: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not true():
            assert time.monotonic() < deadline, "this never comes true"
            time.sleep(0.005)

    return wait


@pytest.fixture
def tiny_config() -> ElasticConfig:
    """Four layers of two KV groups.

    The initial weights are large (0.2), so that logits are far from flat and a wrong head, mask or
    position shows.
    """
    from models.elastic.config import ElasticConfig

    return ElasticConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )


@pytest.fixture
def tiny_model(tiny_config: ElasticConfig) -> ElasticLM:
    """The same weights in every test, in evaluation mode."""
    from models.elastic.model import ElasticLM

    model = ElasticLM(tiny_config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Tokenizer:
    """A token for each byte, and one that ends a text: 256."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level_family(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: Tokenizer) -> Path:
    """A model folder with that tokenizer: four layers with random weights, of which D are the first two."""
    from models.checkpoint.folder import save_model
    from models.elastic.config import ElasticConfig
    from models.elastic.granularity import FULL, Granularity
    from models.elastic.model import ElasticLM

    config = ElasticConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=256,
        initializer_range=0.2,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    family = {"S": Granularity(ffn=(0.5,)), "D": Granularity(layers=(0, 1)), "XL": FULL}
    path = tmp_path_factory.mktemp("family") / "model"
    return save_model(path, model, tokenizer=byte_level_tokenizer, family=family)
