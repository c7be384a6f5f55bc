"""Which of torch's two libraries multiplies fp32 matrices on this CPU: oneDNN where it is quicker and as exact.

torch takes MKL, which keeps its AVX-512 kernels to Intel's processors; on an AMD EPYC with AVX-512 oneDNN's products
take 0.45 of MKL's time (docs/speed.md). torch hands fp32 products to oneDNN only under
``torch.set_float32_matmul_precision("medium")``, which permits bf16 inside. oneDNN makes use of that where AMX is, and
computes in full fp32 elsewhere. So the setting is tried: it stays only where AMX is absent, products come out as exact
as before, and they are quicker. It is the process's own, for products of others too. The two round otherwise, so a
training keeps the one that it was begun with (:mod:`isthmus.training.multiplying`).

A product by oneDNN costs 11 µs before it begins. Attention's many small ones, and steps that read a token a row, stay
with MKL (:func:`small_products`).
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.measured import Timer, measured_once

T = TypeVar("T")

VARIABLE = "ISTHMUS_PRODUCTS"
"""Environment variable: ``torch`` leaves torch's own setting alone."""
GAIN = 0.8
"""oneDNN must take less than this share of MKL's time."""
SMALL = 2**20
"""Rows times inputs times outputs of a product below which MKL is quicker in any case."""
_PLAIN, _QUICK = "highest", "medium"
_SHAPES = ((512, 512, 512), (64, 384, 1536), (4, 512, 2048))
"""Rows, inputs and outputs of the products that are timed: those of training, of a short text, of decoding."""
_ODD = ((1, 37, 129), (3, 512, 77), (130, 1000, 65), (257, 384, 384))
"""And of those that are held against fp64 besides."""


def multiply_quickly(device: torch.device | None = None) -> bool:
    """Let oneDNN multiply fp32 matrices in this process if that is quicker here and as exact. True where it does.

    Nothing is changed for another device than the CPU, beside a GPU, where somebody set a precision already, where
    VARIABLE says so, or within :func:`held`.
    """
    if not _STATE.held and _nobody_else(device) is None and quicker():
        take(ONEDNN)
    return torch.get_float32_matmul_precision() == _QUICK


ONEDNN, TORCH = "oneDNN", "torch"
"""By whom fp32 products are: oneDNN, or whatever torch takes by itself."""


class _State:
    """``taken``: whether the setting is ours; ``held``: whether a training has it as it is to stay."""

    taken = False
    held = False


_STATE = _State()


def own() -> str:
    """By whom products are without this module, with the precision that somebody set."""
    setting = torch.get_float32_matmul_precision()
    ours = _STATE.taken and setting == _QUICK
    return TORCH if ours or setting == _PLAIN else f"{TORCH} (precision {setting})"


def take(by: str) -> None:
    """Products by oneDNN from here on, or by anything else as torch has them."""
    if by == ONEDNN:
        torch.set_float32_matmul_precision(_QUICK)
        _STATE.taken = True
    elif _STATE.taken and torch.get_float32_matmul_precision() == _QUICK:
        torch.set_float32_matmul_precision(_PLAIN)
        _STATE.taken = False


@contextmanager
def held() -> Iterator[None]:
    """Inside, nothing but :func:`take` changes by whom products are: a model that is opened does not."""
    before, _STATE.held = _STATE.held, True
    try:
        yield
    finally:
        _STATE.held = before


def hindrance(device: torch.device | None = None) -> str | None:
    """Why products cannot be oneDNN's here; none where they can."""
    if (why := _nobody_else(device)) is not None:
        return why
    if not _full_fp32_expected():
        return "oneDNN is known to compute in full fp32 on x86 without AMX alone, which this CPU is not"
    return None if _with(_QUICK, _exact) else "oneDNN's products are less exact here"


def _nobody_else(device: torch.device | None) -> str | None:
    """Who or what has the setting in hand, if anything has."""
    if device is not None and device.type != "cpu":
        return f"they are computed on {device.type}"
    if torch.cuda.is_available():
        return "a GPU is beside the CPU"
    if os.environ.get(VARIABLE) == TORCH:
        return f"{VARIABLE}={TORCH} says so"
    setting = torch.get_float32_matmul_precision()
    return None if own() == TORCH else f"torch.set_float32_matmul_precision({setting!r}) was called"


@contextmanager
def small_products(inside: bool = True) -> Iterator[Callable[[Tensor], None]]:
    """Inside, products go to MKL again where :func:`multiply_quickly` gave them to oneDNN. Yields what does the same
    for the backward pass of the attention that made a tensor, a few views ago."""
    if not (inside and _STATE.taken and torch.get_float32_matmul_precision() == _QUICK):
        yield lambda y: None
        return
    torch.set_float32_matmul_precision(_PLAIN)
    try:
        yield _small_backward
    finally:
        torch.set_float32_matmul_precision(_QUICK)


def _small_backward(y: Tensor) -> None:
    node = y.grad_fn
    for _ in range(4):
        if node is not None and "ScaledDotProduct" in node.name():
            node.register_prehook(partial(_hook, _PLAIN))
            node.register_hook(partial(_hook, _QUICK))
            return
        node = node.next_functions[0][0] if node is not None and node.next_functions else None


def _hook(setting: str, *gradients: object) -> None:
    torch.set_float32_matmul_precision(setting)


@cache
def quicker(timer: Timer = time.perf_counter) -> bool:
    """Whether oneDNN is exact and quicker here: tried once a process, timed once a machine."""
    if not _full_fp32_expected() or not _with(_QUICK, _exact):
        return False
    both = (_PLAIN, _QUICK)
    seconds = measured_once(["products"], both, lambda: {name: _work(name) for name in both}, timer)
    return seconds[_QUICK] < GAIN * seconds[_PLAIN]


def _full_fp32_expected() -> bool:
    """On x86 without AMX; elsewhere oneDNN is known to compute such products in bf16."""
    able = torch.cpu.get_capabilities()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and not any(has for what, has in able.items() if "amx" in what)


def _exact() -> bool:
    """Whether products have the error of fp32 (a rounding is 6e-8 of a term, in bf16 4e-3)."""
    draw = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in (*_SHAPES, *_ODD):
        x, w = torch.randn(rows, inputs, generator=draw), torch.randn(outputs, inputs, generator=draw)
        wrong = ((x @ w.T).double() - x.double() @ w.double().T).square().mean().sqrt()
        if not wrong < 1e-6 * inputs**0.5:
            return False
    return True


def _work(setting: str) -> Callable[[], None]:
    draw = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(r, i, generator=draw), torch.randn(o, i, generator=draw)) for r, i, o in _SHAPES]

    def run() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)

    return lambda: _with(setting, run)


def _with(setting: str, run: Callable[[], T]) -> T:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with torch.no_grad():
            return run()
    finally:
        torch.set_float32_matmul_precision(before)
