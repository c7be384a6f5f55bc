"""Memory of one process under DDP and FSDP2: a LLaVA of about 100 million parameters, all of it open, over gloo.

    python benchmarks/parallel_memory.py --processes 2

Prints for each engine the resident memory of the first process before the engine, after three steps, and at its peak.
Nets are made as recipes make them: in every process for DDP, in a file of the working folder for FSDP2.
"""

import argparse
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp  # what an engine imports is no memory of its
from torch.multiprocessing.spawn import spawn

from isthmus.batch import Batch, Places, Tokens, Visuals
from isthmus.mapped import made
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.vit import VisionConfig
from isthmus.processes import join, rank, wait
from isthmus.stage import Group, Stage, apply_stage
from isthmus.training import optim
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from isthmus.training.parallel import Parallel
from isthmus.training.precision import context

VOCAB, PATCHES, WORDS = 8000, 16, 16


def net() -> Llava:
    vision = VisionConfig(image_size=64, patch_size=16, width=384, layers=6, heads=6, mlp_width=1536)
    language = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 11,
        "num_attention_heads": 12,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return Llava(LlavaConfig(vision=vision, language=language))


def batch() -> Batch:
    """One row: a picture and some words."""
    ids = torch.cat([torch.zeros(PATCHES, dtype=torch.long), torch.arange(1, WORDS + 1)])[None]
    labels = torch.where(torch.arange(PATCHES + WORDS) >= PATCHES, ids, -100)
    zero = torch.zeros(1, dtype=torch.long)
    return Batch(
        ids=("row",),
        sources=("made up",),
        text={"lm": Tokens(ids=ids, lengths=torch.tensor([PATCHES + WORDS]), labels=labels)},
        visuals=(Visuals(index=zero, pixels=torch.randn(1, 1, 3, 64, 64)),),
        places={"lm": Places(row=zero, visual=zero, start=zero, length=torch.tensor([PATCHES]))},
        owner=zero,
        keys=("picture",),
    )


def resident(what: str) -> float:
    """MiB: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{what}:"))


def run(number: int, processes: int, port: int, name: str, folder: Path) -> None:
    told: dict[str, Any] = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in told.items()}
    torch.set_num_threads(1)
    join()
    own = net() if name == "ddp" else made(net, folder)
    table = apply_stage(own, [Group("*", 1e-4)])
    stage = Stage(name="s", train=table.groups, steps=3)
    before = resident("VmRSS")
    runs = engine(own, Parallel(engine=name))  # type: ignore[arg-type]
    parameters = optim.open_parameters(runs.net, table)
    optimizer = optim.build_optimizer(parameters, table, stage)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        backward(runs, [batch()], context("fp32", torch.device("cpu")))
        optimizer.step()
    if rank() == 0:
        print(
            f"{name} in {processes} processes, {table.parameters:,} parameters: {before:,.0f} MiB with the net, "
            f"{resident('VmRSS'):,.0f} MiB after three steps, {resident('VmHWM'):,.0f} MiB at the peak",
            flush=True,
        )
    wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=2)
    processes = parser.parse_args().processes
    for name in ("ddp", "fsdp"):
        with socket.socket() as meeting:
            meeting.bind(("127.0.0.1", 0))
            port = meeting.getsockname()[1]
        with tempfile.TemporaryDirectory(dir=".") as folder:
            spawn(run, args=(processes, port, name, Path(folder)), nprocs=processes)


if __name__ == "__main__":
    main()
