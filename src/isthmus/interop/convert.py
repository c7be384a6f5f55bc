"""Writing a model in another project's form: ``isthmus convert``.

Which formats a kind of model can be written in, and by what, is said in :mod:`.formats`; each writer turns a model into
the files of a folder, which is then written completely or not at all. What a format has no place for is refused, or
lost only where that is allowed.
"""

from dataclasses import dataclass
from dataclasses import replace as replace_
from pathlib import Path
from typing import Protocol, cast

from isthmus import adapters
from isthmus.checkpoint import FORMAT, MANIFEST, read_json, write_folder
from isthmus.data.interleave import InterleaveProcessor
from isthmus.data.processor import SpliceProcessor
from isthmus.errors import CheckpointError, ConfigError, nearest
from isthmus.interop.card import card
from isthmus.interop.export import AnySource, Export
from isthmus.interop.formats import FORMATS, named
from isthmus.nn.vit import VisionEncoder
from isthmus.user_code import label

SHARD_BYTES = 5_000_000_000
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


class _Writer(Protocol):
    """What the writers of :data:`isthmus.interop.formats.FORMATS` are to the models of their kind."""

    def __call__(self, model: AnySource, *, shard_bytes: int) -> Export: ...


@dataclass(frozen=True, slots=True)
class Converted:
    """Where the model went, its files in bytes by name, what was lost, and what is another there."""

    folder: Path
    files: dict[str, int]
    losses: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {"folder": str(self.folder), "files": self.files, "losses": list(self.losses), "notes": list(self.notes)}


def write_model(
    model: AnySource,
    folder: str | Path,
    to: str,
    *,
    replace: bool = False,
    lossy: bool = False,
    shard_bytes: int | None = None,
    origin: str | Path | None = None,
) -> Converted:
    """Write ``model`` as a folder of the format ``to``, atomically, with a model card.

    Args:
        replace: an existing folder may be replaced; else it is an error.
        lossy: what the format has no place for may be left out; else it is an error that names it.
        shard_bytes: safetensors larger than this, 5 GB unless said otherwise, are written in several files; where the
            format keeps its weights in one file, a note says so.
        origin: where the model was opened; the card has the recipe and scores found there.

    Raises ConfigError for an unknown format, CheckpointError where it cannot hold the model (naming the field) and
    where the folder cannot be written.
    """
    folder = Path(folder)
    if to not in FORMATS:
        raise ConfigError(f"unknown format {to!r}; {nearest(to, FORMATS)}")
    writers = model.system.exporters
    if to != "isthmus" and to not in writers:
        raise CheckpointError(
            f"A {model.kind} model cannot be written in the format {to}; it can in {', '.join(('isthmus', *writers))}."
        )
    if to != "isthmus" and adapters.adapted(model.net):
        raise CheckpointError(
            f"This model carries adapters ({adapters.summary(model.net)}), and the format {to} has no place for them: "
            "give --merge to add them to their layers first."
        )
    vision = model.net.part("vision")
    if to != "isthmus" and isinstance(vision, VisionEncoder) and vision.config.kind:
        raise CheckpointError(
            f"This model's vision encoder is of your own code, {label(vision.config.kind)}, and the format {to} has no "
            "place for it."
        )
    if folder.exists() and not replace:
        raise CheckpointError(f"{folder} exists already and is never written over unless you say so (--replace).")
    if folder.exists() and not _written_here(folder):
        raise CheckpointError(
            f"{folder} is no folder that isthmus wrote: it has no {MANIFEST} of ours, so --replace leaves it alone. "
            "Remove it yourself, or give another name."
        )
    place = Path(origin) if origin is not None else None
    if to == "isthmus":
        export = Export(files={}, opens="isthmus.load(FOLDER)")
        model.save(folder, extra={**_recipe(place), "README.md": card(model, export, to, place)}, replace=replace)
        return Converted(folder, _sizes(folder), (), _larger(folder, shard_bytes))
    export = cast(_Writer, named(writers[to]))(model, shard_bytes=shard_bytes or SHARD_BYTES)
    export = replace_(export, notes=(*export.notes, *_pixels(model, to), *_words(model, to)))
    if export.losses and not lossy:
        raise CheckpointError(
            f"The format {to} has no place for: {'; '.join(export.losses)}. Give --lossy to write the model without."
        )
    write_folder(folder, {**export.files, "README.md": card(model, export, to, place)}, replace=replace)
    return Converted(folder, _sizes(folder), export.losses, (*export.notes, *_larger(folder, shard_bytes)))


def _larger(folder: Path, shard_bytes: int | None) -> tuple[str, ...]:
    """Files of weights that came out larger than was asked for: the format, or one tensor, is not cut."""
    weights = {name: size for name, size in _sizes(folder).items() if Path(name).suffix in _WEIGHTS}
    return tuple(
        f"{name} has {size / 1e6:,.1f} MB, more than --shard-size asks for: "
        + ("it holds one tensor" if "-of-" in name else "this format keeps its weights in one file")
        for name, size in weights.items()
        if shard_bytes is not None and size > 1.1 * shard_bytes + 2**16
    )


def _written_here(folder: Path) -> bool:
    """Whether nothing of anybody else's is lost with the folder: it is one of ours, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    return (folder / MANIFEST).is_file() and read_json(folder / MANIFEST).get("format") == FORMAT


def _pixels(model: AnySource, to: str) -> tuple[str, ...]:
    """How the format's code makes other pixels of some pictures than the model had."""
    image, notes = getattr(model.processor, "image", None), []
    if image is None:
        return ()
    if image.mode == "square" and FORMATS[to].crop not in (None, image.crop):
        notes.append(
            "pictures are cut out of the middle by another rounding there: up to one pixel beside, at some sizes"
        )
    if image.deep != "clip":
        notes.append("numbers of more than 8 bits in a picture are cut off at 255 there; here they are scaled")
    return tuple(notes)


def _words(model: AnySource, to: str) -> tuple[str, ...]:
    """How transformers makes other ids of a text with a picture in it than the model had."""
    if to != "hf" or not isinstance(model.processor, SpliceProcessor | InterleaveProcessor):
        return ()
    words = model.processor.tokenizer
    if words.whole or words.around_pictures() is words:
        return ()
    return ("the text after a picture begins with a dummy space here, and without one there",)


def _recipe(origin: Path | None) -> dict[str, str]:
    """The recipe that came with the model goes along."""
    if origin is None:
        return {}
    file = next((f for f in (origin / "model" / "recipe.yaml", origin / "recipe.yaml") if f.is_file()), None)
    return {} if file is None else {"recipe.yaml": file.read_text(encoding="utf-8")}


def _sizes(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
