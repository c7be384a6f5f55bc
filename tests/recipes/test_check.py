"""The preflight: samples shown as they are, weights untouched, what is wrong with a recipe found before training."""

import json

import pytest
import torch

from isthmus.data.loader import Loader
from isthmus.data.record import Example, Place, Span
from isthmus.data.wordpiece import train_wordpiece
from isthmus.errors import ConfigError
from isthmus.recipes import check as check_module
from isthmus.recipes.check import check, show
from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe
from tests.cli.test_cli import run
from tests.data.helpers import byte_level, png
from tests.miniature import tree
from tests.narrow import must_be


def test_a_sample_is_shown_in_runs_of_learnt_read_and_picture_tokens():
    tokenizer = byte_level()
    ids, labels = [1, 0, 0, 0, 0, 70, 71, 72, 2], [-100] * 6 + [71, 72, 2]
    places = (Place(0, "lm", 1, 2), Place(1, "lm", 3, 2))
    shown = show(Example("x", "s", {"lm": Span(ids, labels), "text": Span([5, 6])}, places=places), tokenizer, {})
    assert [(p.kind, len(p.tokens)) for p in shown.streams["lm"]] == [
        ("read", 1),
        ("picture", 2),
        ("picture", 2),
        ("read", 1),
        ("learnt", 3),
    ]
    assert [t for p in shown.streams["lm"] for t in p.tokens] == tokenizer.tokens(ids)
    assert [(p.kind, p.tokens) for p in shown.streams["text"]] == [("read", tuple(tokenizer.tokens([5, 6])))]


def test_a_stream_with_a_tokenizer_of_its_own_is_shown_in_its_words():
    own = train_wordpiece(["a red cube"] * 4, 64)
    ids = own.encode("a red cube")
    shown = show(Example("x", "s", {"qformer": Span(ids)}, places=()), byte_level(), {"qformer": own})
    assert [t for p in shown.streams["qformer"] for t in p.tokens] == own.tokens(ids)


def test_a_sound_recipe_is_tried_stage_by_stage_and_left_as_it_was(story, monkeypatch):
    kept = []
    real = check_module.build
    monkeypatch.setattr(check_module, "build", lambda recipe: kept.append(real(recipe)) or kept[0])
    checks = []
    checked = check(parse_recipe(tree("llava", story)), samples=1, on_stage=checks.append)
    assert tuple(checks) == checked.stages
    assert checked.problems == ()
    assert checked.evaluations == {"vqa": 12}
    align, instruct = checked.stages
    assert [s.name for s in instruct.sources] == ["scenes-conversations-train", "scenes-symbols-train"]
    assert [s.samples for s in instruct.sources] == [40, 10]
    assert align.table.trained < instruct.table.trained
    assert align.seconds > 0
    assert align.total == 3 * align.seconds
    pieces = instruct.shown[0].streams["lm"]
    assert [len(p.tokens) for p in pieces if p.kind == "picture"] == [16]
    learnt = [p.tokens for p in pieces if p.kind == "learnt"]
    assert len(learnt) == 3  # one answer a turn, each with its end
    assert all(tokens[-1] == "</s>" for tokens in learnt)
    fresh, used = real(parse_recipe(tree("llava", story))).net.state_dict(), kept[0].net.state_dict()
    assert all(torch.equal(tensor, used[name]) for name, tensor in fresh.items())


def test_data_that_draws_numbers_of_its_own_is_found(monkeypatch):
    real, calls = check_module.make_loader, []

    def fickle(built, spec, **given):
        calls.append(1)
        loader = must_be(Loader, real(built, spec, **given))
        loader.seed += len(calls) > 2  # another order when the interrupted run begins
        return loader

    monkeypatch.setattr(check_module, "make_loader", fickle)
    checked = check(parse_recipe(tree("clip")))
    assert len(checked.problems) == 1
    assert "resumed ended with other bits" in checked.problems[0]


def test_bad_data_and_a_pattern_without_gradient_exit_with_2(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rows = [{"id": i, "image": f"{i}.png", "caption": f"a thing {i}"} for i in range(10)]
    for row in rows[:-1]:
        (tmp_path / "images" / row["image"]).write_bytes(png((row["id"], 0, 0)))
    (tmp_path / "train.json").write_text(json.dumps(rows))
    mine = tree("clip")
    mine["stages"][0]["data"] = [{"kind": "jsonl", "file": "train.json", "image_folder": "images"}]
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))  # JSON is YAML too
    code, out, said = run(monkeypatch, capsys, "check", "mine.yaml", "--json", "facts.json")
    assert code == 2
    for word in (
        "Stage contrast: 10.0% of what it reads is bad, more than the allowed 1.0%; source jsonl:train: ",
        "1 of 10 samples tried are bad, for example: missing image",
    ):
        assert word in " ".join(said.split())
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["stages"][0]["sources"][0]["bad"] == {"missing image": 1}
    code, out, said = run(monkeypatch, capsys, "check", "mine.yaml", "stages.contrast.bad_samples=0.2")
    assert (code, said) == (0, "")
    assert "Ready: isthmus train mine.yaml stages.contrast.bad_samples=0.2" in out
    assert "the same bits" in out
    assert "train: 10 samples" in out  # ":train:" is a name here and no emoji
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.filterwarnings("always::isthmus.errors.IsthmusWarning")
@pytest.mark.parametrize(("weight", "code"), [(0.05, 0), (1.0, 2)])
def test_a_stage_is_judged_as_its_training_is_and_warned_of_once(monkeypatch, capsys, tmp_path, weight, code):
    """Bad samples are counted over all sources of a stage, as often as each is read: here 1 in 210, or 1 in 20."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("train", "torn"):
        rows = [{"id": i, "image": f"{name}{i}.png", "caption": f"a thing {i}", "hint": "unread"} for i in range(10)]
        for row in rows[: -1 if name == "torn" else None]:
            (tmp_path / "images" / str(row["image"])).write_bytes(png((int(str(row["id"])), 0, 0)))
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    mine = tree("clip")
    own = {"kind": "jsonl", "image_folder": "images"}
    mine["stages"][0]["data"] = [own | {"file": "train.json"}, own | {"file": "torn.json", "weight": weight}]
    (tmp_path / "mine.yaml").write_text(json.dumps(mine))
    found, out, said = run(monkeypatch, capsys, "check", "mine.yaml")
    assert found == code, said
    assert "torn: 10 samples" in out
    assert ("5.0% of what it reads is bad" in " ".join(said.split())) == bool(code)
    assert said.count("warning: train: the field `hint` of 10 samples") == 1


def test_bad_evaluation_data_is_a_problem_that_names_the_evaluation(tmp_path):
    rows = [{"id": i, "image": f"{i}.png", "caption": f"a thing {i}"} for i in range(100)]
    for row in rows[2:]:
        (tmp_path / row["image"]).write_bytes(png((row["id"], 0, 0)))
    (tmp_path / "test.json").write_text(json.dumps(rows))
    mine = tree("clip")
    data = {"kind": "jsonl", "file": str(tmp_path / "test.json"), "image_folder": str(tmp_path)}
    mine["evaluate"] = [
        {"name": name, "task": "retrieval", "data": data, "bad_samples": share}
        for name, share in [("strict", 0.01), ("lax", 0.02)]
    ]
    checked = check(parse_recipe(mine))
    assert checked.evaluations == {"lax": 98}
    (problem,) = checked.problems
    assert problem.startswith("Evaluation strict: 2 of 100 samples are bad")
    assert str(tmp_path / "0.png") in problem


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"task": "retreival"}, "no task 'retreival'; did you mean 'retrieval'"),
        ({"options": {"prefx": "a"}}, r"Task 'retrieval' \(retrieval\) has no option 'prefx'"),
        ({"task": "linear-probe"}, "a linear probe needs `train`"),
    ],
)
def test_a_task_that_is_none_is_refused_before_the_first_step(tmp_path, own, message):
    mine = tree("clip")
    mine["evaluate"][0] |= own
    with pytest.raises(ConfigError, match=message):
        check(parse_recipe(mine), on_stage=lambda stage: pytest.fail(f"stage {stage.name} was tried"))
    with pytest.raises(ConfigError, match=message):
        train(parse_recipe(mine), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_stage_of_mostly_text_is_tried_with_a_picture_too(story, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    rows = [{"id": f"t{n}", "conversations": turns} for n in range(30)]
    seen = [{"from": "human", "value": "and <image>?"}, turns[1]]
    rows.append({"id": "p", "image": "a.png", "conversations": seen})
    (tmp_path / "mostly.json").write_text(json.dumps(rows))
    mine = tree("llava", story)
    mine["stages"], mine["evaluate"] = mine["stages"][1:], []
    mine["stages"][0] |= {"data": [{"kind": "llava", "file": str(tmp_path / "mostly.json")}], "batch_size": 1}
    checked = check(parse_recipe(mine), samples=2)
    assert checked.problems == ()
    text, picture = (sample.streams["lm"] for sample in checked.stages[0].shown)
    assert [p.kind for p in text] == ["read", "learnt"]
    assert [p.kind for p in picture] == ["read", "picture", "read", "learnt"], "the picture's place is shown"
