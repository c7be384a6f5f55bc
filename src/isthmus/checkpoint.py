"""Our own folders: written completely or not at all, checked when read, and data only (safetensors and JSON).

A folder is written aside (``<path>.tmp-<pid>``), every file and the folder are fsynced, then it is renamed into
place and the parent is fsynced: after a crash the old folder or the new one is there, never a half. A
``manifest.json`` with the size and sha256 of every file is checked on reading, because safetensors itself does
not notice a flipped bit in the data. Nothing here is ever a pickle.
"""

import errno
import glob
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isthmus import load_report
from isthmus.errors import CheckpointError
from isthmus.file_type import but_is, start_of
from isthmus.load_report import Account

MANIFEST = "manifest.json"
FORMAT = "isthmus-folder-1"
HEADER_BYTES = 100_000_000
"""Longest safetensors header accepted, as in the safetensors library."""
HEADER_KEYS = 200_000
"""Most tensors accepted in one file: a larger header is an attack or a mistake, and slow to parse."""
MARGIN = 64 * 1024
"""Free bytes wanted beyond the content: manifest, folder entries, block rounding."""

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class Foreign:
    """A file of another project's kind: ``write(path)`` makes it, of about ``size`` bytes."""

    write: Callable[[Path], object]
    size: int


Content = bytes | str | Mapping[str, object] | Foreign
"""What a file may hold: bytes, text, a dict of tensors (under a name in ``.safetensors``) or a dict for JSON."""


# ---------------------------------------------------------------------------------------------------- folders


def write_folder(path: str | Path, files: Mapping[str, Content], *, replace: bool = False) -> Path:
    """Write ``files`` (name -> content) as the folder ``path``, atomically, with a manifest; answers with the path.

    An existing folder is refused unless ``replace``; then old and new are swapped by renaming. Names may hold ``/``.

    Raises CheckpointError when the folder exists, a name leaves the folder, or the disk is full or read-only; what
    was there before is then untouched and nothing half-written counts as a folder.
    """
    path = Path(path)
    prepared = {_safe_name(name): _prepare(name, content) for name, content in files.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _settle(path)
    except OSError as error:
        raise CheckpointError(f"Cannot write in {path.parent}: {error.strerror}.") from error
    if path.exists() and not replace:
        raise CheckpointError(f"{path} exists already and is never written over. Choose another path or remove it.")
    clean_leftovers(path.parent, glob.escape(path.name))
    needed = sum(_size(content) for content in prepared.values()) + MARGIN
    if (free := _free_bytes(path.parent)) < needed:
        raise CheckpointError(_full(path, needed, free))
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir()
        _write_files(aside, prepared, {})
        _into_place(aside, path)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        _settle(path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(_full(path, needed, _free_bytes(path.parent))) from error
        raise CheckpointError(f"Cannot write {path}: {error.strerror or error}. Nothing was changed.") from error
    return path


def begin_folder(path: Path) -> Path:
    """An empty folder beside ``path`` in which several processes write what :func:`finish_folder` makes ``path``.

    Raises CheckpointError when ``path`` exists or its folder cannot be written.
    """
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    if path.exists():
        raise CheckpointError(f"{path} exists already and is never written over. Choose another path or remove it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(path.parent, glob.escape(path.name))
        aside.mkdir()
    except OSError as error:
        raise CheckpointError(f"Cannot write in {path.parent}: {error.strerror}.") from error
    return aside


class Entry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class HeaderEntry(TypedDict):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def entry_of(file: Path) -> Entry:
    """What a manifest says of a file, which is on the disk by then."""
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def finish_folder(aside: Path, path: Path, entries: Mapping[str, Entry], files: Mapping[str, Content]) -> None:
    """Write ``files`` beside those that ``entries`` lists, the manifest of all, and rename the folder into place.

    Raises OSError where the disk refuses.
    """
    _write_files(aside, {_safe_name(name): _prepare(name, content) for name, content in files.items()}, entries)
    _into_place(aside, path)


def read_folder(path: str | Path) -> dict[str, Path]:
    """The files of a folder (name -> path) after its manifest was checked: all there, right size, right sha256.

    Files that the manifest does not list are left out. Raises CheckpointError naming the damaged file.
    """
    path = Path(path)
    home = path if path.exists() or not _displaced(path).exists() else _displaced(path)
    if not home.is_dir():
        raise CheckpointError(f"{path} is not a folder. Give the folder of a run, a checkpoint or a model.")
    files: dict[str, Path] = {}
    for name, entry in _read_manifest(home / MANIFEST).items():
        file = home / _safe_name(name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {home / MANIFEST} lists it. {_REPAIR}")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size:,} bytes, its manifest says {entry['bytes']:,}: "
                f"it was cut or changed. {_REPAIR}"
            )
        if file_sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its sha256 is not the one in its manifest. {_REPAIR}")
        files[name] = file
    return files


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON{but_is(start_of(Path(path)), _RESTORE)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, an object is expected.")
    return value


def clean_leftovers(parent: str | Path, name: str = "*") -> None:
    """Remove what killed processes left aside: ``<name>.tmp-<pid>`` whose process is gone."""
    for folder in Path(parent).glob(f"{name}.tmp-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_RESTORE = "restore it from a copy, or remove the folder to go on without it"
_REPAIR = f"{_RESTORE.capitalize()}."


_Prepared = bytes | dict[str, Tensor] | Foreign


def _write_files(aside: Path, files: Mapping[str, _Prepared], written: Mapping[str, Entry]) -> None:
    """Write and fsync every file, the manifest of them and of those ``written``, and the folders that hold them."""
    entries = dict(written)
    for name, content in files.items():
        file = aside / name
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_file(file, content)
        entries[name] = entry_of(file)
    _write_file(aside / MANIFEST, _render_manifest(entries))
    for folder in {aside, *(file.parent for file in aside.rglob("*"))}:
        _sync(folder)


def _write_file(path: Path, content: _Prepared) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Foreign):
        content.write(path)
    else:
        save_tensors(path, content)
    _sync(path)


def _into_place(aside: Path, path: Path) -> None:
    """Rename ``aside`` to ``path``. Two renames when ``path`` exists; in between the old one is found by readers."""
    displaced = _displaced(path)
    if path.exists():
        os.rename(path, displaced)
    os.rename(aside, path)
    _sync(path.parent)
    shutil.rmtree(displaced, ignore_errors=True)


def _displaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.isthmus-old")  # a name that no copy of a user's has


def _settle(path: Path) -> None:
    """Finish or undo a replacement that a crash interrupted between its two renames."""
    displaced = _displaced(path)
    if displaced.exists():
        if path.exists():
            shutil.rmtree(displaced, ignore_errors=True)
        else:
            os.rename(displaced, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _full(path: Path, needed: int, free: int) -> str:
    return (
        f"No space to write {path}: {needed:,} bytes are needed, {free:,} are free. What was saved before is "
        "intact. Free some space (or choose another folder) and give the same command again."
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _safe_name(name: str) -> str:
    pure = PurePosixPath(name)
    if not name or "\\" in name or pure.is_absolute() or ".." in pure.parts or str(pure) in (".", MANIFEST):
        raise CheckpointError(f"{name!r} is no name for a file inside a folder of ours.")
    return str(pure)


def _prepare(name: str, content: Content) -> _Prepared:
    if isinstance(content, bytes | Foreign):
        return content
    if isinstance(content, str):
        return content.encode()
    if name.endswith(".safetensors"):
        return cast("dict[str, Tensor]", dict(content))
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _size(content: _Prepared) -> int:
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, Foreign):
        return content.size
    return sum(t.numel() * t.element_size() + 128 + len(name) for name, t in content.items())


def _render_manifest(entries: Mapping[str, Entry]) -> bytes:
    body = {"format": FORMAT, "files": dict(entries)}
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": own}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Entry]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, so {path.parent} cannot be trusted. {_REPAIR}")
    content = read_json(path)
    files = content.get("files")
    # Rendering again compares every byte: a manifest that was touched anywhere is not ours any more.
    if content.get("format") != FORMAT or not isinstance(files, dict) or _render_manifest(files) != path.read_bytes():
        raise CheckpointError(f"{path} is damaged or was written by another version. {_REPAIR}")
    return files


# ---------------------------------------------------------------------------------------------------- tensors


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file (no manifest, no fsync). Views of one storage are written as separate tensors."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:
            tensor = tensor.clone()
        storages.add(storage)
        ready[name] = tensor
    try:
        Path(path).touch()
        mode = Path(path).stat().st_mode  # what the user's umask says; the library's own file is its owner's alone
        save_file(ready, path)
        Path(path).chmod(mode)
    except OSError:
        raise
    except Exception as error:
        # safetensors reports a full disk as its own error class, with the errno only in the text.
        code = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
        raise OSError(code, f"safetensors could not write it ({error})", str(path)) from error


def load_tensors(path: str | Path, account: Account | None = None) -> dict[str, Tensor]:
    """The tensors of one safetensors file, memory-mapped (copy on write): pages are read when touched.

    Raises CheckpointError when the header lies about sizes, overlaps, or is too large.
    """
    path = Path(path)
    check_header(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is no readable safetensors file ({error}). {_REPAIR}") from error
    load_report.stored(account, tensors.values())
    return tensors


def check_header(path: Path) -> dict[str, HeaderEntry]:
    """The checked header of a safetensors file: name -> {dtype, shape, data_offsets}; no tensor is read.

    Raises CheckpointError naming the tensor when sizes, offsets or dtypes do not fit the file.
    """

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a sound safetensors file: {what}. {_REPAIR}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_BYTES):
                raise bad(
                    f"its header claims {length:,} bytes, the file has {size:,}: it was cut off or is no such file"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    if raw.count(b"{") > HEADER_KEYS + 2:
        raise bad(f"its header lists more than {HEADER_KEYS:,} tensors")
    try:
        pairs = json.loads(raw, object_pairs_hook=list)
        header: dict[str, dict[str, object]] = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
        names = [name for name, _ in pairs]
    except (ValueError, TypeError, RecursionError) as error:
        raise bad("its header is not a JSON object of tensors") from error
    if len(set(names)) != len(names):
        raise bad("its header lists a tensor twice")
    checked: dict[str, HeaderEntry] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _offsets(item[1])):
        begin, stop = _offsets(entry)
        shape = entry.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise bad(f"{name!r} has the shape {shape!r}")
        dtype = entry.get("dtype")
        item = _ITEM_BYTES.get(dtype) if isinstance(dtype, str) else None
        if not isinstance(dtype, str) or item is None:
            raise bad(f"{name!r} has the unknown dtype {dtype!r}")
        if begin != end or stop - begin != math.prod(shape) * item:
            raise bad(f"{name!r} claims bytes {begin}..{stop} for shape {shape}, which does not fit")
        checked[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}
        end = stop
    if 8 + length + end != size:
        cut = ": it was cut off, as by a download that broke" if 8 + length + end > size else ""
        raise bad(f"its tensors end at byte {8 + length + end:,} of {size:,}{cut}")
    return {name: checked[name] for name in header}


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 over dtype, shape and the exact bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _offsets(entry: Mapping[str, object]) -> tuple[int, int]:
    pair = entry.get("data_offsets")
    if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair):
        return pair[0], pair[1]
    return -1, -1
