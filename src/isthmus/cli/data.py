"""``isthmus data ...``: write and look at data."""

from pathlib import Path

from rich.console import Console


def scenes(out: Path, layout: str, *, count: int, split: str, seed: int, size: int) -> None:
    """Write generated scenes; ``layout`` is llava, webdataset or coco."""
    from isthmus.data.scenes.export import export

    export(out, format=layout, split=split, count=count, seed=seed, size=size)
    Console().print(f"{count} {split} scenes (seed {seed}, {size} x {size}) written to [bold]{out}[/] as {layout}.")
