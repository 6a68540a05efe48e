import json
import logging
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.base.labels import IGNORE_INDEX
from train.data.batch import Batch
from train.data.documents import is_validation
from train.data.module import TextData, cache_folder
from train.data.pack import Rows
from train.recipe.recipe import Recipe
from train.recipe.sections import DataConfig, TrainerConfig


def make_data(source: Path, first_step: int = 0, **settings: object) -> TextData:
    options = {"vocab_size": 280, "sequence_length": 8, "valid_fraction": 0.3, **settings}
    options.setdefault("cache_dir", str(source.parent / "cache"))
    recipe = Recipe(
        data=DataConfig(source=str(source), **options),  # type: ignore[arg-type]
        trainer=TrainerConfig(max_steps=7, batch_size=2, accumulate_grad_batches=2),
    )
    return TextData(recipe, first_step=first_step)


def test_prepared_data_knows_its_vocabulary_rows_and_provenance(
    stories: list[str], stories_txt: Path
) -> None:
    data = make_data(stories_txt).prepare()

    assert data.vocab_size == data.tokenizer.get_vocab_size() == 280
    assert data.tokenizer.id_to_token(data.eos_token_id) == "<|endoftext|>"
    assert data.provenance["num_documents"] == len(stories)
    assert data.provenance["num_train_tokens"] == data.train_rows.num_labels
    assert data.provenance["source"] == str(stories_txt)
    assert json.loads(json.dumps(data.provenance)) == data.provenance
    assert len(data.train_rows) > len(data.valid_rows) > 0


def test_a_second_run_makes_the_same_from_the_cache(
    stories_txt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_data(stories_txt).prepare()
    monkeypatch.setattr("train.data.module.train_bpe", None)  # any use would fail
    monkeypatch.setattr("train.data.tokens.write_streams", None)

    second = make_data(stories_txt, sequence_length=12).prepare()

    assert second.provenance == first.provenance


def test_the_tokenizer_learns_from_training_text_alone(stories_txt: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "valid.txt"
    held_out.write_text("zygote " * 20)

    data = make_data(stories_txt, valid=str(held_out), vocab_size=2000).prepare()

    assert "zygote" not in "".join(data.tokenizer.get_vocab())
    assert data.provenance["validation"] == str(held_out)
    assert data.provenance["num_valid_documents"] == 0
    assert data.valid_rows.num_labels > 20


def test_the_tokenizer_never_sees_what_the_hash_held_out(tmp_path: Path) -> None:
    words = (f"{'zygote ' * 20}{number}" for number in range(99))
    held_out = next(text for text in words if is_validation(text, 0.3))
    texts = [f"a plain text, number {number}, of many" for number in range(30)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join([*texts, held_out]))

    data = make_data(tmp_path / "a.txt", vocab_size=2000).prepare()

    assert "plain" in "".join(data.tokenizer.get_vocab())
    assert "zygote" not in "".join(data.tokenizer.get_vocab())


def test_processes_share_the_batch_size_of_a_recipe(stories_txt: Path) -> None:
    data = make_data(stories_txt).prepare()
    data.trainer = SimpleNamespace(global_rank=1, world_size=2)  # type: ignore[assignment]

    batch = data.train_dataloader().batch(0, 0)

    assert batch.tokens_BT.shape == (1, 8)
    assert (batch.first_row, batch.stride, batch.num_rows) == (1, 2, 4)


def test_a_corpus_of_one_document_gives_its_tail_to_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "book.txt").write_text("Once upon a time there was a cat. " * 50)

    with caplog.at_level(logging.WARNING):
        data = make_data(tmp_path / "book.txt").prepare()

    train, valid = data.train_rows.num_labels, data.valid_rows.num_labels
    assert valid == round(0.3 * (train + valid))
    assert "the last 0.3 of the tokens" in caplog.text
    assert "the last 0.3 of the tokens" in data.provenance["validation"]


def test_another_tokenizer_is_used_as_it_is(stories_txt: Path, tmp_path: Path) -> None:
    make_data(stories_txt).prepare().text_tokenizer.save(tmp_path)

    data = make_data(stories_txt, tokenizer=str(tmp_path), vocab_size=2).prepare()

    assert data.vocab_size == 280
    assert data.provenance["tokenizer"]["name"] == str(tmp_path)


def test_the_number_of_documents_can_be_limited(stories_txt: Path) -> None:
    data = make_data(stories_txt, max_documents=10).prepare()

    assert data.provenance["num_documents"] == 10


def test_batches_without_a_label_are_not_measured(stories_txt: Path) -> None:
    data = make_data(stories_txt).prepare()
    rows = data.valid_rows
    assert len(data.validation_batches()) > 2
    is_label = np.zeros(len(rows.stream), bool)
    is_label[-2:] = True
    data.valid_rows = Rows(stream=rows.stream, sequence_length=rows.sequence_length, is_label=is_label)
    ((_, labels_BT),) = data.validation_batches()
    assert (labels_BT != IGNORE_INDEX).any()


def test_validation_batches_are_the_same_every_time_and_bounded(stories_txt: Path) -> None:
    data = make_data(stories_txt).prepare()

    batches = data.validation_batches()
    limited = data.validation_batches(2)

    num_labels = sum(int((labels_BT != IGNORE_INDEX).sum()) for _, labels_BT in batches)
    assert num_labels == data.valid_rows.num_labels
    assert len(limited) == 2
    for (tokens_BT, labels_BT), (again_BT, labels_again_BT) in zip(limited, batches, strict=False):
        assert torch.equal(tokens_BT, again_BT)
        assert torch.equal(labels_BT, labels_again_BT)


class Recorder(pl.LightningModule):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_trains_from_the_first_step_to_the_last(
    stories_txt: Path, tmp_path: Path, num_workers: int
) -> None:
    data = make_data(stories_txt, first_step=4, num_workers=num_workers).prepare()
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=3,
        max_epochs=-1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )

    trainer.fit(recorder, datamodule=data)

    assert [(b.step, b.first_row) for b in recorder.seen] == [
        (step, first_row) for step in (4, 5, 6) for first_row in (0, 2)
    ]
    expected = make_data(stories_txt).prepare().train_dataloader().batch(4, 0)
    assert torch.equal(recorder.seen[0].tokens_BT, expected.tokens_BT)


def test_errors_name_the_setting(stories_txt: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data.source='.*none.txt'"):
        make_data(tmp_path / "none.txt").prepare()
    with pytest.raises(UsageError, match=r"^data.valid='none.txt'"):
        make_data(stories_txt, valid="none.txt").prepare()
    with pytest.raises(UsageError, match=r"^data.vocab_size=100"):
        make_data(stories_txt, vocab_size=100).prepare()
    with pytest.raises(UsageError, match=r"^data.tokenizer='none'"):
        make_data(stories_txt, tokenizer="none").prepare()
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(NestlingError, match=r"^data.source='.*blank.txt': no text"):
        make_data(tmp_path / "blank.txt").prepare()


def test_the_cache_lies_where_the_recipe_says_or_with_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert cache_folder("somewhere") == Path("somewhere")
    assert cache_folder(None) == tmp_path / "nestling" / "data"
