"""Pictures: where they come from, how they are opened safely, and how they become pixels.

A picture stays a lazy source until a batch is filled. :func:`open_image` refuses by the header, before a single
pixel is decoded: a picture of a few kilobytes can otherwise take a gigabyte of memory. Pillow is the reference path
for resizing (antialiased bicubic), because the published weights saw its pixels.
"""

import base64
import binascii
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image as PilImage
from PIL import UnidentifiedImageError
from torch import Tensor

from isthmus.config import strict
from isthmus.data.orientation import upright, upright_size
from isthmus.data.record import Image, ImageSource, Video
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.file_type import but_is, near
from isthmus.nn.tiles import best_canvas, check_pinpoints, fitted

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""The only formats opened. Pillow knows 40 more, several of them with a history of holes."""
_CONVERT = "convert it, or leave it out"
_REWRITE = "write the file again or leave it out"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What is refused before decoding: encoded bytes, pixels, side length in pixels, and if wanted long side over short
    side. A shape that would be too large once resized is refused by :class:`ImageTransform`."""

    file_bytes: int = 10 * 1024 * 1024
    pixels: int = 50_000_000
    side: int = 16_384
    aspect: float = math.inf

    def check_bytes(self, count: int, where: str) -> None:
        """Raises DataError when the encoded file is empty or too large."""
        if count == 0:
            raise DataError(f"broken image: {where} is empty (0 bytes); write the file again or leave it out")
        if count > self.file_bytes:
            raise DataError(
                f"image too large: {where} has {count:,} bytes, the limit is {self.file_bytes:,}; save it smaller"
            )

    def check_size(self, width: int, height: int, where: str) -> None:
        """Raises DataError when the header announces a size outside the limits."""
        problem = ""
        if min(width, height) < 1 or max(width, height) > self.side:
            problem = f"each side must be 1 to {self.side:,} pixels"
        elif width * height > self.pixels:
            problem = f"the limit is {self.pixels:,} pixels"
        elif max(width, height) > self.aspect * min(width, height):
            problem = f"one side may be at most {self.aspect:g} times the other"
        if problem:
            raise DataError(f"image too large: {where} is {width} x {height}; {problem}; shrink or crop it")


@dataclass(frozen=True, slots=True)
class FileImage:
    """A picture in a file of its own."""

    path: Path

    def describe(self) -> str:
        return str(self.path)

    def encoded_size(self) -> int:
        """Size in bytes. Raises DataError when there is no such file."""
        try:
            return self.path.stat().st_size
        except (OSError, ValueError):  # no file can have a name with a NUL in it
            beside = near(self.path, tuple(name.lower() for name in (*FORMATS, "jpg")))
            raise DataError(
                f"missing image: there is no readable file {self.path}{beside}; check the image folder"
            ) from None

    def read(self) -> bytes:
        self.encoded_size()
        try:
            return self.path.read_bytes()
        except OSError:
            raise DataError(
                f"missing image: {self.path} cannot be read; check that it is a file and its permissions"
            ) from None


@dataclass(frozen=True, slots=True)
class TarImage:
    """A picture inside a tar file, read at its offset without extracting anything."""

    path: Path
    offset: int
    size: int
    name: str

    def describe(self) -> str:
        return f"{self.path} :: {self.name}"

    def encoded_size(self) -> int:
        return self.size

    def read(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                raw = file.read(self.size)
        except OSError:
            raise DataError(f"missing image: the shard of {self.describe()} cannot be read; was it moved?") from None
        if len(raw) != self.size:
            raise DataError(
                f"broken image: {self.describe()} should have {self.size} bytes and has {len(raw)}; the "
                "shard changed since it was indexed, start again"
            )
        return raw


@dataclass(frozen=True, slots=True)
class BytesImage:
    """An encoded picture in memory, for example from a request."""

    data: bytes
    name: str = "image"

    def describe(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture as base64 in a table's cell or in a data: URL, decoded when it is read."""

    text: str
    name: str

    def describe(self) -> str:
        return self.name

    def read(self) -> bytes:
        try:
            return base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError):
            raise DataError(f"broken image: {self.name} is not base64; copy the file again") from None


@dataclass(frozen=True, slots=True, eq=False)
class MadeImage:
    """A picture that already is a PIL image."""

    image: PilImage.Image
    name: str = "image"

    def describe(self) -> str:
        return self.name

    def read(self) -> PilImage.Image:
        return self.image


AnyImage = str | Path | bytes | PilImage.Image | ImageSource | Image
"""Whatever a user may call a picture: a path, encoded bytes, a PIL image, a lazy source, or a record's part."""


def as_image(picture: AnyImage) -> Image:
    """The picture as a record's part, still undecoded. Raises DataError for anything that is no picture."""
    if isinstance(picture, Image):
        return picture
    if isinstance(picture, str | Path):
        return Image(FileImage(Path(picture)))
    if isinstance(picture, bytes):
        return Image(BytesImage(picture))
    if isinstance(picture, PilImage.Image):
        return Image(MadeImage(picture))
    if isinstance(picture, ImageSource):
        return Image(picture)
    raise DataError(f"not a picture: {type(picture).__name__}; give a path, encoded bytes or a PIL image")


def open_image(source: ImageSource, limits: ImageLimits | None = None, *, deep: "Deep" = "scale") -> PilImage.Image:
    """The picture as 8-bit RGB: first frame, EXIF-rotated, transparency composited on white.

    Numbers of more than 8 bits are scaled (``deep`` "scale": grey of 16 bits keeps its high byte, floats are refused,
    for their white is unknown) or cut off at 255 as transformers and Pillow do ("clip").

    Raises DataError, always naming the picture, when it is missing, not of an allowed format, outside ``limits``
    or damaged. Pillow's own messages are never passed on: they may hold memory addresses.
    """
    with _opened(source, limits or ImageLimits()) as image:
        if image.mode == "F" and deep == "scale":
            raise DataError(
                f"a picture of floats: {source.describe()} has no range that is known to be white; scale it to 8 bits"
            )
        turned = upright(image)
        try:
            return _to_rgb(turned, deep)
        except ValueError:  # Pillow has no way from this mode to RGB
            raise DataError(
                f"a picture of mode {image.mode}: {source.describe()} cannot be made RGB; convert it first"
            ) from None


def check_header(source: ImageSource, limits: ImageLimits | None = None) -> None:
    """Raises DataError as :func:`open_image` does for what is known without decoding: format and size."""
    with _opened(source, limits or ImageLimits()):
        pass


def decoded(source: ImageSource, limits: ImageLimits | None = None) -> PilImage.Image:
    """The picture decoded and otherwise as it came: what :func:`open_image` makes of this is what it makes of the file.
    Raises DataError as it does."""
    with _opened(source, limits or ImageLimits()) as image:
        image.load()
        return image


def image_size(source: ImageSource, limits: ImageLimits | None = None) -> tuple[int, int]:
    """Height and width of what :func:`open_image` makes, from the header alone. Raises DataError as it does."""
    with _opened(source, limits or ImageLimits()) as image:
        return upright_size(image)


@contextmanager
def _opened(source: ImageSource, limits: ImageLimits) -> Iterator[PilImage.Image]:
    """The picture with nothing but its header read, found to be within ``limits``; whatever Pillow raises inside the
    block comes out as a DataError."""
    where = source.describe()
    if isinstance(source, FileImage | TarImage):
        limits.check_bytes(source.encoded_size(), where)
    raw = source.read()
    if isinstance(raw, PilImage.Image):
        limits.check_size(*raw.size, where)
        yield raw
        return
    limits.check_bytes(len(raw), where)
    try:
        with PilImage.open(BytesIO(raw), formats=FORMATS) as image:
            limits.check_size(*image.size, where)
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        if raw.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")):  # of a format, and not even its header is sound
            raise DataError(f"broken image: {where} is truncated or damaged; {_REWRITE}") from None
        raise DataError(
            f"broken image: {where} is not a picture of the formats {', '.join(FORMATS)}"
            f"{but_is(raw, _CONVERT, known=_CONVERT)}"
        ) from None
    except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning):
        raise DataError(
            f"image too large: {where} has far more pixels than the limit of {limits.pixels:,}; shrink it"
        ) from None
    except Exception:  # Pillow's decoders raise almost anything on damaged data: OSError, SyntaxError, …
        raise DataError(f"broken image: {where} is truncated or damaged; {_REWRITE}") from None


def _to_rgb(image: PilImage.Image, deep: "Deep") -> PilImage.Image:
    """8-bit RGB on white. Scaled, 16-bit grey keeps its high byte, as Pillow does for 16-bit colour; clipped, all goes
    as in transformers, where colour premultiplied by alpha (RGBa) is taken for opaque."""
    if deep == "scale" and image.mode.startswith("I"):
        numbers = np.asarray(image).astype(np.int64)
        return PilImage.fromarray((numbers.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data and (deep == "scale" or image.mode != "RGBa"):
        coloured = image.convert("RGBA")
        white = PilImage.new("RGBA", coloured.size, (255, 255, 255, 255))
        return PilImage.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


Mode = Literal["square", "pad", "squash", "aspect", "anyres"]
Crop = Literal["floor", "round"]
Deep = Literal["scale", "clip"]
MOST_RESIZED = 100_000_000
"""Pixels of a picture between resizing and cropping: a thin strip whose short side is made the model's size grows."""
_MODES = ("square", "pad", "squash", "aspect", "anyres")
_RESAMPLING = {
    "bicubic": PilImage.Resampling.BICUBIC,
    "bilinear": PilImage.Resampling.BILINEAR,
    "nearest": PilImage.Resampling.NEAREST,
}


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """RGB picture -> normalised pixels (3, size, size), float32; a clip -> (F, 3, size, size).

    ``square``: short side to ``size``, other side int(size * long / short), centre crop (CLIP; spec of stage 1 of
    LLaVA-1.5). ``pad``: first onto a square canvas of the long side, background floor(255 * mean), offset
    floor((long - short) / 2) (stage 2 of LLaVA-1.5). ``squash``: both sides to ``size`` (SigLIP). ``aspect``: the long
    side to ``size``, the other in proportion, rounded to full patches of ``patch`` pixels, so (3, h, w) with any h, w.
    ``anyres``: views of ``size``, (1 + tiles, 3, size, size): the picture squashed, then the tiles of the canvas among
    ``pinpoints`` (height, width) that suits the picture, fitted into its middle on black (LLaVA 1.6).
    ``mean`` and ``std`` are of pixels in 0..1. ``crop``: where the centre begins when (long - size) / 2 is no whole
    number: ``floor`` (transformers, LLaVA) or the nearest even, ``round`` (OpenAI's CLIP, open_clip). ``deep``: what
    becomes of more than 8 bits, see :func:`open_image`. Raises ConfigError for values that make no sense.
    """

    size: int
    mode: Mode = "square"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: str = "bicubic"
    patch: int = 1
    pinpoints: tuple[tuple[int, int], ...] = ()
    crop: Crop = "floor"
    deep: Deep = "scale"

    def __post_init__(self) -> None:
        for name, known in (("crop", get_args(Crop)), ("deep", get_args(Deep))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"image transform: unknown {name} {getattr(self, name)!r}; {nearest(getattr(self, name), known)}"
                )
        if (self.mode == "anyres") != bool(self.pinpoints):
            raise ConfigError("image transform: pinpoints, the canvases of a picture's tiles, belong to mode anyres")
        check_pinpoints(self.pinpoints, self.size)
        if self.patch < 1 or (self.mode == "aspect" and self.size % self.patch):
            raise ConfigError(
                f"image transform: size {self.size} must be a whole number of patches of {self.patch} pixels"
            )
        if self.size < 1:
            raise ConfigError(f"image transform: size must be at least 1 pixel, not {self.size}")
        if self.mode not in _MODES:
            raise ConfigError(f"image transform: unknown mode {self.mode!r}; {nearest(self.mode, _MODES)}")
        if self.resample not in _RESAMPLING:
            raise ConfigError(
                f"image transform: unknown resample {self.resample!r}; {nearest(self.resample, _RESAMPLING)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError("image transform: mean and std need three numbers each, and std must be positive")

    @classmethod
    def clip(cls, size: int = 224, mode: Mode = "square") -> "ImageTransform":
        """OpenAI CLIP and LLaVA."""
        return cls(size=size, mode=mode)

    @classmethod
    def siglip(cls, size: int = 224) -> "ImageTransform":
        """SigLIP: squashed, pixels to -1..1."""
        return cls(size=size, mode="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    @property
    def background(self) -> tuple[int, int, int]:
        """The canvas colour of ``pad``: near zero after normalisation."""
        red, green, blue = (math.floor(255 * m) for m in self.mean)
        return red, green, blue

    def __call__(self, picture: AnyImage) -> Float[Tensor, "*frames 3 height width"]:
        """Pixels (3, size, size), or (F, 3, size, size) of a clip. A PIL image is taken as it is and must be RGB; all
        else is opened by :func:`open_image` with its limits and errors."""
        if isinstance(picture, Video):
            if self.mode == "anyres":
                raise DataError("a clip is not cut into tiles: this model's image mode anyres reads single pictures")
            return torch.stack([self(frame) for frame in picture.source.read()])
        image = picture if isinstance(picture, PilImage.Image) else self.opened(picture)
        if self.mode == "anyres":
            return torch.stack([self._normalised(view) for view in self.views(image)])
        where = "the picture" if isinstance(picture, PilImage.Image) else as_image(picture).source.describe()
        return self._normalised(self.fit(image, where))

    def opened(self, picture: AnyImage) -> PilImage.Image:
        """As :func:`open_image`, with this transform's way with more than 8 bits."""
        return open_image(as_image(picture).source, deep=self.deep)

    def _normalised(self, image: PilImage.Image) -> Tensor:
        levels = np.asarray(image)
        table = _normalised_levels(self.mean, self.std)
        return torch.from_numpy(np.stack([table[c][levels[:, :, c]] for c in range(3)]))

    def views(self, image: PilImage.Image) -> list[PilImage.Image]:
        """``anyres``: the full picture, then the tiles of its canvas, row by row."""
        filter_, size = _RESAMPLING[self.resample], (image.height, image.width)
        canvas = best_canvas(size, self.pinpoints)
        height, width = fitted(size, canvas)
        sheet = PilImage.new("RGB", (canvas[1], canvas[0]))
        sheet.paste(image.resize((width, height), filter_), ((canvas[1] - width) // 2, (canvas[0] - height) // 2))
        corners = [(x, y) for y in range(0, canvas[0], self.size) for x in range(0, canvas[1], self.size)]
        overview = image.resize((self.size, self.size), filter_)
        return [overview, *(sheet.crop((x, y, x + self.size, y + self.size)) for x, y in corners)]

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the model sees of a picture of that size (``anyres``: of one view)."""
        if self.mode != "aspect":
            return self.size, self.size
        across, down = self._multiple_of_patches(width, height)
        return down, across

    def fit(self, image: PilImage.Image, where: str = "the picture") -> PilImage.Image:
        """The size x size picture the model sees (``aspect``: of any shape; not for ``anyres``), unnormalised.

        Raises DataError, naming ``where``, for a strip too thin to be resized before its middle is cut out.
        """
        if self.mode == "aspect":
            target = self._multiple_of_patches(*image.size)
            return image if target == image.size else image.resize(target, _RESAMPLING[self.resample])
        if self.mode == "pad":
            image = _on_square(image, self.background)
        width, height = image.size
        if self.mode == "squash":
            target = (self.size, self.size)
        elif width <= height:
            target = (self.size, int(self.size * height / width))
        else:
            target = (int(self.size * width / height), self.size)
        if target[0] * target[1] > MOST_RESIZED:
            raise DataError(
                f"image too large: {where} is {width} x {height}; with its short side made {self.size} pixels it is "
                f"{target[0]:,} x {target[1]:,}; the limit is {MOST_RESIZED:,} pixels; crop it, or use image mode "
                "pad or squash"
            )
        if target != image.size:
            image = image.resize(target, _RESAMPLING[self.resample])
        if target == (self.size, self.size):
            return image
        left, top = (self._start(side) for side in target)
        return image.crop((left, top, left + self.size, top + self.size))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every such shape: of ``aspect`` the long side is ``size`` and the other a number of full patches."""
        if self.mode != "aspect":
            return [(self.size, self.size)]
        sides = range(self.patch, self.size, self.patch)
        return [*((self.size, s) for s in sides), *((s, self.size) for s in sides), (self.size, self.size)]

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the model sees of a picture of that size (``anyres``: its first view),
        in fractions of width and height. Below 0 and above 1 is the canvas of ``pad``; the rounding to whole pixels
        of the resized picture is left out."""
        if self.mode not in ("square", "pad"):
            return 0.0, 0.0, 1.0, 1.0
        side = min(width, height) if self.mode == "square" else max(width, height)
        across, down = (1 - side / width) / 2, (1 - side / height) / 2
        return across, down, 1 - across, 1 - down

    def _start(self, side: int) -> int:
        """Where the centre begins along a side. Python rounds half to even, as in the code of OpenAI and open_clip."""
        return round((side - self.size) / 2) if self.crop == "round" else (side - self.size) // 2

    def _multiple_of_patches(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the long side at ``size`` and both sides full patches, at least one."""
        long = max(width, height)
        sides = [
            max(1, math.floor(side * self.size / long / self.patch + 0.5)) * self.patch for side in (width, height)
        ]
        return sides[0], sides[1]

    def to_dict(self) -> dict[str, object]:
        values: dict[str, object] = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        del values["pinpoints"]
        for name in ("crop", "deep"):  # named only where they are others, so that older folders read the same
            if values[name] == getattr(type(self), name):
                del values[name]
        return values | ({"pinpoints": [list(canvas) for canvas in self.pinpoints]} if self.pinpoints else {})

    @classmethod
    def from_dict(cls, values: object) -> "ImageTransform":
        """Inverse of :meth:`to_dict`. Raises ConfigError naming an unknown key, or a value of a wrong type."""
        return strict(cls, values, "image transform")


def _on_square(image: PilImage.Image, background: tuple[int, int, int]) -> PilImage.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = PilImage.new("RGB", (side, side), background)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


@lru_cache(maxsize=8)
def _normalised_levels(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """(3, 256) float32: what each of the 256 grey levels of each channel becomes.

    The order of roundings (scale in float64, then subtract and divide in float32) is the one of the published
    processors, so that pixels are equal to theirs bit for bit.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    shift, scale = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    return (scaled[None] - shift[:, None]) / scale[:, None]
