"""The demo's end: models trained before are taken as they are, asked, and put side by side in one report."""

import json
import shutil

import pytest

from isthmus.recipes import demo
from isthmus.recipes.schema import parse_recipe


@pytest.fixture(scope="module")
def out(rivals, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    recipes = {}
    for name, run in rivals.items():
        shutil.copytree(run, folder / name)
        tree = json.loads((run / "run.json").read_text())["recipe"]
        recipes[demo.STORY[name]] = parse_recipe(tree)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "demo_recipe", lambda name, out, seed: recipes[name])
        demo.run_demo(folder, serve=False)
    return folder


def test_results_keep_their_keys(out):
    results = json.loads((out / "results.json").read_text())
    assert {"accuracy", "blind", "shuffled", "prior", "gain"} <= results["models"]["llava"].keys()
    assert "recall_at_1" in results["models"]["clip"]
    assert {"lm", "blip2"} <= results["models"].keys()
    assert results["seed"] == 0
    assert set(results["seconds"]) == set(demo.STORY)


def test_the_report_is_the_comparison(out):
    page = (out / "report.html").read_text()
    for word in ("What they cost", "not equal", "flamingo: loss by stage", "picture → text", 'class="look"'):
        assert word in page
    assert (out / "scores.csv").is_file()
    assert (out / "picture.png").is_file()
