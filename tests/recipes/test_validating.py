"""Validation inside a stage: what is logged, the best model kept, early stop, exact resume, unknown metrics."""

import copy
import json

import pytest
import torch

from isthmus.checkpoint import load_tensors, read_json
from isthmus.errors import ConfigError
from isthmus.opening import load
from isthmus.recipes import run as run_module
from isthmus.recipes.check import check
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from isthmus.recipes.scoring import own_tasks
from tests.miniature import tree

HELD_OUT = {"kind": "scenes", "form": "conversations", "split": "test", "count": 10, "turns": 3}


def recipe(story, *, steps=4, lr=1e-3, validate=None):
    found = tree("llava", story)
    found["parts"] = {"init": str(story / "llava")}
    stage = found["stages"][1] | {"steps": steps, "train": [{"pattern": "connector.*", "lr": lr}]}
    stage["validate"] = validate or {
        "every": 2,
        "data": [HELD_OUT],
        "tasks": ["vqa"],
        "rows": 8,
        "keep_best": {"metric": "loss"},
    }
    found["stages"] = [stage]
    return found


def lines(folder):
    found = [json.loads(line) for line in (folder / "stages/instruct/metrics.jsonl").read_text().splitlines()]
    for line in found:
        for name in ("seconds", "tokens_per_second", "data_wait"):
            line.pop(name, None)
    return found


def weights(folder):
    return load_tensors(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(t, two[n]) for n, t in one.items())


@pytest.fixture(scope="module")
def validated(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated") / "run"
    train(parse_recipe(recipe(story)), folder, progress=False)
    return folder


def test_loss_and_scores_stand_in_the_metrics(validated):
    found = {line["step"]: line["validation"] for line in lines(validated) if "validation" in line}
    assert sorted(found) == [0, 2, 4]
    assert all({"loss", "vqa.accuracy", "vqa.gain"} <= set(numbers) for numbers in found.values())
    assert found[4]["loss"] != found[0]["loss"]
    assert not list((validated / "stages/instruct").glob("validation-*"))


def test_measuring_changes_nothing_of_the_training(story, validated, tmp_path):
    plain = recipe(story)
    del plain["stages"][0]["validate"]
    train(parse_recipe(plain), tmp_path / "run", progress=False)
    assert same(weights(tmp_path / "run/model"), weights(validated / "model"))


def test_the_best_step_is_kept_and_named_beside_the_last(story, validated):
    best = validated / "stages/instruct/best"
    told = read_json(best / "validation.json")
    found = {line["step"]: line["validation"] for line in lines(validated) if "validation" in line}
    assert told["step"] == min(found, key=lambda step: found[step]["loss"])
    assert told["loss"] == found[told["step"]]["loss"]
    assert load(best).kind == "llava"
    assert [spec.name for spec in own_tasks(best)] == ["vqa"]  # so `isthmus eval` needs no task
    assert load(validated).kind == "llava"


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_resumed_run_validates_and_keeps_alike(story, validated, tmp_path, monkeypatch, stopped):
    real = run_module.train_stage

    def breaks(net, loader, *args, **kwargs):
        class Some:
            position = loader.position

            def steps(self, start):
                for number, item in enumerate(loader.steps(start)):
                    if number == stopped:
                        raise KeyboardInterrupt
                    yield item

        return real(net, Some(), *args, **kwargs)

    monkeypatch.setattr(run_module, "train_stage", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(recipe(story)), tmp_path / "run", progress=False)
    monkeypatch.setattr(run_module, "train_stage", real)
    train(parse_recipe(recipe(story)), tmp_path / "run", progress=False)
    assert lines(tmp_path / "run") == lines(validated)
    for place in ("model", "stages/instruct/best"):
        assert same(weights(tmp_path / "run" / place), weights(validated / place))


def test_without_a_better_model_the_stage_ends_early(story, tmp_path):
    validate = {"every": 1, "data": [HELD_OUT], "rows": 4, "keep_best": {"metric": "loss", "patience": 2}}
    found = recipe(story, steps=50, lr=1.0, validate=validate)  # a rate that only makes it worse
    train(parse_recipe(found), tmp_path / "run", progress=False)
    validations = [line["validation"]["loss"] for line in lines(tmp_path / "run")]
    best = validations.index(min(validations))
    assert len(validations) == best + 3 < 50
    assert read_json(tmp_path / "run/stages/instruct/best/validation.json")["step"] == best


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tasks": ["vqq"]}, "validates by 'vqq', which is no evaluation; did you mean 'vqa'"),
        ({"keep_best": {"metric": "bleu"}}, "'bleu' of keep_best is given by no task"),
        ({"tasks": [], "data": []}, "give data"),
        ({"keep_best": {"metric": "loss", "patience": 0}}, "patience"),
        ({"evry": 3}, "unknown key 'stages.0.validate.evry'; did you mean 'every'"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_read(story, change, fault):
    found = recipe(story)
    found["stages"][0]["validate"] |= change
    with pytest.raises(ConfigError, match=fault):
        parse_recipe(found)


def test_a_metric_that_no_task_gives_is_named_before_a_step(story, tmp_path):
    found = recipe(story)
    found["stages"][0]["validate"]["keep_best"] = {"metric": "vqa.acuracy"}
    with pytest.raises(ConfigError, match=r"'vqa\.acuracy' is given by none of the tasks after step 0.*vqa\.accuracy"):
        train(parse_recipe(found), tmp_path / "run", progress=False)
    assert any("vqa.acuracy" in problem for problem in check(parse_recipe(copy.deepcopy(found))).problems)


def test_adapters_are_kept_with_their_base(story, tmp_path):
    found = recipe(story)
    found["stages"][0]["train"].append({"pattern": "language.*", "lora": {"rank": 2}, "lr": 1e-2})
    train(parse_recipe(found), tmp_path / "run", progress=False)
    best = load(tmp_path / "run/stages/instruct/best")
    assert best.base is not None
    assert best.base.path == str(story / "llava")
