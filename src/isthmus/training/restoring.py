"""A run's state back into net, optimizer and random generators, whether it was written in one piece or in shards."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from isthmus.training.state import restore_generators, restore_tensors


def restore(
    files: Mapping[str, Path], net: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Put trained tensors, optimizer state and random generators back. Raises CheckpointError when they do not fit."""
    restore_generators(files)
    if "trained.safetensors" in files:
        restore_tensors(files, net, optimizer, parameters)
    else:
        from isthmus.training.shard_files import restore_shards

        restore_shards(files["state.json"].parent, net, optimizer, parameters)
