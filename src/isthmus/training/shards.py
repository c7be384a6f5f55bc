"""A tensor that is sharded over the processes (DTensor), and the full tensor."""

import sys

import torch
from torch import Tensor

from isthmus.processes import talking


def is_shard(tensor: Tensor) -> bool:
    """Is it one process's share of a tensor?"""
    # Where the module was never imported, which takes a second, nothing is one.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor, put together from the processes' shards where it is one of those: a collective of all processes."""
    if not is_shard(tensor):
        return tensor
    with talking():
        return tensor.full_tensor()  # type: ignore[attr-defined]


def like(value: Tensor, target: Tensor) -> Tensor:
    """A copy of the full tensor ``value`` laid out as ``target``: on its device, this process's shard of it where it
    has those."""
    value = value.to(target.device, copy=True).view(target.shape)
    if not is_shard(target):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def put(value: Tensor, target: Tensor) -> None:
    """Put the full tensor ``value`` into ``target``, which may be a shard."""
    local(target).copy_(local(like(value, target)))
