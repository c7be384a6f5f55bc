"""A source's fingerprint: what a run must find unchanged when it goes on.

Reading a data set again at each start would take hours, so the fingerprint is cheap and still reads content, never
times or places (data copied anew is the same data): the number of samples, all that the source keeps in memory anyway
(rows of text, names and sizes inside shards), and an even spread of complete samples with the bytes of their pictures.
An edit that changes neither a size nor a row in memory nor one of those samples is not noticed.
"""

import hashlib
from collections.abc import Iterator

from isthmus.data.images import FileImage, TarImage
from isthmus.data.mix import Source
from isthmus.data.record import Image
from isthmus.errors import DataError

SAMPLES = 256
"""Samples that are read completely, evenly spread; of a smaller source all are."""


def fingerprint(source: Source) -> str:
    """``4,000 samples, sha256 1f0c…``: readable, equal iff nothing that was read has changed."""
    digest = hashlib.sha256()
    for fact in source.listing():
        digest.update(repr(fact).encode(errors="backslashreplace"))
    count = len(source)
    for index in sorted({number * count // SAMPLES for number in range(SAMPLES)} if count > SAMPLES else range(count)):
        for fact in _sample(source, index):
            digest.update(repr(fact).encode(errors="backslashreplace"))
    return f"{count:,} samples, sha256 {digest.hexdigest()[:16]}"


def _sample(source: Source, index: int) -> Iterator[object]:
    """What one sample says and shows; a sample that cannot be read says so (without its place on the disk)."""
    try:
        record = source[index]
    except DataError as error:
        yield str(error).split(":", 1)[0]
        return
    yield record.id
    for part in record.parts:
        yield _picture(part) if isinstance(part, Image) else (part.text, part.role, part.learn)


def _picture(part: Image) -> str:
    """A stored picture by its bytes. A made one by its key alone: the key already changes with its generator."""
    if not isinstance(part.source, FileImage | TarImage):
        return part.key or part.source.describe()
    try:
        return hashlib.sha256(part.source.read()).hexdigest()
    except DataError as error:
        return str(error).split(":", 1)[0]
