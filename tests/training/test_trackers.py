"""Trackers: who gets the numbers, offline unless asked otherwise, and names or packages that are not there."""

import sys
from types import SimpleNamespace

import pytest

from isthmus.errors import ConfigError, MissingExtraError
from isthmus.training.log import MetricLine, MetricLog
from isthmus.training.trackers import open_trackers

LINE: MetricLine = {
    "step": 3,
    "loss": {"lm": 1.5},
    "validation": {"vqa.accuracy": 0.5},
    "samples": 24,
    "seconds": 1.5,
}


def stand_in(monkeypatch, name):
    told = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("end"))
    asked = {}
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=lambda **options: asked.update(options) or run))
    return told, asked


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_numbers_go_to_the_tracker(tmp_path, monkeypatch, name):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    told, asked = stand_in(monkeypatch, name)
    folder = tmp_path / "run" / "stages" / "tune"
    folder.mkdir(parents=True)
    log = MetricLog(folder, 0, report_to=[name])
    log.write(LINE)
    log.close()
    numbers = {"loss/lm": 1.5, "validation/vqa.accuracy": 0.5, "samples": 24, "seconds": 1.5}
    assert told == [(3, numbers), "end"]
    assert asked["name"].startswith("run/tune")
    assert asked.get("mode", "offline") == "offline"


def test_a_run_that_goes_on_is_one_run_and_a_new_one_is_another(tmp_path, monkeypatch):
    _, first = stand_in(monkeypatch, "wandb")
    _, second = stand_in(monkeypatch, "trackio")

    def names(step):
        open_trackers(["wandb", "trackio"], tmp_path, step)
        return first["id"], second["name"]

    begun, resumed, anew = names(0), names(7), names(0)
    assert begun == resumed
    assert begun[0] != anew[0]
    assert begun[1] != anew[1]


def test_what_is_not_known_or_not_installed(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'wandbb' is no tracker; did you mean 'wandb'"):
        open_trackers(["wandbb"], tmp_path, 0)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(MissingExtraError, match="pip install trackio"):
        open_trackers(["trackio"], tmp_path, 0)
