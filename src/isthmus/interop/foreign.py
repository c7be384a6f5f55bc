"""Another code base's file or folder, recognised by its content and opened by its reader."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from isthmus.errors import CheckpointError, IsthmusError, nearest
from isthmus.interop import adapters, folders, formats, hf_gguf
from isthmus.interop.given import Given, Opened
from isthmus.interop.hub import looks_like_id

MOST_LAYERS = 4096
"""More layers than any model has; a net is built before its weights are held against it."""


def open_foreign(path: Path, config: Mapping[str, object] | None, named: Given) -> Opened:
    """Net, processor and ids never to be said; ``config`` is the folder's config.json, if it has one.

    Raises CheckpointError for what is not known, damaged or hostile.
    """
    if depth := next(_beyond(config or {}), None):
        raise CheckpointError(f"{path}: {depth} is more than any model has; its config.json is damaged or hostile.")
    try:
        return _opened(path, config, named)
    except IsthmusError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        # A field left out, of another type, or beyond all sizes: the files are the user's, so this is no fault of ours.
        raise CheckpointError(
            f"{path} cannot be opened: its configuration or its files do not describe a model that can be built "
            f"({type(error).__name__}: {str(error).strip()[:300]}). Is a field of config.json missing or damaged?"
        ) from error


def _opened(path: Path, config: Mapping[str, object] | None, named: Given) -> Opened:
    """A file, a folder of a format that is recognised by its files, adapters, or what transformers wrote."""
    if path.is_file() and hf_gguf.is_gguf(path):
        return hf_gguf.open_gguf(path, named)
    if path.is_file():
        return formats.open_file(path, named)
    opened = formats.open_folder(path, config, named) if path.is_dir() else None
    if opened is None and adapters.is_adapter(path):
        return adapters.open_adapter(path, named)
    adapters.warn_of_leftover(path)
    if opened is not None:
        return opened
    if config is None:
        raise CheckpointError(_nothing_here(path))
    return folders.load_foreign(path, config, named)


def _beyond(config: Mapping[str, object]) -> Iterator[str]:
    """Fields that count layers, at any depth, and are above MOST_LAYERS."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _beyond(value)
        elif "layers" in name and isinstance(value, int | float) and value > MOST_LAYERS:
            yield f"{name} = {value:,}"


_DEEPER = ("*/config.json", "snapshots/*/config.json")
"""Where a model is when the folder above it was named: a run's or a download's, or the hub's cache."""


def _nothing_here(path: Path) -> str:
    if not path.exists():
        beside = [str(f) for f in path.parent.glob("*") if f.is_dir()] if path.parent.is_dir() else []
        near = nearest(str(path), beside) if beside else ""
        hint = " A model of the hub is fetched by `isthmus convert`, `show`, `chat` and `verify` with --revision main."
        after = f"; {near}" if "did you" in near else "." + hint * looks_like_id(path)
        return f"There is no model at {path}: no such file or folder{after}"
    if path.is_dir():
        if (path / "run.json").is_file():
            return (
                f"The run in {path} is not finished, so it has no model yet: run `isthmus train` with the same "
                "recipe and --out again and it goes on where it stopped."
            )
        inside = [str(f.parent) for pattern in _DEEPER for f in sorted(path.glob(pattern))][:3]
        if inside:
            there = ", ".join(inside)
            return f"{path} is not a model folder: it has no config.json, but this in it has: {there}. Give that."
        found = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        return f"{path} is not a model folder: it has no config.json (found: {found})."
    return f"{path} is neither a folder nor a file."
