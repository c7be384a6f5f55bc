"""What each process of the tests of DDP and FSDP2 runs: one step's gradient of every system, its rows split."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.batch import Batch
from isthmus.net import Net
from isthmus.processes import join, wait
from isthmus.stage import Group, apply_stage
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from isthmus.training.parallel import Parallel
from isthmus.training.precision import context
from isthmus.training.shards import full_tensor
from tests.models import tiny_blip2, tiny_flamingo, tiny_llava
from tests.models.blip2_ranks import likeliest
from tests.nn import contrastive_ranks

FP32 = context("fp32", torch.device("cpu"))
ROWS = 32
WAYS = {
    "ddp": Parallel(),
    "fsdp": Parallel(engine="fsdp"),
    "replicated": Parallel(engine="fsdp", frozen="replicated"),
    "recomputed": Parallel(engine="fsdp", recompute=True),
    "bf16": Parallel(engine="fsdp", gather="bf16"),
}


def clip(loss: contrastive_ranks.Loss) -> tuple[Net, Batch]:
    """Bias and temperature are open too."""
    return contrastive_ranks.tiny(loss), contrastive_ranks.batch(ROWS)


def represent() -> tuple[Net, Batch]:
    texts = [[tiny_blip2.CLS, *range(4, 5 + n % 7), tiny_blip2.SEP] for n in range(ROWS)]
    return tiny_blip2.tiny(label_smoothing=0.1), tiny_blip2.pairs(texts)


def generate() -> tuple[Net, Batch]:
    return tiny_blip2.tiny("generate"), tiny_blip2.prompts(
        [[2, *range(3, 5 + n % 5)] for n in range(ROWS)], learn_from=1
    )


def llava(*names: str) -> tuple[Net, Batch]:
    return tiny_llava.tiny(), tiny_llava.batch([tiny_llava.ROWS[names[n % len(names)]] for n in range(ROWS)])


def flamingo() -> tuple[Net, Batch]:
    names = ("one", "two", "none", "clip", "none")
    return tiny_flamingo.tiny(), tiny_flamingo.batch([tiny_flamingo.ROWS[names[n % 5]] for n in range(ROWS)])


SYSTEMS = {
    "clip": partial(clip, "softmax"),
    "siglip": partial(clip, "sigmoid"),
    "represent": represent,
    "generate": generate,
    "llava": partial(llava, "one", "two", "none"),
    "flamingo": flamingo,
    # Every second row, and so every row of half of the processes, has no picture.
    "connector": partial(llava, "one", "none"),
}
ROUNDED = ("llava", "bf16", "even")
CONTRASTS = ("clip", "siglip", "represent")


def build(system: str) -> tuple[Net, Batch]:
    torch.manual_seed(0)
    net, batch = SYSTEMS[system]()
    apply_stage(net, [Group("connector.*" if system == "connector" else "*", 1e-3)])
    visuals = tuple(replace(v, pixels=None if v.pixels is None else v.pixels.double()) for v in batch.visuals)
    return net.double().eval(), replace(batch, visuals=visuals)


def single(batch: Batch) -> Batch:
    visuals = tuple(replace(v, pixels=None if v.pixels is None else v.pixels.float()) for v in batch.visuals)
    return replace(batch, visuals=visuals)


def shares(system: str, batch: Batch, number: int, world: int) -> dict[str, list[Batch]]:
    """The ways in which this process's micro-batches may be cut."""
    own = list(range(number, ROWS, world))
    found = {"even": [batch.select(own)]}
    if system != "represent":  # whose terms belong to one batch
        cut = 3 + number  # unlike in every process
        found["micro"] = [batch.select(own[:cut]), batch.select(own[cut:])]
        if number == 1:
            found["micro"].insert(1, found["micro"].pop().select([0, 1, 2]))
            found["micro"].append(batch.select([own[n] for n in range(cut + 3, len(own))]))
    if system not in CONTRASTS:
        found["first alone"] = [batch] if number == 0 else []
    return found


def step(system: str, way: str, name: str, number: int, world: int) -> dict[str, Any]:
    net, batch = build(system)
    if way == "bf16":
        net, batch = net.float(), single(batch)
    runs = engine(net, WAYS[way])
    autocast = context("bf16" if way == "bf16" else "fp32", torch.device("cpu"))
    means = backward(runs, shares(system, batch, number, world)[name], autocast)
    gradients: dict[str, Tensor] = {
        n: full_tensor(p.grad) for n, p in runs.net.named_parameters() if p.grad is not None
    }
    return {"means": means, "gradients": {n: g.clone() for n, g in gradients.items()}}


def cases(world: int) -> list[tuple[str, str, str]]:
    if world == 4:
        return [("represent", "ddp", "even"), ("represent", "fsdp", "even"), ("llava", "fsdp", "micro")]
    found = [
        (system, way, name)
        for system in SYSTEMS
        for way in ("ddp", "fsdp")
        for name in shares(system, build(system)[1], 0, world)
    ]
    own = [("connector", "replicated", "even"), ("llava", "recomputed", "even"), ("flamingo", "recomputed", "even")]
    return [*found, *own, ROUNDED]


def run(number: int, world: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    torch.multinomial = likeliest
    join()
    found = {case: step(*case, number, world) for case in cases(world)}
    if number in (0, world - 1):
        torch.save(found, Path(folder) / f"{world}-{number}.pt")
    wait()
