"""A head over some tokens: their logits are the member's own, the rest has no chance."""

import pytest
import torch

from models.base.errors import UsageError
from models.decode.engine.trimmed_head import TrimmedHead
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import View
from models.packed.quantize import pack

EXIT = Granularity.parse("ffn=0.5,layers=0-1")
FP32_SUMS = 1e-5


@pytest.mark.parametrize("precision", [None, "fp32", "bf16", "int8", "int4", "q4_0"])
@torch.inference_mode()
def test_logits_are_the_members_own_for_these_tokens_and_minus_infinity_elsewhere(
    precision: str | None, tiny_model: ElasticLM
) -> None:
    view = View(tiny_model if precision is None else pack(tiny_model, precision), EXIT)
    few, ids = TrimmedHead(view, torch.tensor([5, 0, 63, 7])), [3, 1, 4, 1, 5]
    ours_TV, theirs_TV = (one.run([Request(ids, view.full.new_cache(5), 5)]) for one in (few, view))
    is_scored_V = torch.isin(torch.arange(64), few.ids_N)
    torch.testing.assert_close(
        ours_TV[:, is_scored_V], theirs_TV[:, is_scored_V], rtol=0, atol=FP32_SUMS, check_dtype=False
    )
    assert (ours_TV[:, ~is_scored_V] == float("-inf")).all()
    torch.testing.assert_close(few.run([Request(ids, view.full.new_cache(5), 2)]), ours_TV[-2:])


@torch.inference_mode()
def test_keys_and_values_are_written_as_the_member_writes_them(tiny_model: ElasticLM) -> None:
    view, ids = View(tiny_model, EXIT), [3, 1, 4]
    ours, theirs = view.full.new_cache(3), view.full.new_cache(3)
    TrimmedHead(view, torch.tensor([1])).run([Request(ids, ours, 1)])
    view.run([Request(ids, theirs, 1)])
    for cache in (ours, theirs):
        cache.commit(3)
    for layer in range(2):
        for ours_store, theirs_store in zip(ours.read(layer), theirs.read(layer), strict=True):
            torch.testing.assert_close(ours_store, theirs_store, rtol=0, atol=0)


def test_its_own_bytes_are_told(tiny_model: ElasticLM) -> None:
    assert TrimmedHead(View(tiny_model, EXIT), torch.arange(10)).num_bytes == 10 * 32 * 4


@pytest.mark.parametrize("ids", [[], [3, 3], [-1, 2], [0, 64]])
def test_what_is_no_set_of_token_ids_is_refused(ids: list[int], tiny_model: ElasticLM) -> None:
    with pytest.raises(UsageError, match="give different ids from 0 to 63"):
        TrimmedHead(View(tiny_model, EXIT), torch.tensor(ids, dtype=torch.long))
