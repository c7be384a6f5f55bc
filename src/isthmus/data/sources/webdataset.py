"""WebDataset tar shards: consecutive members with one key are one sample. Own offset index, no package."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from isthmus.data.images import TarImage
from isthmus.data.sources.files import stems
from isthmus.data.sources.members import listed
from isthmus.data.sources.rows import Form, Row, picture_names
from isthmus.data.sources.tar import index_tar
from isthmus.data.video import VIDEOS
from isthmus.errors import DataError

IMAGE_ENDINGS = frozenset(
    {"jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2"}
)
"""Also of pictures that are not opened: they are bad samples and counted, never passed over."""

_SEVERAL = ("conversations", "messages", "questions", "question", "text")
"""The texts that may have several pictures; a caption or label has one."""

_LOOKED_AT = 100
"""Samples whose fields are read at opening, to name those that carry text and are not read."""


@dataclass(frozen=True, slots=True)
class _Sample:
    shard: str
    key: str
    members: dict[str, TarImage]


class WebDatasetRows:
    """Samples of tar shards: pictures by their ending, ``.txt`` as caption, ``.cls`` as label, ``.json`` as fields.
    Several pictures come in the order in which the fields list their names, else in natural order of the names.

    Raises DataError before any sample is read: a damaged shard (see :func:`index_tar`) or a key that comes twice in
    one shard. The same key in two shards is two samples. With a ``form``, a sample of captions or a label (or with
    two ``.json``) whose pictures are several is bad when it is read: its key may have been cut at a dot of the name.
    """

    def __init__(self, shards: Sequence[Path], form: Form | None = None) -> None:
        self.form = form
        self.samples: list[_Sample] = []
        for stem, shard in zip(stems(shards), shards, strict=True):
            self.samples += _group(shard, stem)
        if form is not None and self.samples:
            count = min(len(self.samples), _LOOKED_AT)
            form.name_unread(self._first(count), f"{shards[0]} (of {count:,} samples that were read)")

    def _first(self, count: int) -> Iterator[Mapping[str, object]]:
        for index in range(count):
            try:
                yield self[index].values
            except DataError:
                continue  # met, and counted as bad, when it is visited

    def __len__(self) -> int:
        return len(self.samples)

    def listing(self) -> Iterator[object]:
        return ((s.shard, s.key, [(m.name, m.offset, m.size) for m in s.members.values()]) for s in self.samples)

    def __getitem__(self, index: int) -> Row:
        sample = self.samples[index]
        values: dict[str, object] = {}
        # The fields of a JSON first, wherever it stands: a text or class in a file of its own is what is meant.
        for ending, member in sorted(sample.members.items(), key=lambda item: not item[0].endswith("json")):
            extension = ending.rsplit(".", 1)[-1]
            if extension == "json":
                values |= {name: v for name, v in _json(member).items() if v is not None or name not in values}
            elif extension == "txt":
                values["caption"] = _text(member).strip()
            elif extension == "cls":
                values["label"] = _number(member)
            elif f".{extension}" in VIDEOS:
                raise DataError(
                    f"bad video: {member.describe()} is in a tar, where no clip is read; unpack it, and name it in the "
                    "`video` field of a JSON file"
                )
        images = tuple(m for e, m in sample.members.items() if e.rsplit(".", 1)[-1] in IMAGE_ENDINGS)
        row = Row(f"{sample.shard}/{sample.key}", values, images, key=sample.key.rsplit("/", 1)[-1])
        if self.form is not None and len(images) > 1 and not _expected(self.form, row, sample):
            raise DataError(
                f"several pictures: {images[0].name!r} and {images[1].name!r} are one sample, {sample.key!r}, since a "
                "key ends at the first dot of the name; write the names without further dots, or keep one picture"
            )
        if len(images) < 2:
            return row
        return replace(row, images=tuple(listed(picture_names(self.form, row) if self.form else (), images)))


def _expected(form: Form, row: Row, sample: _Sample) -> bool:
    """Whether a sample may have several pictures: its text is of such a form, and in one file."""
    files = [ending for ending in sample.members if ending.rsplit(".", 1)[-1] == "json"]
    return len(files) < 2 and any(form.value(row, name) is not None for name in _SEVERAL)


def _group(shard: Path, stem: str) -> list[_Sample]:
    samples: list[_Sample] = []
    seen: set[str] = set()
    for member in index_tar(shard):
        folder, _, name = member.name.rpartition("/")
        start, _, ending = name.partition(".")
        if not start or not ending:
            continue  # hidden files and files without an ending belong to no sample
        key = f"{folder}/{start}" if folder else start
        if not samples or samples[-1].key != key:
            if key in seen:
                raise DataError(
                    f"bad shard: {shard} has the key {key!r} twice; keys must be unique and the members of "
                    "a sample must stand together"
                )
            seen.add(key)
            samples.append(_Sample(stem, key, {}))
        ending = ending.lower()
        if ending in samples[-1].members:
            raise DataError(f"bad shard: {shard} has {member.name!r} twice; keys must be unique")
        samples[-1].members[ending] = member
    return samples


def _text(member: TarImage) -> str:
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"bad text: {member.describe()} is not UTF-8; write it as UTF-8") from None


def _json(member: TarImage) -> dict[str, object]:
    try:
        values = json.loads(_text(member))
    except (ValueError, RecursionError):
        raise DataError(f"bad text: {member.describe()} is not valid JSON; write it again") from None
    if not isinstance(values, dict):
        raise DataError(f"bad text: {member.describe()} should hold a JSON object; write it again")
    return values


def _number(member: TarImage) -> int:
    try:
        return int(_text(member))
    except ValueError:
        raise DataError(f"bad label: {member.describe()} should hold a class number") from None
