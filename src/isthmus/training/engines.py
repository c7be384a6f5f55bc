"""Which engine trains a net: one process, PyTorch's DistributedDataParallel, or FSDP2."""

import torch

from isthmus.net import Net
from isthmus.processes import device, world_size
from isthmus.training.parallel import DDP, Engine, Parallel, Replicated, recomputed


def where(net: Net, parallel: Parallel) -> torch.device:
    """The device that the net trains on. A net that is sharded waits on the CPU, and its shards are elsewhere."""
    return device() if shards(parallel) else next(net.parameters()).device


def move(net: Net, parallel: Parallel) -> None:
    """Move a net to where it trains, unless only its shards go there."""
    if not shards(parallel):
        net.to(device())


def shards(parallel: Parallel) -> bool:
    """Whether each process trains its shards of a net."""
    return parallel.engine == "fsdp" and world_size() > 1


def engine(net: Net, parallel: Parallel = DDP) -> Engine:
    """The engine for the processes that there are. The net's parameters are opened and frozen by now."""
    if shards(parallel):
        from isthmus.training.sharding import Sharded

        return Sharded(net, parallel)
    engine_class = Replicated if world_size() > 1 else Engine
    return engine_class(net, recomputed(net) if parallel.recompute else [])
