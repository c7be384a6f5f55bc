"""A comparison recipe run in miniature: arms, seeds, resume, redrawn parts, a connector of one's own, statements."""

import copy
import csv
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.checkpoint import read_json
from isthmus.comparison import contest
from isthmus.comparison.contest import finished, recipe_of_arm, run_contest
from isthmus.comparison.recipe import parse_comparison
from isthmus.errors import ConfigError, DataError, IsthmusError
from isthmus.opening import load
from isthmus.recipes import run as run_module
from isthmus.recipes.run import make_loader
from tests.cli.test_cli import run
from tests.comparison.test_compare import yes_or_no
from tests.comparison.test_recipe import CAPTIONS, OPEN

KEYS = {"precision": "fp32", "log_every": 1, "save_every": 1}
TREE: dict[str, Any] = {
    "kind": "compare",
    "seeds": [0, 1],
    "budget": {"samples": 16},
    "stages": [KEYS | {"name": "describe", "batch_size": 4, "data": CAPTIONS}],
    "evaluate": [
        {
            "name": "vqa",
            "task": "vqa",
            "options": {"decoding": {"max_new_tokens": 2}},
            "data": {"kind": "scenes", "form": "questions", "split": "test", "count": 8},
            "train": {"kind": "scenes", "form": "questions", "count": 30},
        }
    ],
    "arms": [
        {
            "name": "llava",
            "model": "llava",
            "stages": {"describe": {"template": "vicuna_bare", "train": OPEN}},
            "shots": [0, 2],
        },
        {"name": "blind", "like": "llava", "redraw": ["vision"]},
        {
            "name": "flamingo",
            "model": "flamingo",
            "config": {
                "resampler": {"layers": 1, "latents": 5, "heads": 2, "head_width": 8},
                "xattn": {"heads": 2, "head_width": 8},
            },
            "image": {"mode": "aspect"},
            "stages": {
                "describe": {
                    "max_length": 400,
                    "train": [*OPEN, {"pattern": "xattn.*", "lr": 1e-2}],
                }
            },
        },
    ],
    "statements": [{"text": "Seeing helps", "arms": ["blind", "llava", "flamingo"], "by_size": True}],
}


def tree(story, **changes) -> dict[str, Any]:
    parts = {"vision": str(story / "clip"), "language": str(story / "lm")}
    return copy.deepcopy(TREE) | {"parts": parts} | changes


@pytest.fixture(scope="module")
def plan(story):
    return parse_comparison(tree(story))


@pytest.fixture(scope="module")
def out(plan, tmp_path_factory):
    """One arm alone first, as after an interruption, then all of them."""
    folder = tmp_path_factory.mktemp("contest")
    run_contest(plan, folder, name="mini", arms=["llava"], show=False)
    first = json.loads((folder / "results.json").read_text())
    stamps = {f: f.stat().st_mtime_ns for f in folder.glob("*/llava/**/*") if f.is_file() and f.suffix != ".lock"}
    run_contest(plan, folder, name="mini", show=False)
    (folder / "first.json").write_text(json.dumps(first))
    (folder / "changed.json").write_text(
        json.dumps([str(f) for f, t in stamps.items() if f.stat().st_mtime_ns != t and f.name != "scores.json"])
    )
    return folder


def test_results_are_there_after_one_arm_and_nothing_is_done_twice(out):
    assert list(read_json(out / "first.json")["models"]) == ["llava", "llava-vqa-0-shots", "llava-vqa-2-shots"]
    assert json.loads((out / "changed.json").read_text()) == []


def test_scores_are_means_over_seeds(out):
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    overall = {r["model"]: float(r["score"]) for r in rows if r["kind"] == "all" and r["task"] == "vqa"}
    assert list(overall) == ["llava", "blind", "flamingo"]
    for arm, score in overall.items():
        single = [read_json(out / "scores" / arm / f"seed-{n}" / "vqa" / "scores.json")["accuracy"] for n in (0, 1)]
        assert score == pytest.approx(sum(single) / 2)


def test_the_page_tells_the_statement_the_shots_and_the_budget(out):
    page = (out / "report.html").read_text()
    for word in (
        "Seeing helps",
        "llava",
        "16 rows read",
        "score over shots",
        "parameters trained",
        "3 of 3 arms",
        "2 of 2",
    ):
        assert word in page
    pairs = [r["first"] for r in csv.DictReader((out / "differences.csv").read_text().splitlines())]
    assert pairs == ["llava", "llava", "blind"]


def test_arms_read_the_same_samples_in_the_same_order(plan, out):
    from isthmus.recipes.build import build

    orders = []
    for arm in ("llava", "flamingo"):
        recipe = recipe_of_arm(plan, arm, 0, out)
        loader = make_loader(build(recipe), recipe.stages[0])
        steps = islice(loader.steps(), 4)
        orders.append([i for _, batches in steps for batch in batches for i in batch.ids])
    assert orders[0] == orders[1]


def test_a_redrawn_part_keeps_its_shape_and_loses_its_weights(out, story):
    mine = load(out / "parts" / "vision-seed-0").net.state_dict()
    theirs = load(story / "clip").net.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    assert not torch.equal(mine["vision.patch_embed.weight"], theirs["vision.patch_embed.weight"])
    other = load(out / "parts" / "vision-seed-1").net.state_dict()
    assert not torch.equal(mine["vision.patch_embed.weight"], other["vision.patch_embed.weight"])


def test_what_is_finished_is_neither_built_nor_opened_beforehand(plan, out, tmp_path, monkeypatch):
    opened, built = [], []
    monkeypatch.setattr(contest, "open_evaluations", lambda specs: opened.append([spec.name for spec in specs]))
    monkeypatch.setattr(run_module, "build", lambda recipe, real=run_module.build: built.append(1) or real(recipe))
    contest._foresee(plan, ["llava", "blind"], out)
    assert (opened, built) == ([[]], [])
    contest._foresee(plan, ["llava"], tmp_path)
    assert (opened[1:], built) == ([["vqa", "vqa-0-shots", "vqa-2-shots"]], [1])


def test_an_interrupted_arm_goes_on_where_it_stopped(story, tmp_path, monkeypatch):
    plan = parse_comparison(tree(story, seeds=[0], statements=[]))
    asked = []

    def stop(*args, **kwargs):
        asked.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "score_contestant", stop)
    with pytest.raises(KeyboardInterrupt):
        run_contest(plan, tmp_path, name="mini", arms=["llava"], show=False)
    assert finished(plan, tmp_path) == []
    monkeypatch.undo()
    before = (tmp_path / "arms/llava/seed-0/model/manifest.json").stat().st_mtime_ns
    (rival,) = run_contest(plan, tmp_path, name="mini", arms=["llava"], show=False)
    assert rival.name == "llava"
    assert (tmp_path / "arms/llava/seed-0/model/manifest.json").stat().st_mtime_ns == before


def test_an_error_names_its_arm(story, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise DataError("prompt too long")

    monkeypatch.setattr(contest, "score_contestant", broken)
    with pytest.raises(DataError, match=r"^Arm 'llava', seed 0: prompt too long$"):
        run_contest(parse_comparison(tree(story)), tmp_path, name="mini", show=False)


def test_a_budget_in_operations_becomes_steps_once(story, tmp_path):
    plan = parse_comparison(tree(story, budget={"flops": 1e9}))
    recipe = recipe_of_arm(plan, "llava", 0, tmp_path)
    kept = read_json(tmp_path / "arms/llava/steps.json")
    assert recipe.stages[0].stage.steps == kept["steps"]["describe"] == round(1e9 / kept["flops_of_a_step"]["describe"])
    assert recipe_of_arm(plan, "llava", 1, tmp_path).stages[0].stage.steps == recipe.stages[0].stage.steps
    assert kept["steps"]["describe"] > 1


CONNECTOR = """
from torch import nn

class Mean(nn.Module):
    def __init__(self, vision_width, out_width):
        super().__init__()
        self.linear = nn.Linear(vision_width, out_width)

    def forward(self, features, mask=None, times=None, text=None):
        return self.linear(features.flatten(1, 2).mean(1, keepdim=True))

    def num_tokens(self, frames, grid):
        return 1
"""


def test_a_connector_of_ones_own_takes_part_by_the_command(story, tmp_path, monkeypatch, capsys):
    import yaml

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONNECTOR)
    own = tree(story, seeds=[0], statements=[{"text": "Patches pay", "arms": ["mean", "llava"], "by_size": True}])
    own["evaluate"][0] |= {"name": "dev", "task": "nlvr", "data": yes_or_no(tmp_path, 8), "train": None}
    own["arms"] = [
        own["arms"][0] | {"shots": []},
        {"name": "mean", "like": "llava", "config": {"projector": "mine:Mean"}},
    ]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    code, said, wrong = run(monkeypatch, capsys, "compare", "own.yaml", "budget.samples=8", "--json", "all.json")
    assert code == 0, wrong
    facts = json.loads((tmp_path / "all.json").read_text())
    assert {n: facts["costs"][n]["visual_tokens"] for n in ("llava", "mean")} == {"llava": 16, "mean": 1}
    assert "runs/own/report.html" in said
    page = (tmp_path / "runs/own/report.html").read_text()  # of a task that is not called vqa as of one that is
    assert page.count("<article") == 8
    assert page.count('class="look"') > 0
    tested = page[page.index("<h2>Patches pay") :]
    assert "<td>mean</td>" in tested[: tested.index("</table>")]
    assert "Patches pay</" in page[page.index("<h2>Curves") :]


def test_a_task_of_ones_own_is_scored_over_seeds_and_paired(story, tmp_path, monkeypatch, capsys):
    """Again when the folder is read a second time, and with what has no interval."""
    import yaml

    monkeypatch.chdir(tmp_path)
    for name in ("my_task.py", "my_source.py"):
        shutil.copy(Path(__file__).parents[2] / "examples" / name, tmp_path)
    (tmp_path / "bare.py").write_text(BARE)
    cards = {"kind": "my_source.py:Cards", "count": 12}
    own = tree(story, statements=[])
    own["evaluate"] = [
        {"name": "counting", "task": "my_task.py:Counting", "data": cards},
        {"name": "bare", "task": "bare.py:Bare", "data": cards},
    ]
    own["arms"] = [own["arms"][0] | {"shots": []}, own["arms"][1]]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    for _ in range(2):
        code, _, wrong = run(monkeypatch, capsys, "compare", "own.yaml", "budget.samples=8", "--out", "out")
        assert code == 0, wrong
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    kinds = {(r["model"], r["task"], r["kind"], bool(r["low"])) for r in rows}
    assert kinds == {
        (model, *found)
        for model in ("llava", "blind")
        for found in (("counting", "exact", True), ("counting", "near", True), ("bare", "length", False))
    }
    (mean,) = [float(r["score"]) for r in rows if r["model"] == "llava" and r["task"] == "bare"]
    single = [read_json(tmp_path / f"out/scores/llava/seed-{n}/bare/scores.json")["length"] for n in (0, 1)]
    assert mean == pytest.approx(sum(single) / 2)
    pairs = list(csv.DictReader((tmp_path / "out/differences.csv").read_text().splitlines()))
    assert [(r["task"], r["measure"]) for r in pairs] == [("counting", "exact"), ("counting", "near")]


BARE = """
from dataclasses import dataclass
from typing import ClassVar, Protocol

from isthmus.evaluation.tasks import Task
from isthmus.evaluation.turns import prompt

class Writes(Protocol):
    def answer_records(self, records, **decoding): ...

class Length:
    def __init__(self, length):
        self.length = length

    def to_dict(self):
        return {"length": self.length}

@dataclass(frozen=True, kw_only=True)
class Bare(Task):
    needs: ClassVar[type] = Writes
    name: str
    records: object
    seed: int = 0

    def rows(self, model, done, *, chunk):
        for record in (self.records[i] for i in range(len(self.records))):
            if record.id not in done:
                (answer,) = model.answer_records([prompt(record)], max_new_tokens=6)
                yield [{"id": record.id, "length": len(answer) / 100}]

    def score(self, rows):
        return Length(sum(row["length"] for row in rows) / len(rows))
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compare-tiny", "--limit", 3), "--limit is for models"),
        (("compare-tiny", "--seed", 0), "--seed is for models"),
        (("compare-tiny", "--select", "random"), "--select is for models"),
        (("compare-tiny", "--arm", "llava"), "no arm 'llava'; did you mean 'llava-"),
        (("compare-tiny", "armz=1"), "unknown key 'armz'"),
        (("a", "b", "--arm", "x"), "--arm chooses among the arms"),
    ],
)
def test_what_the_command_refuses(monkeypatch, capsys, tmp_path, arguments, message):
    code, _, said = run(monkeypatch, capsys, "compare", *arguments, "--out", tmp_path)
    assert code == 2
    assert message in " ".join(said.split())


def test_a_part_that_is_not_there_cannot_be_redrawn(story, tmp_path):
    changed = tree(story)
    changed["arms"][1]["redraw"] = ["visoin"]
    with pytest.raises(ConfigError, match="redraws the part 'visoin'"):
        recipe_of_arm(parse_comparison(changed), "blind", 0, tmp_path)


def of_task(**own):
    return lambda plan: plan["evaluate"][0].update(own)


def of_last_arm(stage=None, **own):
    """A change to what is the last arm's own, or to its stage."""
    return lambda plan: (plan["arms"][-1] if stage is None else plan["arms"][-1]["stages"][stage]).update(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_task(task="vqaa"), "There is no task 'vqaa'; did you mean 'vqa'"),
        (of_task(options={"rul": "exact"}), r"Task 'vqa' \(vqa\) has no option 'rul'"),
        (of_task(options={"decoding": {"max_tokens": 2}}), "decoding has no field 'max_tokens'"),
        (of_task(train=None), "shots come from training data"),
        (of_task(data={"kind": "llava", "file": "gone.json"}), "gone.json"),
        (of_task(train={"kind": "llava", "file": "gone.json"}), "gone.json"),
        (of_last_arm(redraw=["visoin"]), "redraws the part 'visoin'"),
        (of_last_arm(parts={"vision": "runs/gone"}), "runs/gone"),
        (of_last_arm(config={"resampler": {"latnets": 5}}), "latnets"),
        (of_last_arm("describe", data=[{"kind": "llava", "file": "gone.json"}]), "gone.json"),
        (of_last_arm("describe", processor={"p_nxt": 0.5}), "p_nxt"),
        (of_last_arm("describe", train=[{"pattern": "xatn.*", "lr": 1.0}]), r"'xatn\.\*' matches no parameter"),
    ],
)
def test_what_can_be_known_is_refused_before_anything_is_trained(story, tmp_path, monkeypatch, change, message):
    """Of the last arm and of every task, in the words in which a training or an evaluation refuses it."""
    changed = tree(story)
    change(changed)
    monkeypatch.setattr(contest, "train", lambda *args, **kwargs: pytest.fail("an arm was trained"))
    with pytest.raises(IsthmusError, match=message):
        run_contest(parse_comparison(changed), tmp_path, name="mini", show=False)
    assert not list(tmp_path.rglob("run.json"))


def test_a_run_of_another_recipe_is_refused_before_anything_is_trained(story, out, tmp_path, monkeypatch):
    shutil.copytree(out / "arms/flamingo", tmp_path / "arms/flamingo")
    changed = parse_comparison(tree(story, budget={"samples": 24}))
    monkeypatch.setattr(contest, "train", lambda *args, **kwargs: pytest.fail("an arm was trained"))
    with pytest.raises(ConfigError, match=r"flamingo.seed-0 holds a run of another recipe"):
        run_contest(changed, tmp_path, name="mini", show=False)
