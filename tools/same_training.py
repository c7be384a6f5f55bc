"""Does a change of the code leave training as it was? Trains every tiny recipe for a few steps.

    python tools/same_training.py FILE [--steps 20]              # on the code as it is: writes FILE
    python tools/same_training.py OTHER [--steps 20] --against FILE   # after the change: compares bit for bit

Each recipe is trained on the parts that the earlier ones left, in one thread, with its vocabulary made of fewer texts.
Kept are each step's loss and gradient norm, a sha256 of the final weights and of the model's configuration files, and
the answers to a few test questions.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from isthmus.data.sources import open_source
from isthmus.model import Model
from isthmus.opening import load
from isthmus.recipes.run import train
from isthmus.recipes.schema import read_recipe

RECIPES = ("clip-tiny", "lm-tiny", "flamingo-tiny", "blip2-tiny", "llava-tiny")


def run(out: Path, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in RECIPES:
        recipe = read_recipe(name)
        words = ["threads=1"]
        if recipe.tokenizer is not None:
            words.append("tokenizer.samples=200")
        for stage in recipe.stages:
            few = min(steps, 6) if recipe.model == "clip" else steps
            words += [f"stages.{stage.name}.{key}" for key in (f"steps={few}", "warmup=2", "log_every=1")]
        words += [f"parts.{part}={out / Path(place).name}" for part, place in recipe.parts.items()]
        folder = out / name.removesuffix("-tiny")
        model = train(name, folder, overrides=words, progress=False)
        found[name] = {"steps": _metrics(folder), "files": _files(folder), "says": _says(model)}
        for place in sorted(folder.glob("stages/*/model")):
            model = load(place.parent)
            found[name][f"stage {place.parent.name}"] = {"files": _files(place.parent), "says": _says(model)}
        print(name, "trained", file=sys.stderr)
    return found


def _metrics(folder: Path) -> list[Any]:
    """What was logged, without times."""
    rows = []
    for file in sorted(folder.glob("stages/*/metrics.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            facts = json.loads(line)
            rows.append({k: v for k, v in facts.items() if k == "step" or "loss" in k or "norm" in k})
    return rows


def _files(folder: Path) -> dict[str, str]:
    """sha256 of the finished model's files, but for those that name paths and versions."""
    inner = folder / "model"
    files = (f for f in sorted(inner.rglob("*")) if f.is_file() and f.name not in ("recipe.yaml", "manifest.json"))
    return {str(f.relative_to(inner)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _says(model: Model) -> Any:
    pictures = open_source({"kind": "scenes", "form": "questions", "split": "test", "count": 6})
    records = [pictures[i] for i in range(6)]
    if model.kind == "lm":
        readings = open_source({"kind": "scenes", "form": "readings", "split": "test", "count": 6})
        records = [readings[i] for i in range(6)]
    found: dict[str, Any] = {"can": list(model.capabilities)}
    if "answer" in model.capabilities:
        found["answers"] = model.answer_records(records, max_new_tokens=8)
    if "score" in model.capabilities:
        found["scores"] = model.score([*records[0].parts[:-1]], ["red", "blue cube"])
    if "caption" in model.capabilities:
        found["captions"] = [model.caption(r.images[0], max_new_tokens=8) for r in records[:2]]
    if "similarity" in model.capabilities:
        found["similarity"] = model.similarity([r.images[0] for r in records], ["a red cube", "a ring"]).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--against", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = run(Path(place), told.steps)
    told.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if told.against is None:
        return
    before = json.loads(told.against.read_text(encoding="utf-8"))
    now = json.loads(told.file.read_text(encoding="utf-8"))
    moved = [f"{name}: {key}" for name in before for key in before[name] if before[name][key] != now[name].get(key)]
    print("\n".join(moved) if moved else "Nothing moved: losses, weights, files and answers are equal bit for bit.")
    sys.exit(bool(moved))


if __name__ == "__main__":
    main()
