"""A folder that tells an id twice must tell the same one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import isthmus
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from tests.interop import tiny_models


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "m"
    write_model(tiny_models.llava(), folder, "hf")
    return folder


def changed(source: Path, folder: Path, file: str, **values: Any) -> Path:
    folder.mkdir()
    for one in source.iterdir():
        (folder / one.name).symlink_to(one)
    content = json.loads((source / file).read_text())
    (folder / file).unlink()
    inner = content["text_config"] if values.pop("inside", False) else content
    inner.update(values)
    (folder / file).write_text(json.dumps(content))
    return folder


WORD = 40  # of the tokenizer's letters
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("config.json", {"image_token_index": WORD}, r"image token at 40 \('.'\), the processor's '<image>' is at"),
    ("config.json", {"image_token_id": WORD}, "two ids of its image token"),
    ("processor_config.json", {"image_token": "<pad>"}, "the processor's '<pad>' is at 0"),
    ("config.json", {"inside": True, "eos_token_id": WORD}, r"text_config has eos_token_id 40 .* has '</s>' at 2"),
    ("config.json", {"inside": True, "bos_token_id": WORD}, r"text_config has bos_token_id 40 .* has '<s>' at 1"),
    ("config.json", {"pad_token_id": WORD}, r"config.json has pad_token_id 40 .* has '<pad>' at 0"),
    ("generation_config.json", {"eos_token_id": [WORD, 41]}, "generation_config.json has eos_token_id 40, 41"),
    ("generation_config.json", {"bos_token_id": WORD}, "generation_config.json has bos_token_id 40"),
]


@pytest.mark.parametrize(("file", "values", "named"), CASES)
def test_two_ids_of_one_token_are_refused(
    file: str, values: dict[str, Any], named: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=named):
        isthmus.load(changed(written, tmp_path / "m", file, **values))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("generation_config.json", {"eos_token_id": [2, WORD]}),  # the end and one more
        ("config.json", {"inside": True, "bos_token_id": 50256}),  # a default that was never set
        ("tokenizer_config.json", {"eos_token": "<unk>"}),  # Llama's default, which is in every file of a Llama
        ("config.json", {"pad_token_id": 3}),  # Llama's files say <unk> where nothing pads
    ],
)
def test_what_is_no_disagreement_opens(file: str, values: dict[str, Any], written: Path, tmp_path: Path) -> None:
    assert isthmus.load(changed(written, tmp_path / "m", file, **values)).kind == "llava"


def test_an_original_llava_is_held_to_its_ids_too(tmp_path: Path) -> None:
    write_model(tiny_models.llava(), tmp_path / "m", "original")
    isthmus.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"config\.json has eos_token_id 40 .* has '</s>' at 2"):
        isthmus.load(changed(tmp_path / "m", tmp_path / "wrong", "config.json", eos_token_id=WORD))


def test_a_text_tower_and_its_tokenizer_end_a_text_alike(tmp_path: Path) -> None:
    model = tiny_models.clip()
    model.net.config = replace(model.net.config, text=replace(model.net.config.text, pool="eot", eot_id=WORD))
    for kind, made in (("clip", model), ("text", tiny_models.text_encoder(model))):
        write_model(made, tmp_path / kind, "hf")
        with pytest.raises(CheckpointError, match=r"the text's eos_token_id 40 .* has '</s>' at 2"):
            isthmus.load(tmp_path / kind)
