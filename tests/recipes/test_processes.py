"""Every system from a recipe in two processes: the steps of one process, one folder, and a command that starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

import isthmus
from isthmus.checkpoint import load_tensors
from isthmus.errors import ConfigError
from isthmus.recipes import run as run_module
from isthmus.recipes.run import make_loader, train
from isthmus.recipes.schema import parse_recipe
from isthmus.training.log import read_metrics
from tests.miniature import tree
from tests.recipes import process_ranks as ranks
from tests.training.test_processes import free_port


@pytest.fixture(scope="module")
def both(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(ranks.run, args=(2, free_port(), str(story), str(folder)), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def alone(story, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    for name, recipe in ranks.recipes(story).items():
        train(recipe, folder / name, progress=False)
    return folder


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("clip", "contrast"),
        ("llava", "align"),
        ("llava", "instruct"),
        ("flamingo", "interleave"),
        ("blip2", "generate"),
    ],
)
def test_two_processes_make_the_steps_of_one(both, alone, name, stage):
    ours, theirs = (read_metrics(f / name / "stages" / stage / "metrics.jsonl") for f in (both, alone))
    assert len(ours) == len(theirs) == 3
    # BLIP-2 comes with a first stage of its own, whose negatives each process draws for itself.
    steps = zip(ours, theirs, strict=True) if name != "blip2" else ()
    for own, other in steps:
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert own["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert (own["samples"], own["supervised"]) == (other["samples"], other["supervised"])
        if name != "flamingo":  # whose sources come one after the other in each process
            assert own["order"] == other["order"]


def test_the_first_step_of_blip2s_first_stage_contrasts_the_rows_of_both(both, alone):
    own, other = (read_metrics(f / "blip2" / "stages" / "represent" / "metrics.jsonl")[0] for f in (both, alone))
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


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_a_step_are_its_rows(story, monkeypatch, world):
    recipe = parse_recipe(tree("llava", story))
    built = run_module.build(recipe).enter(recipe.stages[1])
    whole = make_loader(built, recipe.stages[1])
    parts = []
    for number in range(world):
        monkeypatch.setattr(run_module, "rank", lambda number=number: number)
        monkeypatch.setattr(run_module, "world", lambda: world)
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
    monkeypatch.setattr(run_module, "world", lambda: 2)
    with pytest.raises(ConfigError, match="written by one process, and here are 2"):
        train(parse_recipe(found), tmp_path, progress=False)


def test_the_command_starts_its_processes_and_speaks_once(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree("clip")), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    command = [sys.executable, "-m", "isthmus", "train", "--processes", "2", "recipe.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The clip model is in run") == 1
    (state,) = sorted((tmp_path / "run/stages/contrast/checkpoints").glob("*3/state.json"))
    assert json.loads(state.read_text())["processes"] == 2


def test_processes_of_the_own_torchrun_are_not_started_again(monkeypatch):
    from isthmus.cli.train import run

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun says how many"):
        run("clip-tiny", [], None, tensorboard=False, processes=2)
