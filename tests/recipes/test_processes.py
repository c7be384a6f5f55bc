"""Every system from a recipe in two processes: the steps of one process, one folder, and a command that starts them."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import isthmus
from isthmus.checkpoint import load_tensors, read_json
from isthmus.errors import ConfigError, IsthmusWarning
from isthmus.recipes import run as run_module
from isthmus.recipes.run import make_loader, train
from isthmus.recipes.schema import parse_recipe
from isthmus.training.log import read_metrics
from tests.miniature import tree
from tests.recipes import process_ranks as ranks
from tests.spawning import free_port, spawn


@pytest.fixture(scope="module")
def both(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    spawn(ranks.run, 2, free_port(), str(story), str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, recipe in ranks.recipes(story).items():
        train(recipe, folder / name, progress=False)
    return folder


def log_of(file) -> list[dict[str, Any]]:
    """The lines of one log."""
    return [dict(line) for line in read_metrics(file)]


@pytest.mark.parametrize(
    ("name", "stage"),
    [("clip", "contrast"), ("llava", "align"), ("llava", "instruct"), ("flamingo", "interleave")],
)
def test_two_processes_make_the_steps_of_one(both, alone, name, stage):
    ours, theirs = (log_of(f / name / "stages" / stage / "metrics.jsonl") for f in (both, alone))
    assert len(ours) == len(theirs) == 3
    for own, other in zip(ours, theirs, strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert (own["samples"], own["supervised"]) == (other["samples"], other["supervised"])
        if name != "flamingo":  # whose sources come one after the other in each process
            assert own["order"] == other["order"]


def test_the_first_step_of_blip2s_first_stage_contrasts_the_rows_of_both(both, alone):
    own, other = (log_of(f / "blip2" / "stages" / "represent" / "metrics.jsonl")[0] for f in (both, alone))
    assert own["loss"].keys() == other["loss"].keys() == {"itc", "itm", "itg"}
    for name in ("itc", "itg"):  # the negatives of matching are drawn by each process
        assert own["loss"][name] == pytest.approx(other["loss"][name], rel=1e-4)
    assert own["samples"] == other["samples"]


def test_the_folder_is_one_model(both, alone):
    for name in ("clip", "llava", "flamingo", "blip2"):
        assert isthmus.load(both / name).kind == name
        ours, theirs = (load_tensors(f / name / "model" / "model.safetensors") for f in (both, alone))
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert not list(both.rglob("quarantine-1.jsonl"))


@pytest.mark.parametrize("name", ["clip", "llava", "flamingo"])
def test_shards_make_the_steps_of_whole_nets_and_one_model(both, name):
    assert isthmus.load(both / f"{name}-sharded").kind == name
    ours, theirs = (load_tensors(both / n / "model" / "model.safetensors") for n in (f"{name}-sharded", name))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    for value, other in ((ours[n], theirs[n]) for n in theirs):
        torch.testing.assert_close(value, other, atol=2e-3, rtol=0)  # Adam's first steps go by the gradient's sign
    for place in sorted((both / name / "stages").iterdir()):
        sharded = both / f"{name}-sharded" / "stages" / place.name / "metrics.jsonl"
        for own, other in zip(log_of(sharded), log_of(place / "metrics.jsonl"), strict=True):
            assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert own["order"] == other["order"]


@pytest.mark.parametrize("engine", ["", "-sharded"])
def test_adapters_trained_and_validated_by_two_are_those_of_one(both, alone, engine):
    ours, theirs = (f / n / "stages/instruct" for f, n in ((both, f"tuned{engine}"), (alone, "tuned")))
    lines = [[line for line in log_of(f / "metrics.jsonl") if "validation" in line] for f in (ours, theirs)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [0, 2, 3]
    assert lines[0][0]["validation"] == lines[1][0]["validation"]  # to the bit, scores and losses
    for own, other in zip(*lines, strict=True):
        assert own["validation"]["loss"] == pytest.approx(other["validation"]["loss"], rel=1e-4)
    assert read_json(ours / "best/validation.json")["step"] == read_json(theirs / "best/validation.json")["step"]
    for own, other in ((ours.parents[1] / "model", theirs.parents[1] / "model"), (ours / "best", theirs / "best")):
        assert read_json(own / "config.json")["base"]["sha256"] == read_json(other / "config.json")["base"]["sha256"]
        for file in ("adapter_model.safetensors", "trained.safetensors"):
            found, wanted = load_tensors(own / file), load_tensors(other / file)
            assert found.keys() == wanted.keys()
            assert all(torch.allclose(t, wanted[n], atol=2e-3, rtol=0) for n, t in found.items())
        assert isthmus.load(own).base is not None


def test_two_processes_end_a_stage_that_gets_no_better_together(both, alone):
    steps = [[line["step"] for line in log_of(f / "ends/stages/instruct/metrics.jsonl")] for f in (both, alone)]
    assert steps[0] == steps[1]
    assert len(steps[0]) < 10


def test_two_processes_score_as_one(both, story, tmp_path):
    with pytest.warns(IsthmusWarning, match="begins anew"):
        ranks.evaluations(story, tmp_path, both)
    for name in ("seven/vqa", "one/vqa", "ranks/retrieval", "broken/vqa"):
        for file in ("outputs.jsonl", "scores.json"):
            own, other = (f / name / file for f in (both / "scores", tmp_path))
            assert own.read_text() == other.read_text(), (name, file)
    assert (both / "scores/seven.json").read_text() == (tmp_path / "seven.json").read_text()
    assert read_json(both / "scores/broken/vqa/scores.json")["left_out"] == 1
    assert len((both / "scores/broken/vqa/quarantine.jsonl").read_text().splitlines()) == 1


def test_nets_mapped_from_a_file_have_the_bits_of_whole_ones(both, story):
    """In the process that wrote it and in the one that made a net without values, in every stage of every system."""
    expected = ranks.nets(story, None)
    assert any(len(stages) > 1 for stages in expected.values())
    assert all(torch.load(both / f"nets-{number}.pt") == expected for number in range(2))


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_a_step_are_its_rows(story, monkeypatch, world):
    recipe = parse_recipe(tree("llava", story))
    built = run_module.build(recipe).enter(recipe.stages[1])
    whole = make_loader(built, recipe.stages[1])
    parts = []
    for number in range(world):
        monkeypatch.setattr(run_module, "rank", lambda number=number: number)
        monkeypatch.setattr(run_module, "world_size", lambda: world)
        parts.append(make_loader(built, recipe.stages[1]))
    streams = [loader.steps() for loader in (whole, *parts)]
    for _ in range(30):  # past the end of an epoch
        (position, batches), *shares = [next(stream) for stream in streams]
        assert {share[0] for share in shares} == {position}
        rows = [i for batch in batches for i in batch.ids]
        for number, (_, own) in enumerate(shares):
            assert [i for batch in own for i in batch.ids] == rows[number::world]
    for stream in streams:
        stream.close()


def test_a_feature_cache_is_for_one_process(story, monkeypatch, tmp_path):
    found = tree("llava", story)
    found["stages"][0]["feature_cache"] = {}
    monkeypatch.setattr(run_module, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="written by one process, and here are 2"):
        train(parse_recipe(found), tmp_path, progress=False)


def command(folder):
    found = tree("clip")
    found["stages"][0] |= {"steps": 40, "save_every": 10}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    return program(folder, "train", "--processes", "2", "recipe.yaml", "--out", "run")


def program(folder, *words):
    words = [sys.executable, "-m", "isthmus", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    return subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(parent):
    """The processes of a command, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int((folder / "stat").read_text().rsplit(")")[-1].split()[1]) == parent:
                words = dict(w.split("=", 1) for w in (folder / "environ").read_text().split("\0") if "=" in w)
                found[int(words["RANK"])] = int(folder.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes below /proc, on Linux alone")
def test_the_command_speaks_once_and_survives_a_lost_process(tmp_path):
    running = command(tmp_path)
    metrics = tmp_path / "run/stages/contrast/metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    os.kill(children(running.pid)[1], signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 128 + signal.SIGKILL
    assert said.count("Process 1 of this run has ended") == 1
    assert re.search(r"Process 1 was last seen at (making the net|step \d+|saving step)", " ".join(said.split()))
    assert "Traceback" not in said

    again = command(tmp_path)
    told, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert told.count("The clip model is in run") == 1
    assert [line["step"] for line in log_of(metrics)] == list(range(1, 41))


@pytest.mark.slow
def test_an_evaluation_in_two_processes_is_one_command_with_one_voice(story, tmp_path):
    seen = {}
    for number in (1, 2):
        running = program(tmp_path, "eval", story / "clip", "--processes", number, "--out", f"of-{number}")
        told, said = running.communicate(timeout=300)
        assert (running.returncode, said) == (0, "")
        seen[number] = told.replace(f"of-{number}", "out")
    assert seen[1] == seen[2]
    for file in ("manifest.json", "outputs.jsonl", "scores.json"):
        assert (tmp_path / "of-2/retrieval" / file).read_text() == (tmp_path / "of-1/retrieval" / file).read_text()
    running = program(tmp_path, "eval", story / "clip", "--processes", "2", "--task", "retreival")
    told, said = running.communicate(timeout=300)
    assert running.returncode == 2
    assert " ".join(said.split()).count("has no task 'retreival' of its own") == 1
    assert said.count("isthmus:") == 1


SLEEPS = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from isthmus.evaluation.tasks import Task

@dataclass(frozen=True, kw_only=True)
class Sleeps(Task):
    name: str
    records: object
    seed: int = 0
    who: int = 0

    def rows(self, model, done, *, chunk):
        Path(f"begun-{os.environ['RANK']}").touch()
        if int(os.environ["RANK"]) == self.who:
            time.sleep(600)
        yield [{"id": name} for name in self.ids if name not in done]

    def score(self, rows):
        raise AssertionError("came to an end")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes below /proc, on Linux alone")
@pytest.mark.parametrize("who", [0, 1])
def test_an_interrupt_stops_an_evaluation_whichever_process_waits(story, tmp_path, who):
    (tmp_path / "mine.py").write_text(SLEEPS)
    (tmp_path / "data.yaml").write_text("{kind: scenes, form: questions, count: 4}")
    words = ["--task", "mine.py:Sleeps", "--data", "data.yaml", "--set", f"task.who={who}", "--processes", "2"]
    running = program(tmp_path, "eval", story / "llava", *words)
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    time.sleep(1)  # the one that does not sleep waits for the other's rows
    own = children(running.pid)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=25)
    assert running.returncode == 130
    assert said == "isthmus: Interrupted. The same command goes on where this one stopped.\n"
    assert sorted(own) == [0, 1]
    assert not any(Path(f"/proc/{number}").exists() for number in own.values())


def test_processes_of_the_own_torchrun_are_not_started_again(monkeypatch):
    from isthmus.cli.train import run

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun says how many"):
        run("clip-tiny", [], None, tensorboard=False, processes=2)
