"""What each process of the test of BLIP-2's whole first-stage loss runs: its half of the batch."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from isthmus.batch import Batch
from isthmus.models.blip2 import Blip2
from tests.models.tiny_blip2 import TEXTS, pairs, tiny

TERMS = ("itc", "itm", "itg")


def likeliest(scores: torch.Tensor, draws: int) -> torch.Tensor:
    """In the place of ``torch.multinomial``: the hardest negative, so that all processes find the same."""
    return scores.topk(draws).indices


def exact(batch: Batch) -> Batch:
    """The batch in float64."""
    (group,) = batch.visuals
    assert group.pixels is not None
    return replace(batch, visuals=(replace(group, pixels=group.pixels.double()),))


def frozen_encoder() -> Blip2:
    torch.manual_seed(0)
    net = tiny(label_smoothing=0.1).double()
    net.vision.requires_grad_(False)
    return net


def terms_and_gradients(net: Blip2, batch: Batch) -> dict[str, tuple[torch.Tensor, int, dict[str, torch.Tensor]]]:
    """Each term's sum, count, and gradient of the sum with respect to every open parameter it reaches."""
    found = {}
    opened = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for name in TERMS:
        term = net.loss(batch)[name]
        gradients = torch.autograd.grad(term.total, list(opened.values()), allow_unused=True)
        kept = {n: g for n, g in zip(opened, gradients, strict=True) if g is not None}
        found[name] = (term.total.detach(), term.count, kept)
    return found


def run(rank: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    torch.set_num_threads(1)
    torch.multinomial = likeliest
    share = len(TEXTS) // world
    first = rank * share
    batch = exact(pairs(TEXTS[first : first + share], first=first))
    torch.save(terms_and_gradients(frozen_encoder(), batch), Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()
