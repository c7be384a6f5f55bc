"""``--processes N``: the same command in N processes of this machine, as torchrun would start them, with one voice."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import torch

from isthmus.errors import ConfigError
from isthmus.lifeline import PARENT
from isthmus.processes import STOPS, LostError, usable_cores

_POLL, _PATIENCE = 0.1, 30.0
"""Seconds between checks of the processes, and until those are ended that do not notice the failure of another."""


class Ended(SystemExit):
    """The exit code of processes that have said themselves how they ended."""


def start(words: Sequence[str], processes: int) -> int:
    """Run ``isthmus`` with these words in so many processes that share the cores; the exit code.

    The first process speaks; what another one says is shown where the first only lost it. Signals are passed on, and
    no process is left over. Raises ConfigError inside a torchrun of the user's own, and for more processes than GPUs
    where there are some.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--processes is for a command started by itself; here torchrun says how many processes run.")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if 0 < gpus < processes:
        raise ConfigError(
            f"--processes {processes}: each process takes a GPU of its own, and torch sees {gpus}. Start no more than "
            "there are, or hide them (CUDA_VISIBLE_DEVICES=) to compute on the CPU."
        )
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // processes))),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    with tempfile.TemporaryFile() as aside:
        running: list[subprocess.Popen[bytes]] = []
        with _passing_signals(running):
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(_begin(words, os.environ | shared | own, aside if rank else None))
            failed = _wait(running)
        code = running[failed].returncode
        if code and running[0].returncode in (LostError.exit_code, -signal.SIGKILL):
            aside.seek(0)
            sys.stderr.write(aside.read().decode(errors="replace"))
            sys.stderr.write(f"isthmus: process {failed} (counted from 0) ended with code {code}.\n")
    return code if code >= 0 else 128 - code


def _wait(running: "list[subprocess.Popen[bytes]]") -> int:
    """Until all have ended; the first that failed by itself, else 0. Those that wait for it notice or are ended."""
    failed: list[int] = []
    patience = _PATIENCE
    while None in (codes := [process.poll() for process in running]):
        time.sleep(_POLL)
        failed = failed or _failed(codes)
        patience -= _POLL if any(codes) else 0.0
        if patience < 0:
            for process in running:
                process.kill()
    return (failed or _failed(codes) or [0])[0]


def _failed(codes: Sequence[int | None]) -> list[int]:
    return [number for number, code in enumerate(codes) if code not in (None, 0, LostError.exit_code)]


def _begin(words: Sequence[str], environment: dict[str, str], aside: IO[bytes] | None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "isthmus", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if aside is None else subprocess.DEVNULL,
        stderr=aside,
        process_group=0,  # Ctrl-C reaches it through us, once
    )


@contextmanager
def _passing_signals(running: "list[subprocess.Popen[bytes]]") -> Iterator[None]:
    def pass_on(number: int, _frame: object) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            if process.poll() is None:
                process.kill()
