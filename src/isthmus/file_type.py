"""What a file really is, by its first bytes: for the error that refuses a file of the wrong type."""

import os.path
from pathlib import Path
from typing import NamedTuple

START = 512
"""Bytes that identify it."""


class FileType(NamedTuple):
    """``what`` it is, with its article, and what to do about it (empty where that depends on what was wanted)."""

    what: str
    advice: str = ""


_ROWS = "save it as JSON lines, and its pictures as files (docs/data.md shows how)"
_AGAIN = "download it again from where the file itself lies"
_STARTS = (
    (b"version https://git-lfs.github.com", FileType("a Git LFS pointer", "fetch the file itself by `git lfs pull`")),
    (b"\x1f\x8b", FileType("compressed by gzip", "unpack it first")),
    (b"BZh", FileType("compressed by bzip2", "unpack it first")),
    (b"\xfd7zXZ", FileType("compressed by xz", "unpack it first")),
    (b"\x28\xb5\x2f\xfd", FileType("compressed by zstd", "unpack it first")),
    (b"PK\x03\x04", FileType("a zip archive, as .zip, .xlsx and .npz files are", "unpack it, or save it as text")),
    (b"PAR1", FileType("a Parquet table", _ROWS)),
    (b"ARROW1", FileType("an Arrow table", _ROWS)),
    (b"\xff\xff\xff\xff", FileType("an Arrow table, as Hugging Face's data sets are saved", _ROWS)),
    (b"SQLite format 3", FileType("an SQLite database", "save the table as CSV")),
    (b"\x93NUMPY", FileType("a NumPy array")),
    (b"\x89HDF", FileType("an HDF5 file, as Keras writes weights")),
    (b"GGUF", FileType("a GGUF file, as llama.cpp reads")),
    (b"%PDF", FileType("a PDF document")),
    (b"\x89PNG", FileType("a PNG picture")),
    (b"\xff\xd8\xff", FileType("a JPEG picture")),
    (b"GIF8", FileType("a GIF picture")),
    (b"II*\x00", FileType("a TIFF picture")),
    (b"MM\x00*", FileType("a TIFF picture")),
    (b"\xff\xfe", FileType("text in UTF-16", "save it as UTF-8")),
    (b"\xfe\xff", FileType("text in UTF-16", "save it as UTF-8")),
)


def file_type(start: bytes) -> FileType | None:
    """What a file that begins so is; none where its beginning does not say, as for most text."""
    for sign, found in _STARTS:
        if start.startswith(sign):
            return found
    if start[4:8] == b"ftyp":
        return FileType("an AVIF, HEIC or video file")
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return FileType("an HTML page, as a server sends instead of a file", _AGAIN)
    if text.startswith((b"<svg", b"<?xml")):
        return FileType("an SVG drawing" if b"<svg" in text else "an XML document")
    return None


def but_is(start: bytes, otherwise: str, *, known: str = "name another file") -> str:
    """``, but an HTML page …; download it again``; where the beginning does not say ``; `` and what to do
    ``otherwise``. ``known`` is to be done with a kind that has no advice of its own."""
    if (found := file_type(start)) is None:
        return f"; {otherwise}"
    return f", but {found.what}; {found.advice or known}"


def start_of(path: Path) -> bytes:
    """The first bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(START)
    except OSError:
        return b""


def near(path: Path, endings: tuple[str, ...] = ()) -> str:
    """``; there is …`` for a file that is there under almost the name of one that is not: the ending in capitals or
    left out, all in small letters, a folder named twice. A few files are looked for; no folder is listed."""
    tries = [path.with_suffix(path.suffix.swapcase()), path.with_name(path.name.lower())]
    if not path.suffix:
        tries = [path.with_suffix(f".{ending}") for ending in endings]
    if path.parent.name == path.parent.parent.name:
        tries.append(path.parent.parent / path.name)
    found = next((other for other in tries if other != path and os.path.isfile(other)), None)
    if found is not None:
        return f"; there is {found}"
    return "" if os.path.isdir(path.parent) else f"; there is no folder {path.parent}"
