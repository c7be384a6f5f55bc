"""Runs: stages hand over, a finished run is loaded, an interrupted one goes on bit for bit, others are refused."""

import json
import shutil

import pytest
import torch

from isthmus.checkpoint import load_tensors
from isthmus.errors import CheckpointError, ConfigError, DataError, IsthmusError, StageError
from isthmus.opening import load
from isthmus.recipes import run as run_module
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from isthmus.training.lock import RunBusyError, RunLock
from tests.miniature import tree


def weights(folder):
    return load_tensors(folder / "model" / "model.safetensors")


def losses(folder, stage):
    lines = (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_frozen_parts_come_through_every_stage_bit_for_bit(story):
    clip, lm, llava = (weights(story / name) for name in ("clip", "lm", "llava"))
    vision = {n: t for n, t in llava.items() if n.startswith("vision.")}
    assert vision
    assert all(torch.equal(t, clip[n]) for n, t in vision.items())
    align = load_tensors(story / "llava" / "stages" / "align" / "trained" / "trained.safetensors")
    assert set(align) == {n for n in llava if n.startswith("connector.")}
    assert any(not torch.equal(t, lm[n]) for n, t in llava.items() if n.startswith("language."))


@pytest.mark.parametrize("stopped_in", ["align", "instruct"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(story, tmp_path, monkeypatch, stopped_in):
    recipe = parse_recipe(tree("llava", story))
    folder = tmp_path / "llava"
    real, steps = run_module.train_stage, []

    def breaks(net, loader, stage, *args, **kwargs):
        class Two:
            position = loader.position

            def steps(self, start):
                for number, item in enumerate(loader.steps(start)):
                    if stage.name == stopped_in and number == 2:
                        raise KeyboardInterrupt
                    steps.append(number)
                    yield item

        return real(net, Two(), stage, *args, **kwargs)

    monkeypatch.setattr(run_module, "train_stage", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, progress=False)
    assert not (folder / "model").exists()
    monkeypatch.setattr(run_module, "train_stage", real)
    train(recipe, folder, progress=False)
    for stage in ("align", "instruct"):
        assert losses(folder, stage) == losses(story / "llava", stage)
    once, again = weights(story / "llava"), weights(folder)
    assert once.keys() == again.keys()
    assert all(torch.equal(once[n], again[n]) for n in once)


def test_a_finished_run_is_loaded_not_run_again(story, monkeypatch):
    monkeypatch.setattr(run_module, "build", None)
    assert train(parse_recipe(tree("clip")), story / "clip", progress=False).kind == "clip"


def test_another_recipe_or_part_is_refused(story, tmp_path):
    shutil.copytree(story / "clip", tmp_path / "clip")
    changed = tree("clip")
    changed["stages"][0]["steps"] = 4
    with pytest.raises(ConfigError, match=r"recipe\.stages\.0\.stage\.steps was 3, now 4"):
        train(parse_recipe(changed), tmp_path / "clip", progress=False)
    missing = tree("llava", tmp_path)
    with pytest.raises(CheckpointError, match="lm is not a model folder"):
        train(parse_recipe(missing), tmp_path / "llava", progress=False)


def test_other_words_about_a_recipe_are_no_other_recipe(story):
    own = tree("lm", story)
    assert train(parse_recipe({**own, "about": "told anew"}), story / "lm", progress=False).kind == "lm"


def test_a_second_process_is_refused(tmp_path):
    with RunLock(tmp_path), pytest.raises(RunBusyError, match="in use by process"):
        train(parse_recipe(tree("clip")), tmp_path, progress=False)


def test_an_unfinished_run_says_so_when_loaded(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not finished"):
        load(tmp_path)


def test_a_damaged_model_is_refused(story, tmp_path):
    shutil.copytree(story / "lm", tmp_path / "lm")
    file = tmp_path / "lm" / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(tmp_path / "lm")


def test_bad_parts_patterns_and_tokenizers_are_named(story, tmp_path):
    for change, words in [
        ({"parts": {"visoin": "x"}}, "did you mean 'vision'"),
        ({"tokenizer": {"folder": "x"}}, "comes with the part 'language'"),
        ({"parts": {"vision": str(story / "lm"), "language": str(story / "lm")}}, "vision"),
    ]:
        with pytest.raises((ConfigError, CheckpointError), match=words):
            train(parse_recipe(tree("llava", story) | change), tmp_path / words[:6].strip("'"), progress=False)
    stages = [stage | {"processor": {"p_next": 0.5}} for stage in tree("clip")["stages"]]
    with pytest.raises(ConfigError, match="the processor of a clip stage has no options"):
        train(parse_recipe(tree("clip") | {"stages": stages}), tmp_path / "options", progress=False)


GONE = {"kind": "llava", "file": "gone.json"}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"validate": {"every": 1, "data": [GONE]}}, r"gone\.json"),
        ({"validate": {"every": 1, "tasks": ["vqa"]}}, r"gone\.json"),
        ({"train": [{"pattern": "conector.*", "lr": 1.0}]}, "'connector"),
        ({"feature_cache": {}, "train": [{"pattern": "*", "lr": 1.0}]}, "'instruct' trains vision"),
    ],
)
def test_what_is_wrong_with_the_last_stage_shows_before_the_first_step(story, tmp_path, monkeypatch, own, message):
    mine = tree("llava", story)
    mine["stages"][1] |= own
    mine["evaluate"][0]["data"] = GONE
    monkeypatch.setattr(run_module, "train_stage", lambda *args, **kwargs: pytest.fail("a step was made"))
    with pytest.raises(IsthmusError, match=message):
        train(parse_recipe(mine), tmp_path, progress=False)


def test_changed_data_is_refused_on_resume_for_all_stages_at_once(story, tmp_path, monkeypatch):
    rows = [{"text": f"the cube number {i} is red"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = tree("lm") | {"tokenizer": tree("lm")["tokenizer"]}
    spec["stages"][0] |= {"data": [{"kind": "jsonl", "file": str(file)}], "template": "document", "steps": 5}
    recipe, folder, real = parse_recipe(spec), tmp_path / "run", run_module.train_stage

    def stops(*args, **kwargs):
        real(*args, **kwargs)
        raise KeyboardInterrupt  # after the stage's last checkpoint, before it is handed over

    monkeypatch.setattr(run_module, "train_stage", stops)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, progress=False)
    monkeypatch.setattr(run_module, "train_stage", real)
    file.write_text(file.read_text().replace("number 7 is red", "number 7 is tan"))
    with pytest.raises(StageError, match=r"begun with data 0 \(jsonl:rows\) = '40 samples, sha256"):
        train(recipe, folder, progress=False)
    file.write_text(file.read_text().replace("number 7 is tan", "number 7 is red"))
    assert train(recipe, folder, progress=False).kind == "lm"

    late = tree("llava", story)
    late["stages"][1]["data"] = [{"kind": "jsonl", "file": str(tmp_path / "gone.jsonl")}]
    with pytest.raises(DataError, match=r"no such file: .*gone\.jsonl"):
        train(parse_recipe(late), tmp_path / "llava", progress=False)
    assert not list((tmp_path / "llava").glob("stages/align/checkpoints"))


def test_samples_mended_before_anything_was_saved_count_no_more(tmp_path):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"text": f"the cube number {i} is red" if i % 20 else ""} for i in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = tree("lm")
    spec["stages"][0] |= {"data": [{"kind": "jsonl", "file": str(file)}], "template": "document"}
    spec["stages"][0] |= {"steps": 1, "batch_size": 120}
    with pytest.raises(DataError, match="6 of 120 samples are bad"):
        train(parse_recipe(spec), folder, progress=False)
    quarantine = folder / "stages" / "pretrain" / "quarantine.jsonl"
    assert len(quarantine.read_text().splitlines()) == 6
    file.write_text("".join(json.dumps(row if row["text"] else {"text": "mended"}) + "\n" for row in rows[1:]))
    train(parse_recipe(spec), folder, progress=False)
    assert not quarantine.exists()
