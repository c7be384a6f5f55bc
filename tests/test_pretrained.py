"""Models that come with the package: packed from a demo's folder, opened by name, served, and in the wheel."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus import borrowed, checkpoint, pretrained
from isthmus.cli.serve import opened
from isthmus.errors import CheckpointError
from isthmus.interop.hub import model_hash
from isthmus.model import FORMAT, FolderConfig
from isthmus.recipes.scoring import recipe_of
from tests.cli.test_cli import run
from tests.interop import tiny_models
from tests.narrow import there
from tests.serving.helpers import encoded, models, picture

ROOT = Path(__file__).resolve().parents[1]


def packer():
    spec = importlib.util.spec_from_file_location("pack_weights", ROOT / "tools" / "pack_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def given() -> dict[str, isthmus.Model]:
    """The demo's five in small; LLaVA has CLIP's encoder and the language model's weights."""
    found = {name: models()[name] for name in packer().NAMES} | {"llava": tiny_models.llava()}
    found["llava"].net.vision.load_state_dict(found["clip"].net.vision.state_dict())
    found["llava"].net.language.load_state_dict(found["lm"].net.language.state_dict())
    return found


def demo_folder(folder: Path) -> Path:
    for name, model in given().items():
        model.save(folder / name / "model", extra={"recipe.yaml": "model: x\n"})
    (folder / "results.json").write_text(json.dumps({"llava": {}}))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    runs, out = demo_folder(tmp_path_factory.mktemp("demo")), tmp_path_factory.mktemp("package") / "pretrained"
    out.mkdir()
    packer().pack(runs, out)
    return out


@pytest.fixture
def shipped(packed, monkeypatch):
    monkeypatch.setattr(pretrained, "FOLDER", packed)
    return packed


def test_packed_models_hold_what_opening_needs_in_bf16(packed):
    assert sorted(f.name for f in packed.iterdir()) == ["blip2", "clip", "flamingo", "llava", "lm", "results.json"]
    for name in packer().NAMES:
        held = {str(f.relative_to(packed / name)) for f in (packed / name).rglob("*") if f.is_file()}
        assert {"config.json", "manifest.json", "model.safetensors", "processor.json"} <= held
        assert "recipe.yaml" not in held
        dtypes = {t.dtype for t in checkpoint.load_tensors(packed / name / "model.safetensors").values()}
        assert torch.float32 not in dtypes
        ours, opened = given()[name].net.state_dict(), isthmus.load(packed / name).net.state_dict()
        assert all(torch.equal(opened[n], t.to(torch.bfloat16).to(t.dtype)) for n, t in ours.items())
        assert {t.dtype for t in opened.values()} == {t.dtype for t in ours.values()}


def test_what_an_earlier_model_holds_too_is_taken_from_there(packed, tmp_path):
    told = json.loads((packed / "llava" / "config.json").read_text())["borrowed"]
    assert {part: place["folder"] for part, place in told.items()} == {"vision": "clip", "language.lm": "lm"}
    own = checkpoint.load_tensors(packed / "llava" / "model.safetensors")
    assert {name.split(".")[0] for name in own} == {"connector"}
    assert "borrowed" not in json.loads((packed / "flamingo" / "config.json").read_text())
    whole = isthmus.load(packed / "llava")
    whole.save(tmp_path / "whole")
    opened = isthmus.load(tmp_path / "whole")
    assert opened.answer(picture(1), "what?", max_new_tokens=6) == whole.answer(picture(1), "what?", max_new_tokens=6)


def test_a_folder_that_is_taken_from_must_be_there_and_the_same(packed, tmp_path):
    shutil.copytree(packed / "llava", tmp_path / "llava")
    with pytest.raises(CheckpointError, match=r"takes its vision from .*clip/model.safetensors, which is not there"):
        isthmus.load(tmp_path / "llava")
    models()["clip"].save(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"takes its vision from: it has another sha256"):
        isthmus.load(tmp_path / "llava")
    shutil.rmtree(tmp_path / "clip")
    for name in ("clip", "lm"):
        shutil.copytree(packed / name, tmp_path / name)
    assert there(isthmus.load(tmp_path / "llava").report).matched > 10
    bare: FolderConfig = {"format": FORMAT, "isthmus": "", "kind": "llava", "config": {}}
    for name in ("../clip", "/etc", "..", ""):
        config: FolderConfig = {**bare, "borrowed": {"vision": {"folder": name, "sha256": ""}}}
        with pytest.raises(CheckpointError, match="which is no folder beside it"):
            borrowed.weights(tmp_path / "llava" / "model.safetensors", config)


def test_the_models_that_come_along_are_small():
    """All of them together, to the byte; and none is there twice."""
    files = [f for f in (ROOT / "src" / "isthmus" / "pretrained").glob("*/*") if f.suffix != ".pyc"]
    assert {f.parent.name for f in files} >= set(packer().NAMES)
    assert sum(f.stat().st_size for f in files) <= 25_000_000
    seen = {}
    for file in files:
        for name, tensor in checkpoint.load_tensors(file).items() if file.name == borrowed.FILE else ():
            if tensor.numel() > 10_000:
                other = seen.setdefault(checkpoint.tensor_sha256(tensor), (file, name))
                assert other == (file, name), f"{other} is in {file} too, as {name}"


def test_the_scores_that_come_along_are_those_of_these_weights():
    folder = ROOT / "src" / "isthmus" / "pretrained"
    manifests = json.loads((folder / "results.json").read_text())["manifests"]
    assert sorted(manifests) == sorted(packer().NAMES)
    for name, tasks in manifests.items():
        told = {manifest["model"] for manifest in tasks.values()}
        assert told == {model_hash(folder / name)}, "run python -m tools.score_shipped"


def test_a_model_of_the_package_is_opened_by_its_name(shipped, tmp_path, monkeypatch, capsys):
    model = isthmus.load("isthmus:llava")
    said = model.answer(picture(1), "what?", max_new_tokens=6)
    assert said == isthmus.load(shipped / "llava").answer(picture(1), "what?", max_new_tokens=6)
    (tmp_path / "p.png").write_bytes(encoded(picture(1)))
    arguments = ("chat", "isthmus:llava", "what?", "--image", tmp_path / "p.png", "--max-new-tokens", 6)
    code, out, told = run(monkeypatch, capsys, *arguments)
    assert (code, out.split()) == (0, said.split()), told


def test_what_is_not_there_is_told(shipped, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"isthmus:lava is no model of this installation; did you mean 'llava'"):
        isthmus.load("isthmus:lava")
    for name in ("isthmus:", "isthmus:../llava", "isthmus:/etc"):
        with pytest.raises(CheckpointError, match="no model of this installation"):
            isthmus.load(name)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"came without trained models. `isthmus demo` trains them"):
        isthmus.load("isthmus:llava")
    with pytest.raises(CheckpointError, match="came without trained models"):
        opened([], {})


def test_serving_without_a_model_serves_those_of_the_package(shipped):
    assert sorted(opened([], {})) == ["blip2", "clip", "flamingo", "llava", "lm"]
    found = opened(["isthmus:clip", f"mine={shipped / 'llava'}", str(shipped / "lm")], {})
    assert list(found) == ["clip", "mine", "lm"]


def test_packing_refuses_what_is_not_whole_or_too_large(tmp_path, monkeypatch):
    runs, out, tool = demo_folder(tmp_path / "demo"), tmp_path / "out", packer()
    out.mkdir()
    monkeypatch.setattr(tool, "MOST", 10_000)
    with pytest.raises(CheckpointError, match="are more than the 10,000 of the package: clip"):
        tool.pack(runs, out)
    (runs / "lm" / "model" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="its manifest says"):
        tool.pack(runs, out)
    (runs / "results.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no results.json"):
        tool.pack(runs, out)
    assert not list(out.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_answers_in_a_fresh_environment(packed, tmp_path):
    """Built and installed as a user would (the build fetches its backend), asked in a folder of its own."""
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["cp", "-r", ROOT / "src", tree / "src"], check=True)
    subprocess.run(["cp", "-r", *packed.iterdir(), tree / "src/isthmus/pretrained"], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path / "dist", tree], check=True, timeout=600)
    (wheel,) = (tmp_path / "dist").glob("isthmus-*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    python = tmp_path / "env/bin/python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel], check=True
    )
    (tmp_path / "p.png").write_bytes(encoded(picture(1)))
    where = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ask = [python, "-m", "isthmus", "chat", "isthmus:llava", "--image", "p.png", "what?", "--max-new-tokens", "6"]
    done = subprocess.run(ask, cwd=tmp_path, env=where, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = isthmus.load(packed / "llava").answer(picture(1), "what?", max_new_tokens=6)
    assert done.stdout.split() == expected.split()
    found = subprocess.run(
        [python, "-c", "import isthmus; print(isthmus.__file__)"], capture_output=True, text=True, env=where
    )
    assert str(tmp_path / "env") in found.stdout


def test_commands_take_a_model_of_the_package_by_name(shipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("d.yaml").write_text("{kind: scenes, form: questions, split: test, count: 3}")
    data = ("--data", "d.yaml", "--task", "vqa")
    assert "language" in run(monkeypatch, capsys, "show", "isthmus:llava")[1]
    assert run(monkeypatch, capsys, "eval", "isthmus:llava", *data)[0] == 0
    assert list(Path("runs/eval/llava/d").rglob("manifest.json"))
    assert run(monkeypatch, capsys, "compare", "isthmus:llava", "isthmus:blip2", *data, "--out", "both")[0] == 0
    assert not list(shipped.rglob("eval"))


def test_recipe_and_identity_of_a_model_of_the_package(shipped):
    assert model_hash("isthmus:clip") == model_hash(shipped / "clip") != ""
    recipe = recipe_of(shipped / "llava")
    assert recipe is not None
    assert (recipe.model, [spec.name for spec in recipe.evaluate][:1]) == ("llava", ["vqa"])
