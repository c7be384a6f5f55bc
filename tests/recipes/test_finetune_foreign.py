"""Adapters of others are trained on: PEFT's of transformers' LLaVA and BLIP-2, those of the original LLaVA."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from typer.testing import CliRunner

from isthmus import adapters
from isthmus.checkpoint import load_tensors, read_json
from isthmus.cli.app import app
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.hf_peer import open_class
from isthmus.interop.original_llava import llava_to_original
from isthmus.opening import load
from isthmus.recipes.build import build
from isthmus.recipes.schema import read_recipe
from isthmus.stage import named_state
from tests.interop import tiny_models
from tests.recipes.test_finetune_page import data


def peft_lora(base, folder, targets):
    """A LoRA with numbers in it, as peft saves one over transformers' own class."""
    peer = get_peft_model(open_class(base), LoraConfig(r=2, target_modules=targets))
    torch.manual_seed(0)
    for name, tensor in peer.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_()
    peer.save_pretrained(folder)
    config = read_json(folder / "adapter_config.json") | {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return peer


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers to peft
def test_a_lora_of_transformers_llava_is_trained_on(tmp_path):
    write_model(tiny_models.llava(), tmp_path / "llava-hf", "hf")
    peft_lora(tmp_path / "llava-hf", tmp_path / "lora", ["q_proj"])
    weights = tmp_path / "llava-hf/model.safetensors"  # half as wide, as published ones are
    save_file({n: t.bfloat16() for n, t in load_tensors(weights).items()}, weights, metadata={"format": "pt"})
    recipe = read_recipe("finetune-llava", [f"INIT={tmp_path / 'lora'}", "DATA=data"])
    built = build(recipe)
    built = built.enter(recipe.stages[0])
    merged, before = named_state(built.net), named_state(load(tmp_path / "lora").net)
    assert all(torch.equal(t, merged[n]) for n, t in before.items())
    assert adapters.adapted(built.net)
    assert built.begun == str(tmp_path / "lora")
    mapped = named_state(build(recipe, tmp_path).enter(recipe.stages[0]).net)
    assert all(torch.equal(t, mapped[n]) for n, t in merged.items())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("language", "query"), [(tiny_models.OPT, "q_proj"), ({**tiny_models.T5, "vocab_size": tiny_models.ROWS}, "q")]
)
def test_a_lora_on_every_part_of_a_blip2_opens_merged(tmp_path, language, query):
    write_model(tiny_models.blip2(language), tmp_path / "blip2-hf", "hf")
    peer = peft_lora(tmp_path / "blip2-hf", tmp_path / "lora", [query, "query", "qkv", "language_projection"])
    model, base = load(tmp_path / "lora"), load(tmp_path / "blip2-hf")
    moved = {n for n, t in model.net.state_dict().items() if not torch.equal(t, base.net.state_dict()[n])}
    assert {n.split(".")[0] for n in moved} == {"vision", "connector", "language"}
    write_model(model, tmp_path / "again", "hf")
    ours, theirs = open_class(tmp_path / "again").state_dict(), peer.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)


def original_lora(folder):
    """A tower, a language model, and what the original LLaVA's trainer leaves of a LoRA run over them; the net that
    they make, and what the LoRA adds to one of its weights."""
    model = tiny_models.llava()
    net = model.net
    tower, lm, lora = tiny_models.clip(), tiny_models.lm(), folder / "lora"
    tower.net.vision.load_state_dict(net.vision.state_dict())
    lm.net.language.load_state_dict(net.language.state_dict())
    write_model(tower, folder / "tower", "hf")
    write_model(lm, folder / "vicuna", "hf")
    lora.mkdir()
    own = {"mm_vision_tower": str(folder / "tower"), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (lora / "config.json").write_text(json.dumps({**tiny_models.LLAMA, "model_type": "llava_llama", **own}))
    a, b = torch.randn(4, 32), torch.randn(32, 4) / 8
    layer = "model.layers.1.self_attn.q_proj"
    names = [f"base_model.model.{layer}.lora_{x}.weight" for x in "AB"]
    save_file(dict(zip(names, (a, b), strict=True)), lora / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(folder / "vicuna")}
    (lora / "adapter_config.json").write_text(json.dumps(described))
    state = llava_to_original(net.state_dict(), net.config, vision=False)
    side = {f"base_model.model.{k}": v for k, v in state.items() if "mm_projector" in k}
    torch.save(side, lora / "non_lora_trainables.bin")
    return lora, net, f"language.lm.{layer}.weight", 2 * b @ a


def test_an_original_llavas_lora_folder_is_trained_on_saved_and_merged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora, net, layer, added = original_lora(tmp_path)
    data(tmp_path / "my-data", lambda name: {"caption": name})
    short = ["stages.tune.steps=2", "stages.tune.batch_size=2", "stages.tune.train.0.lora.rank=2"]
    small = ["stages.tune.validate.rows=2", "evaluate.answers.options.decoding.max_new_tokens=1"]
    for words in (
        ["train", "finetune-llava", f"INIT={lora}", "DATA=my-data", "--out", "runs/my", *short, *small],
        ["convert", "runs/my", "hf", "--to", "hf", "--merge"],
    ):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    begun, trained, shipped = load(lora).net, load("runs/my"), load("hf").net
    torch.testing.assert_close(named_state(begun)[layer], net.state_dict()[layer] + added)
    assert trained.base is not None
    assert trained.base.path == str(lora)
    assert torch.equal(named_state(trained.net)[layer], named_state(begun)[layer])  # below the new adapter
    adapters.merge(trained.net)
    assert not torch.equal(trained.net.state_dict()[layer], begun.state_dict()[layer])
    for name, tensor in trained.net.state_dict().items():
        torch.testing.assert_close(shipped.state_dict()[name], tensor)


def test_an_original_lora_whose_parts_are_elsewhere_names_what_it_wants(tmp_path):
    lora, *_ = original_lora(tmp_path)
    (tmp_path / "vicuna").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"give language=…"):
        load(lora)
    assert load(lora, language=tmp_path / "moved").kind == "llava"
