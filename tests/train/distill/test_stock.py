"""A teacher through the forward pass of transformers: what it says, and how it is opened."""

from pathlib import Path

import pytest
import torch

from models.base.errors import NestlingError
from models.checkpoint.huggingface import to_hugging_face
from models.elastic.granularity import FULL
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.distill.stock import StockTeacher, load_stock_teacher, read_stock_shape
from train.objective import joint_loss as objective
from train.objective.joint_loss import joint_loss
from train.objective.sampler import StepPlan
from train.objective.teacher import ElasticTeacher, Teacher
from train.recipe.sections import LossConfig


def test_transformers_says_what_our_own_class_says(
    tiny_model: ElasticLM, teacher: ElasticLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 7 positions begin and end amid rows of 12."""
    monkeypatch.setattr(objective, "rows_per_chunk", lambda *_: 7)
    plan = StepPlan(full=1.0, exits=(), slots=())

    def loss(of: Teacher) -> torch.Tensor:
        config = LossConfig(ramp_start=0, ramp_steps=0)
        return joint_loss(tiny_model, {"XL": FULL}, batch, plan, config, block=3, teacher=of).total.detach()

    ours, theirs = ElasticTeacher(teacher), StockTeacher(to_hugging_face(teacher), {})
    torch.testing.assert_close(loss(ours), loss(theirs), rtol=1e-5, atol=0)


def save_gpt2(folder: Path, *, vocab_size: int = 64) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(
        GPT2Config(vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    ).save_pretrained(folder)


def test_a_model_that_we_cannot_hold_is_opened(tmp_path: Path, batch: Batch) -> None:
    save_gpt2(tmp_path)
    shape = read_stock_shape(tmp_path)
    assert shape is not None
    assert (shape.vocab_size, shape.longest) == (64, 64)
    model = load_stock_teacher(tmp_path, torch.float32)
    assert shape.parameters == sum(one.numel() for one in model.parameters())
    assert shape.flops(10) == 20 * shape.parameters
    targets = StockTeacher(model, {}).targets(batch)
    theirs_NV = model(batch.tokens_BT).logits.flatten(0, 1)
    apart_N = targets.divergence(slice(7, 20), theirs_NV[7:20], LossConfig(divergence="forward_kl"))
    torch.testing.assert_close(apart_N, torch.zeros(13), atol=1e-5, rtol=0)


def test_a_folder_of_nothing_known_has_no_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "wombat"}')
    assert read_stock_shape(tmp_path) is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(NestlingError, match=f"{tmp_path} does not open in transformers"):
        load_stock_teacher(tmp_path, torch.float32)
