"""What is entered in the registry drafts exactly, knows its name, and serves one request after another."""

import pytest

from models.decode.engine.drafters import DRAFTERS
from models.decode.engine.engine import stream
from models.elastic.model import ElasticLM
from train.recipe.recipe import NO_NAMES


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_registered_draft_writes_the_greedy_ids_of_plain_decoding(name: str, tiny_model: ElasticLM) -> None:
    draft = DRAFTERS[name](tiny_model)
    for prompt in ([3, 1, 4], [1, 2, 1, 2, 1]):
        plain = [token.id for token in stream(tiny_model, prompt, max_new_tokens=40)]
        assert [token.id for token in stream(tiny_model, prompt, draft=draft, max_new_tokens=40)] == plain
        draft = draft.renew()


def test_no_member_of_a_family_may_have_its_name() -> None:
    assert DRAFTERS.keys() <= NO_NAMES
