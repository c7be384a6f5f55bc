"""FeatureCache: what a frozen vision encoder makes of each picture, kept on disk by the picture's content key.

    FOLDER/features.bin    float32 arrays one after the other, read through a memory map
    FOLDER/index.jsonl     {"key", "shape", "at", "crc"} per picture, written after its array

A process that is killed leaves at worst an array without a line; the next one writes over it.
"""

import json
import math
import mmap
import threading
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from isthmus.data.images import FileImage, TarImage
from isthmus.data.record import Example, Features, Image
from isthmus.data.visits import read_once
from isthmus.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class _Entry:
    shape: tuple[int, ...]
    at: int
    crc: int

    @property
    def end(self) -> int:
        return self.at + 4 * math.prod(self.shape)


class FeatureCache:
    """Arrays by content key, at most ``limit`` bytes of them; what comes later is not kept.

    One process writes; threads of it may read. The folder belongs to one encoder and one image transform: whoever opens
    it sees to that.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limit = folder, limit
        self._data, self._index = folder / "features.bin", folder / "index.jsonl"
        self._data.touch()
        self._entries = self._read_index()
        self._end = max((entry.end for entry in self._entries.values()), default=0)
        self._known: dict[Hashable, str] = {}  # content keys by the identity of an unopened picture
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._end

    def get(self, key: str) -> Float[Tensor, "F P D"] | None:
        """The picture's (F, P, D), or none. Raises CheckpointError when it is damaged."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        raw = self._mapped(entry.end)[entry.at : entry.end]
        if zlib.crc32(raw) != entry.crc:
            raise CheckpointError(f"{self._data} is damaged at byte {entry.at} ({key!r}); remove {self.folder}.")
        return torch.from_numpy(np.frombuffer(raw, dtype="<f4").reshape(entry.shape).copy())

    def put(self, key: str, features: Float[Tensor, "F P D"]) -> None:
        """Keep a picture's (F, P, D), unless it is there already or the cache is full."""
        raw = np.ascontiguousarray(features.detach().float().cpu().numpy(), dtype="<f4").tobytes()
        if key in self._entries or self._end + len(raw) > self.limit:
            return
        entry = _Entry(tuple(features.shape), self._end, zlib.crc32(raw))
        with self._data.open("r+b") as file:
            file.seek(entry.at)
            file.write(raw)
        line = {"key": key, "shape": entry.shape, "at": entry.at, "crc": entry.crc}
        with self._index.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._end = entry.end
        self._entries[key] = entry

    def stand_in(self, example: Example) -> Example:
        """The example whose pictures come as :class:`Features` where these are kept: those are not decoded, and from
        their second visit on not opened either."""
        visuals = tuple(replace(v, key=v.key or self._known.get(v.identity(), "")) for v in example.visuals)
        pixels = tuple(partial(self._of, v.identity(), make) for v, make in zip(visuals, example.pixels, strict=True))
        return replace(example, visuals=visuals, pixels=pixels, keyed=True)

    def _of(self, identity: Hashable, make: Callable[[Image], Tensor | Features], visual: Image) -> Tensor | Features:
        held = visual if visual.key else read_once(visual)
        key = held.key
        if isinstance(visual.source, FileImage | TarImage):  # a source that holds its content would be kept with it
            self._known[identity] = key
        found = self.get(key)
        return make(held) if found is None else Features(found)

    def _mapped(self, end: int) -> mmap.mmap:
        with self._lock:
            if self._map is None or len(self._map) < end:
                with self._data.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return self._map

    def _read_index(self) -> dict[str, _Entry]:
        """The complete lines of the index whose arrays are in the file; a last line cut short is dropped."""
        if not self._index.exists():
            return {}
        content = self._index.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            self._index.write_bytes(complete)
        entries: dict[str, _Entry] = {}
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                row = json.loads(line)
                entry = _Entry(tuple(row["shape"]), int(row["at"]), int(row["crc"]))
                entries[str(row["key"])] = entry
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(f"{self._index}, line {number} is damaged; remove {self.folder}.") from None
            if entry.end > self._data.stat().st_size:
                raise CheckpointError(f"{self._data} is shorter than its index says; remove {self.folder}.")
        return entries
