"""Pictures decoded once for the question and its controls: the last ones decoded, within a number of bytes."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from PIL import Image as PilImage

from isthmus.data.images import decoded
from isthmus.data.record import FrameSource, Image, ImageSource, Video
from isthmus.errors import DataError

Frames = Sequence[PilImage.Image]
"""A clip's, or a picture as the only one."""
LIMIT = 256 * 2**20
"""Bytes of decoded pictures: 218 of 640 x 480, which Pillow keeps in four bytes a pixel."""


class Undecodable(DataError):
    """A picture whose header could be read and that could not be decoded when its question came."""


class DecodedWindow:
    """The pictures decoded last, by content key, at most ``limit`` bytes of them."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[str, tuple[Frames, int]] = OrderedDict()
        self._lock = Lock()

    def image(self, image: Image, key: str) -> Image:
        """The visual with its content ``key``, decoded through this window when it is read."""
        if isinstance(image, Video):
            return replace(image, source=WindowedClip(self, image.source, key), key=key)
        return replace(image, source=WindowedImage(self, image.source, key), key=key)

    def get(self, key: str, decode: Callable[[], Frames]) -> Frames:
        """What ``decode`` gives. Raises Undecodable where it raises DataError."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        try:
            found = decode()
        except DataError as error:
            raise Undecodable(str(error)) from None
        size = _bytes(found)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = (found, size)
                self.size += size
            while self.size > self.limit:
                self.size -= self._kept.popitem(last=False)[1][1]
        return found


@dataclass(frozen=True, slots=True)
class WindowedImage:
    """A picture that is decoded through a :class:`DecodedWindow`."""

    window: DecodedWindow
    source: ImageSource
    key: str

    def describe(self) -> str:
        return self.source.describe()

    def read(self) -> PilImage.Image:
        return self.window.get(self.key, lambda: [decoded(self.source)])[0]


@dataclass(frozen=True, slots=True)
class WindowedClip:
    """A clip whose frames are."""

    window: DecodedWindow
    source: FrameSource
    key: str

    def describe(self) -> str:
        return self.source.describe()

    def read(self) -> Frames:
        return self.window.get(self.key, self.source.read)


def original(source: ImageSource) -> ImageSource:
    """The source as the data has it, which reads encoded bytes where there are such."""
    return source.source if isinstance(source, WindowedImage) else source


def _bytes(frames: Frames) -> int:
    """As Pillow keeps them: one byte a pixel in modes of 8 bits and one band, else four or more."""
    return sum(f.width * f.height * (1 if f.mode in ("1", "L", "P") else 4) for f in frames)
