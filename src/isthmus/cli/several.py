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

from isthmus.errors import ConfigError
from isthmus.lifeline import PARENT
from isthmus.processes import LostError

_LOOK, _PATIENCE = 0.1, 30.0
"""Seconds between looks at the processes, and until those are ended that do not notice the failure of another."""


class Ended(SystemExit):
    """The exit code of processes that have said themselves how they ended."""


def start(processes: int) -> int:
    """Run this command line, without its ``--processes``, in so many processes that share the cores; the exit code.

    The first process speaks; what another one says is shown where the first only lost it. Signals are passed on, and
    no process is left over. Raises ConfigError inside a torchrun of the user's own.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--processes is for a command started by itself; here torchrun says how many processes run.")
    command = [sys.executable, "-m", "isthmus", *_without_the_option(sys.argv[1:])]
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
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
                running.append(_begin(command, os.environ | shared | own, aside if rank else None))
            _wait(running)
        code, *others = [process.returncode for process in running]
        if code in (LostError.exit_code, -signal.SIGKILL):
            aside.seek(0)
            sys.stderr.write(aside.read().decode(errors="replace"))
            lost = next((n for n, c in enumerate(others, 1) if c not in (0, code)), 0)
            code = others[lost - 1] if lost else code
            sys.stderr.write(
                f"isthmus: process {lost} of {processes} ended with code {code}, and the others with it.\n"
            )
    return code if code >= 0 else 128 - code


def _wait(running: "list[subprocess.Popen[bytes]]") -> None:
    """Until all have ended. Those that wait for one that has failed notice it themselves, or are ended for it."""
    failed = 0.0
    while None in (codes := [process.poll() for process in running]):
        time.sleep(_LOOK)
        failed += _LOOK if any(codes) else 0.0
        if failed > _PATIENCE:
            for process in running:
                process.kill()


def _without_the_option(words: Sequence[str]) -> list[str]:
    place = next(n for n, word in enumerate(words) if word.split("=")[0] == "--processes")
    return [*words[:place], *words[place + (1 if "=" in words[place] else 2) :]]


def _begin(command: list[str], environment: dict[str, str], aside: IO[bytes] | None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
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

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in running:
            if process.poll() is None:
                process.kill()
