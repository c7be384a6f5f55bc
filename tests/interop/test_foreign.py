"""Damaged and hostile folders: whatever a config.json says, what comes is a model or one clear paragraph."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import isthmus
from isthmus.errors import IsthmusError
from isthmus.interop.convert import write_model
from tests.interop import tiny_models

KINDS = {
    "clip": tiny_models.clip,
    "siglip": tiny_models.siglip,
    "llava": tiny_models.llava,
    "llava_next": tiny_models.llava_next,
    "idefics": tiny_models.idefics,
    "blip2": tiny_models.blip2,
    "lm": tiny_models.lm,
}
STRANGE: tuple[Any, ...] = (None, "x", [], {}, 0, -1)


def places(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def changed(values: dict[str, Any], place: tuple[str, ...], number: int) -> dict[str, Any]:
    """One field gone (every other time) or strange, by turns."""
    whole = json.loads(json.dumps(values))
    inner = whole
    for name in place[:-1]:
        inner = inner[name]
    if number % 2:
        del inner[place[-1]]
    else:
        inner[place[-1]] = STRANGE[number // 2 % len(STRANGE)]
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_a_configuration_can_bring_a_traceback(kind: str, tmp_path: Path) -> None:
    write_model(KINDS[kind](), tmp_path / "model", "hf")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    refused = 0
    for number, place in enumerate(places(values)):
        for turn in (number, number + 1):
            file.write_text(json.dumps(changed(values, place, turn)))
            try:
                isthmus.load(tmp_path / "model")
            except IsthmusError:
                refused += 1
    assert refused > 5


def test_layers_beyond_all_models_are_not_built(tmp_path: Path) -> None:
    write_model(tiny_models.clip(), tmp_path / "model", "hf")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["vision_config"]["num_hidden_layers"] = 10**9
    file.write_text(json.dumps(values))
    with pytest.raises(IsthmusError, match=r"num_hidden_layers = 1,000,000,000 is more than any model has"):
        isthmus.load(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "5"])
def test_a_damaged_tokenizer_configuration_is_a_paragraph(content: str, tmp_path: Path) -> None:
    write_model(tiny_models.llava(), tmp_path / "model", "hf")
    (tmp_path / "model" / "tokenizer_config.json").write_text(content)
    with pytest.raises(IsthmusError, match=r"tokenizer_config\.json"):
        isthmus.load(tmp_path / "model")
