"""``isthmus demo``: the full story; at a terminal the page over the models of the package is open beside it, and in
the end that over the finished models."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console

from isthmus.errors import MissingExtraError
from isthmus.lifeline import PARENT

HOST, PORT = "127.0.0.1", 8000
_PATIENCE = 10.0
"""Seconds in which the page beside the trainings may end by itself."""


def run(out: Path, *, seed: int, serve: bool, jobs: int | None, budget: float) -> None:
    """Train, score and show everything. Elsewhere than at a terminal, or without ``serve``, it ends with the command
    that serves the page."""
    from isthmus.demo.story import run_demo, searched, served

    watched = serve and sys.stdout.isatty()
    beside = partial(page_beside, out) if watched else nullcontext
    run_demo(out, seed=seed, jobs=jobs, budget=budget, page=f"http://{HOST}:{PORT}/", beside=beside)
    if watched:
        show([*served(out), *packaged()], searched(out))


def packaged() -> list[str]:
    """The models of the package, named so that nobody takes them for those that were trained here."""
    from isthmus.pretrained import SCHEME, names

    return [f"shipped-{name}={SCHEME}{name}" for name in reversed(names())]


@contextmanager
def page_beside(out: Path) -> Iterator[None]:
    """The page over the models of the package, in a process of its own; none where they or the extra are missing."""
    from isthmus.cli.serve import needs_extra
    from isthmus.demo.story import searched

    console = Console(emoji=False)
    try:
        needs_extra()
    except MissingExtraError:  # reported at the end, when there is more to show
        yield
        return
    if not packaged():
        yield
        return
    address = f"http://{HOST}:{(port := free_port())}/"
    words = ["serve", *packaged(), "--port", f"{port}", "--pictures", str(searched(out)), "--browse"]
    with (out / "page.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "isthmus", *words],
            env={**os.environ, PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
    console.print(
        f"Meanwhile, the models that came with the package (shipped-...): {address}", markup=False, highlight=False
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show(models: list[str], pictures: Path | None = None) -> None:
    """Serve the page over these models, and a folder to search, and open it in a browser, until Ctrl-C."""
    from isthmus.cli import serve

    console = Console(emoji=False)
    try:
        serve.needs_extra()
    except MissingExtraError as error:
        console.print(f"No page: {error}", markup=False, highlight=False)
        return
    console.print("Ctrl-C ends the page.")
    try:
        serve.run(
            models,
            host=HOST,
            port=free_port(),
            domains=(),
            limits={},
            log_requests=False,
            given={},
            browse=True,
            pictures=pictures,
        )
    except KeyboardInterrupt:
        console.print("The page is closed; everything else is done.")


def free_port() -> int:
    """PORT, or any other that is free where something listens at it already."""
    for port in (PORT, 0):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((HOST, port))
            except OSError:
                continue
            return tried.getsockname()[1]
    return PORT  # serving says what is wrong with it
