"""Pictures: safe opening, conversion to RGB, and pixels equal to the published processors' bit for bit."""

import io
import struct
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from isthmus.data.images import (
    BytesImage,
    FileImage,
    ImageLimits,
    ImageTransform,
    MadeImage,
    Mode,
    TarImage,
    as_image,
    image_size,
    open_image,
)
from isthmus.data.record import Image, Video
from isthmus.data.video import MadeFrames
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import pixel


def noise(width: int, height: int, seed: int = 0) -> PilImage.Image:
    return PilImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: PilImage.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def opened(data: bytes, **limits) -> PilImage.Image:
    return open_image(BytesImage(data, "the picture"), ImageLimits(**limits))


SIZES = [(301, 200), (200, 301), (33, 77), (32, 32), (33, 32), (31, 100), (7, 5), (64, 64)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 33])
def test_square_equals_the_clip_processor(size, side):
    image = noise(*size)
    peer = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    assert torch.equal(ImageTransform.clip(side)(image), peer(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [32, 33])
def test_pad_equals_the_llava_processor(size, side):
    image = noise(*size)
    peer = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    ours = ImageTransform.clip(side, "pad")(image)
    assert torch.equal(ours, peer(image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES[:4])
def test_squash_equals_the_siglip_processor(size):
    image = noise(*size)
    peer = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    assert torch.equal(ImageTransform.siglip(32)(image), peer(image, return_tensors="pt")["pixel_values"][0])


CANVASES = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))


@pytest.mark.parametrize("size", [*SIZES, (200, 61), (61, 200), (90, 30)])
def test_anyres_equals_the_llava_next_processor(size):
    image = noise(*size)
    peer = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=list(map(list, CANVASES)),
    )
    transform = ImageTransform(size=32, mode="anyres", pinpoints=CANVASES)
    found = peer(image, return_tensors="pt")
    assert torch.equal(transform(image), found["pixel_values"][0])
    assert image_size(MadeImage(image)) == tuple(found["image_sizes"][0].tolist())
    assert ImageTransform.from_dict(transform.to_dict()) == transform


def test_anyres_reads_no_clips_and_needs_its_canvases():
    transform = ImageTransform(size=32, mode="anyres", pinpoints=CANVASES)
    with pytest.raises(DataError, match="a clip is not cut into tiles"):
        transform(Video(MadeFrames([noise(4, 4)])))
    refused: list[dict[str, Any]] = [{"mode": "anyres"}, {"mode": "pad", "pinpoints": CANVASES}]
    for options in refused:
        with pytest.raises(ConfigError, match="belong to mode anyres"):
            ImageTransform(size=32, **options)
    with pytest.raises(ConfigError, match="whole tiles of 33"):
        ImageTransform(size=33, mode="anyres", pinpoints=CANVASES)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_from_the_header_is_that_of_the_opened_picture(orientation):
    exif = PilImage.Exif()
    exif[0x0112] = orientation
    source = BytesImage(encoded(noise(5, 9), "JPEG", exif=exif))
    picture = open_image(source)
    assert image_size(source) == (picture.height, picture.width)
    with pytest.raises(DataError, match=r"truncated or damaged|is not a picture"):
        image_size(BytesImage(source.read()[:20]))


@pytest.mark.parametrize(("size", "offset"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((6, 3), (0, 1))])
def test_pad_canvas_follows_the_recipe(size, offset):
    long = max(size)
    image = noise(*size)
    canvas = PilImage.new("RGB", (long, long), (122, 116, 104))
    canvas.paste(image, offset)
    assert ImageTransform.clip(long, "pad").fit(image).tobytes() == canvas.tobytes()
    border = ImageTransform.clip(long, "pad")(PilImage.new("RGB", (4 * long, 1)))[:, 0, 0]
    assert torch.allclose(border, torch.tensor([-0.01125, -0.01120, -0.00133]), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(["square", "pad", "squash"]))
def test_every_size_gives_a_square(width, height, side, mode):
    assert ImageTransform(size=side, mode=mode)(noise(width, height)).shape == (3, side, side)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_the_shape_is_that_of_the_pixels(mode):
    canvases = ((32, 64),) if mode == "anyres" else ()
    transform = ImageTransform(size=32, mode=mode, pinpoints=canvases, patch=8 if mode == "aspect" else 1)
    for width, height in ((40, 23), (23, 40), (90, 20), (32, 32)):
        picture = PilImage.new("RGB", (width, height))
        assert transform.shape(height, width) == tuple(transform(picture).shape[-2:])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 3, 8)))
def test_the_shape_of_an_aspect_picture_is_known_from_its_size(width, height, patch):
    transform = ImageTransform(size=24, mode="aspect", patch=patch)
    shape = transform.shape(height, width)
    assert tuple(transform(noise(width, height)).shape[1:]) == shape
    assert shape in transform.shapes
    assert len(set(transform.shapes)) == len(transform.shapes) == 2 * (24 // patch) - 1


def test_transform_round_trip_and_errors():
    transform = ImageTransform.siglip(48)
    assert ImageTransform.from_dict(transform.to_dict()) == transform
    with pytest.raises(ConfigError, match="did you mean 'squash'"):
        ImageTransform(size=8, mode="squish")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'size'"):
        ImageTransform.from_dict({"siez": 3})
    refused: list[dict[str, Any]] = [{"size": 0}, {"size": 8, "std": (0, 1, 1)}, {"size": 8, "resample": "lanczos"}]
    for wrong in refused:
        with pytest.raises(ConfigError):
            ImageTransform(**wrong)


def test_transparency_is_composited_on_white():
    clear = PilImage.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert opened(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    half = PilImage.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert opened(encoded(half)).getpixel((0, 0)) == (127, 127, 127)
    palette = PilImage.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert opened(encoded(palette)).getpixel((0, 0)) == (10, 20, 30)
    assert opened(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    grey = PilImage.new("LA", (4, 4), (0, 0))
    assert opened(encoded(grey, "WEBP", lossless=True)).getpixel((0, 0)) == (255, 255, 255)


def test_other_modes_become_rgb():
    assert opened(encoded(PilImage.new("L", (3, 3), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert opened(encoded(PilImage.new("1", (3, 3), 1))).getpixel((0, 0)) == (255, 255, 255)
    deep = PilImage.fromarray(np.full((3, 3), 0x8123, dtype=np.uint16))
    assert opened(encoded(deep)).getpixel((0, 0)) == (0x81, 0x81, 0x81)
    cmyk = opened(encoded(PilImage.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert cmyk.mode == "RGB"
    assert pixel(cmyk, (4, 4))[0] > 240


def test_floats_are_not_taken_for_grey():
    """As 8 bits they would all be black."""
    floats = PilImage.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    with pytest.raises(DataError, match="scale it to 8 bits"):
        open_image(as_image(floats).source)


def odd_modes() -> list[PilImage.Image]:
    """Numbers beyond 8 bits, and alpha in every form that Pillow can make RGB of."""
    ramp = np.linspace(-300, 70_000, 12 * 9).reshape(9, 12)
    coloured = PilImage.merge("RGBA", [*noise(12, 9).split(), noise(12, 9).split()[0]])
    palette = noise(12, 9).convert("P")
    palette.info["transparency"] = 3
    deep = [ramp.clip(0, 65535).astype(np.uint16), ramp.astype(np.int32), (ramp / 100).astype(np.float32)]
    alpha = [coloured, coloured.convert("RGBa"), coloured.convert("LA"), coloured.convert("PA"), palette]
    return [*map(PilImage.fromarray, deep), *alpha, *(noise(12, 9).convert(m) for m in ("1", "CMYK", "HSV", "YCbCr"))]


@pytest.mark.parametrize("picture", odd_modes(), ids=lambda picture: picture.mode)
def test_a_checkpoints_pixels_are_the_librarys_in_every_mode(picture):
    peer = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    ours = replace(ImageTransform.clip(8), deep="clip")(MadeImage(picture))
    assert torch.equal(ours, peer(picture, return_tensors="pt")["pixel_values"][0])


def test_a_mode_without_a_way_to_rgb_is_named():
    with pytest.raises(DataError, match="a picture of mode La: "):
        open_image(MadeImage(PilImage.new("La", (2, 2))))


@pytest.mark.parametrize("size", [(640, 427), (640, 426), (640, 425), (480, 641), (33, 32), (35, 32)])
def test_the_centre_is_cut_where_each_origin_cuts_it(size):
    """OpenAI's and open_clip's code rounds (long - R) / 2 to the nearest even, transformers' rounds down."""
    image, side = noise(*size), 32
    ours = ImageTransform.clip(side)
    rounded = replace(ours, crop="round").fit(image)
    long = int(side * max(size) / min(size))
    first = round((long - side) / 2.0)
    wide = image.size[0] > image.size[1]
    whole = image.resize((long, side) if wide else (side, long), PilImage.Resampling.BICUBIC)
    box = (first, 0, first + side, side) if wide else (0, first, side, first + side)
    assert rounded.tobytes() == whole.crop(box).tobytes()
    odd = (long - side) % 4 == 3
    assert (rounded.tobytes() != ours.fit(image).tobytes()) == odd
    assert ImageTransform.from_dict(replace(ours, crop="round").to_dict()).crop == "round"
    assert "crop" not in ours.to_dict()  # folders written before the field read the same


def test_a_thin_strip_is_read_as_far_as_memory_allows():
    strip = PilImage.new("RGB", (2_000, 2), (9, 9, 9))
    assert ImageTransform.clip(8)(MadeImage(strip)).shape == (3, 8, 8)
    thin = MadeImage(PilImage.new("RGB", (16_000, 1)), "strip.png")
    with pytest.raises(
        DataError, match=r"strip\.png is 16000 x 1; with its short side made 224 pixels it is 3,584,000"
    ):
        ImageTransform.clip(224)(thin)
    assert ImageTransform.siglip(8)(thin).shape == (3, 8, 8)


def test_only_the_first_frame():
    frames = [PilImage.new("RGB", (5, 5), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert opened(gif).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = PilImage.new("RGB", (40, 20), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 20, 10))
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if inverse is None else upright.transpose(PilImage.Transpose(inverse))
    exif = PilImage.Exif()
    exif[0x0112] = orientation
    image = opened(encoded(stored, "PNG", exif=exif))
    assert image.size == (40, 20)
    assert image.tobytes() == upright.tobytes()


def png_header(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((20_000, 10), "16,384"),
        ((8_000, 8_000), "50,000,000"),
        ((30_000, 30_000), "50,000,000"),
        ((16_000, 16_000), "50,000,000"),
        ((10_000, 10_000), "50,000,000"),
    ],
)
def test_size_is_refused_by_the_header(size, words):
    with pytest.raises(DataError, match=f"image too large: the picture.*{words}"):
        opened(png_header(*size))


def test_too_many_bytes_are_not_even_read(tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(bytes(200))
    with pytest.raises(DataError, match=r"big\.png has 200 bytes, the limit is 100"):
        open_image(FileImage(path), ImageLimits(file_bytes=100))
    with pytest.raises(DataError, match="has 200 bytes"):
        open_image(TarImage(path, 0, 200, "a.png"), ImageLimits(file_bytes=100))
    with pytest.raises(DataError, match="has 200 bytes"):
        opened(bytes(200), file_bytes=100)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_files_name_the_picture_and_no_address(form):
    whole = encoded(noise(64, 64), form)
    with pytest.raises(DataError, match="broken image: the picture") as caught:
        opened(whole[: len(whole) // 2])
    assert "0x" not in str(caught.value)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(DataError, match="not a picture of the formats JPEG"):
        opened(b"hello")
    with pytest.raises(DataError, match="0 bytes"):
        opened(b"")
    with pytest.raises(DataError, match="not a picture of the formats"):
        opened(encoded(noise(8, 8), "TIFF"))
    with pytest.raises(DataError, match="missing image: there is no readable file"):
        open_image(FileImage(tmp_path / "none.png"))
    with pytest.raises(DataError, match="missing image"):
        open_image(FileImage(tmp_path))
    with pytest.raises(DataError, match="not a picture: int"):
        as_image(3)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.integers(0, 10_000), st.integers(0, 255))
def test_damage_is_a_data_error_or_a_picture(form, place, value):
    data = bytearray(encoded(noise(16, 12), form))
    data[place % len(data)] = value
    with suppress(DataError):
        assert opened(bytes(data)).mode == "RGB"


def test_sources_and_content_keys(tmp_path):
    data = encoded(noise(8, 8))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "blob").write_bytes(b"xx" + data + b"yy")
    file, member = FileImage(tmp_path / "a.png"), TarImage(tmp_path / "blob", 2, len(data), "a.png")
    assert open_image(file).tobytes() == open_image(member).tobytes() == noise(8, 8).tobytes()
    assert Image(file).content_key() == Image(member).content_key() == Image(BytesImage(data)).content_key()
    assert member.describe().endswith("blob :: a.png")
    assert open_image(MadeImage(noise(8, 8))).tobytes() == noise(8, 8).tobytes()
    pixels = ImageTransform.clip(8)(noise(8, 8))
    for given_as in (str(tmp_path / "a.png"), tmp_path / "a.png", data, member, Image(member)):
        assert torch.equal(ImageTransform.clip(8)(given_as), pixels)
    with pytest.raises(DataError, match="changed since it was indexed"):
        TarImage(tmp_path / "blob", 2, 10_000, "a.png").read()


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 50), (42, 63)), ((50, 100), (63, 42)), ((63, 63), (63, 63)), ((400, 10), (21, 63))]
)
def test_aspect_keeps_the_shape_in_whole_patches(size, expected):
    transform = ImageTransform(size=63, mode="aspect", patch=21)
    picture = PilImage.effect_noise(size, 80).convert("RGB")
    pixels = transform(picture)
    assert pixels.shape == (3, *expected)
    again = ImageTransform.from_dict(transform.to_dict())
    assert torch.equal(again(picture), pixels)
    if size == (63, 63):
        assert torch.equal(pixels, ImageTransform(size=63, mode="squash")(picture))
    with pytest.raises(ConfigError, match="whole number of patches of 20"):
        ImageTransform(size=63, mode="aspect", patch=20)
