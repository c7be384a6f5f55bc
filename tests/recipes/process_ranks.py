"""What each process of the tests of recipes in several processes runs: five systems, three steps each."""

import os
from pathlib import Path
from typing import Any

import torch

from isthmus.recipes.run import train
from isthmus.recipes.schema import Recipe, parse_recipe
from isthmus.training.parallel import Parallel
from tests.miniature import tree
from tests.recipes.test_blip2 import tree as blip2_tree
from tests.recipes.test_flamingo import recipe as flamingo_recipe

SHARDED = ("clip", "llava", "flamingo")


def recipes(story: Path) -> dict[str, Recipe]:
    clip: dict[str, Any] = tree("clip")
    clip["stages"][0] |= {"batch_size": 8, "accumulate": 2}  # through the gradient cache
    llava: dict[str, Any] = tree("llava", story)
    llava["stages"][1] |= {"accumulate": 2}
    blip2: dict[str, Any] = blip2_tree(story)
    blip2["config"]["qformer"]["dropout"] = 0.0
    return {
        "clip": parse_recipe(clip),
        "llava": parse_recipe(llava),
        "flamingo": flamingo_recipe(story),
        "blip2": parse_recipe(blip2),
    }


def run(number: int, world: int, port: int, story: str, folder: str) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    for name, recipe in recipes(Path(story)).items():
        train(recipe, Path(folder) / name, progress=False)
    for name in SHARDED:
        recipe = recipes(Path(story))[name].model_copy(update={"parallel": Parallel(engine="fsdp")})
        train(recipe, Path(folder) / f"{name}-sharded", progress=False)
