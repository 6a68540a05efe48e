"""What prompts share is copied, within the budget of memory."""

from models.decode.engine.state import State
from models.elastic.model import ElasticLM
from models.serve.prefixes import LEAST_SHARED, Prefixes, Text

LONG = list(range(30))


def text_of(model: ElasticLM, ids: list[int], *, committed: int, is_live: bool = False) -> Text:
    cache = model.new_cache(40)
    cache.commit(committed)
    return Text("model", State(ids, cache), len(ids), is_live)


def test_a_prompt_takes_what_is_committed_but_never_its_last_token(tiny_model: ElasticLM) -> None:
    kept = Prefixes(2**30)
    text = text_of(tiny_model, LONG, committed=29)
    text.state.cache._stores[0][0].fill_(3.0)
    kept.add(text)
    cache = tiny_model.new_cache(40)
    assert kept.fill(cache, "model", LONG) == cache.length == 29
    assert float(cache.read(0)[0].min()) == 3.0
    assert kept.fill(tiny_model.new_cache(40), "model", [*LONG[:20], 7, 7]) == 20
    assert kept.fill(tiny_model.new_cache(40), "other", LONG) == 0
    assert kept.fill(tiny_model.new_cache(40), "model", LONG[: LEAST_SHARED // 2]) == 0


def test_a_prompt_waits_for_one_that_is_being_read(tiny_model: ElasticLM) -> None:
    kept = Prefixes(2**30)
    text = text_of(tiny_model, LONG, committed=0, is_live=True)
    kept.add(text)
    assert kept.must_wait("model", LONG)
    assert not kept.must_wait("model", [60, *LONG])
    text.state.cache.commit(30)
    assert not kept.must_wait("model", LONG)


def test_finished_texts_are_forgotten_for_new_ones_and_live_ones_never(tiny_model: ElasticLM) -> None:
    size = tiny_model.new_cache(40).num_bytes
    kept = Prefixes(3 * size)
    live, old, new = (text_of(tiny_model, LONG, committed=29, is_live=number == 0) for number in range(3))
    for text in (live, old, new):
        kept.add(text)
    assert kept.make_room(size)
    assert kept.num_bytes == 2 * size
    assert not kept.make_room(3 * size)
    assert kept.num_live_bytes == size
