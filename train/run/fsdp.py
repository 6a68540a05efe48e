"""Weights sharded over processes by FSDP2, and gathered where they are saved or measured.

Each process keeps an equal shard of every tensor, of its gradient and of AdamW's moments
(https://arxiv.org/abs/2304.11277). A block is gathered while it runs and freed after; embedding, norm
and head, which the start and the end of a step need, stay for the entire step.
"""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from models.checkpoint.weights import model_from, weights_of
from models.elastic.model import ElasticLM
from models.elastic.owning import adopt, owned_weights


def shard(module: nn.Module, model: ElasticLM, mesh: DeviceMesh, *, step: str) -> None:
    """Leave each process its shard of the weights, which must be the same everywhere before.

    Args:
        module: Holds the model; its method `step` runs everything from the tokens to the loss.
        model: The model.
        mesh: The processes, in one dimension.
        step: Name of that method. Gathering is hooked to it and not to the model's `forward`, because a
            step calls `ElasticLM.states`, and reads the last norm and the head's weight besides.
    """
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(module, step)


def is_sharded(model: nn.Module) -> bool:
    """Return True if this process holds only its shard of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(tensor: Tensor) -> Tensor:
    """Return the full tensor; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a full tensor, on the parameter's device; nothing is sent."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def gather_model(model: ElasticLM, *, wanted: bool) -> ElasticLM | None:
    """Return the model with all its weights; every process must call this.

    Args:
        model: The model as the training holds it.
        wanted: False in a process that only takes part.

    Returns:
        The model itself if it is not sharded, else a copy on the same device; None where it is not wanted.
    """
    if not is_sharded(model):
        return model if wanted else None
    weights, owned = (
        {name: one for name, one in ((name, gather(shard)) for name, shard in named) if wanted}
        for named in (weights_of(model).items(), owned_weights(model))
    )
    if not wanted:
        return None
    gathered = model_from(model.config, weights)
    adopt(gathered, [one.owner for one in model.members], owned)
    return gathered
