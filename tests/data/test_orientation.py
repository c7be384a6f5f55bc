"""The orientation of a picture: what the header gives is what decoding gives, and only what needs it is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo

from isthmus.data.images import BytesImage, image_size, open_image

ROTATED = 6  # EXIF's number for a quarter turn
TIFF = b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00" + struct.pack("<HHI", ROTATED, 0, 0)
XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def png(*, exif: bytes | None = None, xmp: str | None = None, late: bool = False) -> bytes:
    """A picture of 9 x 5 pixels with its metadata before its pixels, or after them."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    text, file = PngInfo(), io.BytesIO()
    if xmp is not None:
        text.add_itxt("XML:com.adobe.xmp", xmp)
    PilImage.fromarray(pixels).save(file, "PNG", pnginfo=text, **({} if exif is None else {"exif": exif}))
    signature, chunks = file.getvalue()[:8], list(chunks_of(file.getvalue()))
    if late:
        chunks.sort(key=lambda chunk: (chunk[0] == b"IEND", chunk[0] in (b"eXIf", b"iTXt")))
    return signature + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def chunks_of(data: bytes):
    place = 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


@pytest.mark.parametrize(
    ("options", "turned", "decodes"),
    [
        ({}, False, False),
        ({"exif": TIFF}, True, False),
        ({"exif": TIFF, "late": True}, True, True),
        ({"xmp": XMP}, True, False),
        ({"xmp": XMP, "late": True}, True, True),
    ],
)
def test_metadata_of_a_png_counts_wherever_it_stands(monkeypatch, options, turned, decodes):
    source, decoded = BytesImage(png(**options)), []
    expected = open_image(source)
    assert expected.size == ((5, 9) if turned else (9, 5))
    monkeypatch.setattr(ImageFile, "load", lambda self, load=ImageFile.load: (decoded.append(1), load(self))[1])
    assert image_size(source) == (expected.height, expected.width)
    assert bool(decoded) is decodes
