"""Each common fault of a checkpoint's folder, tried: the error names the fault itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import isthmus
from isthmus.errors import IsthmusError
from tests.interop import tiny_models

HTML = b"<!DOCTYPE html><html><body>404</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return tiny_models.save_language(tiny_models.lm(), tmp_path_factory.mktemp("sound") / "lm")


def put(name: str, content: bytes) -> Callable[[Path], Path]:
    def fault(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder

    return fault


def cut(size: int) -> Callable[[Path], Path]:
    def fault(folder: Path) -> Path:
        return put(WEIGHTS, (folder / WEIGHTS).read_bytes()[:size])(folder)

    return fault


def only(name: str, content: bytes) -> Callable[[Path], Path]:
    """Weights of another form and no others."""

    def fault(folder: Path) -> Path:
        (folder / WEIGHTS).unlink()
        return put(name, content)(folder)

    return fault


def kind(model_type: str) -> Callable[[Path], Path]:
    def fault(folder: Path) -> Path:
        config = json.loads((folder / "config.json").read_text())
        return put("config.json", json.dumps(config | {"model_type": model_type}).encode())(folder)

    return fault


def without(name: str) -> Callable[[Path], Path]:
    def fault(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return fault


def deeper(*steps: str) -> Callable[[Path], Path]:
    def fault(folder: Path) -> Path:
        place = folder.with_name("above").joinpath(*steps)
        place.parent.mkdir(parents=True)
        shutil.move(folder, place)
        return folder.with_name("above")

    return fault


FAULTS = {
    "weights cut at their end": (cut(-200), "it was cut off, as by a download that broke"),
    "weights cut in their header": (cut(100), "it was cut off"),
    "weights of no byte": (cut(0), r"it is empty \(0 bytes\)"),
    "weights that are HTML": (put(WEIGHTS, HTML), "an HTML page"),
    "weights that are a pointer": (put(WEIGHTS, LFS), "a Git LFS pointer; fetch the file itself"),
    "weights of llama.cpp alone": (only("model.gguf", b"GGUF"), r"of another form \(model\.gguf\)"),
    "weights of Keras alone": (only("tf_model.h5", b"\x89HDF"), r"of another form \(tf_model\.h5\)"),
    "no configuration": (without("config.json"), r"it has no config\.json"),
    "a configuration that is HTML": (put("config.json", HTML), r"config\.json is not valid JSON, but an HTML page"),
    "a configuration that is a pointer": (put("config.json", LFS), r"config\.json .* a Git LFS pointer"),
    "a tokenizer that is a pointer": (put("tokenizer.json", LFS), r"tokenizer\.json .* a Git LFS pointer"),
    "the folder above": (deeper("final"), r"no config\.json, but this in it has: .*above/final"),
    "the hub's cache": (deeper("snapshots", "abc"), "this in it has: .*above/snapshots/abc"),
    "a misspelt kind": (kind("lama"), "did you mean 'llama'"),
    "another kind": (kind("qwen2_vl"), "a model of another kind, not a misspelt one"),
    "the configuration itself": (lambda folder: folder / "config.json", "give the folder that it lies in"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_named_itself(sound, tmp_path, fault):
    change, said = FAULTS[fault]
    shutil.copytree(sound, tmp_path / "lm")
    with pytest.raises(IsthmusError, match=said):
        isthmus.load(change(tmp_path / "lm"))


def test_a_file_that_is_no_model_is_named(tmp_path):
    for name, content, said in (
        ("a.png", b"\x89PNG\r\n", "a PNG picture; name a folder or file of a model"),
        ("a.gguf", b"GGUF\x03", "GGUF file"),
        ("a.yaml", b"model: clip\n", "a recipe is trained first"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(IsthmusError, match=said):
            isthmus.load(tmp_path / name)
