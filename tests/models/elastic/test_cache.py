import dataclasses

import pytest
import torch
from torch import Tensor

from models.elastic.cache import Batch, KVCache, Recording, SharedPrefix, block_starts
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import cut_layers
from tests.models.checkpoint.test_gemma3 import GEMMA3

SUM_ORDER = 2e-5
"""fp32 logits of order 1 through other kernels: sums in another order."""


@pytest.fixture(params=["llama", "gemma3_text"])
def tiny_model(request: pytest.FixtureRequest, tiny_config: ElasticConfig) -> ElasticLM:
    """The same weights in every test; the second one reads a window of 5 in three layers of four."""
    fields = GEMMA3 if request.param == "gemma3_text" else {}
    model = ElasticLM(dataclasses.replace(tiny_config, **fields))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def fill(model: ElasticLM, tokens_BT: Tensor, num_positions: int = 40) -> KVCache:
    cache = KVCache(model.config, batch_size=len(tokens_BT), num_positions=num_positions)
    model(tokens_BT, memory=cache)
    cache.commit(tokens_BT.shape[1])
    return cache


def test_pieces_of_any_length_through_the_cache_equal_one_pass(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    for granularity in (
        FULL,
        Granularity.parse("ffn=0.5,heads=0.5,layers=0:2"),
        Granularity.parse("layers=0-1"),
    ):
        whole_BTV = tiny_model(tokens_BT, granularity)
        cache = KVCache(tiny_model.config, batch_size=2, num_positions=17)
        pieces = []
        for piece_BT in tokens_BT.split([6, 1, 4, 1, 5], dim=1):
            pieces.append(tiny_model(piece_BT, granularity, cache))
            cache.commit(piece_BT.shape[1])
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole_BTV, atol=SUM_ORDER, rtol=0)


def test_rewinding_what_was_appended_is_as_if_it_never_was(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(12)[None]
    cache = fill(tiny_model, tokens_BT)
    before = [tensor.clone() for layer in range(4) for tensor in cache.read(layer)]
    tiny_model(torch.tensor([[7, 8, 9]]), memory=cache)
    cache.commit(3)
    cache.rewind(12)
    after = [tensor for layer in range(4) for tensor in cache.read(layer)]
    for ours, theirs in zip(before, after, strict=True):
        assert torch.equal(ours, theirs)


def test_a_view_shares_the_store_and_the_next_full_pass_overwrites_its_tail(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(10)[None]
    cache = fill(tiny_model, tokens_BT)
    draft = cache.view()
    for token in (20, 21, 22):
        tiny_model(torch.tensor([[token]]), Granularity.parse("S"), draft)
        draft.commit(1)
    assert (cache.length, draft.length) == (10, 13)
    assert draft.read(0)[0].data_ptr() == cache.read(0)[0].data_ptr()
    new_BT = torch.tensor([[30, 31, 32]])
    logits_BTV = tiny_model(new_BT, memory=cache)
    whole_BTV = tiny_model(torch.cat([tokens_BT, new_BT], dim=1))[:, -3:]
    torch.testing.assert_close(logits_BTV, whole_BTV, atol=SUM_ORDER, rtol=0)


def test_the_cache_knows_its_bytes(tiny_config: ElasticConfig) -> None:
    cache = KVCache(tiny_config, batch_size=3, num_positions=5, dtype=torch.float32)
    assert cache.num_bytes == 2 * 4 * 3 * 2 * 5 * 8 * 4


def test_training_on_the_shared_cache_sees_just_what_decoding_gives_the_draft(tiny_model: ElasticLM) -> None:
    """Each block of positions is replayed as a round of decoding: full prefix, then the draft's own."""
    tokens_BT = torch.randint(0, 64, (2, 14), generator=torch.Generator().manual_seed(2))
    for text in ("S", "ffn=0.5,heads=0.5,layers=0:2:3", "layers=0-1"):
        member = Granularity.parse(text)
        starts_T = block_starts(14, 4, 3)
        recording = Recording()
        tiny_model(tokens_BT, FULL, recording)
        trained_BTV = tiny_model(tokens_BT, member, SharedPrefix(recording, starts_T))
        cache = KVCache(tiny_model.config, batch_size=2, num_positions=14)
        for start in starts_T.unique().tolist():
            tiny_model(tokens_BT[:, cache.length : start], memory=cache) if start else None
            cache.commit(start - cache.length)
            draft = cache.view()
            for position in range(start, 14):
                if starts_T[position] != start:
                    break
                drafted_BTV = tiny_model(tokens_BT[:, position : position + 1], member, draft)
                draft.commit(1)
                torch.testing.assert_close(
                    drafted_BTV[:, 0], trained_BTV[:, position], atol=SUM_ORDER, rtol=0
                )
        own_BTV = tiny_model(tokens_BT, member)
        differs = not torch.allclose(own_BTV, trained_BTV, atol=100 * SUM_ORDER)
        assert differs == (text != "layers=0-1"), "only a layer prefix has the full model's keys and values"


def test_gradients_do_not_reach_the_full_model_through_the_shared_cache(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(8)[None]
    recording = Recording()
    tiny_model(tokens_BT, FULL, recording)
    assert not any(tensor.requires_grad for pair in recording.layers.values() for tensor in pair)


def test_requests_of_a_batch_share_a_pass_and_nothing_else(tiny_model: ElasticLM) -> None:
    lengths, counts = (5, 0, 9), [3, 4, 1]
    expected, caches, new = [], [], []
    for length, count in zip(lengths, counts, strict=True):
        tokens_BT = torch.randint(0, 64, (1, length + count))
        expected.append(tiny_model(tokens_BT)[:, length:])
        caches.append(KVCache(tiny_model.config, num_positions=length + count))
        if length:
            tiny_model(tokens_BT[:, :length], memory=caches[-1])
            caches[-1].commit(length)
        new.append(tokens_BT[:, length:])
    logits_BTV = tiny_model(torch.cat(new, dim=1), memory=Batch(caches, counts))
    torch.testing.assert_close(logits_BTV, torch.cat(expected, dim=1), atol=SUM_ORDER, rtol=0)


@torch.no_grad()
def test_layers_on_two_machines_are_those_of_one(tiny_model: ElasticLM) -> None:
    """The embedding is scaled where the ids are, and each part knows the kinds of its own layers."""
    ids = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    x_TD = tiny_model.embed(ids)
    for first, last in ((0, 0), (1, 3)):
        part = cut_layers(tiny_model, first, last)
        x_TD = part.run_layers(x_TD, part.new_cache(20), 20)
    logits_TV = tiny_model.score(x_TD, tiny_model.model.norm)
    torch.testing.assert_close(logits_TV, tiny_model(torch.tensor([ids]))[0], atol=SUM_ORDER, rtol=0)
