"""Clips: where their frames come from. A clip stays a lazy source until a batch is filled.

A folder of pictures is a clip whose frames are taken as sampled already; a video file is read through PyAV (the
``video`` extra) at ``fps`` frames a second, 1 in the paper (2204.14198, sec. 3.1.1). More than ``most`` frames are
thinned evenly, first and last kept.
"""

import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image as PilImage

from isthmus.data.images import AnyImage, FileImage, as_image, open_image
from isthmus.data.record import FrameSource, Image, Video
from isthmus.errors import DataError, MissingExtraError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
VIDEOS = frozenset({".mp4", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg"})
MOST_FRAMES = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FolderFrames:
    """A folder of pictures in the natural order of their names: frame2 before frame10."""

    path: Path
    most: int = MOST_FRAMES

    def describe(self) -> str:
        return str(self.path)

    def read(self) -> list[PilImage.Image]:
        try:
            found = [p for p in self.path.iterdir() if p.suffix.lower() in PICTURES]
        except OSError:
            raise DataError(f"missing video: there is no readable folder {self.path}; check the path") from None
        files = sorted(found, key=lambda p: natural(p.name))
        return _checked([open_image(FileImage(p)) for p in thinned(files, self.most)], self.describe())


@dataclass(frozen=True, slots=True)
class FileFrames:
    """A video file, sampled at ``fps`` frames a second from its first frame on."""

    path: Path
    fps: float = 1.0
    most: int = MOST_FRAMES

    def describe(self) -> str:
        return str(self.path)

    def read(self) -> list[PilImage.Image]:
        """Raises DataError for a missing, damaged or empty file, MissingExtraError without PyAV."""
        try:
            import av
        except ImportError:
            raise MissingExtraError(
                f"reading {self.path} needs PyAV; install isthmus[video], or give a folder of frames"
            ) from None
        if not os.path.isfile(self.path):  # which holds of no name that is too long for a file
            raise DataError(f"missing video: there is no readable file {self.path}; check the path")
        frames: list[PilImage.Image] = []
        try:
            with av.open(str(self.path)) as container:
                due, first = 0.0, None
                for frame in container.decode(video=0):
                    time = float(frame.time or 0.0)
                    first = time if first is None else first  # a cut piece of a stream does not begin at 0
                    passed = time - first + 1e-6
                    if passed >= due:
                        frames.append(frame.to_image().convert("RGB"))
                        due = (int(passed * self.fps) + 1) / self.fps  # the next after a gap, not one for each missed
        except Exception as error:  # FFmpeg's errors are of many classes; a damaged file is one sample's trouble
            raise DataError(
                f"broken video: {self.path} cannot be decoded ({type(error).__name__}); write the file again or drop "
                "the sample"
            ) from None
        return _checked(thinned(frames, self.most), self.describe())


@dataclass(frozen=True, slots=True, eq=False)
class MadeFrames:
    """Frames that already are PIL images."""

    frames: Sequence[PilImage.Image]
    name: str = "video"

    def describe(self) -> str:
        return self.name

    def read(self) -> list[PilImage.Image]:
        return _checked(list(self.frames), self.name)


AnyVideo = str | Path | Sequence[PilImage.Image] | FrameSource | Video


def as_video(clip: AnyVideo, *, fps: float = 1.0, most: int = MOST_FRAMES) -> Video:
    """A folder of frames, a video file, a list of PIL images or a lazy source as a record's part, still undecoded."""
    if isinstance(clip, Video):
        return clip
    if isinstance(clip, str | Path):
        path = Path(clip)
        return Video(FolderFrames(path, most) if os.path.isdir(path) else FileFrames(path, fps, most))
    if isinstance(clip, FrameSource):
        return Video(clip)
    if isinstance(clip, Sequence) and all(isinstance(frame, PilImage.Image) for frame in clip):
        return Video(MadeFrames(clip))
    raise DataError(
        f"not a video: {type(clip).__name__}; give a folder of frames, a video file or a list of PIL images"
    )


def as_visual(thing: AnyImage | Video) -> Image:
    """A picture or, for a folder or a path that ends like a video file, a clip."""
    if isinstance(thing, str | Path) and (os.path.isdir(thing) or Path(thing).suffix.lower() in VIDEOS):
        return as_video(thing)
    return as_image(thing)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts names with the numbers in them by value: 1, 2, 10."""
    pieces = re.split(r"(\d+)", name)  # text and digits take turns, so like is compared with like
    return [int(piece) if n % 2 else piece for n, piece in enumerate(pieces)], name


def thinned(items: list[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly spread, first and last among them."""
    if len(items) <= most:
        return items
    if most == 1:
        return items[:1]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _checked(frames: list[PilImage.Image], where: str) -> list[PilImage.Image]:
    if not frames:
        raise DataError(f"empty video: {where} has 0 frames; give at least one or leave it out")
    if len({frame.size for frame in frames}) > 1:
        raise DataError(f"broken video: the frames of {where} differ in size; make them equal")
    return frames
