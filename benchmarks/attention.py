"""Attention forward and backward on a CPU in bf16, three ways in turn, medians: SDPA's own bf16 kernel, plain products,
and SDPA in float32, which is what isthmus does.

python benchmarks/attention.py
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.nn.attention import attend

SHAPES = {
    "vision (128, 5, 10, 32)": (128, 5, 10, 32, False),
    "text (128, 5, 41, 32)": (128, 5, 41, 32, True),
    "LM (8, 4, 190, 32)": (8, 4, 190, 32, True),
    "LM (64, 3, 128, 64)": (64, 3, 128, 64, True),
}
ROUNDS = 15


def once(function, shape: tuple[int, ...], causal: bool) -> float:
    """Milliseconds of one forward and backward pass."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    function(q, k, v, causal).sum().backward()
    return 1000 * (time.perf_counter() - start)


def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attend(q, k, v, mask=None, causal=causal)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    ways = {"bf16 kernel": kernel, "plain products": plain, "ours": ours}
    for name, (*shape, causal) in SHAPES.items():
        times: dict[str, list[float]] = {label: [] for label in ways}
        for number in range(ROUNDS):
            for label, function in ways.items():
                took = once(function, tuple(shape), causal)
                if number >= 3:
                    times[label].append(took)
        medians = {label: statistics.median(found) for label, found in times.items()}
        told = "   ".join(f"{label} {ms:6.1f} ms ({ms / medians['ours']:.1f})" for label, ms in medians.items())
        print(f"{name:26} {told}")


if __name__ == "__main__":
    main()
