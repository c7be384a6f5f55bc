"""By whom fp32 products are: stored with the run, and kept where the cache of measurements is lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from isthmus import products
from isthmus.checkpoint import read_folder, read_json, write_folder
from isthmus.errors import IsthmusWarning
from isthmus.products import ONEDNN, TORCH, multiply_quickly
from isthmus.recipes import run as recipes
from isthmus.recipes.schema import Recipe, StageSpec
from isthmus.stage import Stage
from isthmus.training import multiplying
from isthmus.training.state import checkpoints
from isthmus.training.stops import Interrupted
from tests.training.test_loop import StopAfter, run, same_bits
from tests.training.toys import ToyLoader, ToyNet

CPU = torch.device("cpu")


class Seeing(ToyLoader):
    """Notes torch's setting before each step, and opens a model meanwhile."""

    settings: list[str]

    def steps(self, start):
        self.settings = []
        for item in super().steps(start):
            multiply_quickly()  # as isthmus.load does
            self.settings.append(torch.get_float32_matmul_precision())
            yield item


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine whose oneDNN is exact, and as quick as a test says; torch's own setting comes back."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products, "_full_fp32_expected", lambda: True)
    monkeypatch.setattr(products, "_exact", lambda: True)
    monkeypatch.setattr(products._STATE, "taken", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")

    def of(quick):
        products.take(TORCH)  # another process
        tell = pytest.fail if quick is None else lambda *_: quick
        monkeypatch.setattr(products, "quicker", lambda: tell("a run that goes on measures nothing"))

    yield of
    torch.set_float32_matmul_precision(before)


def stopped(folder, **options):
    with pytest.raises(Interrupted):
        run(folder, loader=StopAfter(5), **options)


def stored(folder):
    return [read_json(c / "state.json")["products"] for c in checkpoints(folder)]


@pytest.mark.parametrize(("quick", "by", "setting"), [(True, ONEDNN, "medium"), (False, TORCH, "highest")])
def test_a_run_goes_on_as_it_was_begun_whatever_is_measured_then(machine, tmp_path, capsys, quick, by, setting):
    machine(quick)
    stopped(tmp_path, progress=True)
    said = capsys.readouterr().err
    assert said.count("fp32 products by") == 1
    assert f"fp32 products by {by}, " in " ".join(said.split())
    assert set(stored(tmp_path)) == {by}
    machine(not quick)
    loader = Seeing()
    net, _, result = run(tmp_path, loader=loader, progress=True)
    assert set(loader.settings) == {setting}
    assert f"fp32 products by {by}, so the run was begun" in " ".join(capsys.readouterr().err.split())
    assert not result.warnings
    assert set(stored(tmp_path)) == {by}
    assert json.loads((tmp_path / "stage.json").read_text())["products"]["by"] == by
    machine(quick)
    assert same_bits(net, run(tmp_path / "whole")[0])


def test_nothing_is_measured_where_a_run_goes_on(machine, tmp_path):
    machine(True)
    stopped(tmp_path)
    machine(None)
    run(tmp_path)


def test_a_model_that_was_opened_before_changes_nothing(machine, tmp_path):
    machine(False)
    stopped(tmp_path)
    machine(True)
    assert multiply_quickly()
    loader = Seeing()
    run(tmp_path, loader=loader)
    assert set(loader.settings) == {"highest"}
    assert multiply_quickly()  # what comes after the run is free again


@pytest.mark.parametrize("why", ["amx", "inexact", "variable", "somebody"])
def test_what_cannot_be_kept_is_warned_of_and_stored(machine, monkeypatch, tmp_path, why):
    machine(True)
    stopped(tmp_path)
    machine(None)
    said = {
        "amx": "oneDNN is known to compute in full fp32 on x86 without AMX alone",
        "inexact": "less exact here",
        "variable": "ISTHMUS_PRODUCTS=torch says so",
        "somebody": r"set_float32_matmul_precision\('high'\) was called",
    }[why]
    by = "torch (precision high)" if why == "somebody" else TORCH
    with monkeypatch.context() as other:
        if why == "amx":
            other.setattr(products, "_full_fp32_expected", lambda: False)
        if why == "inexact":
            other.setattr(products, "_exact", lambda: False)
        if why == "variable":
            other.setenv(products.VARIABLE, "torch")
        if why == "somebody":
            torch.set_float32_matmul_precision("high")
        loader = Seeing()
        with pytest.warns(
            IsthmusWarning, match=rf"'align': the run was begun .* by oneDNN, which cannot be kept: .*{said}"
        ):
            _, _, result = run(tmp_path, loader=loader)
        assert set(loader.settings) == {"high" if why == "somebody" else "highest"}
    (warning,) = result.warnings
    assert f"resumed with fp32 products by {by} instead of oneDNN; the result may differ" in warning
    assert stored(tmp_path)[-1] == by


def test_a_gpu_beside_the_cpu_or_another_device_hinders(monkeypatch):
    assert products.hindrance(CPU) is None
    assert products.hindrance(torch.device("cuda")) == "they are computed on cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert products.hindrance(CPU) == "a GPU is beside the CPU"


def test_a_state_of_before_goes_on_and_keeps_what_is_measured_then(machine, tmp_path):
    machine(True)
    stopped(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    content = {name: file.read_bytes() for name, file in read_folder(newest).items()}
    state = json.loads(content.pop("state.json"))
    del state["products"]
    shutil.rmtree(newest)
    write_folder(newest, {**content, "state.json": state})
    machine(False)
    _, _, result = run(tmp_path)
    assert not result.warnings
    assert stored(tmp_path)[-1] == TORCH


def test_the_first_process_chooses_and_one_that_cannot_is_enough(machine, monkeypatch):
    machine(True)
    monkeypatch.setattr(multiplying, "first", lambda: False)
    monkeypatch.setattr(products, "quicker", lambda: pytest.fail("the first process measures"))
    told = iter([[None, None], [None, None], [TORCH, TORCH], [True, None]])
    monkeypatch.setattr(multiplying, "all_gather", lambda own: next(told))
    assert multiplying.settle(CPU, None, "x").by == ONEDNN
    told = iter([[ONEDNN, ONEDNN], [None, "it has AMX"], [TORCH, TORCH]])
    assert multiplying.settle(CPU, ONEDNN, "x") == multiplying.Multiplying(TORCH, "it has AMX")
    assert torch.get_float32_matmul_precision() == "highest"


def test_later_stages_multiply_as_the_runs_first(machine, tmp_path):
    machine(True)
    _, _, result = run(tmp_path / "stages" / "one", ToyNet())
    assert not result.warnings
    stages = [Stage(name=name, train=(), steps=1) for name in ("none", "one", "two")]
    recipe = Recipe.model_construct(stages=[StageSpec.model_construct(stage=stage) for stage in stages])
    by = recipes._products(recipe, tmp_path / "stages")
    assert by == ONEDNN
    machine(False)
    run(tmp_path / "stages" / "two", ToyNet(), products=by)
    assert set(stored(tmp_path / "stages" / "two")) == {ONEDNN}
    assert recipes._products(recipe, tmp_path / "elsewhere") is None


def test_a_full_disk_leaves_what_later_stages_read(machine, monkeypatch, tmp_path):
    machine(True)
    run(tmp_path)
    before, write = read_json(tmp_path / "stage.json"), Path.write_text

    def full(file, text, **named):
        if not file.name.startswith("stage.json"):
            return write(file, text, **named)
        write(file, text[:20], **named)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert read_json(tmp_path / "stage.json") == before
