"""``isthmus batch``: a file of API requests, answered offline."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console

from isthmus.cli.options import Loading
from isthmus.cli.serve import needs_extra, opened, remote

DEADLINE = 86_400.0
"""Seconds that one request of a file may take: nobody waits before a screen."""


def run(
    requests: Path,
    out: Path | None,
    *,
    named: Sequence[str],
    together: int,
    domains: Sequence[str],
    json_file: Path | None,
    given: Loading,
) -> None:
    """Answer what is not answered yet. ``given``: further arguments of :func:`isthmus.load`. Exit code 1 when a request
    has an error for an answer."""
    needs_extra()
    from isthmus.opening import load
    from isthmus.serving.api import create_app
    from isthmus.serving.batch import models_of, run_batch
    from isthmus.serving.limits import Limits

    console = Console(emoji=False)
    out = out or requests.with_suffix(".answers.jsonl")
    models = opened(named, given) if named else {}
    models |= {name: load(name, **given) for name in models_of(requests) if name not in models}
    limits = Limits(deadline=DEADLINE, queue=max(1024, 8 * together), rows=min(together, 64))
    app = create_app(models, limits=limits, remote=remote(domains, limits.picture))
    with console.status("") as line:
        outcome = run_batch(
            app,
            requests,
            out,
            together=together,
            note=lambda so_far: line.update(f"{so_far.before + so_far.answered} of {so_far.requests}"),
        )
    before = f", {outcome.before} were before" if outcome.before else ""
    console.print(f"{outcome.answered} answered{before}: {out}", markup=False, highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(outcome) | {"out": str(out)}, indent=2) + "\n", encoding="utf-8")
    if outcome.failed:
        console.print(
            f"{outcome.failed} of all answers are errors; each says why in its line.", markup=False, highlight=False
        )
        raise typer.Exit(1)
