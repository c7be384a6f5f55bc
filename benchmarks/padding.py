"""Steps of the two contrastive stages with and without the work that nobody reads: padding of unlike texts, and rows of
the last layer that are not pooled. In turn, one thread, medians.

python benchmarks/padding.py RUNS   (a demo's folder, for BLIP-2's frozen parts)
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from isthmus.demo.story import demo_recipe
from isthmus.nn import lengths
from isthmus.nn.block import Block
from isthmus.nn.connectors.qformer import QFormer
from isthmus.recipes.build import build
from isthmus.recipes.run import make_loader
from isthmus.stage import apply_stage

ROUNDS = 14
_BLOCK, _QFORMER = Block.forward, QFormer.forward


def _whole_block(self: Block, x: torch.Tensor, *, read: torch.Tensor | None = None, **how: Any) -> torch.Tensor:
    y = _BLOCK(self, x, **how)
    return y if read is None else y[torch.arange(len(y)), read][:, None]


def _whole_qformer(self: QFormer, *rows: Any, read: int | None = None, **how: Any) -> Any:
    found = _QFORMER(self, *rows, **how)
    return found if read is None else type(found)(found.hidden[:, :read], found.past)


@contextmanager
def everything() -> Iterator[None]:
    """Inside, padding and unread rows are computed."""
    with (
        mock.patch.object(lengths, "_MOST", 1),
        mock.patch.object(Block, "forward", _whole_block),
        mock.patch.object(QFormer, "forward", _whole_qformer),
    ):
        yield


def step(net: Any, batch: Any) -> float:
    """Seconds of one forward and backward pass."""
    net.zero_grad(set_to_none=True)
    start = time.perf_counter()
    terms = net.loss(batch)
    torch.stack([term.weight * term.mean for term in terms.values()]).sum().backward()
    return time.perf_counter() - start


def main(runs: Path) -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {torch.backends.cpu.get_cpu_capability()}, float32")
    for name in ("clip-tiny", "blip2-tiny"):
        recipe = demo_recipe(name, runs, seed=0)
        stage = recipe.stages[0]
        built = build(recipe).enter(stage)
        apply_stage(built.net, stage.stage.train)
        loader = make_loader(built, stage)
        stream = loader.steps()
        times: dict[str, list[float]] = {"everything": [], "what is read": []}
        for number in range(ROUNDS):
            (batch,) = next(stream)[1]
            for way in sorted(times, reverse=bool(number % 2)):
                with everything() if way == "everything" else nullcontext():
                    took = step(built.net, batch)
                if number >= 2:
                    times[way].append(took)
        stream.close()
        medians = {way: statistics.median(found) for way, found in times.items()}
        told = ", ".join(f"{way} {1000 * found:.0f} ms" for way, found in medians.items())
        print(f"{name}, {stage.name}: {told}, ratio {medians['what is read'] / medians['everything']:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
