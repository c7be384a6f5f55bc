"""FSDP2 (``fully_shard``): every process holds its share of each tensor, of its gradient and of the optimizer's state.

Units are the language model's blocks, gathered when they run and dropped afterwards, and the towers (vision encoder,
text tower). Everything else (embeddings, connector, gated blocks, heads) is the root, which is gathered once per pass
and stays until its backward pass is done, as the towers do.

No process may wait for a call that another does not make. A language model's blocks run once per pass in every
process, so a process with fewer passes than another repeats a row of which nothing is learnt. Towers and connector
run as often as there are shapes of pictures, maybe never: being gathered by the pass itself, and reduced after it,
they need nothing of the other processes in between.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from isthmus import mapped
from isthmus.allocator import return_freed_memory
from isthmus.batch import IGNORE, Batch, Term
from isthmus.net import Net
from isthmus.processes import all_gather, device, talking, world_size
from isthmus.training.parallel import Engine, Parallel, recomputed, touch
from isthmus.training.shard_files import ShardWriter
from isthmus.training.shards import full_tensor, is_shard
from isthmus.training.state import StateWriter

_PASS = "sharded_pass"


class Sharded(Engine):
    """A twin of the net in shards trains; :meth:`close` brings what it learnt back into the net. The net's own memory
    is not touched in between: one that is mapped from a file (mapped.py) takes no room beside the shards."""

    def __init__(self, net: Net, parallel: Parallel) -> None:
        return_freed_memory()  # or what is gathered for a moment stays after it
        self.unsharded = net
        super().__init__(_twin(net))
        self._touch: Tensor | None = None
        setattr(self.net, _PASS, self._pass)
        self._towers = [tower for tower in self.net.towers() if any(True for _ in tower.parameters())]
        if parallel.recompute:
            recomputed(self.net)
        self._shard(parallel)
        self._root = _sharded(self.net)
        register_fsdp_forward_method(self.net, _PASS)

    @property
    def replays(self) -> bool:
        return False

    def _shard(self, parallel: Parallel) -> None:
        mesh = init_device_mesh(device().type, (world_size(),))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if parallel.gather == "bf16":
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        replicated = {p for p in self.net.parameters() if not p.requires_grad and parallel.frozen == "replicated"}
        for tensor in (*replicated, *self.net.buffers()):
            tensor.data = tensor.data.to(device())  # the engine moves only what it shards
        options = {"mesh": mesh, "mp_policy": policy, "ignored_params": replicated}
        for block in self.net.blocks():
            fully_shard(block, **options)
        for tower in self._towers:
            fully_shard(tower, reshard_after_forward=False, **options)
        fully_shard(self.net, reshard_after_forward=False, **options)
        self._resident = [tower for tower in self._towers if isinstance(tower, FSDPModule)]
        for module in self.net.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # the other way needs NCCL, even for a factor of one

    def _pass(self, batch: Batch | None) -> tuple[Mapping[str, Term], Tensor]:
        """One pass, after the root's hook: the towers are gathered, whether or not this process's rows need them."""
        for tower in self._resident:
            tower.unshard()
        resident = [p for p in self.net.parameters() if p.requires_grad and not is_shard(p)]
        terms = {} if batch is None else self.net.loss(batch)
        return terms, touch(resident) if resident else torch.zeros((), requires_grad=True)

    def passes(self, batches: Sequence[Batch], most: int, fewest: int) -> list[Batch | None]:
        spare = _unlearnt(batches[0]) if batches and fewest < most else None
        if fewest == 0:  # a collective: processes that need nothing take part too
            spare = next(batch for batch in all_gather(spare) if batch is not None)
        missing = most - len(batches)
        return [*batches, *([spare.to(device())] * missing if spare is not None else [])]

    def loss(self, batch: Batch | None, *, last: bool) -> Mapping[str, Term]:
        del last  # every pass is reduced: unsharded gradients would wait in every process
        with talking():
            terms, self._touch = getattr(self.net, _PASS)(batch)
        return terms

    def backward(self, loss: Tensor | float) -> None:
        assert self._touch is not None
        with talking():
            (loss + self._touch).backward()
        self._touch = None

    def cached_loss(self, batches: Sequence[Batch]) -> Mapping[str, Term]:
        """All is gathered for the step and reduced once after it, so processes may have unlike numbers of chunks."""
        self._root.set_requires_gradient_sync(False)
        self._root.set_reshard_after_backward(False)
        self.loss(None, last=False)
        with talking():
            terms = self.net.cached_loss(batches)
        self._root.set_requires_gradient_sync(True)
        self._root.set_reshard_after_backward(True)
        self.loss(None, last=True)
        self.backward(0.0)
        return terms

    def state_writer(self) -> StateWriter:
        return ShardWriter()

    @contextmanager
    def gathered(self, folder: Path) -> Iterator[None]:
        self.close(folder)
        waits = next(self.unsharded.parameters()).device
        self.unsharded.to(device())
        try:
            yield
        finally:
            self.unsharded.to(waits)

    @torch.no_grad()
    def close(self, folder: Path) -> None:
        """Each trained tensor is put together once, for the file from which all processes have it from then on."""
        trained = dict(self.net.named_parameters())
        opened = {name: p for name, p in self.unsharded.named_parameters() if p.requires_grad}
        found = mapped.shared(((n, full_tensor(trained[n]).view_as(p).to(p.device)) for n, p in opened.items()), folder)
        for name, parameter in opened.items():
            mapped.given(parameter, found[name])
        buffers = dict(self.net.named_buffers())
        for name, buffer in self.unsharded.named_buffers():
            buffer.copy_(buffers[name])


def _twin(net: Net) -> Net:
    """A copy of the net that shares its values. Numbers without a dimension have one in it, for FSDP2 cuts along it."""
    shared = {}
    for parameter in net.parameters():
        value = parameter.detach()
        shared[id(parameter)] = nn.Parameter(value.view(1) if value.ndim == 0 else value, parameter.requires_grad)
    return copy.deepcopy(net, shared)


def _sharded(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _unlearnt(batch: Batch) -> Batch:
    """One row of the batch, of which nothing is learnt."""
    row = batch.select([0])
    text = {
        name: replace(t, labels=None if t.labels is None else torch.full_like(t.labels, IGNORE))
        for name, t in row.text.items()
    }
    return replace(row, text=text)
