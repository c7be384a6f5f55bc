"""Answers a second at batch sizes 1, 7 and 64, and how often a batch changes an answer.

python benchmarks/answers.py runs/demo/llava runs/demo/flamingo ...
"""

import argparse
import time
from pathlib import Path

from isthmus.comparison.cost import BATCHES
from isthmus.data.record import Record
from isthmus.demo.scenes import SceneSource
from isthmus.model import Model
from isthmus.opening import load


def answers(model: Model, records: list[Record], size: int) -> tuple[list[str], float]:
    """The answers in batches of ``size``, and answers per second of wall-clock time."""
    started = time.perf_counter()
    said = model.answer_records(records, batch_size=size, max_new_tokens=8)
    return said, len(records) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=128, help="questions")
    given = parser.parse_args()
    source = SceneSource("questions", split="test", count=given.count)
    records = [source[i] for i in range(given.count)]
    for folder in given.models:
        model = load(folder)
        model.answer_records(records[:2], max_new_tokens=8)  # the first call warms up
        alone, _ = answers(model, records, 1)
        for size in BATCHES:
            said, rate = answers(model, records, size)
            other = sum(a != b for a, b in zip(said, alone, strict=True))
            print(f"{folder.name}, batches of {size}: {rate:,.0f} answers a second, {other} of {len(said)} differ")


if __name__ == "__main__":
    main()
