"""Attention forward and backward on a CPU in bf16: PyTorch's SDPA beside plain products, alternating, medians.

python benchmarks/attention.py
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.nn.attention import attend

SHAPES = {
    "vision (192, 5, 17, 32)": (192, 5, 17, 32, False),
    "text (192, 5, 41, 32)": (192, 5, 41, 32, True),
    "LM (64, 3, 128, 64)": (64, 3, 128, 64, True),
}
ROUNDS = 15


def once(function, shape: tuple[int, ...], causal: bool) -> float:
    """Milliseconds of one forward and backward pass."""
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    start = time.perf_counter()
    function(q, k, v, causal).sum().backward()
    return 1000 * (time.perf_counter() - start)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return attend(q, k, v, mask=None, causal=causal)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, (*shape, causal) in SHAPES.items():
        times: dict[str, list[float]] = {"sdpa": [], "ours": []}
        for number in range(ROUNDS):
            for label, function in (("sdpa", sdpa), ("ours", ours)):
                took = once(function, tuple(shape), causal)
                if number >= 3:
                    times[label].append(took)
        a, b = (statistics.median(times[label]) for label in ("sdpa", "ours"))
        print(f"{name:26} sdpa {a:6.1f} ms   ours {b:6.1f} ms   ratio {a / b:.1f}")


if __name__ == "__main__":
    main()
