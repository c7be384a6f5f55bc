"""``isthmus verify``: contracts on a user's own checkpoint."""

import json
import os
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from isthmus.cli.options import Loading
from isthmus.cli.serve import KEY, needs_extra
from isthmus.errors import CapabilityError, ConfigError

_STYLES = {"pass": "[green]pass[/]", "FAIL": "[bold red]FAIL[/]", "n/a": "[dim]n/a[/]"}


def run(source: str, json_file: Path | None, *, only: list[str], given: Loading, served_as: str | None = None) -> None:
    """Print a row per contract; exit code 1 when one fails. ``given`` are further arguments of ``load``."""
    if served_as is not None:
        raise ConfigError("--served-as names a model of the engine at --against; give that too.")
    from isthmus.opening import load
    from isthmus.testing.contracts import verify

    console = Console(emoji=False)
    rows = verify(load(source, **given), only=only)
    table = Table(title=escape(source))
    for column in ("contract", "", "largest difference", "tolerance", "details"):
        table.add_column(column, justify="right" if column in ("largest difference", "tolerance") else "left")
    for row in rows:
        figures = ["" if x is None else f"{x:.2g}" for x in (row.difference, row.tolerance)]
        table.add_row(row.name, _STYLES[row.verdict], *figures, escape(row.detail))
    console.print(table)
    failed = [row.name for row in rows if row.verdict == "FAIL"]
    console.print(f"[bold red]{len(failed)} failed:[/] {', '.join(failed)}" if failed else "[bold green]All hold.[/]")
    if json_file is not None:
        facts = {"model": source, "contracts": [row.to_dict() for row in rows]}
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise typer.Exit(1)


def run_against(
    source: str,
    url: str,
    json_file: Path | None,
    *,
    served_as: str | None,
    only: list[str],
    given: Loading,
) -> None:
    """Print a row per request that the model and the engine at ``url`` both answer; exit code 1 when one differs."""
    if only:
        raise ConfigError("--only names contracts; with --against the same requests go to both, all of them.")
    needs_extra()
    from isthmus.opening import load
    from isthmus.serving.against import compare

    console = Console(emoji=False)
    key, hint = os.environ.get(KEY) or "none", Path(source).name
    rows = compare(load(source, **given), url, served_as=served_as, hint=hint, key=key)
    if not rows:
        raise CapabilityError(f"{source} neither answers nor embeds texts, so it cannot be compared with an engine.")
    table = Table(title=escape(f"{source} against {url}"))
    for column in ("request", "", "tokens alike", "largest difference", "details"):
        table.add_column(column, justify="right" if "tokens" in column or "largest" in column else "left")
    for row in rows:
        difference = "" if row.difference is None else f"{row.difference:.2g}"
        table.add_row(row.name, _STYLES[row.verdict], f"{row.tokens} of {row.of}", difference, escape(row.detail))
    console.print(table)
    failed = [row.name for row in rows if row.verdict == "FAIL"]
    console.print(f"[bold red]{len(failed)} differ:[/] {', '.join(failed)}" if failed else "[bold green]All alike.[/]")
    if json_file is not None:
        facts = {"model": source, "against": url, "requests": [row.to_dict() for row in rows]}
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    if failed:
        raise typer.Exit(1)
