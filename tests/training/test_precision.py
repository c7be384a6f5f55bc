"""Precision: what is quicker here, measured once; kept by the run."""

import json

import pytest
import torch
from torch import nn

from isthmus import measured
from isthmus.measured import measure
from isthmus.stage import Group, Stage
from isthmus.training import precision
from isthmus.training.precision import Choice, choose, computes_bf16, context, products
from tests.training.test_loop import run
from tests.training.test_loop import stage as loop_stage
from tests.training.toys import ToyNet

CPU = torch.device("cpu")
NET = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.LayerNorm(8))


def stage(**fields) -> Stage:
    return Stage(**{"name": "x", "train": (Group("*", lr=1.0),), "steps": 1, **fields})


class Clock:
    """Time that passes only where something runs."""

    def __init__(self, **costs: float) -> None:
        self.now, self.costs, self.ran = 0.0, costs, []

    def __call__(self) -> float:
        return self.now

    def work(self, *_) -> dict:
        return {name: lambda name=name: self.run(name) for name in self.costs}

    def run(self, name: str) -> None:
        self.ran.append(name)
        self.now += self.costs[name]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A CPU that can multiply in bf16, an empty cache, and products that cost what a test says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)

    def machine(**costs: float) -> Clock:
        clock = Clock(**costs)
        monkeypatch.setattr(precision, "_work", clock.work)
        return clock

    return machine


@pytest.mark.parametrize(
    ("fp32", "bf16", "wanted"), [(0.01, 0.017, "fp32"), (0.01, 0.0098, "fp32"), (0.01, 0.004, "bf16")]
)
def test_the_quicker_one_is_taken_and_the_reason_told(asked, fp32, bf16, wanted):
    clock = asked(fp32=fp32, bf16=bf16)
    found = choose(stage(), NET, CPU, timer=clock)
    assert found.precision == wanted
    assert f"bf16 takes {bf16 / fp32:.2f} of fp32's time" in found.why


def test_it_is_measured_once_per_machine_and_net(asked, monkeypatch):
    clock = asked(fp32=0.01, bf16=0.004)
    assert choose(stage(), NET, CPU, timer=clock).precision == "bf16"
    ran = len(clock.ran)
    slower = asked(fp32=0.01, bf16=0.02)
    assert choose(stage(), NET, CPU, timer=slower).precision == "bf16"  # taken from the cache
    assert not slower.ran
    assert choose(stage(), nn.Linear(4, 4), CPU, timer=slower).precision == "fp32"  # another net
    monkeypatch.setattr(measured, "processor", lambda: ["another machine"])
    assert choose(stage(), NET, CPU, timer=slower).precision == "fp32"
    assert ran >= 2 * 3


def test_timing_ends_soon_where_the_answer_is_clear():
    clear, near = Clock(fp32=0.01, bf16=0.02), Clock(fp32=0.01, bf16=0.0101)
    assert measure(clear.work(), clear) == pytest.approx({"fp32": 0.01, "bf16": 0.02})
    assert len(clear.ran) == 2 * (1 + measured.ROUNDS)
    measure(near.work(), near)
    assert 1.0 < near.now < 1.1
    slow = Clock(fp32=3.0, bf16=4.0)
    measure(slow.work(), slow)
    assert len(slow.ran) == 2 * 3


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"KEY": 3}', '{"KEY": {"fp32": "x", "bf16": 1}}', '{"KEY": {"fp32": 0.0}}']
)
def test_a_broken_cache_is_no_crash(asked, monkeypatch, tmp_path, content):
    clock = asked(fp32=0.01, bf16=0.004)
    monkeypatch.setattr(measured, "_key", lambda facts: "KEY")
    file = tmp_path / "isthmus" / "precision.json"
    file.parent.mkdir()
    file.write_text(content)
    assert choose(stage(), NET, CPU, timer=clock).precision == "bf16"
    assert clock.ran
    assert json.loads(file.read_text())["KEY"] == pytest.approx({"fp32": 0.01, "bf16": 0.004})


def test_a_cache_that_cannot_be_written_is_no_crash(asked, tmp_path):
    (tmp_path / "isthmus").write_text("a file where a folder should be")
    assert choose(stage(), NET, CPU, timer=asked(fp32=0.01, bf16=0.004)).precision == "bf16"


def test_what_is_said_or_cannot_be_is_not_measured(asked, monkeypatch):
    clock = asked(fp32=0.01, bf16=0.004)
    assert choose(stage(precision="fp32"), NET, CPU, timer=clock).precision == "fp32"
    assert choose(stage(precision="bf16"), NET, CPU, timer=clock).precision == "bf16"
    assert choose(stage(), NET, torch.device("cuda"), timer=clock).precision == "bf16"
    assert choose(stage(), nn.LayerNorm(3), CPU, timer=clock) == Choice("fp32", "the net has no products to time")
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    assert choose(stage(), NET, CPU, timer=clock).precision == "fp32"
    assert not clock.ran


def test_the_first_process_times_how_frozen_parts_attend(asked, monkeypatch):
    """The others find in the cache what it measured: each for itself they could attend otherwise."""
    timed = []
    monkeypatch.setattr(precision, "half_is_quicker", lambda dtype, *, single: timed.append((dtype, single)) or True)
    for is_first, said, times in ((True, "bf16", 1), (False, "bf16", 0), (True, "fp32", 0)):
        monkeypatch.setattr(precision, "first", lambda is_first=is_first: is_first)
        assert choose(stage(precision=said), NET, CPU).precision == said
        assert timed == [(torch.bfloat16, False)] * times
        timed.clear()


def test_the_first_process_decides_for_all(asked, monkeypatch):
    clock = asked(fp32=0.01, bf16=0.004)
    monkeypatch.setattr(precision, "first", lambda: False)
    monkeypatch.setattr(precision, "all_gather", lambda own: [Choice("fp32", "the first one measured"), own])
    assert choose(stage(), NET, CPU, timer=clock) == Choice("fp32", "the first one measured")
    assert not clock.ran


def test_products_are_the_largest_matrices_without_tables():
    assert products(NET) == [((8, 16), 2), ((16, 8), 1)]


def test_the_real_products_run_in_both_precisions():
    seconds = measure(precision._work([((24, 16), 3)]))
    assert all(0 < s < 1 for s in seconds.values())
    with context("bf16", CPU):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with context("fp32", CPU):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_a_run_stores_its_precision_and_keeps_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(precision, "choose", lambda *_, **__: Choice("fp32", "measured"))
    auto = {"precision": "auto", "steps": 6, "save_every": 3}
    run(tmp_path / "a", the_stage=loop_stage(**auto), progress=True)
    assert "precision fp32, measured" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "stage.json").read_text())["precision"] == {
        "precision": "fp32",
        "why": "measured",
    }

    monkeypatch.setattr(precision, "choose", lambda *_, **__: pytest.fail("a run that goes on measures nothing"))
    _, _, result = run(tmp_path / "a", ToyNet(), the_stage=loop_stage(**auto), progress=True)
    assert "precision fp32, so the run was begun" in capsys.readouterr().err
    assert not result.warnings


def test_bf16_needs_the_right_processor(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for features, answer in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        assert computes_bf16(CPU) is answer
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert computes_bf16(CPU) is False
