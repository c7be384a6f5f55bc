"""What each process of the distributed loss tests runs (imported by freshly started processes, so kept light)."""

from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from isthmus.batch import Batch, Tokens, Visuals
from isthmus.models.clip import Clip, ClipConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig

ROWS, EOT = 6, 19
Loss = Literal["softmax", "sigmoid"]
CASES: list[tuple[Loss, bool]] = [("softmax", False), ("softmax", True), ("sigmoid", False), ("sigmoid", True)]
"""(loss, whether through the gradient cache)"""


def tiny(loss: Loss = "softmax", **options) -> Clip:
    torch.manual_seed(3)
    vision = VisionConfig(image_size=8, patch_size=4, width=12, layers=2, heads=2, mlp_width=16)
    text = TextConfig(context=8, vocab_size=20, width=12, layers=2, heads=2, mlp_width=16, eot_id=EOT)
    return Clip(ClipConfig(vision=vision, text=text, embed_dim=10, loss=loss, **options)).double()


def batch(rows: int = ROWS, keys: tuple[str, ...] | None = None) -> Batch:
    torch.manual_seed(4)
    ids, lengths = torch.randint(0, EOT, (rows, 8)), torch.randint(4, 9, (rows,))
    ids[torch.arange(rows), lengths - 1] = EOT
    pixels = torch.randn(rows, 1, 3, 8, 8, dtype=torch.float64)
    names = tuple(f"row{i}" for i in range(rows))
    return Batch(
        ids=names,
        sources=("test",) * rows,
        text={"text": Tokens(ids=ids, lengths=lengths)},
        visuals=(Visuals(index=torch.arange(rows), pixels=pixels),),
        owner=torch.arange(rows),
        keys=keys or names,
    )


def whole() -> Batch:
    """The global batch; its first and last rows, on different ranks, show the same picture."""
    return batch(keys=("a", "b", "c", "d", "e", "a"))


def gradients(net: Clip) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def own_rows(rank: int, world: int) -> Batch:
    """Unlike numbers of rows: the first process has one more than an even share, the last one less."""
    bounds = [0, *(ROWS // world * n + 1 for n in range(1, world)), ROWS]
    return whole().select(range(bounds[rank], bounds[rank + 1]))


def run(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    results = []
    own = own_rows(rank, world)
    for loss, cached in CASES:
        net = tiny(loss)
        if cached:
            term = net.cached_loss(own.split(2))["contrastive"]
        else:
            term = net.loss(own)["contrastive"]
            (term.total / ROWS).backward()
        summed = {"loss": term.total.detach() / ROWS, **gradients(net)}
        for value in summed.values():  # as the training loop does
            dist.all_reduce(value)
        results.append(summed)
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()
