"""An offset index over a tar file, made by reading its headers alone. Nothing is ever extracted."""

import tarfile
from pathlib import Path, PurePosixPath

from isthmus.data.images import TarImage
from isthmus.errors import DataError
from isthmus.file_type import but_is, start_of

_BLOCK = 512


def index_tar(path: Path) -> list[TarImage]:
    """All regular files of an uncompressed tar, in order.

    Raises DataError naming the shard when it is missing, empty, not a tar, truncated, damaged in the middle, or
    when a member's name leaves the folder. A damaged shard is refused entirely: samples that silently go missing
    are worse than a stop before the first step.
    """
    try:
        length = path.stat().st_size
    except OSError:
        raise DataError(f"no such file: {path}; check the path and the DATA= folder") from None
    if length == 0:
        raise DataError(f"bad shard: {path} is empty (0 bytes); copy it again")
    members: list[TarImage] = []
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                end = entry.offset_data + (-(-entry.size // _BLOCK) * _BLOCK if entry.isreg() else 0)
                if entry.isdir():
                    continue
                _check_member(path, entry)
                members.append(TarImage(path, entry.offset_data, entry.size, entry.name))
    except tarfile.TarError:
        if not members:
            raise DataError(
                f"bad shard: {path} is not an uncompressed tar file{but_is(start_of(path), 'copy it again')}"
            ) from None
        end = length + 1
    if end > length or not _ends_properly(path, end):
        raise DataError(f"bad shard: {path} is truncated or damaged after {len(members)} files; copy it again")
    if not members:
        raise DataError(f"bad shard: {path} holds no file; write it again")
    return members


def _check_member(path: Path, entry: tarfile.TarInfo) -> None:
    name = PurePosixPath(entry.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"bad shard: {path} holds the name {entry.name!r}, which leaves the folder; refused")
    if not entry.isreg():
        raise DataError(f"bad shard: {path} holds {entry.name!r}, which is a link or device; refused")


def _ends_properly(path: Path, end: int) -> bool:
    """A tar ends in blocks of zeros. The library stops as silently at damage or at the end of the file."""
    with open(path, "rb") as file:
        file.seek(end)
        return file.read(_BLOCK) == bytes(_BLOCK)
