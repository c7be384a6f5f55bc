"""What each process of the tests of recipes in several processes runs: every system, three steps each; adapters with
validation on the way; evaluations."""

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image as PilImage

from isthmus.checkpoint import tensor_sha256
from isthmus.cli.evaluate import run as command
from isthmus.opening import load
from isthmus.processes import of_first
from isthmus.recipes.build import build
from isthmus.recipes.run import train
from isthmus.recipes.schema import EvalSpec, Recipe, parse_recipe
from isthmus.recipes.scoring import own_tasks, score_model
from isthmus.stage import named_state
from isthmus.training.parallel import Parallel
from tests.miniature import tree
from tests.recipes.test_blip2 import tree as blip2_tree
from tests.recipes.test_flamingo import recipe as flamingo_recipe
from tests.recipes.visits import questions

SHARDED = ("clip", "llava", "flamingo", "tuned")
HELD_OUT = {"kind": "scenes", "form": "conversations", "split": "test", "count": 10, "turns": 3}
LORA = {"pattern": "language.*", "lora": {"rank": 2}, "lr": 1e-3}


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
        "tuned": parse_recipe(tuned(story)),
        "ends": parse_recipe(tuned(story, ends=True)),
    }


def tuned(story: Path, *, ends: bool = False) -> dict[str, Any]:
    """Adapters and an average of weights, measured on the way: five rows of loss in two batches, five questions. With
    ``ends`` a stage whose rate only makes it worse, so that it ends early, by one batch, of which one process has none.
    """
    found = tree("llava", story)
    found["parts"] = {"init": str(story / "llava")}
    connector = {"pattern": "connector.*", "lr": 1.0 if ends else 1e-3}
    validate: dict[str, Any] = {"every": 1 if ends else 2, "data": [HELD_OUT], "rows": 4 if ends else 5}
    validate |= {"keep_best": {"metric": "loss", "patience": 1 if ends else None}, "tasks": [] if ends else ["vqa"]}
    own: dict[str, Any] = {"steps": 9} if ends else {"steps": 3, "ema": 0.5}
    train = [connector] if ends else [LORA, connector]
    found["stages"] = [found["stages"][1] | own | {"train": train, "validate": validate}]
    return found


def evaluations(story: Path, folder: Path, trained: Path) -> None:
    """What is scored in one process and in two, models of ``trained``: more questions than processes, fewer, a ranking,
    and a picture that cannot be decoded among the second process's."""
    command(str(trained / "tuned"), given={}, limit=7, out=folder / "seven", json_file=folder / "seven.json")
    alone = [spec.model_copy(update={"options": SHORT | {"controls": []}}) for spec in own_tasks(trained / "tuned")]
    score_model(load(trained / "tuned"), alone, folder / "one", model_hash="x", limit=1)
    score_model(load(trained / "clip"), own_tasks(trained / "clip"), folder / "ranks", model_hash="x")
    folder.joinpath("data").mkdir(parents=True, exist_ok=True)
    broken = EvalSpec(name="vqa", task="vqa", data=of_first(lambda: damaged(folder / "data")), options=SHORT)
    score_model(load(story / "llava"), [broken], folder / "broken", model_hash="x")


SHORT = {"decoding": {"max_new_tokens": 2}}


def damaged(folder: Path) -> dict[str, Any]:
    """Four questions, the last about a picture whose header alone is sound."""
    data = questions(folder, 4)
    PilImage.effect_noise((64, 64), 40).save(folder / "3.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:900])
    return data


def nets(story: Path, aside: Path | None) -> dict[str, list[dict[str, str]]]:
    """The sha256 of each tensor of each recipe's net as its stages begin."""
    found = {}
    for name, recipe in recipes(story).items():
        built = build(recipe, aside)
        found[name] = []
        for stage in recipe.stages:
            built = built.enter(stage)
            found[name].append({n: tensor_sha256(t) for n, t in named_state(built.net).items()})
    return found


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
    evaluations(Path(story), Path(folder) / "scores", Path(folder))
    torch.save(nets(Path(story), Path(folder)), Path(folder) / f"nets-{number}.pt")
