import math

import pytest
import torch
from torch import Tensor

from models.base.errors import NestlingError
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.measure import perplexity
from models.measure.perplexity import evaluate_loss

FP32_SUMS = 1e-5
"""Relative: fp32 losses of a few nats, through products over other numbers of rows."""


def random_batch(num_rows: int = 3, num_positions: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (num_rows, num_positions + 1), generator=generator)
    labels_BT = ids[:, 1:].clone()
    labels_BT[torch.rand(labels_BT.shape, generator=generator) < 0.3] = -100
    return ids[:, :-1], labels_BT


@pytest.mark.parametrize("text", ["full", "S", "ffn=1:0.5,heads=0.5:1,layers=0:3"])
def test_the_loss_is_the_mean_over_valid_positions_of_all_batches(tiny_model: ElasticLM, text: str) -> None:
    granularity = Granularity.parse(text)
    batches = [random_batch(3, 20, 1), random_batch(1, 5, 2)]
    losses = []
    for tokens_BT, labels_BT in batches:
        log_q_BTV = tiny_model(tokens_BT, granularity).double().log_softmax(-1)
        for row, position in (labels_BT != -100).nonzero().tolist():
            losses.append(-log_q_BTV[row, position, labels_BT[row, position]].item())
    ours = evaluate_loss(tiny_model, batches, granularity)
    assert ours.num_tokens == len(losses)
    assert ours.loss == pytest.approx(math.fsum(losses) / len(losses), rel=FP32_SUMS)
    assert ours.perplexity == pytest.approx(math.exp(ours.loss))


def test_the_loss_does_not_depend_on_how_rows_are_batched(tiny_model: ElasticLM) -> None:
    tokens_BT, labels_BT = random_batch(4)
    rows = [(tokens_BT[row : row + 1], labels_BT[row : row + 1]) for row in (2, 0, 3, 1)]
    whole, pieces = evaluate_loss(tiny_model, [(tokens_BT, labels_BT)]), evaluate_loss(tiny_model, rows)
    assert pieces.loss == pytest.approx(whole.loss, rel=FP32_SUMS)
    assert pieces.num_tokens == whole.num_tokens


def test_no_more_logits_than_a_chunk_are_held(tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(4)
    whole = evaluate_loss(tiny_model, [batch])
    sizes: list[int] = []
    tiny_model.lm_head.register_forward_hook(lambda *hooked: sizes.append(hooked[-1].numel()))
    monkeypatch.setattr(perplexity, "CHUNK_NUMBERS", 7 * 64 + 1)
    chunked = evaluate_loss(tiny_model, [batch])
    assert max(sizes) == 7 * 64
    assert sum(sizes) == 64 * whole.num_tokens
    assert chunked.loss == pytest.approx(whole.loss, rel=FP32_SUMS)


def test_the_loss_of_even_guesses_is_the_logarithm_of_the_vocabulary(tiny_model: ElasticLM) -> None:
    with torch.no_grad():
        tiny_model.model.norm.weight.zero_()
    assert evaluate_loss(tiny_model, [random_batch()]).perplexity == pytest.approx(64, rel=FP32_SUMS)


def test_progress_is_told_of_each_batch(tiny_model: ElasticLM) -> None:
    calls: list[None] = []
    evaluate_loss(tiny_model, [random_batch()] * 3, FULL, progress=lambda: calls.append(None))
    assert len(calls) == 3


def test_text_without_a_label_is_refused(tiny_model: ElasticLM) -> None:
    tokens_BT, labels_BT = random_batch()
    with pytest.raises(NestlingError, match="no token to predict"):
        evaluate_loss(tiny_model, [(tokens_BT, labels_BT.fill_(-100))])
    with pytest.raises(NestlingError, match="no token to predict"):
        evaluate_loss(tiny_model, [])
