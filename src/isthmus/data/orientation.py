"""EXIF orientation: how a stored picture is turned upright, read without decoding it wherever that is possible."""

from io import BytesIO

from PIL import Image as PilImage
from PIL.PngImagePlugin import PngImageFile

_TAG = 0x0112
_FIRST_TURNED = 5  # of the orientations below, those from here on exchange width and height
_TURNS = {
    2: PilImage.Transpose.FLIP_LEFT_RIGHT,
    3: PilImage.Transpose.ROTATE_180,
    4: PilImage.Transpose.FLIP_TOP_BOTTOM,
    5: PilImage.Transpose.TRANSPOSE,
    6: PilImage.Transpose.ROTATE_270,
    7: PilImage.Transpose.TRANSVERSE,
    8: PilImage.Transpose.ROTATE_90,
}
_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG in which Pillow finds an orientation: EXIF itself, and EXIF or XMP as text."""
_SIGNATURE_BYTES = 8


def upright(image: PilImage.Image) -> PilImage.Image:
    """The picture turned as its EXIF orientation says, decoded."""
    orientation = orientation_of(image)
    image.load()
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def upright_size(image: PilImage.Image) -> tuple[int, int]:
    """Height and width in pixels once it is upright."""
    width, height = image.size
    return (width, height) if orientation_of(image) >= _FIRST_TURNED else (height, width)


def orientation_of(image: PilImage.Image) -> int:
    """EXIF orientation 1..8. Damaged EXIF data counts as upright: the pixels may still be sound.

    Pillow decodes a PNG that has no EXIF data before its pixels, because some may follow them. The names of the chunks
    say whether any do, so only then the pixels are decoded here.
    """
    try:
        exif = PilImage.Image.getexif(image) if _is_known(image) else image.getexif()
        value = exif.get(_TAG, 1)
    except Exception:  # the EXIF parser is as open-minded about exceptions as the decoders
        return 1
    return value if isinstance(value, int) else 1


def _is_known(image: PilImage.Image) -> bool:
    """Whether a PNG in memory has no metadata after its first pixels, so that all were read with its header."""
    if not isinstance(image, PngImageFile) or not isinstance(image.fp, BytesIO):
        return False
    # A chunk is its length in 4 bytes, its name in 4, that many bytes, and a checksum in 4.
    data, place, pixels = image.fp.getbuffer(), _SIGNATURE_BYTES, False
    while place + 8 <= len(data):
        name = bytes(data[place + 4 : place + 8])
        if pixels and name in _METADATA:
            return False
        pixels = pixels or name == b"IDAT"
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return True
