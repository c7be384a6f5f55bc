"""What is said of a recipe before it runs: counts of steps, memory for the backward pass, times in words."""

import copy

import pytest
import torch

from isthmus.recipes.build import build
from isthmus.recipes.facts import duration, stage_cost, steps_of
from isthmus.recipes.schema import parse_recipe
from tests.miniature import tree


def cost(story, name, **changes):
    spec = tree(name, story)
    spec["stages"][-1] |= changes
    recipe = parse_recipe(spec)
    built = build(recipe)
    before = copy.deepcopy(built.net.state_dict())
    found = stage_cost(built, recipe.stages[-1])
    assert all(torch.equal(t, before[n]) for n, t in built.net.state_dict().items())
    return found


def test_activations_grow_with_the_rows_and_count_one_micro_batch(story):
    four, eight = cost(story, "clip", batch_size=4), cost(story, "clip", batch_size=8)
    assert eight.activations == pytest.approx(2 * four.activations, rel=0.15)
    assert eight.tokens > 1.5 * four.tokens
    assert four.total == 3 * four.seconds > 0
    split = cost(story, "clip", batch_size=8, accumulate=2)
    assert split.activations < 0.6 * eight.activations
    assert split.tokens == eight.tokens


def test_a_frozen_part_keeps_nothing_for_its_backward_pass(story):
    closed = cost(story, "llava", train=[{"pattern": "connector.*", "lr": 1e-3}])
    opened = cost(story, "llava", train=[{"pattern": "*", "lr": 1e-3}])
    assert closed.activations < opened.activations


def test_steps_of_a_stage():
    spec = parse_recipe(tree("clip")).stages[0]
    assert steps_of(spec) == 3
    by_samples = tree("clip")
    del by_samples["stages"][0]["steps"]
    by_samples["stages"][0]["samples"] = 20
    assert steps_of(parse_recipe(by_samples).stages[0]) == 5


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "not known"), (40.2, "40 s"), (720, "12 min"), (3 * 3600 + 1800, "3.5 h")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
