import pytest
import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.base.labels import IGNORE_INDEX
from models.elastic.granularity import FULL
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure import perplexity
from models.measure.consistency import compare_views
from models.measure.perplexity import Batches, to_perplexity

FP32_SUMS = 1e-5
"""Relative: fp32 losses of a few nats, through products over other numbers of rows."""


def random_batch(num_rows: int = 3, num_positions: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (num_rows, num_positions + 1), generator=generator)
    labels_BT = ids[:, 1:].clone()
    labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.3] = IGNORE_INDEX
    return ids[:, :-1], labels_BT


def loss(model: ElasticLM, batches: Batches) -> float:
    return compare_views(model, {"XL": View(model, FULL)}, batches)["XL"]["loss"]


def test_the_loss_does_not_depend_on_how_rows_are_batched(tiny_model: ElasticLM) -> None:
    tokens_BT, labels_BT = random_batch(4)
    rows = [(tokens_BT[row : row + 1], labels_BT[row : row + 1]) for row in (2, 0, 3, 1)]
    assert loss(tiny_model, rows) == pytest.approx(loss(tiny_model, [(tokens_BT, labels_BT)]), rel=FP32_SUMS)


def test_no_more_logits_than_a_chunk_are_held(tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(4)
    whole = loss(tiny_model, [batch])
    sizes: list[int] = []
    tiny_model.lm_head.register_forward_hook(lambda *hooked: sizes.append(hooked[-1].numel()))
    monkeypatch.setattr(perplexity, "CHUNK_NUMBERS", 7 * 64 + 1)
    chunked = loss(tiny_model, [batch])
    assert max(sizes) == 7 * 64
    assert sum(sizes) == 2 * 64 * int((batch[1] != IGNORE_INDEX).sum()), "of p and of q"
    assert chunked == pytest.approx(whole, rel=FP32_SUMS)


def test_the_loss_of_even_guesses_is_the_logarithm_of_the_vocabulary(tiny_model: ElasticLM) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
    assert to_perplexity(loss(tiny_model, [random_batch()])) == pytest.approx(64, rel=FP32_SUMS)


def test_progress_is_called_for_each_batch(tiny_model: ElasticLM) -> None:
    calls: list[None] = []
    view = View(tiny_model, FULL)
    compare_views(tiny_model, {"XL": view}, [random_batch()] * 3, lambda: calls.append(None))
    assert len(calls) == 3


def test_text_without_a_label_is_refused(tiny_model: ElasticLM) -> None:
    tokens_BT, labels_BT = random_batch()
    for batches in ([(tokens_BT, labels_BT.fill_(IGNORE_INDEX))], []):
        with pytest.raises(NestlingError, match="no token to predict"):
            loss(tiny_model, batches)
