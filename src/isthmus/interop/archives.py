"""Weights out of any file or folder, with no code run: safetensors, torch's pickles, TorchScript archives, shards.

A file is identified by its first bytes, never by its name. A pickle may build tensors and plain containers only; a
TorchScript archive (OpenAI's CLIP files) is read by an unpickler of its own, its code is never touched.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import load_tensors, read_json
from isthmus.errors import CheckpointError
from isthmus.file_type import but_is, start_of
from isthmus.load_report import Account

Value = TypeVar("Value")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OWN = ("model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_OF_A_BODY = {"embed_tokens", "layers", "norm", "decoder"}
_OF_A_MODEL = {
    *("model", "lm_head", "transformer", "gpt_neox", "visual", "vision_model", "text_model", "visual_projection"),
    *("text_projection", "logit_scale", "logit_bias", "perceiver", "lang_encoder", "Qformer", "visual_encoder"),
    *("query_tokens", "qformer", "language_projection", "module"),
}
"""First parts of names within the body of a model, which are below ``model.`` by right, and within a full one."""
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_archive(path: str | Path, account: Account | None = None) -> Mapping[str, object]:
    """What one file holds: name -> tensor, or for a training checkpoint also plain values and nested mappings.

    Raises CheckpointError: missing, of no known kind, damaged, or a pickle that wants more than tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
    if start.startswith(_ZIP):
        names = _sound_members(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return _torchscript(path, account)
        return _pickled(path, account, mapped=True)
    if start[8:9] == b"{":
        return load_tensors(path, account)
    if start.startswith(_PICKLE):
        return _pickled(path, account, mapped=False)
    otherwise = "give the folder that it lies in" if path.suffix in (".json", ".txt") else "download it again"
    if path.suffix in (".yaml", ".yml"):
        otherwise = "a recipe is trained first, by `isthmus train`"
    if not start:
        raise CheckpointError(f"{path} is no file of weights: it is empty (0 bytes); download it again.")
    raise CheckpointError(
        f"{path} is no file of weights, neither safetensors nor a file that torch.save wrote"
        f"{but_is(start_of(path), otherwise, known='name a folder or file of a model')}."
    )


def read_state(folder: str | Path, account: Account | None = None) -> dict[str, Tensor]:
    """All tensors of a folder: its index's shards, else its one file of weights, safetensors before pickles.

    Raises CheckpointError: none or several, a shard that is missing, lies outside the folder, or holds less than the
    index says.
    """
    folder = Path(folder)
    for name in _INDEXES:
        if (folder / name).is_file():
            return without_wrappers(_shards(folder, folder / name, account))
    for ending in ("*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(ending))
        own = [f for f in found if f.name in _OWN]
        found = own if len(own) == 1 else found  # beside the library's file others keep the same in another form
        if len(found) > 1:
            names = ", ".join(f.name for f in found[:6])
            raise CheckpointError(f"{folder} holds several files of weights and no index ({names}); name one of them.")
        if found:
            return tensors_of(unwrapped(read_archive(found[0], account)), found[0])
    others = [f.name for e in ("*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ckpt*") for f in sorted(folder.glob(e))]
    beside = f" What it has is of another form ({', '.join(others[:4])})." if others else ""
    raise CheckpointError(f"{folder} holds no weights: no safetensors, .bin, .pt or .pth file.{beside}")


def unwrapped(content: Mapping[str, object]) -> dict[str, object]:
    """The state dict in a training checkpoint, which keeps it beside optimizer and epoch, or the content as it is;
    names without what wrapped the model."""
    for name in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(inside := content.get(name), Mapping):
            return without_wrappers(dict(inside))
    return without_wrappers(dict(content))


def without_wrappers(state: dict[str, Value]) -> dict[str, Value]:
    """Names without the one prefix that a compiled, distributed or framework's model gave to all of them:
    ``_orig_mod.``, ``module.``, and ``model.`` where a full model stands after it rather than the body of one."""
    while state:
        if any("_orig_mod." in name for name in state):  # of a compiled part, too
            state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
            continue
        prefix = next((p for p in ("module.", "model.") if all(name.startswith(p) for name in state)), None)
        inside = {name.split(".")[1] for name in state} if prefix else set()
        if prefix is None or (prefix == "model." and (inside & _OF_A_BODY or not inside & _OF_A_MODEL)):
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def tensors_of(content: Mapping[str, object], where: str | Path) -> dict[str, Tensor]:
    """The tensors of a state dict. Raises CheckpointError for anything else among them."""
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where} is no plain state dict: {name!r} is of type {type(value).__name__}.")
        tensors[name] = value
    return tensors


def _shards(folder: Path, index: Path, account: Account | None) -> dict[str, Tensor]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{index} has no weight_map, so the shards are not known.")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(map(str, placed.values()))):
        shard = folder / name
        if Path(name).name != name or shard.resolve().parent not in (folder.resolve(), *_hub_blobs(folder)):
            raise CheckpointError(f"{index}: {name!r} points outside the folder.")
        if not shard.is_file():
            raise CheckpointError(f"{folder} lacks the shard {name}, which its index names; download it again.")
        weights |= tensors_of(read_archive(shard, account), shard)
    lost = sorted(set(placed) - set(weights))
    if lost:
        raise CheckpointError(f"{index} names {lost[0]!r} and {len(lost) - 1} more tensors that no shard holds.")
    return weights


def _hub_blobs(folder: Path) -> tuple[Path, ...]:
    """Where the hub's cache keeps the files that a snapshot's folder links to."""
    own = folder.resolve()
    return (own.parents[1] / "blobs",) if own.parent.name == "snapshots" else ()


def _sound_members(path: Path) -> list[str]:
    """The names in a zip. None may be compressed but TorchScript's code, which nobody reads: torch stores tensors as
    they are, and what is stored cannot swell."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is a damaged archive ({error}); it may have been cut short.") from error
    read = [m for m in members if "/code/" not in m.filename]
    swollen = sum(m.file_size for m in read) > path.stat().st_size
    if swollen or any(m.compress_type != zipfile.ZIP_STORED for m in read):
        raise CheckpointError(f"{path} holds compressed or overlapping members, which torch never writes: not opened.")
    return [m.filename for m in members]


def _pickled(path: Path, account: Account | None, *, mapped: bool) -> dict[str, object]:
    """By torch's own restricted unpickler; a zip's tensors stay in the file until they are touched."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle that wants to build more than tensors and plain containers, so it was not opened: "
            "a pickle can run any code. Save its state dict alone, best as safetensors."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read by torch ({type(error).__name__}); it may be damaged.") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    load_report.stored(account, _tensors_in(content))
    return {str(name): value for name, value in content.items()}


def _tensors_in(content: object) -> Iterator[Tensor]:
    """The tensors of a state dict, or of a training checkpoint that holds one among other things."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _tensors_in(value)


# TorchScript.


class _Module:
    """Stands for any scripted class: holds the attributes it was saved with and does nothing."""

    def __setstate__(self, state: object) -> None:
        self.__dict__ = dict(state) if isinstance(state, Mapping) else {}


class _Reader(pickle.Unpickler):
    """Builds scripted modules as :class:`_Module` and tensors; refuses every other name."""

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_boollist", "build_doublelist"):
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, tag: value
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: tuple[str, object, str, str, int]) -> Tensor:
        """The storage of an id as torch writes it; one of another form is an error, here or where it is read."""
        storage_type, dtype, key, _, count = pid
        if storage_type != "storage" or not isinstance(dtype, torch.dtype) or not str(key).isalnum():
            raise pickle.UnpicklingError(f"storage {key!r}")
        if key not in self._storages:
            raw = self._archive.read(f"{self._root}/data/{key}")
            if len(raw) != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key!r} holds {len(raw)} bytes for {count} numbers")
            self._storages[key] = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else offset - 1
    if min((offset, *size, *stride), default=0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.as_strided(storage, size, stride, offset)


def _torchscript(path: Path, account: Account | None) -> dict[str, Tensor]:
    """The parameters and buffers of a scripted module under their dotted names."""
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
            root = pickled.rpartition("/")[0]
            with archive.open(pickled) as file:
                module = _Reader(file, archive, root).load()
    except Exception as error:
        raise CheckpointError(
            f"{path} is a TorchScript archive that could not be read as tensors alone ({error}); no code of it was run."
        ) from error
    found: dict[str, Tensor] = {}
    _collect(module, "", found)
    load_report.stored(account, found.values())
    return found


def _collect(module: object, prefix: str, found: dict[str, Tensor]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", found)
        elif isinstance(value, Tensor):
            found[prefix + name] = value
