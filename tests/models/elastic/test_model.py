import itertools

import pytest
import torch

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.norm import RMSNorm
from models.elastic.view import View

SUM_ORDER = 2e-5
"""fp32 logits of order 1 through other kernels: sums in another order."""


def test_the_full_granularity_is_the_plain_model_bit_for_bit(tiny_model: ElasticLM) -> None:
    """Invariant 2: written out or not, as a view or not, the full member runs the very same operations."""
    tokens_BT = torch.arange(20)[None]
    plain_BTV = tiny_model(tokens_BT)
    assert torch.equal(plain_BTV, tiny_model(tokens_BT, Granularity(ffn=(1.0,) * 4, layers=(0, 1, 2, 3))))
    assert torch.equal(plain_BTV, View(tiny_model, FULL)(tokens_BT))


@pytest.mark.parametrize("text", ["S", "heads=0.5", "layers=0:2:3", "ffn=0.25,heads=0.5,layers=1:3"])
def test_a_member_equals_a_model_of_its_own_weights(tiny_model: ElasticLM, text: str) -> None:
    view = View(tiny_model, Granularity.parse(text))
    alone = ElasticLM(view.config)
    alone.load_state_dict(view.state_dict())
    tokens_BT = torch.arange(20)[None]
    torch.testing.assert_close(view(tokens_BT), alone(tokens_BT), atol=SUM_ORDER, rtol=0)


def test_weights_outside_a_member_do_not_matter_to_it(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(20)[None]
    member = Granularity.parse("ffn=0.5,heads=0.5,layers=0:2")
    before_BTV = tiny_model(tokens_BT, member)
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if ".layers.1." in name or ".layers.3." in name:
                parameter.fill_(float("nan"))
            elif name.endswith(("gate_proj.weight", "up_proj.weight")):
                parameter[32:] = float("nan")
            elif name.endswith("down_proj.weight"):
                parameter[:, 32:] = float("nan")
            elif name.endswith("o_proj.weight"):
                parameter[:, 16:] = float("nan")
            elif name.endswith(("k_proj.weight", "v_proj.weight")):
                parameter[8:] = float("nan")
            elif name.endswith("q_proj.weight"):
                parameter[16:] = float("nan")
    assert torch.equal(before_BTV, tiny_model(tokens_BT, member))
    assert tiny_model(tokens_BT).isnan().all()


def test_a_view_owns_no_memory(tiny_model: ElasticLM) -> None:
    owners = {tensor.untyped_storage().data_ptr() for tensor in tiny_model.state_dict().values()}
    for granularity in DEFAULT_FAMILY.values():
        state = View(tiny_model, granularity).state_dict()
        assert {tensor.untyped_storage().data_ptr() for tensor in state.values()} <= owners


def test_the_weights_of_a_member_are_a_subset_of_those_of_any_that_contains_it(tiny_model: ElasticLM) -> None:
    """Invariant 3, on addresses: every number of the smaller member is a number of the larger one."""
    texts = ["ffn=0.25,heads=0.5,layers=0:2", "ffn=0.5,heads=0.5,layers=0:2", "ffn=0.5,layers=0-2", "full"]
    views = [View(tiny_model, Granularity.parse(text)) for text in texts]
    for small, large in itertools.pairwise(views):
        assert large.plan.contains(small.plan)
        assert addresses(small) < addresses(large)


def addresses(view: View) -> set[int]:
    """The place in memory of every number of a view."""
    found: set[int] = set()
    for tensor in view.state_dict().values():
        places = torch.full(tensor.shape, tensor.data_ptr(), dtype=torch.int64)
        for dim, stride in enumerate(tensor.stride()):
            shape = [-1 if place == dim else 1 for place in range(tensor.dim())]
            places += 4 * stride * torch.arange(tensor.shape[dim]).view(shape)
        found |= set(places.flatten().tolist())
    return found


def test_an_exit_is_the_layer_prefix_member(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(20)[None]
    for count in (1, 2, 3):
        state_BTD, last_BTD = tiny_model.states(tokens_BT, exits=(count,))
        member = Granularity(layers=tuple(range(count)))
        assert torch.equal(tiny_model.head(state_BTD), tiny_model(tokens_BT, member))
        assert torch.equal(tiny_model.head(last_BTD), tiny_model(tokens_BT))


def test_only_the_last_positions_can_be_scored(tiny_model: ElasticLM) -> None:
    tokens_BT = torch.arange(20)[None]
    last_BTV = tiny_model(tokens_BT, num_last=3)
    torch.testing.assert_close(last_BTV, tiny_model(tokens_BT)[:, -3:], atol=SUM_ORDER, rtol=0)


def test_a_view_of_unequal_layers_has_no_single_shape(tiny_model: ElasticLM) -> None:
    with pytest.raises(UsageError, match="differ in width"):
        _ = View(tiny_model, Granularity.parse("ffn=1:0.5:0.5:1")).config


def test_initial_weights_follow_from_the_seed_alone(tiny_config: ElasticConfig) -> None:
    ours, theirs = ElasticLM(tiny_config), ElasticLM(tiny_config)
    ours.init_weights(torch.Generator().manual_seed(3))
    theirs.init_weights(torch.Generator().manual_seed(3))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])
    assert all((module.weight == 1).all() for module in ours.modules() if isinstance(module, RMSNorm))
