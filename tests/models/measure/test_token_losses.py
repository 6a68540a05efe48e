"""Losses token by token: paired, kept, and equal to those of `evaluate`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.measure.consistency import evaluate_family
from models.measure.token_losses import TokenLosses

HALF = Granularity(ffn=(0.5,))
MIXED = Granularity(ffn=(1.0, 0.5, 0.25, 0.5), heads=(1.0, 0.5, 1.0, 0.5))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    tokens_BT = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    labels_BT = tokens_BT[:, 1:].clone()
    labels_BT[0, :5] = -100
    return [(tokens_BT[:2, :-1], labels_BT[:2]), (tokens_BT[2:, :-1], labels_BT[2:])]


def test_the_means_are_those_of_evaluate(tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]) -> None:
    losses = TokenLosses(tiny_model, batches)
    members = {"half": HALF, "mixed": MIXED, "full": FULL}
    for theirs in evaluate_family(tiny_model, members, batches):
        assert losses.mean(members[theirs.name]) == pytest.approx(theirs.loss, rel=1e-5)
    assert losses.losses(HALF).shape == (3 * 16 - 5,)


def test_a_difference_is_paired(tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]]) -> None:
    losses = TokenLosses(tiny_model, batches)
    difference = losses.compare(MIXED, FULL)
    assert difference.mean == pytest.approx(losses.mean(MIXED) - losses.mean(FULL))
    assert losses.compare(HALF, HALF).error == 0.0
    assert 0 < difference.error < 1


def test_what_was_measured_is_kept_and_a_damaged_file_is_measured_again(
    tiny_model: ElasticLM, batches: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "losses.safetensors"
    first = TokenLosses(tiny_model, batches, path)
    first.measure([HALF, MIXED])
    again = TokenLosses(tiny_model, batches, path)
    assert torch.equal(again.losses(MIXED), first.losses(MIXED))
    assert again.num_measured == 0
    path.write_bytes(path.read_bytes()[:-3])
    damaged = TokenLosses(tiny_model, batches, path)
    assert damaged.mean(HALF) == first.mean(HALF)
    assert damaged.num_measured == 1
