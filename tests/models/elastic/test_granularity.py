import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, FULL, Granularity

SHAPE = ElasticConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
)


@st.composite
def granularities(draw: st.DrawFn) -> Granularity:
    layers = draw(st.none() | st.sets(st.integers(0, 5), min_size=1).map(lambda s: tuple(sorted(s))))
    count = 6 if layers is None else len(layers)
    ffn_shares, heads_shares = (
        st.sampled_from([1.0, 0.5, 0.25, 0.125, 0.3, 1 / 3]),
        st.sampled_from([1.0, 0.5, 0.25]),
    )
    return Granularity(
        ffn=tuple(draw(st.lists(ffn_shares, min_size=count, max_size=count) | ffn_shares.map(lambda s: [s]))),
        heads=tuple(draw(st.lists(heads_shares, min_size=count, max_size=count))),
        layers=layers,
    )


@given(granularities())
def test_its_text_parses_back_to_the_same_value(granularity: Granularity) -> None:
    assert Granularity.parse(str(granularity)) == granularity
    assert Granularity.parse(str(granularity)).resolve(SHAPE) == granularity.resolve(SHAPE)


@given(granularities(), granularities())
def test_containment_is_a_partial_order_below_the_full_model(ours: Granularity, theirs: Granularity) -> None:
    small, large = ours.resolve(SHAPE), theirs.resolve(SHAPE)
    assert FULL.resolve(SHAPE).contains(small)
    assert small.contains(small)
    if small.contains(large) and large.contains(small):
        assert small == large


def test_the_default_family_nests() -> None:
    plans = [DEFAULT_FAMILY[name].resolve(SHAPE) for name in ("S", "M", "L", "XL")]
    for small, large in itertools.pairwise(plans):
        assert large.contains(small)
        assert not small.contains(large)
    assert [plan.layers[0].ffn for plan in plans] == [8, 16, 32, 64]


def test_a_list_gives_each_layer_that_runs_its_own_width() -> None:
    plan = Granularity.parse("layers=0:2:5,ffn=1:0.5:0.25,heads=0.5").resolve(SHAPE)
    assert [(layer.index, layer.ffn, layer.groups) for layer in plan.layers] == [
        (0, 64, 2),
        (2, 32, 2),
        (5, 16, 2),
    ]
    assert not plan.is_uniform
    assert not plan.is_layer_prefix


@pytest.mark.parametrize(
    ("text", "prefix"),
    [("layers=0-1", True), ("layers=0:1", True), ("layers=0:2", False), ("layers=1-2", False), ("S", False)],
)
def test_only_the_first_layers_at_full_width_are_an_exit(text: str, prefix: bool) -> None:
    assert Granularity.parse(text).resolve(SHAPE).is_layer_prefix is prefix


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Q", "choose from S, M, L, XL"),
        ("ffn=2", "ffn=2 is not a fraction"),
        ("ffn=0", "above 0"),
        ("ffn=half", "ffn=half"),
        ("width=0.5", "the axes are ffn, heads and layers"),
        ("ffn=0.5,ffn=0.5", "at most once"),
        ("layers=3:1", "ascending"),
        ("layers=", "layers="),
        ("layers=0:1,ffn=1:0.5:0.25", "2 and 3"),
        ("heads=0.3", "fractions that fit this model are 0.25, 0.5, 0.75, 1"),
        ("layers=0-99999999999", "beyond 10000"),
        ("layers=0-6", "layers are 0 to 5"),
        ("ffn=1:0.5", "one for each of them"),
    ],
)
def test_a_granularity_that_does_not_fit_is_refused_with_the_remedy(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Granularity.parse(text).resolve(SHAPE)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
