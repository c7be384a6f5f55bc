"""``isthmus verify``: contracts on a user's own checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_STYLES = {"pass": "[green]pass[/]", "FAIL": "[bold red]FAIL[/]", "n/a": "[dim]n/a[/]"}


def run(source: str, json_file: Path | None, *, only: list[str], given: Mapping[str, Any]) -> None:
    """Print a row per contract; exit code 1 when one fails. ``given`` are further arguments of ``load``."""
    from isthmus.model import load
    from isthmus.testing.contracts import verify

    console = Console()
    rows = verify(load(source, **given), only=only)  # type: ignore[arg-type]
    table = Table(title=source)
    for column in ("contract", "", "largest difference", "tolerance", "what was seen"):
        table.add_column(column, justify="right" if column in ("largest difference", "tolerance") else "left")
    for row in rows:
        figures = ["" if x is None else f"{x:.2g}" for x in (row.difference, row.tolerance)]
        table.add_row(row.name, _STYLES[row.verdict], *figures, row.told)
    console.print(table)
    failed = [row.name for row in rows if row.verdict == "FAIL"]
    console.print(f"[bold red]{len(failed)} failed:[/] {', '.join(failed)}" if failed else "[bold green]All hold.[/]")
    if json_file is not None:
        facts = {"model": source, "contracts": [row.to_dict() for row in rows]}
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise typer.Exit(1)
