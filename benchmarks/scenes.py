"""Scenes made and drawn per second of processor time on one core, encoded or not.

python benchmarks/scenes.py
"""

import io
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from PIL import Image as PilImage

from isthmus.demo.scenes import SceneSource

COUNT = 1000


def rate(form: str, size: int, *, encoded: bool) -> float:
    """Pictures with their words per second, after the sprites are rendered (the first hundred are not counted)."""
    source = SceneSource(form, count=COUNT + 100, size=size)  # type: ignore[arg-type]
    start = 0.0
    for number in range(len(source)):
        if number == 100:
            start = time.process_time()  # not the wall clock: other programs may share the core
        picture = source[number].images[0].source.read()
        if encoded:
            assert isinstance(picture, PilImage.Image)
            picture.save(io.BytesIO(), "PNG")
    return COUNT / (time.process_time() - start)


def main() -> None:
    for form in ("captions", "conversations"):
        for size in (64, 128):
            print(
                f"{form}, {size} x {size}: {rate(form, size, encoded=False):,.0f} a second, "
                f"as PNG {rate(form, size, encoded=True):,.0f}"
            )


if __name__ == "__main__":
    main()
