"""A visual read once for all that a visit needs of it: its content key and its pixels."""

from dataclasses import dataclass, replace

from isthmus.data.images import FileImage, ImageLimits, TarImage
from isthmus.data.record import Image, Raw


@dataclass(frozen=True, slots=True, eq=False)
class ReadImage:
    """A picture, or the frames of a clip, whose source was read before: ``raw`` is what it gave."""

    raw: Raw
    name: str

    def describe(self) -> str:
        return self.name

    def read(self) -> Raw:
        return self.raw


def read_once(image: Image) -> Image:
    """The visual in memory and with its content key, both from one reading of its source.

    Raises DataError for a missing file, and for one whose size in bytes is over the limit.
    """
    if isinstance(image.source, FileImage | TarImage):
        ImageLimits().check_bytes(image.source.encoded_size(), image.source.describe())
    raw = image.source.read()
    return replace(image, source=ReadImage(raw, image.source.describe()), key=image.key or image.key_of(raw))
