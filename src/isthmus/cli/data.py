"""``isthmus data ...``: write and look at data."""

from pathlib import Path

from rich.console import Console

from isthmus.errors import ConfigError, nearest


def scenes(out: Path, layout: str, *, count: int, split: str, seed: int, size: int) -> None:
    """Write generated scenes; ``layout`` is llava, webdataset or coco."""
    from isthmus.data.scenes.export import export
    from isthmus.data.scenes.scene import SPLITS

    if split not in SPLITS:
        raise ConfigError(f"Scenes have no split {split!r}; {nearest(split, SPLITS)}")

    export(out, format=layout, split=split, count=count, seed=seed, size=size)
    Console().print(f"{count} {split} scenes (seed {seed}, {size} x {size}) written to [bold]{out}[/] as {layout}.")
