"""Weights large enough that nothing is vacuous."""

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def redraw(net: Net, std: float = 0.2) -> Net:
    """Every matrix from N(0, std²), every vector moved a little."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=g) * std
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return net
