"""Losses of a run's folder as a page draws them."""

import json

from isthmus.comparison.curves import loss_curves
from isthmus.recipes.schema import read_recipe


def test_stages_follow_each_other(tmp_path):
    recipe = read_recipe("llava-tiny")
    for name, steps in (("align", (5, 10)), ("find", (5, 7))):  # the stage between them has no line yet
        folder = tmp_path / "stages" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": {"lm": 1.0}, "seconds": 0.1}) for step in steps]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    curves = loss_curves(tmp_path, recipe)
    assert [step for step, _ in curves["align"]] == [5, 10]
    assert [step for step, _ in curves["find"]] == [15, 17]
