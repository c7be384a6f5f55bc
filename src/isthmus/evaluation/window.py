"""Pictures decoded once for the question and its controls: the last ones decoded, within a number of bytes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from PIL import Image as PilImage

from isthmus.data.images import decoded
from isthmus.data.record import Image, Video
from isthmus.errors import DataError

LIMIT = 256 * 2**20
"""Bytes of decoded pictures: 218 of 640 x 480, which Pillow keeps in four bytes a pixel."""


class Undecodable(DataError):
    """A picture whose header could be read and that could not be decoded when its question came."""


class DecodedWindow:
    """The pictures decoded last, by content key, at most ``limit`` bytes of them."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def image(self, image: Image, key: str) -> Image:
        """The visual with its content ``key``, decoded through this window when it is read."""
        return replace(image, source=WindowedImage(self, image.source, key, isinstance(image, Video)), key=key)

    def get(self, image: "WindowedImage") -> Any:
        """The decoded picture, or the frames of a clip. Raises DataError where they cannot be decoded."""
        with self._lock:
            if image.key in self._kept:
                self._kept.move_to_end(image.key)
                return self._kept[image.key][0]
        try:
            found: Any = image.source.read() if image.clip else decoded(image.source)
        except DataError as error:
            raise Undecodable(str(error)) from None
        size = _bytes(found) if image.clip else _bytes([found])
        with self._lock:
            if image.key not in self._kept:
                self._kept[image.key] = (found, size)
                self.size += size
            while self.size > self.limit:
                self.size -= self._kept.popitem(last=False)[1][1]
        return found


@dataclass(frozen=True, slots=True)
class WindowedImage:
    """A source that is decoded through a :class:`DecodedWindow`."""

    window: DecodedWindow
    source: Any
    key: str
    clip: bool = False

    def describe(self) -> str:
        return self.source.describe()

    def read(self) -> Any:
        return self.window.get(self)


def original(source: Any) -> Any:
    """The source as the data has it, which reads encoded bytes where there are such."""
    return source.source if isinstance(source, WindowedImage) else source


def _bytes(frames: Sequence[PilImage.Image]) -> int:
    """As Pillow keeps them: one byte a pixel in modes of 8 bits and one band, else four or more."""
    return sum(f.width * f.height * (1 if f.mode in ("1", "L", "P") else 4) for f in frames)
