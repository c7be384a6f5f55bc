"""Kill training runs at random moments, start them again, and hold what comes out against the uninterrupted run.

    python tools/kill_runs.py --kills 6 --processes 2 --engine fsdp --seed 0

Tiny CLIP, LLaVA, Flamingo and BLIP-2 (the recipes of the tests) train in forked processes. One of a run's processes is
ended by SIGKILL at a random moment; the others must leave by themselves. Then the same call goes on. Losses, samples
and the final weights must have the bits of the run that nobody disturbed, and no checkpoint may be there in half.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
from tests.miniature import run_story
from tests.recipes.process_ranks import recipes

from isthmus.checkpoint import file_sha256, read_folder
from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe
from isthmus.training.log import read_metrics
from isthmus.training.parallel import Parallel
from isthmus.training.state import checkpoints

STEPS, SAVE_EVERY = 12, 2
PATIENCE = 60.0
"""Seconds within which the processes that were not killed must have left."""
TIMES = ("seconds", "tokens_per_second", "data_wait")


def lengthened(recipe: Recipe, engine: str) -> Recipe:
    """The recipe with as many steps in every stage, and this engine."""
    tree = recipe.model_dump(mode="json")
    for stage in tree["stages"]:
        stage["stage"] |= {"steps": STEPS, "save_every": SAVE_EVERY}
    how = Parallel(engine=engine, timeout=PATIENCE * 2 / 3)  # type: ignore[arg-type]
    return Recipe.model_validate(tree).model_copy(update={"parallel": how})


def started(recipe: Recipe, folder: Path, processes: int) -> list[int]:
    with socket.socket() as meeting:
        meeting.bind(("127.0.0.1", 0))
        port = meeting.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in {**told, "MASTER_PORT": port}.items()}
            torch.set_num_threads(1)
            code = 1
            try:
                train(recipe, folder, progress=False)
                code = 0
            except Exception as error:
                print(f"process {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    return children


def waited(children: list[int], until: float) -> dict[int, int]:
    """The exit codes of those that ended before that moment."""
    codes: dict[int, int] = {}
    while len(codes) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                codes |= {child: status} if ended else {}
        time.sleep(0.005)
    return codes


def facts(folder: Path) -> tuple[object, ...]:
    """What must be the same: lines of all stages without their times, and the model's weights."""
    lines = [
        {k: v for k, v in line.items() if k not in TIMES}
        for file in sorted(folder.glob("stages/*/metrics.jsonl"))
        for line in read_metrics(file)
    ]
    return lines, file_sha256(folder / "model" / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=6, help="of each system")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--engine", default="fsdp")
    parser.add_argument("--only", help="one system: clip, llava, flamingo, blip2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    story = os.fork()
    if story == 0:
        torch.set_num_threads(1)
        run_story(place / "story")
        os._exit(0)
    os.waitpid(story, 0)
    failed = 0
    for name, recipe in recipes(place / "story").items():
        if options.only not in (None, name):
            continue
        recipe = lengthened(recipe, options.engine)
        began = time.monotonic()
        codes = waited(started(recipe, place / name, options.processes), began + 600)
        if len(codes) < options.processes or any(codes.values()):
            sys.exit(f"{name}: the run that nobody disturbed ended within 600 s with {codes}")
        takes, expected = time.monotonic() - began, facts(place / name)
        kills, slowest, number, folder = 0, 0.0, 0, place / f"{name}-0"
        while True:
            children = started(recipe, folder, options.processes)
            moment = time.monotonic() + dice.uniform(0.05, 1.0) * takes
            ended = waited(children, moment if kills < options.kills else moment + 600)
            if len(ended) < len(children):
                dying = time.monotonic()
                os.kill(dice.choice([c for c in children if c not in ended]), signal.SIGKILL)
                left = waited([c for c in children if c not in ended], dying + PATIENCE)
                slowest = max(slowest, time.monotonic() - dying)
                kills += 1
                stuck = [c for c in children if c not in ended and c not in left]
                failed += len(stuck)
                for child in stuck:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                for checkpoint in folder.glob("stages/*"):
                    for whole in checkpoints(checkpoint):
                        read_folder(whole)
                continue
            if any(ended.values()):
                sys.exit(f"{name}: run {number} ended by itself after {kills} kills: {ended}")
            same = facts(folder) == expected
            failed += not same
            print(f"{name}: run {number} {'equal to the bit' if same else 'DIFFERS'}", flush=True)
            if kills >= options.kills:
                break
            shutil.rmtree(folder)
            number, folder = number + 1, place / f"{name}-{number + 1}"
        print(
            f"{name}: {takes:.1f} s undisturbed, {kills} kills, the others left within {slowest:.1f} s, "
            f"every checkpoint whole",
            flush=True,
        )
    shutil.rmtree(place)
    print("failed" if failed else "all runs as if nothing had happened")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
