"""An exponential moving average of the trained weights (EMA): ``a <- d a + (1 - d) w`` after each update.

It lives in the optimizer's state beside the moments, so that whatever saves, resumes or shards those does it too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from isthmus.training.shards import local

_KEY = "average"


def update(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """After an update. The average begins as the weights are after the first one."""
    for parameter, state in _trained(optimizer):
        average = state.get(_KEY)
        if average is None:
            state[_KEY] = parameter.detach().clone()
        else:
            average.lerp_(parameter.detach(), 1.0 - decay)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While inside, the weights are their averages, where there are any."""
    _swap(optimizer)
    try:
        yield
    finally:
        _swap(optimizer)


def take(optimizer: torch.optim.Optimizer) -> None:
    """Put the averages in for good, where there are any."""
    for parameter, state in _trained(optimizer):
        if _KEY in state:
            parameter.data.copy_(state[_KEY])


@torch.no_grad()
def _swap(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in _trained(optimizer):
        if _KEY in state:
            weights, average = local(parameter), local(state[_KEY])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, dict[str, Tensor]]]:
    """Parameters that have had an update, with their state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if state := optimizer.state.get(parameter):
                yield parameter, state
