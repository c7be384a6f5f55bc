"""Language models in transformers' folders: exact, strict, and told what is wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import isthmus
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.hf_language import read_language_folder
from isthmus.language import LanguageModel
from isthmus.weights import load_into
from tests.language.test_causal import build, every_family, stream


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@every_family
def test_library_folders_load_exactly(name: str, shard: str, tmp_path) -> None:
    lm, tokens = build(name), stream([9])
    lm.lm.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "20KB")
    config, state = read_language_folder(tmp_path)
    twin = LanguageModel.build(config).eval()
    twin.lm.load_state_dict(state, strict=True)
    assert torch.equal(twin.logits(twin.embed(tokens.ids)), lm.logits(lm.embed(tokens.ids)))


def test_a_body_without_prefix_and_old_buffers_load(tmp_path) -> None:
    lm = build("gpt2")
    body = {k.removeprefix("transformer."): v.clone() for k, v in lm.lm.state_dict().items() if k != "lm_head.weight"}
    body["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(body, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(lm.lm.config.to_dict()))
    _, state = read_language_folder(tmp_path)
    assert all(torch.equal(state[k], v) for k, v in lm.lm.state_dict().items())


def test_damaged_folders_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_language_folder(tmp_path)
    build("llama").lm.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)

    def refuse(state: dict[str, torch.Tensor], match: str) -> None:
        save_file(state, file)
        with pytest.raises(CheckpointError, match=match):
            read_language_folder(tmp_path)

    refuse({k: v for k, v in good.items() if k != "lm_head.weight"}, "lacks 1 tensors, among them lm_head.weight")
    refuse({**good, "model.surprise": torch.zeros(1)}, "unexplained 1 tensors, among them model.surprise")
    refuse({**good, "model.norm.weight": torch.zeros(3)}, r"model.norm.weight is stored as \(3,\)")
    file.write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="no file of weights"):
        read_language_folder(tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_language_folder(tmp_path)


def test_pickled_weights_are_read_as_tensors_and_nothing_else(tmp_path) -> None:
    lm = build("llama")
    lm.lm.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(lm.lm.state_dict(), tmp_path / "pytorch_model.bin")
    _, state = read_language_folder(tmp_path)
    assert all(torch.equal(state[k], v) for k, v in lm.lm.state_dict().items())
    torch.save({**lm.lm.state_dict(), "model.norm.weight": torch.nn.Linear(1, 1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_language_folder(tmp_path)


def test_weights_are_mapped_and_what_is_built_afterwards_is_drawn_as_ever(tmp_path) -> None:
    lm = build("gpt2")  # its head is tied to its table
    lm.lm.save_pretrained(tmp_path)
    Tokenizer.train(["a red cube"] * 3, 300).save(tmp_path)
    opened = isthmus.load(tmp_path).net.language.lm
    assert opened.lm_head.weight is opened.transformer.wte.weight
    assert all(torch.equal(tensor, lm.lm.state_dict()[name]) for name, tensor in opened.state_dict().items())
    torch.manual_seed(0)
    drawn = torch.nn.Linear(8, 8).weight
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.nn.Linear(8, 8).weight)
    assert drawn.std() > 0.05
    assert LanguageModel.build(lm.config).lm.transformer.wte.weight.std() > 0.01


@pytest.mark.parametrize("wrapped", ["model.", "module.", "_orig_mod."])
def test_a_wrapped_state_dict_opens(wrapped: str, tmp_path) -> None:
    lm = build("llama")
    lm.lm.save_pretrained(tmp_path)
    state = {f"{wrapped}{name}": tensor.clone() for name, tensor in lm.lm.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    _, found = read_language_folder(tmp_path)
    assert all(torch.equal(found[k], v) for k, v in lm.lm.state_dict().items())


def test_a_head_of_its_own_beside_a_configuration_that_ties_is_kept(tmp_path) -> None:
    """As in transformers, which ties only what is stored once, or twice alike."""
    lm = build("gpt2")
    lm.lm.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    table = stored["transformer.wte.weight"]
    tokens = stream([9])
    for head, tied in ((table.clone(), True), (table + 1, False)):
        save_file({**stored, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config, state = read_language_folder(tmp_path)
        twin = LanguageModel.build(config).eval()
        load_into(twin.lm, state, where=tmp_path)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(twin.logits(twin.embed(tokens.ids)), theirs(input_ids=tokens.ids).logits)
        assert (twin.lm.lm_head.weight is twin.lm.transformer.wte.weight) == tied
