"""Comparison recipes: what an arm takes from the shared, from another arm and from the budget; what is refused."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from isthmus.comparison.recipe import parse_comparison
from isthmus.errors import ConfigError
from isthmus.recipes.schema import read_recipe, read_tree, shipped, yaml_value
from tests.narrow import must_be, there

OPEN = [{"pattern": "connector.*", "lr": 1e-3}]
CAPTIONS = [{"kind": "scenes", "form": "captions", "count": 40}]
TREE: dict[str, Any] = {
    "kind": "compare",
    "parts": {"vision": "runs/demo/clip", "language": "runs/demo/lm"},
    "budget": {"samples": 120},
    "stages": [
        {"name": "describe", "share": 1, "batch_size": 4, "data": CAPTIONS},
        {"name": "instruct", "share": 3, "batch_size": 6, "data": CAPTIONS},
    ],
    "evaluate": [{"name": "vqa", "task": "vqa", "data": {"kind": "scenes", "form": "questions", "count": 12}}],
    "arms": [
        {
            "name": "one",
            "about": "the first",
            "model": "llava",
            "config": {"projector": "linear", "feature_layer": -2},
            "shots": [0, 2],
            "stages": {"describe": {"train": OPEN, "template": "plain"}, "instruct": {"train": OPEN}},
        },
        {"name": "other", "like": "one", "config": {"projector": "mlp2x_gelu"}, "stages": {"describe": None}},
    ],
    "statements": [{"text": "more is better", "arms": ["one", "other"]}],
}


def tree(**changes):
    return copy.deepcopy(TREE) | changes


def test_an_arm_is_an_ordinary_recipe_of_what_is_shared_and_its_own():
    recipe = parse_comparison(tree()).recipe("one", 7)
    assert (recipe.model, recipe.seed, recipe.parts) == ("llava", 7, TREE["parts"])
    describe, instruct = recipe.stages
    assert (describe.template, describe.batch_size, instruct.template) == ("plain", 4, None)
    assert (describe.stage.steps, instruct.stage.steps) == (8, 15)
    assert describe.data == CAPTIONS
    assert not recipe.evaluate  # the comparison asks


def test_like_takes_over_all_but_the_words_and_the_shots():
    plan = parse_comparison(tree())
    other = plan.resolved("other")
    assert other.config == {"projector": "mlp2x_gelu", "feature_layer": -2}
    assert (other.about, other.shots) == ("", [])


def test_a_stage_left_out_leaves_its_share_to_the_others():
    plan = parse_comparison(tree())
    assert plan.shares("one") == {"describe": 0.25, "instruct": 0.75}
    (stage,) = plan.recipe("other", 0).stages
    assert (stage.name, stage.stage.steps) == ("instruct", 20)


def test_every_arm_reads_the_same_number_of_rows():
    changed = tree(budget={"samples": 1001})
    plan = parse_comparison(changed)
    for arm in ("one", "other"):
        rows = sum(there(s.stage.steps) * there(s.batch_size) for s in plan.recipe(arm, 0).stages)
        assert abs(rows - 1001) < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"samples": 10, "flops": 1e9}}, "exactly one of samples"),
        ({"armz": []}, "unknown key 'armz'; did you mean 'arms'"),
        ({"statements": [{"text": "x", "arms": ["one", "othr"]}]}, "no arm 'othr'; did you mean 'other'"),
        ({"arms": [TREE["arms"][1], TREE["arms"][0]]}, "no arm 'one' before it"),
        ({"arms": [TREE["arms"][0], TREE["arms"][0]]}, "names of arms must differ"),
        ({"stages": TREE["stages"][1:]}, "stage 'describe' has no data"),
        ({"evaluate": [{**TREE["evaluate"][0], "stage": "describe"}]}, "take `stage` out"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_comparison(tree(**changes))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"colour": "red"}, "unknown key 'arms.0.colour'"),
        ({"stages": {"describe": {"train": OPEN, "steps": 3}}}, "gets its steps from the budget"),
        ({"stages": {"describe": {"train": OPEN, "share": 0}}}, "share of stage 'describe'"),
        ({"stages": {"describe": {"train": OPEN, "tempalte": "plain"}}}, "unknown key .*; did you mean 'template'"),
        ({"model": None}, "has no model"),
        ({"name": "../one"}, "pattern"),
    ],
)
def test_an_arm_that_does_not_fit_is_said(arm, message):
    changed = tree(statements=[])
    changed["arms"][0] |= arm
    with pytest.raises(ConfigError, match=message):
        parse_comparison(changed)


@pytest.mark.parametrize("name", shipped("comparisons"))
def test_every_shipped_comparison_parses_with_all_its_arms(name):
    variables = must_be(dict, read_tree(name, to_show=True).get("variables", {}))
    needed = [f"{variable}=there" for variable in variables]
    plan = parse_comparison(read_tree(name, needed), name)
    assert {a for s in plan.statements for a in s.arms} == {a.name for a in plan.arms}
    for arm in plan.arms:
        rows = sum(there(s.stage.steps) * there(s.batch_size) for s in plan.recipe(arm.name, 0).stages)
        assert abs(rows / there(plan.budget.samples) - 1) < 0.01


def test_the_recipe_of_the_docs_parses(monkeypatch):
    project = Path(__file__).parents[2]
    monkeypatch.chdir(project / "examples")  # where my_system.py is
    page = (project / "docs" / "comparison.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    plan = parse_comparison(must_be(dict, yaml_value(block, "docs/comparison.md")))
    assert [s.name for s in plan.recipe("captions", 0).stages] == ["describe"]


def test_train_sends_a_comparison_to_its_own_command():
    with pytest.raises(ConfigError, match="isthmus compare compare-tiny"):
        read_recipe("compare-tiny")
