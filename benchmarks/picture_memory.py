"""Memory of an evaluation with its controls, over many different pictures: it must not grow with their number.

    python -m benchmarks.picture_memory --pictures 10000

Writes the pictures (JPEG, 320 x 240) to a temporary folder, asks a model that only decodes what it is shown, and prints
the resident memory after each tenth, and how often a picture was decoded.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PilImage
from PIL.ImageFile import ImageFile

from isthmus.data.images import ImageTransform
from isthmus.recipes.schema import EvalSpec
from isthmus.recipes.scoring import score_model


class Decodes:
    """Answers with the first grey level of each picture."""

    capabilities = ("answer",)
    prompts: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.transform = ImageTransform(size=32)

    def answer_records(self, records: Sequence[Any], **decoding: Any) -> list[str]:
        return [" ".join(f"{self.transform(i)[0, 0, 0]:.2f}" for i in record.images) or "none" for record in records]


def write(folder: Path, count: int) -> dict[str, str]:
    """``count`` different pictures and a question about each."""
    rows, dice = [], np.random.default_rng(0)
    for number in range(count):
        levels = np.kron(dice.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((80, 80, 1), np.uint8))
        PilImage.fromarray(levels).save(folder / f"{number}.jpg")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
        rows.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return {"kind": "llava", "file": str(folder / "data.json"), "image_folder": str(folder)}


def resident() -> float:
    """MiB of this process, on Linux."""
    (kib,) = re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=10_000)
    count = parser.parse_args().pictures
    decode, decoded = ImageFile.load, [0]

    def counted(self: Any) -> Any:
        decoded[0] += bool(self.tile)
        return decode(self)

    ImageFile.load = counted  # type: ignore[method-assign]
    due = [count * tenth // 10 for tenth in range(11)]

    def report(name: str, done: int, total: int) -> None:
        while due and done >= due[0]:
            print(f"{due.pop(0):>8,} of {total:,} asked: {resident():,.0f} MiB resident", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        spec = EvalSpec(name="vqa", task="vqa", data=write(Path(folder), count))
        score_model(Decodes(), [spec], Path(folder) / "out", model_hash="none", progress=report)
    print(f"decodes per picture: {decoded[0] / count:.2f}")


if __name__ == "__main__":
    main()
