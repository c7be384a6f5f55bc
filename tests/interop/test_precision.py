"""Half precision: kept on the way through `isthmus convert`, and never put upon what must stay exact."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import isthmus
from isthmus.cli.app import app
from isthmus.interop.convert import write_model
from tests.interop import tiny_models

HALVES = [("clip", torch.bfloat16), ("siglip", torch.float16), ("llava", torch.bfloat16), ("idefics", torch.bfloat16)]


def stored(folder: Path, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tiny model in ``folder`` as transformers keeps it in half precision."""
    write_model(getattr(tiny_models, name)(), folder, "hf")
    half = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    return half


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_converting_keeps_every_bit_of_half_precision(tmp_path, name, dtype):
    half = stored(tmp_path / "a", name, dtype)
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "hf"])
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(v, half[k]) and v.dtype == dtype for k, v in written.items())
    assert set(written) == set(half)
    wide = ["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "hf", "--dtype", "float32"]
    assert CliRunner().invoke(app, wide).exit_code == 0
    assert {v.dtype for v in load_file(tmp_path / "c" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["lm", "llava", "blip2"])
def test_a_cast_spares_what_follows_from_the_configuration(tmp_path, name):
    """Rotary frequencies in bf16 would turn position 1,000 by several radians too far, and nothing would say so."""
    model = {"lm": tiny_models.lm, "llava": tiny_models.llava}.get(name, lambda: tiny_models.blip2(tiny_models.LLAMA))()
    write_model(model, tmp_path / "a", "isthmus")
    exact, cast = isthmus.load(tmp_path / "a"), isthmus.load(tmp_path / "a", dtype=torch.bfloat16)
    assert next(cast.net.language.parameters()).dtype == torch.bfloat16
    computed = [n for n, _ in exact.net.named_buffers() if n.endswith("inv_freq")]
    assert computed
    for n in computed:
        assert torch.equal(cast.net.get_buffer(n), exact.net.get_buffer(n))
        assert cast.net.get_buffer(n).dtype == torch.float32
