"""`--draft` and `--dtype` with a precision: what drafts, what it costs, and what a wrong one is told."""

from pathlib import Path

import pytest
import torch

from models.base.errors import UsageError
from models.base.numbers import size
from models.checkpoint.folder import ModelFolder, load_model, save_model
from models.decode.engine.draft import ModelDraft, NestedDraft
from models.decode.engine.engine import stream
from models.decode.open import open_for_decoding
from models.decode.sampling.params import SamplingParams
from models.decode.tune.resolve import choose_drafting
from models.elastic.model import ElasticLM
from models.packed.quantize import packed_bytes

GREEDY = SamplingParams()
PROMPT = [1, 2, 3, 4]


@pytest.fixture
def folder(tiny_model: ElasticLM, tmp_path: Path) -> ModelFolder:
    return load_model(save_model(tmp_path / "model", tiny_model))


def ids(folder: ModelFolder, text: str) -> list[int]:
    drafting = choose_drafting(folder, text, 3, GREEDY)
    return [t.id for t in stream(folder.model, PROMPT, draft=drafting.draft, gamma=3, max_new_tokens=40)]


@pytest.mark.parametrize("text", ["S@int8", "full@int4", "M@bf16", "ffn=0.5,layers=0-1@fp32", "FOLDER@int8"])
def test_a_draft_of_another_precision_leaves_the_greedy_ids_as_they_are(
    text: str, folder: ModelFolder
) -> None:
    assert ids(folder, text.replace("FOLDER", str(folder.path))) == ids(folder, "none")


def test_the_draft_shares_the_targets_cache_and_its_own_bytes_are_told(folder: ModelFolder) -> None:
    drafting = choose_drafting(folder, "S@int8", None, GREEDY)
    assert isinstance(drafting.draft, NestedDraft)
    assert drafting.name == "S@int8"
    assert drafting.extra_bytes == packed_bytes(drafting.draft.view.model) > 0
    assert f"{size(drafting.extra_bytes)} of its own" in drafting.note
    in_place = choose_drafting(folder, "S", None, GREEDY)
    assert (in_place.extra_bytes, in_place.note) == (0, "")


def test_another_folder_counts_all_its_weights_as_extra(folder: ModelFolder) -> None:
    drafting = choose_drafting(folder, str(folder.path), None, GREEDY)
    assert isinstance(drafting.draft, ModelDraft)
    assert drafting.extra_bytes == sum(weight.nbytes for weight in folder.model.parameters())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("S@int3", "--draft S@int3: 'int3' is not a precision"),
        ("nothing@int8", "neither a member"),
        ("@int4", "--draft @int4: nothing stands before the @"),
        ("@int5", "nothing stands before the @.* 'int5' is not a precision"),
        ("S@", "--draft S@: '' is not a precision"),
        ("", "--draft '' is neither a member"),
    ],
)
def test_a_wrong_precision_or_member_is_named(text: str, told: str, folder: ModelFolder) -> None:
    with pytest.raises(UsageError, match=told):
        choose_drafting(folder, text, None, GREEDY)


def test_a_dtype_that_is_none_is_told_what_there_is(folder: ModelFolder) -> None:
    with pytest.raises(UsageError, match="dtype=int4 is not known; choose from auto, fp32, bf16, fp16, int8"):
        open_for_decoding(folder.path, "int4")


@torch.inference_mode()
def test_an_int8_target_is_the_packed_model_and_any_draft_keeps_its_greedy_ids(folder: ModelFolder) -> None:
    target, dtype = open_for_decoding(folder.path, "int8")
    assert dtype == "int8"
    assert packed_bytes(target.model) > 0
    tokens_BT = torch.tensor([PROMPT])
    assert not torch.equal(target.model(tokens_BT), folder.model(tokens_BT))
    plain = ids(target, "none")
    for text in ("S", "S@int8", "S@fp32", "layers=0-1"):
        assert ids(target, text) == plain
