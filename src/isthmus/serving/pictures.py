"""The folder of pictures that the server searches: its files by number, and their vectors in each model's space.

Only files within the folder are ever opened, through our own decoder and within the server's limits. Nobody learns a
path: a picture is a number and the name of its file.

Shapes: N pictures, Q vectors per picture (one of CLIP, one per query of BLIP-2), D width.
"""

import base64
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus.data.images import FileImage, ImageLimits, image_size, open_image
from isthmus.data.video import PICTURES, natural
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.rerank import two_step
from isthmus.model import Model
from isthmus.nn.losses import similarity

MOST_PICTURES = 5_000
"""Of one folder. Their vectors are kept in memory: of a BLIP-2 with 32 queries of 256 numbers, 164 MB."""
AT_ONCE = 8
"""Pictures of one piece of work, between two tokens of the answers that are being written."""
THUMBNAIL, LARGEST, LOSSLESS = 160, 1024, 512
"""Longer side in pixels of what is shown beside a score, of a picture that is handed out, and of one that is handed
out as it is."""


class Pictures:
    """The pictures of ``folder`` and of the folders in it, in the natural order of their names; links that lead out of
    it are left out. Raises ConfigError for no folder, one without pictures, or one of too many."""

    def __init__(self, folder: Path, limits: ImageLimits) -> None:
        self.limits = limits
        root = folder.resolve()
        if not root.is_dir():
            raise ConfigError(f"--pictures takes a folder of pictures; there is no folder {folder}.")
        self.files = tuple(_within(root))
        if not self.files:
            raise ConfigError(f"{folder} holds no picture: none of its files ends with {', '.join(sorted(PICTURES))}.")
        if len(self.files) > MOST_PICTURES:
            raise ConfigError(
                f"{folder} holds more than {MOST_PICTURES:,} pictures, as many as are searched; name a folder of fewer."
            )
        self.unreadable: set[int] = set()
        self._vectors: dict[str, dict[int, Tensor]] = {}

    def name(self, number: int) -> str:
        """The name of a picture's file, as text that can be sent."""
        return self.files[number].name.encode("utf-8", "replace").decode()

    def url(self, number: int, side: int, *, lossless: int = 0) -> str:
        """The picture as a data: URL, its longer side at most ``side`` pixels; a PNG when it is at most ``lossless``,
        else a JPEG. Raises DataError."""
        picture = open_image(FileImage(self.files[number]), self.limits)
        picture.thumbnail((side, side), PilImage.Resampling.BICUBIC)
        out, form = BytesIO(), "PNG" if max(picture.size) <= lossless else "JPEG"
        picture.save(out, form, quality=90)
        return f"data:image/{form.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"

    def rank(self, name: str, model: Model, query: Tensor) -> tuple[list[int], Tensor]:
        """Numbers of pictures, the most similar first, with their similarities, for a query (Q, D): to each of its
        vectors the best of the picture's, averaged over the query's."""
        known = self._vectors.get(name, {})
        if not known:
            return [], torch.zeros(0)
        vectors = torch.stack(list(known.values()))  # (N, Q, D)
        scores = similarity(vectors, query, model.net.compared_by()).mean(1)
        order = scores.argsort(descending=True, stable=True)
        numbers = list(known)
        return [numbers[i] for i in order.tolist()], scores[order]

    def read(self, name: str, model: Model) -> Iterator[int]:
        """Vectors of the pictures that ``model`` has not read yet, some with each step, which gives how many there are.
        They stay when it is stopped half way."""
        known = self._vectors.setdefault(name, {})
        left = [n for n in range(len(self.files)) if n not in known and n not in self.unreadable]
        for start in range(0, len(left), AT_ONCE):
            some = [n for n in left[start : start + AT_ONCE] if self._sound(n)]
            try:
                self._keep(known, some, model)
            except DataError:  # a damaged one among them: each alone
                for number in some:
                    try:
                        self._keep(known, [number], model)
                    except DataError:
                        self.unreadable.add(number)
            yield len(known)

    def _keep(self, known: dict[int, Tensor], some: list[int], model: Model) -> None:
        if some:
            vectors = model.embed_images([self.files[n] for n in some])
            known |= zip(some, vectors.reshape(len(some), -1, vectors.shape[-1]), strict=True)

    def _sound(self, number: int) -> bool:
        """Whether its header is within the limits."""
        try:
            image_size(FileImage(self.files[number]), self.limits)
        except DataError:
            self.unreadable.add(number)
            return False
        return True

    def reranked(self, model: Model, text: str, numbers: list[int], scores: Tensor) -> Iterator[list[float]]:
        """BLIP-2's second step: similarity plus matching logit of each of ``numbers``, some more with each step."""
        found: list[float] = []
        for start in range(0, len(numbers), AT_ONCE):
            some = [self.files[n] for n in numbers[start : start + AT_ONCE]]
            first = scores[start : start + len(some), None]
            found += two_step(model, some, [text], first, len(some))[1][:, 0].tolist()
            yield found


def _within(root: Path) -> Iterator[Path]:
    """Regular files of pictures, one more than are searched at most."""
    count = 0
    for place, folders, names in os.walk(root):
        folders.sort(key=natural)
        for name in sorted(names, key=natural):
            file = Path(place, name)
            if file.suffix.lower() not in PICTURES or not file.is_file() or not file.resolve().is_relative_to(root):
                continue
            yield file.resolve()
            count += 1
            if count > MOST_PICTURES:
                return
