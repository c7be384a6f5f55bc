"""``python -m tests.fuzz --seconds 600 --seed 0``: folders drawn at random, asked here and in transformers."""

import argparse
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.differ import differences
from tests.fuzz.peers import save


def trial(seed: int, folder: Path) -> tuple[str, list[str]]:
    """What was drawn, and what differs; a failure of either side is a difference too."""
    drawn = "?"
    try:
        made = save(seed, folder)
        drawn = f"{made.family} {made.facts['class']} {made.facts['language']}"
        return drawn, differences(folder, seed)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return drawn, [f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:300]}"]


def main() -> int:
    options = argparse.ArgumentParser()
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--seed", type=int, default=0, help="the first seed; the others follow")
    options.add_argument("--count", type=int, default=10**9)
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    until, kinds, wrong = time.monotonic() + given.seconds, Counter[str](), 0
    seed = given.seed
    while time.monotonic() < until and seed < given.seed + given.count:
        with tempfile.TemporaryDirectory() as place:
            drawn, found = trial(seed, Path(place) / "drawn")
        kinds[drawn.partition(" ")[0]] += 1
        if found:
            wrong += 1
            print(f"seed {seed} ({drawn}): " + "; ".join(found), flush=True)
        seed += 1
    print(f"{seed - given.seed} folders from seed {given.seed}: {wrong} differ; {dict(kinds)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
