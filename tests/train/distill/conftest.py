"""A student, a teacher of the same vocabulary, and a micro-batch."""

import dataclasses

import pytest
import torch

from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from train.data.batch import Batch


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
