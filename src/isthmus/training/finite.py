"""Where a NaN comes from: the first parameter, input or module output that is not finite."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from isthmus.batch import Batch
from isthmus.errors import StageError
from isthmus.net import Net
from isthmus.stage import canonical, named_parameters


class NonFiniteError(StageError):
    """A loss or a gradient is NaN or infinite; the update was not made."""


def first_bad_gradient(net: Net) -> str | None:
    """The first parameter, in the net's order, whose gradient holds a non-finite value, with its dtype."""
    for name, parameter in named_parameters(net):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name!r} ({_dtype(parameter.grad)})"
    return None


def first_bad_value(
    net: Net, batches: Sequence[Batch], autocast: AbstractContextManager[object], rng: Tensor
) -> tuple[str | None, int | None]:
    """Replay the forward passes of a step (``rng``: the CPU generator's state before it) without gradients.

    Answers with a description of the first non-finite parameter, input or module output, and its micro-batch.
    """
    module = net
    for name, parameter in named_parameters(module):
        if not _finite(parameter):
            return f"the parameter {name!r} ({_dtype(parameter)})", None
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            for tensor in _tensors(output):
                if not found and not _finite(tensor):
                    found.append(f"the output of module {name!r} ({_dtype(tensor)})")

        return hook

    handles = [m.register_forward_hook(watch(canonical(n) or type(m).__name__)) for n, m in module.named_modules()]
    now = torch.get_rng_state()
    torch.set_rng_state(rng)
    try:
        for index, batch in enumerate(batches):
            for group in batch.visuals:
                if any(not _finite(t) for t in (group.pixels, group.features) if t is not None):
                    return "the pixels or features of the batch", index
            with torch.no_grad(), autocast:
                net.loss(batch)
            if found:
                return found[0], index
    finally:
        torch.set_rng_state(now)
        for handle in handles:
            handle.remove()
    return None, None


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
