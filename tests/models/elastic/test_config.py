from typing import Any

import pytest

from models.base.errors import NestlingError
from models.elastic.config import ElasticConfig


def make(**changes: int) -> ElasticConfig:
    fields: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ElasticConfig(**(fields | changes))


def test_the_head_width_follows_from_the_hidden_size() -> None:
    assert make().head_dim == 8
    assert make(head_dim=16).head_dim == 16
    assert make().heads_per_group == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "num_attention_heads=5 does not divide hidden_size=32",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"vocab_size": 0, "num_hidden_layers": -1}, "vocab_size=0 must be at least 1; num_hidden_layers=-1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_field(changes: dict[str, int], says: str) -> None:
    with pytest.raises(NestlingError) as caught:
        make(**changes)
    assert says in str(caught.value)
