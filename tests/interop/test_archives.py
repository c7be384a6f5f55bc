"""Files of weights: every kind is read, nothing in them is run, and what lies about itself is refused."""

import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch._utils import _rebuild_tensor_v2

from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, read_state, tensors_of, unwrapped

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(3), "fp16": torch.ones(2, 2).half()}


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.register_buffer("b", torch.arange(3))
        self.register_buffer("fp16", torch.ones(2, 2, dtype=torch.float16), persistent=True)
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b


def _write(kind, path):
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "zip":
        torch.save(TENSORS, path)
    elif kind == "legacy":
        torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    else:
        net = Scripted().eval()
        net.a.weight.data.copy_(TENSORS["a.weight"])
        torch.jit.script(net).save(str(path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "torchscript"])
def test_every_kind_is_told_by_its_content(tmp_path, kind):
    path = tmp_path / "weights.of.no.kind"
    _write(kind, path)
    found = tensors_of(read_archive(path), path)
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("new", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="can run any code"):
        read_archive(tmp_path / "x.pt")
    assert not (tmp_path / "exploded").exists()


def _archive(path, data, **others):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/constants.pkl", pickle.dumps(()))
        for name, content in others.items():
            archive.writestr(f"m/data/{name}", content)


def test_code_in_a_torchscript_archive_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _archive(tmp_path / "x.pt", pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="no code of it was run"):
        read_archive(tmp_path / "x.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    out = io.BytesIO()

    class Writer(pickle._Pickler):  # the Python one lets a test write names that do not exist
        def persistent_id(self, item):
            return ("storage", torch.FloatStorage, "0", "cpu", 2) if item == "STORAGE" else None

    class Reaching:
        def __reduce__(self):
            return _rebuild_tensor_v2, ("STORAGE", 0, (1000,), (1,), False, {})

    Writer(out, 2).dump(Reaching())
    _archive(tmp_path / "x.pt", out.getvalue(), **{"0": b"\0" * 8})
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_archive(tmp_path / "x.pt")


def test_a_compressed_archive_is_not_blown_up(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match="compressed"):
        read_archive(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_a_file_cut_short_is_said_to_be_damaged(tmp_path, kind):
    path = tmp_path / "x"
    _write(kind, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"damaged|sound"):
        read_archive(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is no file of weights"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="no file of weights"):
        read_archive(tmp_path / "x")


def test_a_header_of_a_million_keys_is_refused_unread(tmp_path):
    entry = '"k{0}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    header = ("{" + ",".join(entry.format(i) for i in range(1_000_000)) + "}").encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="header"):
        read_archive(tmp_path / "x")


def _sharded(folder, placed):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def test_shards_are_put_together(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "2.safetensors")
    _sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    assert {k: len(v) for k, v in read_state(tmp_path).items()} == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, "lacks the shard 2.safetensors"),
        ({"a": "../secret.safetensors"}, "outside the folder"),
        ({"a": "link.safetensors"}, "outside the folder"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, "no shard holds"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(tmp_path, placed, message):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, folder / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    _sharded(folder, placed)
    with pytest.raises(CheckpointError, match=message):
        read_state(folder)


def test_several_files_without_an_index_are_not_guessed_from(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match="several files"):
        read_state(tmp_path)


@pytest.mark.parametrize("wrapped", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize(
    "names",
    [
        ["model.embed_tokens.weight", "model.layers.0.mlp.weight", "lm_head.weight"],
        ["vision_model.post_layernorm.weight", "text_model.final_layer_norm.weight", "logit_scale"],
        ["visual.conv1.weight", "logit_scale", "transformer.resblocks.0.ln_1.weight"],
        ["perceiver.latents", "lang_encoder.gated_cross_attn_layers.0.ff_gate"],
        ["Qformer.bert.embeddings.weight", "query_tokens"],
    ],
)
def test_a_prefix_that_all_names_have_is_taken_off(wrapped, names):
    """As torch.compile, DistributedDataParallel and training frameworks put it there."""
    assert list(unwrapped({"state_dict": {f"{wrapped}{name}": 0 for name in names}, "epoch": 3})) == names
    assert list(unwrapped(dict.fromkeys(names, 0))) == names


def test_a_prefix_that_belongs_to_the_names_stays():
    for names in (
        ["model.embed_tokens.weight", "model.layers.0.mlp.weight"],  # a Llama whose head is tied
        ["model.language_model.layers.0.mlp.weight", "model.vision_tower.vision_model.post_layernorm.weight"],
        ["model.vision_model.post_layernorm.weight", "model.embed_tokens.weight", "model.perceiver_resampler.latents"],
        ["module.a.weight", "b.weight"],
    ):
        assert list(unwrapped(dict.fromkeys(names, 0))) == names
    part = ["vision.blocks.0.weight", "text.weight"]
    assert list(unwrapped({"vision._orig_mod.blocks.0.weight": 0, "text.weight": 0})) == part
