"""The demo from nothing, on miniature recipes: five models, one comparison, and a second run that trains nothing."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from isthmus.demo import story as demo
from isthmus.errors import ConfigError
from isthmus.recipes.schema import read_recipe
from isthmus.serving.run_facts import scores, training
from tests.miniature import tree
from tests.recipes.test_blip2 import TREE as BLIP2
from tests.recipes.test_flamingo import TREE as FLAMINGO

PARTS = {"vision": "runs/demo/clip", "language": "runs/demo/lm"}


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    trees = {name: tree(name) for name in ("clip", "lm", "llava")}
    trees |= {"flamingo": copy.deepcopy(FLAMINGO) | {"parts": PARTS}, "blip2": copy.deepcopy(BLIP2) | {"parts": PARTS}}
    story = {}
    for name in demo.STORY:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(trees[name]))
        story[name] = str(path)
    monkeypatch.setattr(demo, "STORY", story)
    return tmp_path / "demo"


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_whole_story(out, capsys, monkeypatch, jobs):
    """One training after another in this process, or two at once in their own; then once more, which finds all done."""
    pages = []
    write = demo.write_report
    monkeypatch.setattr(demo, "write_report", lambda file, report: pages.append(report) or write(file, report))
    demo.run_demo(out, seed=3, jobs=jobs, page="http://127.0.0.1:8000/")
    said = capsys.readouterr().out
    assert f"isthmus chat {out / 'llava'}" in " ".join(said.split())
    assert said.rstrip().endswith(demo.page_command(out))
    assert len(list((out / "pictures").glob("*.png"))) == 200
    if jobs > 1:
        assert said.index("lm is done") < said.index("blip2 begins") < said.index("blip2 is done")
        assert (out / "clip" / "eval.log").is_file()
    # A page as soon as one model is scored, without what a busy machine would tell wrongly.
    assert "Not yet scored: " in pages[0].summary
    assert "Not yet scored: " not in pages[-1].summary
    facts = json.loads((out / "results.json").read_text())
    assert facts["seed"] == 3
    assert {"accuracy", "blind", "shuffled", "prior", "gain"} <= facts["models"]["llava"].keys()
    assert "recall_at_1" in facts["models"]["clip"]
    assert facts["seconds"].keys() == {"clip", "lm", "flamingo", "blip2", "llava"}
    page = (out / "report.html").read_text()
    assert f"isthmus serve {out / 'llava'} " in page
    assert '<a href="http://127.0.0.1:8000/#models=llava,blip2,flamingo">' in page
    for word in ("What they cost", "llava − blip2", "blip2: loss by stage", "What was trained"):
        assert word in page, word
    for name in demo.STORY:  # what the browser page tells of each
        stages = training(out / name)
        assert all(stage["steps"] and stage["parts"] and stage["curves"] and not stage["problem"] for stage in stages)
        assert not any(table["problem"] for table in scores(out / name))
    weights = {f: f.read_bytes() for f in out.glob("*/model/model.safetensors")}
    outputs = {f: f.stat().st_mtime_ns for f in out.glob("*/eval/*/outputs.jsonl")}
    assert len(weights) == 5
    demo.run_demo(out, seed=3, jobs=1)
    assert all(f.read_bytes() == data for f, data in weights.items())
    assert all(f.stat().st_mtime_ns == when for f, when in outputs.items())


def test_a_share_of_the_steps(tmp_path):
    """What the demo runs beside it is told the same share as what it reads back here."""
    whole = demo.demo_recipe("flamingo-tiny", tmp_path, 0)
    half = demo.demo_recipe("flamingo-tiny", tmp_path, 0, 0.5)
    assert [s.stage.steps for s in half.stages] == [(s.stage.steps or 0) // 2 for s in whole.stages]
    assert [s.stage.warmup for s in half.stages] == [s.stage.warmup // 2 for s in whole.stages]
    assert demo.demo_recipe("flamingo-tiny", tmp_path, 0, 1.0) == whole
    assert all(s.stage.steps == 2 for s in demo.demo_recipe("clip-tiny", tmp_path, 0, 1e-4).stages)
    (job,) = [j for j in demo._jobs({"flamingo": half}, tmp_path, 0.5) if "train" in j.words]
    told = read_recipe(job.words[1], [w for w in job.words if "=" in w])
    assert told == half
    assert not any(".steps=" in w for j in demo._jobs({"flamingo": whole}, tmp_path, 1.0) for w in j.words)


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_a_budget_that_cannot_be(tmp_path, budget):
    with pytest.raises(ConfigError, match="share of the recipes' steps"):
        demo.run_demo(tmp_path, budget=budget)
