"""What bounds a side of a row: its FLOPs and bytes against what the machine multiplies and copies in a second, and its
peak memory.

The roofline (Williams, Waterman, Patterson 2009) says that work of F FLOPs and B bytes takes at least
``max(F / multiplied a second, B / copied a second)``. FLOPs are those of products, convolutions and attention, as
PyTorch counts them. Bytes are read and written by every kernel that is no view, as if no cache held anything, so the
bytes bound is loose: a cache makes real work faster than it.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
ATEN = torch.ops.aten
FORMULAS = {
    **flop_registry,
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}
NO_WORK = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})


class WorkCounter(TorchDispatchMode):
    """Sums FLOPs, and the bytes of the tensors that each kernel reads and writes; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None:  # what consists of other kernels is counted by them
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=found)
        if not func.is_view and func.overloadpacket.__name__ not in NO_WORK:
            self.bytes += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, found)))
        return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def work(side: Callable[[], Any]) -> dict[str, float]:
    """GFLOP and GB of one run."""
    with WorkCounter() as counted:
        side()
    return {"gflop": round(counted.flops / 1e9, 6), "gb": round(counted.bytes / 1e9, 6)}


def peak_mib(side: Callable[[], Any]) -> float | None:
    """How much resident memory one run adds at its peak, in MiB; None where Linux does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back first, or this one would find it there
        CLEAR.write_text("5")  # the peak counts from here (proc_pid_clear_refs(5))
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    side()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(name: str) -> int:
    """In KiB."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))


def rates(dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 5) -> dict[str, float]:
    """What this machine does in a second with the threads it was given: GFLOP of products of ``size``³ in ``dtype``,
    and GB (read and written) of copies of 256 MiB. The best of ``repeats``."""
    one, other = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: one @ other) for _ in range(repeats))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(repeats))
    return {"gflops": round(2 * size**3 / product / 1e9, 1), "gbs": round(2 * source.nbytes / copy / 1e9, 2)}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bound(found: dict[str, float], machine: dict[str, float]) -> tuple[float, str]:
    """The roofline's least seconds, and which of ``products`` and ``bytes`` sets them."""
    product, copied = found["gflop"] / machine["gflops"], found["gb"] / machine["gbs"]
    return (product, "products") if product >= copied else (copied, "bytes")
