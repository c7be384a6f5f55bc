"""Which precision a stage trains in: what it says, or what is quicker for this net on this machine.

On a GPU that multiplies in bf16 that is bf16, on a CPU without such instructions fp32. A CPU with them is measured:
with AVX-512 alone bf16 is slower than fp32, with AMX several times as quick. The net's largest products are timed,
forwards and backwards, for a second at most, once per machine and net; the answer is kept in the user's cache folder.
"""

import platform
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from isthmus.measured import Timer, measured_once
from isthmus.nn.attention import half_is_quicker
from isthmus.processes import all_gather, first
from isthmus.stage import Stage

GAIN = 0.95
"""bf16 must take less than this share of fp32's time."""
_SHAPES, _ROWS = 6, 512


@dataclass(frozen=True, slots=True)
class Choice:
    """``precision`` is ``fp32`` or ``bf16``, ``why`` a sentence for the user."""

    precision: str
    why: str


def context(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What the forward passes of a precision run in; it can be entered once per pass."""
    if precision == "bf16":
        # No cache of cast weights: one filled under no_grad (gradient cache) would cut the weights off the graph.
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


def computes_bf16(device: torch.device) -> bool:
    """Whether the machine multiplies in bf16 (CUDA; x86 with avx512_bf16 or amx); elsewhere it is only emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def choose(stage: Stage, net: nn.Module, device: torch.device, *, timer: Timer = time.perf_counter) -> Choice:
    """The precision of a stage of this net. The first process decides for all."""
    found = _chosen(stage, net, device, timer)
    if found.precision == "bf16" and device.type == "cpu":
        # The first one times what the others then find in the cache, so that frozen encoders attend alike in all.
        all_gather(half_is_quicker(torch.bfloat16, single=False) if first() else None)
    return found


def _chosen(stage: Stage, net: nn.Module, device: torch.device, timer: Timer) -> Choice:
    if stage.precision != "auto":
        return Choice(stage.precision, "the stage says so")
    if not computes_bf16(device):
        return Choice("fp32", f"this {device.type} does not multiply in bf16")
    if device.type != "cpu":
        return Choice("bf16", f"this {device.type} multiplies in bf16")
    return all_gather(_measured(net, timer) if first() else None)[0] or Choice("fp32", "nobody measured")


def _measured(net: nn.Module, timer: Timer) -> Choice:
    shapes = products(net)
    if not shapes:
        return Choice("fp32", "the net has no products to time")
    facts = [torch.get_num_threads(), torch.get_float32_matmul_precision(), shapes]
    seconds = measured_once(facts, ("fp32", "bf16"), lambda: _work(shapes), timer)
    ratio = seconds["bf16"] / seconds["fp32"]
    took = f"bf16 takes {ratio:.2f} of fp32's time for this net's largest products on this machine"
    return Choice("bf16" if ratio < GAIN else "fp32", took)


Shape = tuple[int, int]
"""Rows and columns of a weight."""


def products(net: nn.Module) -> list[tuple[Shape, int]]:
    """The matrices that cost the net most, and how often each occurs. Tables of embeddings are looked up, not
    multiplied."""
    tables = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in net.parameters() if p.ndim == 2 and p.is_floating_point() and id(p) not in tables]
    found = Counter((p.shape[0], p.shape[1]) for p in weights)
    return sorted(found.items(), key=lambda item: (-item[0][0] * item[0][1] * item[1], item[0]))[:_SHAPES]


def _work(shapes: list[tuple[Shape, int]]) -> dict[str, Callable[[], None]]:
    """For each precision one pass over the products, forwards and backwards, from full weights as a step has them."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=draw).requires_grad_() for shape, _ in shapes]
    inputs = [torch.randn(_ROWS, weight.shape[1], generator=draw).requires_grad_() for weight in weights]

    def run(precision: str) -> None:
        for x, weight, (_, count) in zip(inputs, weights, shapes, strict=True):
            for _ in range(min(count, 2)):
                with context(precision, torch.device("cpu")):
                    y = F.linear(x, weight)
                torch.autograd.grad(y.float().sum(), [x, weight])

    return {"fp32": lambda: run("fp32"), "bf16": lambda: run("bf16")}
