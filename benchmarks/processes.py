"""The same stage in one process with one thread, in one with two threads, and in two processes with one thread each:
seconds a step, in turn, medians. Two cores are needed, and nothing else on them.

python benchmarks/processes.py RECIPE [key=value ...]   (a recipe of one stage, such as clip-tiny)
"""

import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from isthmus.training.log import read_metrics

ROUNDS, STEPS = 2, 30
WAYS = {
    "one process, one thread": ([], "1"),
    "one process, two threads": ([], "2"),
    "two processes, one thread each": (["--processes", "2"], "1"),
}


def seconds(recipe: list[str], options: list[str], threads: str) -> float:
    """The median of a step, the first ones left out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "isthmus", "train", *recipe, *options, "--out", folder]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, capture_output=True)
        (metrics,) = Path(folder).glob("stages/*/metrics.jsonl")
        told = [line["seconds"] for line in read_metrics(metrics)]
    return statistics.median(b - a for a, b in pairwise(told[9:]))


def main(recipe: list[str]) -> None:
    recipe = [*recipe, f"stages.0.steps={STEPS}", "stages.0.warmup=1", "stages.0.log_every=1"]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, (options, threads) in WAYS.items():
            found[way].append(seconds(recipe, options, threads))
    first = statistics.median(next(iter(found.values())))
    for way, times in found.items():
        middle = statistics.median(times)
        print(f"{way}: {middle:.3f} s a step, {middle / first:.2f} of the first")


if __name__ == "__main__":
    main(sys.argv[1:])
