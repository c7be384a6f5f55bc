"""The same requests to another engine: alike against our server, different for one altered weight."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.convert import write_model
from isthmus.serving.against import compare
from tests.cli.test_cli import run
from tests.interop import tiny_models
from tests.serving.helpers import models, on_port


def altered(name, by):
    """The model with one number changed, of the first matrix that all its requests pass through."""
    model, within = getattr(tiny_models, name)(), {"lm": "up_proj", "llava": "connector", "clip": "mlp"}[name]
    part = model.net.text if name == "clip" else model.net
    with torch.no_grad():
        next(p for n, p in part.named_parameters() if p.ndim == 2 and within in n).view(-1)[7] += by
    return model


@pytest.mark.parametrize("name", ["lm", "llava", "flamingo", "blip2", "clip", "matcher"])
def test_a_served_model_is_alike(served, name):
    found = compare(models()[name], f"{served.url}/v1", served_as=name)
    assert len(found) >= (1 if name in ("clip", "matcher") else 4)
    assert {o.verdict for o in found} == {"pass"}, found
    assert all(o.tokens == o.of > 0 for o in found)
    assert all(o.difference is not None and o.difference < 1e-4 for o in found)


@pytest.mark.parametrize("name", ["lm", "llava", "clip"])
def test_one_altered_weight_is_noticed_and_shown(served, name):
    found = compare(altered(name, 0.5), f"{served.url}/v1", served_as=name)
    wrong = [o for o in found if o.verdict == "FAIL"]
    assert wrong
    assert all("token" in o.detail or "vector" in o.detail for o in wrong)


def test_an_engine_without_logprobs_is_compared_by_its_text(served, monkeypatch):
    from isthmus.serving import against

    send = against.Engine.send

    def without(self, path, body):
        return send(self, path, {k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs")})

    monkeypatch.setattr(against.Engine, "send", without)
    found = compare(models()["llava"], f"{served.url}/v1", served_as="llava")
    assert {(o.verdict, o.difference) for o in found} == {("pass", None)}
    found = compare(models()["llava"], f"{served.url}/v1", served_as="flamingo")
    assert any(o.verdict == "FAIL" and o.detail.startswith("token ") for o in found)


def test_the_model_of_the_engine_is_found_or_asked_for(served):
    with pytest.raises(ConfigError, match="serves 6 models: name yours with --served-as"):
        compare(models()["lm"], f"{served.url}/v1")
    assert compare(models()["clip"], f"{served.url}/v1", hint="clip")[0].verdict == "pass"
    with on_port({"lm": models()["lm"]}) as one:
        assert compare(models()["lm"], f"{one.url}/v1")[0].verdict == "pass"
        refused = compare(models()["lm"], f"{one.url}/v1", served_as="other")
        assert {o.detail for o in refused} == {"the engine refuses it with status 404"}
        nowhere = one.url
    with pytest.raises(CheckpointError, match="is an engine there"):
        compare(models()["lm"], f"{nowhere}/v1")


def test_verify_against_an_engine_on_the_command_line(served, monkeypatch, capsys, tmp_path):
    models()["lm"].save(tmp_path / "lm")
    code, said, _ = run(monkeypatch, capsys, "verify", tmp_path / "lm", "--against", f"{served.url}/v1")
    assert code == 0, said
    assert "All alike." in said
    code, said, _ = run(
        monkeypatch, capsys, "verify", tmp_path / "lm", "--against", f"{served.url}/v1", "--served-as", "flamingo"
    )
    assert code == 1
    assert "differ:" in said
    code, _, wrong = run(monkeypatch, capsys, "verify", tmp_path / "lm", "--served-as", "x")
    assert (code, "--served-as names a model" in wrong) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", "llava"])
def test_transformers_own_server_is_alike(name, tmp_path):
    model = getattr(tiny_models, name)()
    write_model(model, tmp_path / "hf", "hf", lossy=True)
    port = 20_000 + os.getpid() % 10_000
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    arguments = [program, "serve", str(tmp_path / "hf"), "--port", str(port), "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        engine = subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                break
            except OSError:
                assert engine.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        found = compare(model, f"http://localhost:{port}/v1", served_as=str(tmp_path / "hf"))
        assert len(found) >= 4
        assert {o.verdict for o in found} == {"pass"}, found
    finally:
        os.killpg(engine.pid, signal.SIGTERM)
        engine.wait(30)
