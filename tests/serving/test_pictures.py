"""Malformed pictures and hostile bodies: never a 5xx, never a path or an address, and the server goes on."""

import random
import re
import struct
import zlib

import pytest
from PIL import Image as PilImage

from tests.serving.helpers import data_url, encoded, picture

CHAT = "/v1/chat/completions"
LEAKS = re.compile(r"0x[0-9a-f]{6,}|Traceback|site-packages|/(?:usr|home|root|tmp|work|lib|etc)/|\.py\b|Error:", re.I)
FORMS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}


def ask(raw: bytes, kind: str = "image/png"):
    part = {"type": "image_url", "image_url": {"url": data_url(raw, kind)}}
    return {"model": "llava", "messages": [{"role": "user", "content": [part]}], "max_tokens": 1}


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"", more: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    )


def odd(form: str, image: PilImage.Image, **options) -> bytes:
    return encoded(image, form, **options)


def sound() -> list[bytes]:
    """Odd pictures that are pictures."""
    image = picture(1, (40, 30))
    exif = PilImage.Exif()
    exif[0x0112] = 6
    broken = PilImage.Exif()
    broken[0x0112] = 99
    frames = [picture(n, (30, 30)) for n in range(3)]
    return [
        odd("JPEG", image.convert("CMYK")),
        odd("PNG", image.convert("P")),
        odd("PNG", image.convert("1")),
        odd("PNG", image.convert("LA")),
        odd("PNG", image.convert("RGBA")),
        odd("PNG", PilImage.new("I;16", (20, 20), 40_000)),
        odd("GIF", frames[0], save_all=True, append_images=frames[1:]),
        odd("WEBP", frames[0], save_all=True, append_images=frames[1:]),
        odd("PNG", frames[0], save_all=True, append_images=frames[1:]),
        odd("JPEG", image, exif=exif.tobytes()),
        odd("JPEG", image, exif=broken.tobytes()),
        odd("JPEG", image, exif=b"Exif\x00\x00" + b"\xff" * 40),
        odd("BMP", image),
        odd("PNG", picture(2, (1, 1))),
        odd("PNG", picture(2, (150, 1))),
    ]


def hopeless() -> list[bytes]:
    """What is refused: not of the formats, too large by its header, of no size, and bombs."""
    image = picture(1, (40, 30))
    bomb = png(7000, 7200, data=b"\x00" * 1000)
    return [
        b"", b"\x00", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBPVP8 ", b"BM",
        odd("TIFF", image), odd("PPM", image), odd("ICO", image), odd("PDF", image), odd("TGA", image),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"PK\x03\x04" + b"\x00" * 60, b"\x80\x04\x95cos\nsystem\n(S'id'\ntR.",
        png(0, 0), png(0, 10), png(10, 0), png(2**31 - 1, 2**31 - 1), png(100_000, 100_000), png(20_000, 1),
        png(300, 1, data=b"\x00" * 901), bomb, png(10, 10, depth=99), png(10, 10, colour=7),
        png(10, 10, data=b"\x00" * 400, more=chunk(b"zTXt", b"x\x00\x00" + zlib.compress(b"y" * 10**8))),
        b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\x80\x00\x00" + b"\x00" * 20,
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 2**30, -(2**30), 1, 24, 0, 0, 0, 0, 0, 0),
    ]  # fmt: skip


def damaged(count: int, seed: int = 0) -> list[tuple[bytes, str]]:
    """Real pictures of all formats cut short, with bytes changed, doubled or in another order."""
    draw = random.Random(seed)
    originals = [(encoded(picture(n, (24, 20)), form), kind) for n, (form, kind) in enumerate(FORMS.items())]
    found = []
    for number in range(count):
        raw, kind = originals[number % len(originals)]
        body = bytearray(raw)
        way = draw.randrange(5)
        if way == 0:
            body = body[: draw.randrange(len(body))]
        elif way == 1:
            for _ in range(draw.randint(1, 12)):
                body[draw.randrange(len(body))] = draw.randrange(256)
        elif way == 2:
            at = draw.randrange(len(body))
            body[at:at] = draw.randbytes(draw.randint(1, 40))
        elif way == 3:
            a, b = sorted(draw.randrange(len(body)) for _ in range(2))
            body = body[:a] + body[b:]
        else:
            at = draw.randrange(8, 60) % len(body)
            body[at : at + 4] = draw.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00"])
        found.append((bytes(body), draw.choice([kind, *FORMS.values()])))
    return found


def check(served, raw: bytes, kind: str = "image/png") -> int:
    found = served.post(CHAT, ask(raw, kind))
    assert found.status in (200, 400), (found.status, raw[:60])
    if found.status == 400:
        assert found.code in ("invalid_image", "invalid_base64")
        assert not LEAKS.search(found.raw.decode()), found.raw
    return found.status


def test_odd_pictures_are_read(served):
    for number, raw in enumerate(sound()):
        assert check(served, raw) == 200, number


def test_what_is_no_picture_is_refused(served):
    for number, raw in enumerate(hopeless()):
        assert check(served, raw) == 400, number


def test_damaged_pictures_harm_nobody(served):
    statuses = [check(served, *each) for each in damaged(300)]
    assert {200, 400} == set(statuses)
    assert served.get("/health").status == 200


@pytest.mark.slow
def test_thousands_of_damaged_pictures_harm_nobody(served):
    for each in damaged(5_000, seed=1):
        check(served, *each)


def test_a_picture_of_just_too_many_pixels_is_not_decoded(served, monkeypatch):
    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert check(served, png(7_100, 7_100)) == 400


def test_the_same_picture_is_answered_alike_before_and_after(served):
    """Nothing of one request is left for the next."""
    good = encoded(picture(5))
    first = served.post(CHAT, ask(good) | {"max_tokens": 8}).json["choices"]
    for raw in hopeless()[:10]:
        check(served, raw)
    check(served, encoded(picture(6)))
    assert served.post(CHAT, ask(good) | {"max_tokens": 8}).json["choices"] == first
