"""Members are given weights of their own, which are copied with the model and listed by name."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.owned import Owned
from models.elastic.ownership import Owner, Ownership


def own(
    model: ElasticLM,
    family: Mapping[str, Granularity],
    ownership: Ownership,
    generator: torch.Generator | None = None,
) -> None:
    """Give each member of a family weights of its own, which compute at first what the full model's do.

    Args:
        model: the elastic model; what a member owns already stays if it is of the same kinds.
        family: members by name; the full model owns nothing.
        ownership: the kinds of weights.
        generator: draws the additions.
    """
    before, model.owned = model.members, nn.ModuleList()
    full = dict(model.model.named_parameters())
    for name, granularity in family.items():
        if not ownership.shapes(model.config, granularity):
            continue
        one = Owned(model.config, name, granularity, ownership)
        same = (old for old in before if (old.plan, old.ownership) == (one.plan, ownership))
        start = next(same, None)
        if start is None:
            one.start_from(full, generator)
        else:
            one.load_state_dict(start.state_dict())
        model.owned.append(one.to(model.device, model.dtype))


def adopt(model: ElasticLM, owners: Iterable[Owner], tensors: Mapping[str, Tensor]) -> None:
    """Give members copies of what `owned_weights` of another model yields, in this one's dtype.

    Args:
        model: the elastic model.
        owners: the members that own them.
        tensors: the weights; every owner's are there, in their shapes.
    """
    model.owned = nn.ModuleList()
    for name, granularity, ownership in owners:
        with torch.device("meta"):  # without memory: its initial weights would be thrown away
            one = Owned(model.config, name, granularity, ownership)
        copies = {
            inside: tensors[f"{name}.{inside}"].detach().to(model.device, model.dtype, copy=True)
            for inside, _ in one.named_parameters()
        }
        one.load_state_dict(copies, assign=True)
        model.owned.append(one)


def copy_owned(source: ElasticLM, model: ElasticLM) -> ElasticLM:
    """Return a copy of a model, with copies of what the members of the model own."""
    adopt(model, (one.owner for one in source.members), dict(owned_weights(source)))
    return model


def owned_weights(model: ElasticLM) -> Iterator[tuple[str, Tensor]]:
    """Yield `S.layers.0.input_layernorm.weight` and so on, detached, sharing the model's memory."""
    for one in model.members:
        for name, parameter in one.named_parameters(prefix=one.name):
            yield name, parameter.detach()
