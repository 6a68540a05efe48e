import dataclasses

import pytest

from models.elastic.config import ElasticConfig
from models.elastic.count import count_flops
from models.elastic.granularity import FULL, Granularity
from train.search.candidates import list_candidates


@pytest.mark.parametrize("num_layers", [1, 2, 7, 24])
def test_members_fit_the_model_differ_and_come_cheapest_first(
    num_layers: int, tiny_config: ElasticConfig
) -> None:
    config = dataclasses.replace(tiny_config, num_hidden_layers=num_layers)
    found = list_candidates(config)
    plans = [one.resolve(config) for one in found]
    assert len(set(plans)) == len(plans) > 0
    assert not any(plan.is_full for plan in plans)
    costs = [count_flops(config, one, num_cached=64) for one in found]
    assert costs == sorted(costs)
    assert len(found) <= 45


def test_exits_mixed_members_and_what_is_asked_for_are_among_them(tiny_config: ElasticConfig) -> None:
    asked = Granularity.parse("ffn=0.75,layers=1:3")
    found = list_candidates(tiny_config, [asked, FULL, Granularity.parse("layers=0-1")])
    texts = [str(one) for one in found]
    assert {"layers=0", "layers=0-1", "layers=0:3", "ffn=1:0.5,layers=0-1", "ffn=0.125", str(asked)} <= set(
        texts
    )
    assert texts.count("layers=0-1") == 1
    assert "full" not in texts


def test_one_group_of_heads_is_never_halved(tiny_config: ElasticConfig) -> None:
    config = dataclasses.replace(tiny_config, num_key_value_heads=1)
    assert all(one.heads == (1.0,) for one in list_candidates(config))
