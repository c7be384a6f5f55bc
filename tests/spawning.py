"""Processes of a test, forked from a server that has imported what all of them need: each import is paid for once."""

import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

_NEEDED = [
    *("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.checkpoint.hf_storage"),
    *(
        "transformers.models.llama.modeling_llama",
        "isthmus.recipes.run",
        "isthmus.training",
        "isthmus.training.sharding",
    ),
]


def free_port() -> int:
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        return meeting.getsockname()[1]


def spawn(run: Callable[..., None], world: int, *args: Any) -> None:
    """``run(number, world, *args)`` in so many processes, until all have ended. Raises what one of them raises."""
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(_NEEDED)
    start_processes(run, (world, *args), nprocs=world, start_method="forkserver")
