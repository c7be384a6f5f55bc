"""Adapters are merged as peft runs them, or refused by name; never merged as something else."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
)
from transformers import LlavaConfig as HfLlavaConfig

import isthmus
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError, IsthmusWarning
from isthmus.interop.lora import merge_adapter
from tests.interop.test_folders import LANGUAGE, PICTURES, VISION, finish, redraw

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
IDS = torch.tensor([[5, 17, 33, 9, 250]])


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["a red cube and a blue ring"] * 3, 300)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, words: Tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    sizes: dict[str, Any] = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(LlamaConfig(**LANGUAGE)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**sizes, **ends)),
        "llava": LlavaForConditionalGeneration(
            HfLlavaConfig(
                vision_config={**VISION, "model_type": "clip_vision_model"},
                text_config={**LANGUAGE, "model_type": "llama"},
                image_token_index=310,
            )
        ),
    }
    for name, model in made.items():
        redraw(model).save_pretrained(folder / name)
        finish(folder / name, words, PICTURES)
    return {name: folder / name for name in made}


def adapter(base: Path, folder: Path, *, trained: bool = True, **settings: Any) -> Path:
    """A PEFT adapter of the base as peft saves it, with numbers in it unless it is not ``trained``."""
    kind = {"llava": LlavaForConditionalGeneration, "gpt2": GPT2LMHeadModel}.get(base.name, LlamaForCausalLM)
    model = get_peft_model(kind.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if trained and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", QV),
    "rslora": ("llama", {**QV, "use_rslora": True}),
    "dora": ("llama", {**QV, "use_dora": True}),
    "patterns": ("llama", {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}),
    "modules to save": ("llama", {**QV, "modules_to_save": ["lm_head"]}),
    "layers": ("llama", {**QV, "layers_to_transform": [1]}),
    "words": ("llama", {"target_modules": ["embed_tokens"]}),
    "fan in": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    "tied head": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}),
    "words of a tied model": ("gpt2", {"target_modules": ["wte"]}),
    "head of a tied model": ("gpt2", {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}),
    "tokens": ("llama", {**QV, "trainable_token_indices": [3, 250]}),
    "tokens of a tied model": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "trainable_token_indices": [3, 250]},
    ),
    "biases by a pattern": ("gpt2", {"target_modules": r".*\.c_attn", "fan_in_fan_out": True, "bias": "all"}),
    "pissa": ("llama", {**QV, "init_lora_weights": "pissa"}),
    "olora": ("llama", {**QV, "init_lora_weights": "olora"}),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_gives_what_peft_gives(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    folder = adapter(bases[name], tmp_path / "adapter", **settings)
    theirs = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[name].from_pretrained(bases[name])
    before = theirs(IDS).logits
    wanted = PeftModel.from_pretrained(theirs, folder)(IDS).logits
    assert (wanted - before).abs().max() > 0.1
    model = isthmus.load(folder, language=bases[name])
    for opened in (model, isthmus.load(model.save(tmp_path / "ours"))):
        language = opened.net.language
        torch.testing.assert_close(language.logits(language.embed(IDS)), wanted, atol=2e-4, rtol=1e-4)
    assert model.report is not None
    assert model.report.converted > 0
    stored = load_file(bases[name] / "model.safetensors")  # a mapped file is not written to
    whole = isthmus.load(bases[name]).net.language.lm.state_dict()
    assert all(torch.equal(tensor, whole[n]) for n, tensor in stored.items() if n in whole)


@torch.no_grad()
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_untrained_adapter_changes_nothing(start: str, bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", trained=False, **QV, init_lora_weights=start)
    found = isthmus.load(folder, language=bases["llama"]).net.language
    base = isthmus.load(bases["llama"]).net.language
    torch.testing.assert_close(found.logits(found.embed(IDS)), base.logits(base.embed(IDS)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' changed the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "of_tomorrow"}, "init_lora_weights 'of_tomorrow'"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new True is not known here"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not merged"),
        ({"r": 8}, "peft cannot merge this adapter"),
        ({"target_modules": ["q_proj"]}, "without a place"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "the adapter lacks"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    changes: dict[str, Any], named: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", **QV)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=named):
        isthmus.load(folder, language=bases["llama"])


def test_trained_tokens_of_a_tied_head_with_biases_are_refused(tmp_path: Path) -> None:
    """peft's own merge gives other logits than the model that it trained, which left the head's biases out."""
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for tied in (False, True):
        base = redraw(PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)))
        own = copy.deepcopy(base)
        settings: dict[str, Any] = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
        model = get_peft_model(base, LoraConfig(**settings))
        for parameter in model.parameters():
            parameter.data += 0.2 * parameter.requires_grad
        model.save_pretrained(str(tmp_path / str(tied)))
        if tied:
            with pytest.raises(CheckpointError, match="shared by lm_head, which has biases"):
                merge_adapter(own, tmp_path / str(tied))
        else:
            merge_adapter(own, tmp_path / str(tied))
            torch.testing.assert_close(own.eval()(IDS % 40).logits, model.eval()(input_ids=IDS % 40).logits)


def test_the_base_is_the_one_named_or_the_one_inside(bases: dict[str, Path], tmp_path: Path) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", **QV)
    assert isthmus.load(folder).kind == "lm"  # the folder that peft wrote down
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny/base"}))
    with pytest.raises(CheckpointError, match=r"is an adapter of 'tiny/base'.*give language="):
        isthmus.load(folder)
    with pytest.raises(CheckpointError, match="needs no vision"):
        isthmus.load(folder, language=bases["llama"], vision=bases["llava"])


@torch.no_grad()
@pytest.mark.parametrize("layout", ["now", "of old"])
def test_an_adapter_of_a_llava_is_merged_into_all_its_parts(
    layout: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Its names of modules are those of the version it was saved with; the vision encoder has a q_proj too."""
    folder = adapter(bases["llava"], tmp_path / "adapter", **QV, modules_to_save=["multi_modal_projector"])
    theirs = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(bases["llava"]), folder)
    wanted = theirs.merge_and_unload().state_dict()
    if layout == "of old":
        swaps = [("model.language_model.", "language_model.model."), ("model.multi_modal", "multi_modal")]
        swaps += [("model.vision_tower.", "vision_tower.vision_model.")]
        state = load_file(folder / "adapter_model.safetensors")
        for new, old in swaps:
            state = {n.replace(f"base_model.model.{new}", f"base_model.model.{old}"): t for n, t in state.items()}
        save_file(state, folder / "adapter_model.safetensors")
    net = isthmus.load(folder).net
    q = "layers.1.self_attn.q_proj.weight"
    for ours, name in (
        (net.language.lm.state_dict()[f"model.{q}"], f"model.language_model.{q}"),
        (net.vision.blocks[1].attn.q_proj.weight, f"model.vision_tower.encoder.{q}"),
        (net.connector.linear_1.weight, "model.multi_modal_projector.linear_1.weight"),
    ):
        torch.testing.assert_close(ours, wanted[name])
    state = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in state.items() if "language_model" in n}, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"modules_to_save": None}))
    alone = isthmus.load(folder, language=bases["llama"]).net.language.lm.state_dict()[f"model.{q}"]
    assert not torch.equal(alone, load_file(bases["llama"] / "model.safetensors")[f"model.{q}"])


def test_an_adapter_beside_a_whole_model_is_told(bases: dict[str, Path], tmp_path: Path, words: Tokenizer) -> None:
    folder = adapter(bases["llama"], tmp_path / "adapter", **QV)
    LlamaForCausalLM.from_pretrained(bases["llama"]).save_pretrained(folder)
    words.save(folder)
    with pytest.warns(IsthmusWarning, match=r"an adapter, adapter_model\.safetensors: .* is not merged"):
        isthmus.load(folder)
