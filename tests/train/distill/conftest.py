"""A student, a teacher of the same vocabulary, and a micro-batch."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.checkpoint.folder import save_model
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.data.tokenizer import train_bpe

TEXT = "def area(width, height):\n    return width * height\n"


@pytest.fixture
def teacher(tiny_config: ElasticConfig) -> ElasticLM:
    """A larger model of the same vocabulary."""
    model = ElasticLM(dataclasses.replace(tiny_config, hidden_size=48, num_hidden_layers=5))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


@pytest.fixture
def batch() -> Batch:
    rows_BT = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(5))
    labels_BT = rows_BT[:, 1:].clone()
    labels_BT[1, 4:] = -100
    return Batch(
        tokens_BT=rows_BT[:, :-1],
        labels_BT=labels_BT,
        step=5,
        first_row=0,
        num_rows=4,
        num_valid=int((labels_BT != -100).sum()),
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer = train_bpe([TEXT * 9], vocab_size=300)
    config = ElasticConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(3))
    save_model(folder, model, tokenizer=tokenizer.backend, family={})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>\n".join(f"{TEXT}# {number}\n" * 3 for number in range(60)))
    return path
