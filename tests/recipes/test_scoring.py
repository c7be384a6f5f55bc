"""From an evaluation as a recipe names it to tasks: shots, what a model must be able to do, what is left out."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image as PilImage

from isthmus.data.quarantine import Quarantine
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import LinearProbeTask
from isthmus.evaluation.protocols import Answers, Embeds, HasVisionFeatures, MatchesPairs, Weighs
from isthmus.interop.hub import model_hash
from isthmus.opening import load
from isthmus.recipes import scoring
from isthmus.recipes.schema import EvalSpec, read_tree, shipped
from isthmus.recipes.scoring import TASKS, check_tasks, make_task, needs, score_model, with_shots
from isthmus.user_code import pin
from tests.narrow import must_be


def test_each_number_of_shots_is_a_task_of_its_own():
    specs = [EvalSpec(name="vqa", task="vqa", data={}), EvalSpec(name="r", task="retrieval", data={})]
    found = with_shots(specs, [0, 8], "rices")
    assert [s.name for s in found] == ["vqa-0-shots", "vqa-8-shots", "r"]
    assert found[1].options == {"shots": 8, "select": "rices"}
    assert with_shots(specs, [], "random") == specs


@pytest.mark.parametrize(
    ("task", "options", "protocol"),
    [
        ("vqa", {}, Answers),
        ("caption", {}, Answers),
        ("choice-likelihood", {}, Weighs),
        ("retrieval", {}, Embeds),
        ("retrieval", {"rerank": 4}, MatchesPairs),
        ("zero-shot", {}, Embeds),
        ("linear-probe", {}, HasVisionFeatures),
    ],
)
def test_what_a_task_needs_is_known_without_its_data(task, options, protocol):
    assert needs(EvalSpec(name="x", task=task, data={}, options=options)) is protocol


@pytest.mark.parametrize("name", sorted(TASKS))
def test_what_a_task_needs_is_what_the_task_says(name):
    data = {"kind": "scenes", "form": "captions" if name in ("caption", "retrieval", "matching") else "questions"}
    judge = {"judge": {"url": "http://127.0.0.1:9", "model": "none"}} if name == "llava-bench" else {}
    spec = EvalSpec(name="x", task=name, data=data | {"count": 4}, train=data | {"count": 4}, options=judge)
    assert make_task(spec).needs is needs(spec)


def test_a_broken_picture_is_left_out_of_an_evaluation_and_counted(story, tmp_path):
    rows = []
    for number in range(3):
        PilImage.effect_noise((64, 64), 40 + number).convert("RGB").save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "noise"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    data = {"kind": "llava", "file": str(tmp_path / "data.json"), "image_folder": str(tmp_path)}
    spec = EvalSpec(name="vqa", task="vqa", data=data, options={"decoding": {"max_new_tokens": 2}})
    model = load(story / "llava")
    for _ in range(2):
        (result,) = score_model(model, [spec], tmp_path / "out", model_hash="x")
        assert (result.left_out, [r["id"] for r in result.rows]) == (1, ["data/0", "data/2"])
    lines = (tmp_path / "out" / "vqa" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["data/1"]
    many = spec.model_copy(update={"name": "many", "data": data | {"file": str(tmp_path / "many.json")}})
    (tmp_path / "many.json").write_text(json.dumps([r | {"id": f"{n} {r['id']}"} for n in range(40) for r in rows]))
    told = []
    with pytest.raises(DataError, match="40 of 120 samples are bad"):
        score_model(model, [spec, many], tmp_path / "many", model_hash="x", done=told.append)
    assert [r.left_out for r in told] == [1]  # what went well is told before the next one fails


def questions(tmp_path, name, answers):
    """A source of one question a row about a picture of its own."""
    rows = []
    for number, answer in enumerate(answers):
        PilImage.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / name).write_text(json.dumps(rows))
    return {"kind": "llava", "file": str(tmp_path / name), "image_folder": str(tmp_path)}


def test_an_empty_answer_is_left_out_of_questions_and_of_their_prior(story, tmp_path):
    data = questions(tmp_path, "data.json", ["noise", "", "noise"])
    train = questions(tmp_path, "train.json", ["", "snow"]) | {"image_folder": str(tmp_path / "bare")}
    (tmp_path / "bare").mkdir()  # a prior needs no pictures
    spec = EvalSpec(name="vqa", task="vqa", data=data, train=train, options={"decoding": {"max_new_tokens": 2}})
    (result,) = score_model(load(story / "llava"), [spec], tmp_path / "out", model_hash="x")
    assert (result.left_out, [r["id"] for r in result.rows]) == (1, ["data/0", "data/2"])
    assert {r["prior"] for r in result.rows} == {"snow"}
    for file, left in [("quarantine.jsonl", "data/1"), ("quarantine-train.jsonl", "train/0")]:
        (line,) = (tmp_path / "out" / "vqa" / file).read_text().splitlines()
        assert json.loads(line)["id"] == left


def test_what_was_mended_after_a_refusal_is_counted_no_more(story, tmp_path):
    data = questions(tmp_path, "data.json", ["noise"] * 4)
    train = questions(tmp_path, "train.json", ["", ""])
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    spec = EvalSpec(name="vqa", task="vqa", data=data, train=train, options={"decoding": {"max_new_tokens": 2}})
    with pytest.raises(DataError, match="No sample"):
        score_model(load(story / "llava"), [spec], tmp_path / "out", model_hash="x")
    assert len(list((tmp_path / "out" / "vqa").glob("quarantine*"))) == 2
    questions(tmp_path, "data.json", ["noise"] * 3 + [""])  # the pictures anew
    questions(tmp_path, "train.json", ["snow", "snow"])
    (result,) = score_model(load(story / "llava"), [spec], tmp_path / "out", model_hash="x")
    lines = (tmp_path / "out" / "vqa" / "quarantine.jsonl").read_text().splitlines()
    assert (result.left_out, [json.loads(line)["id"] for line in lines]) == (1, ["data/3"])
    assert not (tmp_path / "out" / "vqa" / "quarantine-train.jsonl").exists()


def test_broken_training_pictures_are_left_out_of_a_probe(tmp_path):
    data = questions(tmp_path, "data.json", ["noise"] * 4)
    (tmp_path / "1.png").write_bytes(b"no picture")
    scenes = {"kind": "scenes", "form": "questions", "count": 4}
    spec = EvalSpec(name="probe", task="linear-probe", data=scenes, train=data)
    assert len(must_be(LinearProbeTask, make_task(spec, quarantine=Quarantine())).train) == 3
    with pytest.raises(DataError, match="1 of 4 samples are bad"):
        make_task(spec, quarantine=Quarantine(after=4))


@pytest.mark.parametrize("name", [*shipped(), *shipped("comparisons")])
def test_the_tasks_of_every_shipped_recipe_pass_the_check(name):
    written: dict[str, Any] = read_tree(name, to_show=True)
    specs = [EvalSpec.model_validate(spec) for spec in written.get("evaluate", [])]
    check_tasks(specs, written.get("prompts", {}))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_passes_the_check_and_no_misspelt_option_does(name):
    judge = {"judge": {"url": "http://127.0.0.1:9", "model": "none"}} if name == "llava-bench" else {}
    spec = EvalSpec(name="x", task=name, data={}, train={}, options=judge)
    check_tasks([spec], {})
    with pytest.raises(ConfigError, match=f"Task 'x' \\({name}\\) has no option 'contrls'"):
        check_tasks([spec.model_copy(update={"options": judge | {"contrls": []}})], {})


def test_captions_are_checked_with_the_models_own_prompt():
    spec = EvalSpec(name="c", task="caption", data={}, options={"controls": ["blind"]})
    check_tasks([spec], {"caption": "describe it."})
    with pytest.raises(ConfigError, match="without a prompt nothing is left"):
        check_tasks([spec], {})


OWN_TASK = """
from dataclasses import dataclass
from isthmus.evaluation.tasks import Task

@dataclass(frozen=True, kw_only=True)
class Mine(Task):
    name: str
    records: object
    seed: int = 0
    most: int = 1

    def __post_init__(self):
        raise AssertionError("made without data")

    def rows(self, model, done, *, chunk):
        yield []

    def score(self, rows):
        return None
"""


def test_a_users_task_is_checked_by_its_options_and_not_made(tmp_path):
    (tmp_path / "mine.py").write_text(OWN_TASK)
    spec = EvalSpec(name="m", task=pin(f"{tmp_path / 'mine.py'}:Mine"), data={}, options={"most": 2})
    check_tasks([spec], {})
    for own, message in [
        ({"options": {"mots": 2}}, "unknown option 'mots'; did you mean 'most'"),
        ({"options": {"most": "two"}}, "expected int"),
        ({"train": {"kind": "scenes"}}, "takes no training data"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_tasks([spec.model_copy(update=own)], {})


def test_a_later_tasks_option_is_refused_before_the_first_is_scored(story, tmp_path):
    data = {"kind": "scenes", "form": "captions", "split": "test", "count": 4}
    good = EvalSpec(name="good", task="retrieval", data=data)
    bad = EvalSpec(name="bad", task="retrieval", data=data, options={"prefx": "a"})
    with pytest.raises(ConfigError, match=r"Task 'bad' \(retrieval\) has no option 'prefx'"):
        score_model(load(story / "clip"), [good, bad], tmp_path, model_hash="x")
    assert not list(tmp_path.iterdir())


def test_zero_shot_classes_are_those_the_model_picks_itself(story, tmp_path, monkeypatch):
    model = load(story / "clip")
    model.net.config = replace(model.net.config, similarity="euclidean")
    embed = model.net.embed_texts  # words of unlike length, so that cosines pick other classes
    model.net.embed_texts = lambda tokens: embed(tokens) * tokens.lengths[:, None].remainder(5).add(1)
    names, templates = ["a cube", "some spheres", "one green thing", "a picture"], ["a {}.", "{} here"]
    source = open_source({"kind": "scenes", "form": "captions", "count": 6})
    records = [replace(source[i], meta={"class": names[0]}) for i in range(6)]
    monkeypatch.setattr(scoring, "open_source", lambda data: records)
    picked = {}
    for name, options in [("own", {}), ("cosine", {"similarity": "cosine"})]:
        options |= {"classes": names, "templates": templates}
        spec = EvalSpec(name=name, task="zero-shot", data={}, options=options)
        (result,) = score_model(model, [spec], tmp_path, model_hash="x")
        picked[name] = [row["answers"][0] for row in result.rows]
    assert picked["own"] == [next(iter(model.classify(r.images[0], names, templates=templates))) for r in records]
    assert picked["cosine"] != picked["own"]


def test_matching_ranks_by_the_similarity_that_was_trained(story, tmp_path):
    model = load(story / "clip")
    model.net.config = replace(model.net.config, similarity="dot")
    data = {"kind": "scenes", "form": "captions", "count": 4}
    spec = EvalSpec(name="fits", task="matching", data=data)
    (result,) = score_model(model, [spec], tmp_path, model_hash="x")
    source = open_source(data)
    own = [row for row in result.rows if row["label"]]
    for row, record in zip(own, (source[i] for i in range(4)), strict=True):
        expected = float(model.similarity([record.images[0]], [row["caption"]]))
        assert row["score"] == pytest.approx(expected, rel=1e-4)
        unit = torch.nn.functional.normalize
        cosine = (unit(model.embed_images([record.images[0]])) * unit(model.embed_texts([row["caption"]]))).sum()
        assert row["score"] != pytest.approx(float(cosine), rel=1e-2)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.pt", "x.pth"])
def test_other_weights_are_another_model(tmp_path, name):
    """Whatever they are called; else the answers of one would pass for those of the other."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / name).write_bytes(bytes([number]))
    one, two = (model_hash(tmp_path / str(n)) for n in range(2))
    assert one
    assert two
    assert one != two
    assert model_hash(tmp_path / "0" / name) == one
    assert model_hash(tmp_path / "nothing") == ""
