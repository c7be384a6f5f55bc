"""``isthmus data ...``: write and inspect data."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from isthmus.cli.options import Loading
from isthmus.errors import ConfigError, nearest


def scenes(out: Path, layout: str, *, count: int, split: str, seed: int, size: int) -> None:
    """Write generated scenes; ``layout`` is llava, webdataset or coco."""
    from isthmus.demo.scenes.export import export
    from isthmus.demo.scenes.scene import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"Scenes have no split {split!r}; {nearest(split, SPLITS)}")

    export(out, format=layout, split=split, count=count, seed=seed, size=size)
    Console(emoji=False).print(
        f"{count} {split} scenes (seed {seed}, {size} x {size}) written to [bold]{escape(str(out))}[/] as {layout}."
    )


def capfilt(
    data: str,
    out: Path,
    *,
    captioner: str,
    clip: str,
    k: int,
    keep: int,
    wrong: float,
    limit: int | None,
    options: Sequence[str],
    seed: int,
    json_file: Path | None,
    given: Loading,
) -> None:
    """Synthetic captions ranked with the web caption; ``wrong`` mislabels a share first, to see what filtering does.
    ``given``: further arguments of :func:`isthmus.load`, for both models."""
    from isthmus.cli.evaluate import source_of, split_options
    from isthmus.config import fit
    from isthmus.data.sources import open_source
    from isthmus.opening import load
    from isthmus.recipes.capfilt import Mislabelled
    from isthmus.recipes.capfilt import capfilt as run
    from isthmus.recipes.scoring import First

    changes, decoding = split_options(options)
    bad_samples = fit(float, decoding.pop("bad_samples", 0.01), "--set task.bad_samples")
    source = open_source(source_of(data) | changes)
    if limit is not None:
        source = First(source, limit)
    if wrong:
        source = Mislabelled(source, wrong, seed)
    writes, judges = load(captioner, **given), load(clip, **given)
    writes.need("generate")
    judges.need("similarity")
    with Progress(transient=True) as bar:
        task = bar.add_task("capfilt", total=len(source))
        report = run(
            source,
            writes,
            judges,
            out,
            k=k,
            keep=keep,
            seed=seed,
            bad_samples=bad_samples,
            decoding=decoding,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console = Console(emoji=False)
    console.print(
        f"{report.pictures} pictures, {report.captions} captions kept in [bold]{escape(str(out))}[/];", end=" "
    )
    console.print(f"{report.web_kept:.1%} keep their web caption.")
    if report.bad:
        console.print(f"[yellow]{report.bad} bad samples were left out, see {escape(str(out))}.quarantine.jsonl.[/]")
    if report.correct_before is not None and report.correct_after is not None:
        console.print(f"Correct captions: {report.correct_before:.1%} before, {report.correct_after:.1%} after.")
    if report.right_web_kept is not None and report.wrong_web_kept is not None:
        console.print(
            f"Web captions kept: {report.right_web_kept:.1%} of the right, {report.wrong_web_kept:.1%}", end=""
        )
        console.print(" of the wrong.")
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
