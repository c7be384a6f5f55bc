"""What the models that come with the package score as they come: their weights are cast to bfloat16 when they are
packed, and the demo's results.json was measured before.

    python -m tools.score_shipped --out runs/shipped        # goes on where it was stopped; then write_results_page

Every task of the demo's recipes is asked that the shipped model can answer. In the package's results.json its scores
take the place of the demo's, and ``manifests`` has its evaluation's manifest by model and task. What is left from the
demo without a manifest are the scores of BLIP-2's earlier stages, which do not come along.
"""

import argparse
from pathlib import Path

from isthmus.checkpoint import read_json
from isthmus.comparison.compare import Contestant
from isthmus.evaluation.results import write_json
from isthmus.opening import load
from isthmus.pretrained import FOLDER, names
from isthmus.recipes.scoring import recipe_of, score_model

RESULTS = FOLDER / "results.json"


def score(name: str, out: Path) -> None:
    """One model's scores and manifests into the package's results.json, as soon as it has all of them."""
    place = FOLDER / name
    recipe = recipe_of(place)
    assert recipe is not None  # a shipped model has its demo recipe
    rival = Contestant(name=name, folder=place, recipe=recipe)
    specs = [spec for spec in recipe.evaluate if spec.stage is None]
    found = score_model(load(place), specs, out / name, model_hash=rival.identity, seed=recipe.seed)
    results = read_json(RESULTS)
    for result in found:
        results["models"].setdefault(rival.label(result.task), {}).update(result.scores.to_dict())
        manifests = results.setdefault("manifests", {}).setdefault(name, {})
        manifests[result.task] = read_json(result.folder / "manifest.json")
    write_json(RESULTS, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", help="some of the package's models; left out, all")
    parser.add_argument("--out", type=Path, default=Path("runs/shipped"), help="where answers and scores are kept")
    given = parser.parse_args()
    for name in given.models or names():
        score(name, given.out)
        print(f"{name}: {RESULTS}", flush=True)


if __name__ == "__main__":
    main()
