"""How the processes of a run share a step's gradient: PyTorch's engines with one small interface.

    Engine       one process alone: the net as it is
    Replicated   DistributedDataParallel: every process holds the net, gradients are summed while the backward pass runs
    Sharded      FSDP2 (sharding.py): every process holds its part of each tensor

Gradients are summed, never averaged: the losses are divided by the counts of the full step already (gradient.py). Every
process makes the same calls, whatever rows it has: a pass without rows still takes part in the sum.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from isthmus.batch import Batch, Term
from isthmus.errors import ConfigError
from isthmus.net import Net
from isthmus.processes import TIMEOUT, talking
from isthmus.training.state import StateWriter


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How several processes share a net.

    ``engine`` is ``ddp`` (every process holds the full net) or ``fsdp`` (each holds its share of every tensor, and
    gathers a block when it runs). With fsdp, ``frozen`` tensors are ``sharded`` too, or ``replicated`` in every
    process; ``gather: bf16`` casts what is gathered to bf16, which halves what travels and rounds gains and biases as
    well, while gradients are summed in fp32. ``recompute`` keeps of each block of the language model its input alone,
    and runs it again in the backward pass: with any engine, and in one process too. A process that waits longer than
    ``timeout`` seconds for another one gives up. Raises ConfigError where that is no time.
    """

    engine: Literal["ddp", "fsdp"] = "ddp"
    frozen: Literal["sharded", "replicated"] = "sharded"
    gather: Literal["as_is", "bf16"] = "as_is"
    recompute: bool = False
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ConfigError(f"parallel.timeout is {self.timeout!r}; it is a number of seconds above 0.")


DDP = Parallel()


class Engine:
    """One process alone, and what engines of several have in common. ``net`` is what trains."""

    def __init__(self, net: Net, recomputed: Sequence[nn.Module] = ()) -> None:
        self.net, self._recomputed = net, recomputed

    @property
    def replays(self) -> bool:
        """Whether a process may run a forward pass that the others do not run."""
        return True

    def passes(self, batches: Sequence[Batch], most: int, fewest: int) -> list[Batch | None]:
        """What each of this process's passes reads, when processes have between ``fewest`` and ``most`` micro-batches;
        None for a pass without rows."""
        del most, fewest
        return list(batches)

    def loss(self, batch: Batch | None, *, last: bool) -> Mapping[str, Term]:
        """The terms of one pass, ``last`` of the step or not; none without rows. :meth:`backward` comes next."""
        del last
        return {} if batch is None else self.net.loss(batch)

    def backward(self, loss: Tensor | float) -> None:
        """Add the gradient of this process's part of the step's loss. A loss without learnt tokens is a constant, and
        adds nothing."""
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()

    def cached_loss(self, batches: Sequence[Batch]) -> Mapping[str, Term]:
        """Exact loss and gradient of micro-batches whose rows are contrasted with each other; the terms come
        detached (:meth:`.Net.cached_loss`)."""
        return self.net.cached_loss(batches)

    def state_writer(self) -> StateWriter:
        """What writes the run's checkpoints."""
        return StateWriter()

    @contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        """While inside, the net that was given is what it has learnt so far, in every process; ``folder`` is one that
        all processes share."""
        del folder
        yield

    def close(self, folder: Path) -> None:
        """At the end of training: the net that was given holds what was learnt, and is as it was otherwise."""
        del folder
        for block in self._recomputed:
            del block.forward


class Replicated(Engine):
    """DistributedDataParallel. Only a step's last pass sums over the processes."""

    def __init__(self, net: Net, recomputed: Sequence[nn.Module] = ()) -> None:
        super().__init__(net, recomputed)
        with talking(), warnings.catch_warnings():
            # torch 2.13 renames the option, and the versions before it do not know the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = DistributedDataParallel(_Pass(net), broadcast_buffers=False, gradient_as_bucket_view=True)
        self._ddp.register_comm_hook(None, _summed)
        self._touch: Tensor | None = None

    @property
    def replays(self) -> bool:
        return not self.net.contrasts  # whose loss gathers the rows of all

    def passes(self, batches: Sequence[Batch], most: int, fewest: int) -> list[Batch | None]:
        del most, fewest
        return list(batches) or [None]

    def loss(self, batch: Batch | None, *, last: bool) -> Mapping[str, Term]:
        if last:
            with talking():
                terms, self._touch = self._ddp(batch)
            return terms
        with self._ddp.no_sync():
            terms, _ = self._ddp(batch)
            return terms

    def backward(self, loss: Tensor | float) -> None:
        touched, self._touch = self._touch, None
        if touched is None:
            super().backward(loss)
            return
        with talking():
            (loss + touched).backward()

    def cached_loss(self, batches: Sequence[Batch]) -> Mapping[str, Term]:
        with self._ddp.no_sync():
            terms = self.net.cached_loss(batches)
        self.loss(None, last=True)
        self.backward(0.0)
        return terms


def recomputed(net: Net) -> list[nn.Module]:
    """Let the blocks of the net's language model keep their inputs alone; the blocks. What stands around a block
    (hooks that gather it, gated blocks before it) runs once."""
    blocks = net.blocks()
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return blocks


class _Pass(nn.Module):
    """``net.loss`` as the forward pass of a module, with a zero that depends on every open parameter: the sum over the
    processes waits for all of them, and a process may have no row that reaches one."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.module = net

    def forward(self, batch: Batch | None) -> tuple[Mapping[str, Term], Tensor]:
        terms = {} if batch is None else self.module.loss(batch)
        return terms, touch(p for p in self.module.parameters() if p.requires_grad)


def touch(parameters: Iterable[Tensor]) -> Tensor:
    """A zero whose gradient is zero in each of the parameters, without memory for it."""
    return _Touch.apply(*parameters)


class _Kept(Protocol):
    """What the backward pass of :class:`_Touch` finds in PyTorch's context."""

    like: list[tuple[torch.Size, torch.dtype, torch.device]]


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: _Kept, *_gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), dtype=dtype, device=at).expand(shape) for shape, dtype, at in ctx.like)


def _summed(_state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for one bucket of gradients: their sum over the processes, where DDP would take the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
