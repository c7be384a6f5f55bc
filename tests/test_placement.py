"""Devices and number formats by name, from the words on a command line to the weights."""

import pytest
import torch
from typer.testing import CliRunner

import isthmus
from isthmus.cli.app import app
from isthmus.comparison.compare import Contestant
from isthmus.errors import ConfigError
from isthmus.placement import device_of, dtype_of


def test_auto_takes_a_gpu_where_torch_sees_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("auto") == torch.device("cuda")
    assert device_of("cuda:1") == device_of(torch.device("cuda", 1)) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="no device cuda:2: torch sees 2 here"):
        device_of("cuda:2")


def test_what_is_not_there_or_unknown_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ConfigError, match=f"There is no device {name}: torch sees none here"):
            device_of(name)
    for name in ("gpu", "cuda:x", "auto:0"):
        with pytest.raises(ConfigError, match=f"device '{name}'"):
            device_of(name)
    with pytest.raises(ConfigError, match=r"dtype 'bf16'.*bfloat16"):
        dtype_of("bf16")
    assert dtype_of(None) is None
    assert dtype_of("bfloat16") is dtype_of(torch.bfloat16) is torch.bfloat16


def test_load_casts_and_names_a_device_that_is_not_there(story, monkeypatch):
    model = isthmus.load(story / "lm", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="There is no device cuda"):
        isthmus.load(story / "lm", device="cuda")


@pytest.mark.parametrize("command", ["eval", "chat", "verify", "serve", "show", "convert"])
def test_every_command_that_opens_a_model_takes_a_device(command, story, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = {"chat": ["hello"], "convert": [str(tmp_path / "x"), "--to", "hf"]}.get(command, [])
    result = CliRunner().invoke(app, [command, str(story / "lm"), *words, "--device", "cuda"])
    assert isinstance(result.exception, ConfigError)
    assert "There is no device cuda" in str(result.exception)


def test_scores_of_another_dtype_are_other_scores(story, tmp_path):
    (tmp_path / "d.yaml").write_text("{kind: scenes, form: questions, split: test, count: 2}")
    asked = ["eval", str(story / "llava"), "--data", str(tmp_path / "d.yaml"), "--out", str(tmp_path / "out")]
    assert CliRunner().invoke(app, [*asked, "--device", "cpu"]).exception is None
    assert CliRunner().invoke(app, asked).exception is None  # a device is no other model: what is there is taken
    refused = CliRunner().invoke(app, [*asked, "--dtype", "bfloat16"]).exception
    assert isinstance(refused, ConfigError)
    assert "holds another evaluation" in str(refused)
    plain, cast = (Contestant(name="x", folder=story / "llava", dtype=dtype) for dtype in ("", "bfloat16"))
    assert cast.identity == f"{plain.identity} dtype=bfloat16"


def test_compare_casts_what_it_asks(story, tmp_path, monkeypatch):
    opened = []

    def load(folder, **given):
        opened.append(given)
        raise ConfigError("seen")

    monkeypatch.setattr("isthmus.opening.load", load)
    (tmp_path / "d.yaml").write_text("{kind: scenes, form: questions, split: test, count: 2}")
    command = ["compare", str(story / "llava"), str(story / "lm"), "--data", str(tmp_path / "d.yaml")]
    CliRunner().invoke(app, [*command, "--device", "cpu", "--dtype", "bfloat16", "--out", str(tmp_path / "out")])
    assert opened == [{"device": "cpu", "dtype": "bfloat16"}]
