"""``isthmus demo``: the whole story; at a terminal it ends by serving the page over the finished models."""

import socket
import sys
from pathlib import Path

from rich.console import Console

from isthmus.errors import MissingExtraError

HOST, PORT = "127.0.0.1", 8000


def run(out: Path, *, seed: int, serve: bool, jobs: int | None, budget: float) -> None:
    """Train, score and show everything. Elsewhere than at a terminal, or without ``serve``, it ends with the command
    that serves the page."""
    from isthmus.demo.story import run_demo, served

    run_demo(out, seed=seed, jobs=jobs, budget=budget)
    if serve and sys.stdout.isatty():
        show(served(out))


def show(models: list[str]) -> None:
    """Serve the page over these models and open it in a browser, until Ctrl-C."""
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
    return PORT  # serving tells what is wrong with it
