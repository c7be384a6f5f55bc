"""The freezing proof: what a stage says it trains does train, and what it freezes does not move."""

from collections.abc import Iterable, Mapping

from torch import nn

from isthmus.checkpoint import tensor_sha256
from isthmus.errors import StageError
from isthmus.processes import all_gather, rank, world_size
from isthmus.quantised import is_quantised
from isthmus.stage import canonical, named_parameters
from isthmus.training.shards import full_tensor, is_shard, local

WINDOW = 50
"""Steps within which every trained tensor must have had a non-zero gradient."""


class GradientProof:
    """Watches until each trained tensor has had a non-zero gradient; ``pending`` are those that had none yet."""

    def __init__(self, pending: Iterable[str]) -> None:
        self.pending = list(pending)

    def observe(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which pending tensors have a gradient in this step, in any process's shard. Costs nothing once
        everything is proven."""
        if not self.pending:
            return
        has_gradient = [_has_gradient(parameters[name]) for name in self.pending]
        if any(is_shard(parameters[name]) for name in self.pending):
            has_gradient = [any(flags) for flags in zip(*all_gather(has_gradient), strict=True)]
        self.pending = [name for name, flag in zip(self.pending, has_gradient, strict=True) if not flag]

    def demand(self, steps: int) -> None:
        """Raises StageError naming the tensors without a gradient after ``steps`` steps."""
        if self.pending:
            more = f" and {len(self.pending) - 5} more" if len(self.pending) > 5 else ""
            shown = ", ".join(self.pending[:5]) + more
            raise StageError(
                f"After {steps} steps these open tensors have never had a gradient other than zero: {shown}. The "
                "objective does not reach them, or no sample so far uses them. Take them out of the stage's patterns, "
                "or check the data."
            )


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(local(parameter.grad).any())


def frozen_tensors(net: nn.Module, *, alike: bool = False) -> dict[str, str]:
    """sha256 of every tensor that must not move: frozen parameters, with the scales of those in 4 bits, and persistent
    buffers of frozen modules.

    Of shards, which are put together first, one tensor at a time, and where all processes have the net ``alike`` from
    one file, each process reads its part of the tensors: all call it together.
    """
    parameters = {name: p for name, p in named_parameters(net) if not p.requires_grad}
    moving = moving_buffers(net)
    state = net.state_dict()
    buffers = {canonical(n): b for n, b in net.named_buffers() if n in state and canonical(n) not in moving}
    rounded = tuple(f"{name}." for name, p in net.named_parameters() if is_quantised(p))
    scales = {canonical(name): t for name, t in state.items() if name.startswith(rounded)}
    digests: dict[str, str] = {}
    spread = False
    for number, (name, tensor) in enumerate({**parameters, **buffers, **scales}.items()):
        others = alike or is_shard(tensor)
        spread, value = spread or others, full_tensor(tensor)
        if not others or number % world_size() == rank():
            digests[name] = tensor_sha256(value)
    return {n: digest for part in all_gather(digests) for n, digest in part.items()} if spread else digests


def moving_buffers(net: nn.Module) -> set[str]:
    """Names of persistent buffers (running statistics) whose module is in train mode: they train along."""
    state = net.state_dict()
    return {
        canonical(f"{prefix}.{name}" if prefix else name)
        for prefix, module in net.named_modules()
        if module.training
        for name, _ in module.named_buffers(recurse=False)
        if (f"{prefix}.{name}" if prefix else name) in state
    }


def demand_unchanged(before: Mapping[str, str], after: Mapping[str, str], when: str) -> None:
    """Raises StageError naming the first frozen tensor whose bytes are not the same. ``when`` goes into the message."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise StageError(
                f"The frozen tensor {name!r} {when}. A frozen part must stay bit-identical; "
                "start the stage anew from its original parts."
            )
