"""LLaVA against transformers: tiny random models, both ways, all four layouts of keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)

from isthmus.checkpoint import write_folder
from isthmus.errors import CheckpointError
from isthmus.interop.hf_llava import (
    llava_config_from_hf,
    llava_config_to_hf,
    llava_from_hf,
    llava_to_hf,
    read_llava_folder,
)
from isthmus.language import Decoding
from isthmus.load_report import Account
from isthmus.models.llava import Llava
from tests.models.redrawn import redraw
from tests.models.tiny_llava import LANGUAGE, ROWS, Row, V, batch, tiny

IMAGE = V - 1
NEVER = {"suppress_tokens": [IMAGE], "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def hf_model(**changes: Any) -> Any:
    """A LlavaForConditionalGeneration."""
    text = changes.pop("text_config", None) or LlamaConfig(**{k: v for k, v in LANGUAGE.items() if k != "model_type"})
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=16, **changes
    )
    model = LlavaForConditionalGeneration(config).eval()
    redraw(model)
    return model


def hf_inputs(row: Row, per_picture: int = 16) -> dict[str, torch.Tensor]:
    """The placeholder route: the image token once per visual token."""
    rows = batch([row], per_picture=per_picture)
    ids = rows.text["lm"].ids
    inputs = {"input_ids": ids.masked_fill(ids < 0, IMAGE)}
    if rows.visuals and rows.visuals[0].pixels is not None:
        inputs["pixel_values"] = rows.visuals[0].pixels[:, 0]
    return inputs


def ours(folder: Path) -> Llava:
    config, state, token = read_llava_folder(folder)
    assert token == IMAGE
    net = Llava(config).eval()
    net.load_state_dict(state, strict=True)
    return net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_feature_layer": [1, -2]},
        {"vision_feature_layer": -1},
        {"vision_feature_select_strategy": "full", "image_seq_length": 17},
        {"tie_word_embeddings": True},
    ],
)
@torch.no_grad()
def test_logits_and_greedy_tokens_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = dict(changes)
    per_picture = changes.pop("image_seq_length", 16)
    theirs = hf_model(**changes)
    theirs.save_pretrained(tmp_path)
    net = ours(tmp_path)
    assert net.num_tokens(16, 16) == per_picture
    together = net.generate(
        batch([ROWS[n] for n in ROWS], per_picture=per_picture), Decoding(max_new_tokens=16, forbidden_ids=(IMAGE,))
    )
    for row, answer in zip(ROWS.values(), together, strict=True):
        inputs = hf_inputs(row, per_picture)
        logits = net.language.logits(net.embed_prompt(batch([row], per_picture=per_picture)))
        expected = theirs(**inputs).logits
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        found = theirs.generate(**inputs, max_new_tokens=16, **NEVER)[0, inputs["input_ids"].shape[1] :]
        assert answer == found.tolist()


_SMALL = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
OTHERS: dict[str, dict[str, Any]] = {
    "granite": {**_SMALL, "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {**_SMALL, "logit_scale": 0.25},
    "cohere2": {**_SMALL, "head_dim": 8},
    "gemma2": {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gpt_neox": {**_SMALL, "use_parallel_residual": False},
    "phi": _SMALL,
    "opt": {
        "vocab_size": V,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 8},
}
"""Language models that scale or cap their logits, name their body otherwise, or have a bias in the head."""


_QUICK = ("granite", "gpt_neox", "gptj")
"""One whose logits are scaled, one whose body has other names, one with a bias in its head."""


@pytest.mark.parametrize("kind", [k if k in _QUICK else pytest.param(k, marks=pytest.mark.slow) for k in OTHERS])
@torch.no_grad()
def test_any_language_model_answers_as_the_class_that_saved_it(kind: str, tmp_path: Path) -> None:
    """Their LLaVA puts a bare head on the language model's body; and what we write they read."""
    text = AutoConfig.for_model(kind, **OTHERS[kind], tie_word_embeddings=False)
    theirs = hf_model(text_config=text)
    theirs.save_pretrained(tmp_path / "theirs")
    net = ours(tmp_path / "theirs")
    assert net.language.plain_head()
    config = llava_config_to_hf(net.config, image_token_id=IMAGE)
    files = {"config.json": config, "model.safetensors": llava_to_hf(net.state_dict(), net.config)}
    write_folder(tmp_path / "ours", files)
    opened: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    again, report = opened
    assert not any(report.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = again.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in theirs.state_dict().items())
    row = ROWS["two"]
    inputs, own = hf_inputs(row), batch([row])
    expected = theirs(**inputs).logits
    assert expected.abs().max() > 2
    logits = net.language.logits(net.embed_prompt(own))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.eval()(**inputs).logits, expected, atol=1e-4, rtol=0)
    beams = net.generate(own, Decoding(max_new_tokens=8, num_beams=3, forbidden_ids=(IMAGE,)))
    found = theirs.generate(**inputs, max_new_tokens=8, num_beams=3, **NEVER)
    assert beams == [found[0, inputs["input_ids"].shape[1] :].tolist()]


def test_what_is_not_applied_and_what_is_renamed_is_told(tmp_path: Path) -> None:
    text = AutoConfig.for_model("granite", **OTHERS["granite"], tie_word_embeddings=False)
    hf_model(text_config=text).save_pretrained(tmp_path)
    account = Account()
    read_llava_folder(tmp_path, account)
    scaled, named = account.report().notes
    assert scaled.startswith("text_config.logits_scaling 8 is not applied")
    assert "names of transformers 4.52 or later" in named
    assert named in str(account.report())
    assert account.report().to_dict()["notes"] == (scaled, named)


@torch.no_grad()
def test_loss_equals_transformers_with_picture_positions_masked() -> None:
    theirs = hf_model()
    config = llava_config_from_hf(theirs.config.to_dict())
    net = Llava(config).eval()
    net.load_state_dict(llava_from_hf(theirs.state_dict(), config))
    for row in ROWS.values():
        term = net.loss(batch([row]))["lm"]
        expected = theirs(**hf_inputs(row), labels=batch([row]).text["lm"].labels).loss
        assert term.mean.item() == pytest.approx(expected.item(), abs=1e-5)


def in_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """``state`` of the first layout (the files of up to 4.51) with the keys of another."""

    def key(name: str) -> str:
        if layout == "A":
            return name
        if name == "language_model.lm_head.weight":
            return name if layout == "D" else "lm_head.weight"
        if layout in "CD":
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
        if layout in "BC":
            name = "model." + name.replace("language_model.model.", "language_model.")
        return name

    return {key(name): tensor.clone() for name, tensor in state.items()}


def test_all_four_layouts_load_to_identical_weights(tmp_path: Path) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    config, expected, _ = read_llava_folder(tmp_path)
    first = llava_to_hf(expected, config)
    assert {
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_1.bias",
    } <= set(first)
    in_memory, on_disk = set(theirs.state_dict()), set(load_file(tmp_path / "model.safetensors"))
    assert set(in_layout(first, "C")) == in_memory
    assert set(in_layout(first, "D")) == on_disk
    seen = set()
    for layout in "ABCD":
        state = in_layout(first, layout)
        seen.add(frozenset(state))
        found = llava_from_hf(state, config)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(seen) == 4


@pytest.mark.parametrize(("tied", "layer"), [(False, -2), (True, -1)])
@torch.no_grad()
def test_what_we_write_transformers_reads_with_equal_logits_and_tokens(tied: bool, layer: int, tmp_path: Path) -> None:
    net = tiny(language={**LANGUAGE, "tie_word_embeddings": tied}, feature_layer=layer)
    written = llava_to_hf(net.state_dict(), net.config)
    assert ("language_model.lm_head.weight" in written) is not tied
    config = llava_config_to_hf(net.config, image_token_id=IMAGE)
    never = {"suppress_tokens": [IMAGE]}
    folder = tmp_path / "given"
    write_folder(folder, {"config.json": config, "generation_config.json": never, "model.safetensors": written})
    again = ours(folder)
    assert again.config == net.config
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.state_dict().items())
    opened: Any = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    theirs, report = opened
    assert not any(report.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.image_token_id == IMAGE
    for row in ROWS.values():
        inputs = hf_inputs(row)
        expected = net.language.logits(net.embed_prompt(batch([row])))
        torch.testing.assert_close(theirs.eval()(**inputs).logits, expected, atol=1e-4, rtol=0)
        answer = net.generate(batch([row]), Decoding(max_new_tokens=8, forbidden_ids=(IMAGE,)))
        found = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert answer == [found[0, inputs["input_ids"].shape[1] :].tolist()]


@torch.no_grad()
def test_another_language_model_inside(tmp_path: Path) -> None:
    sizes = {k: v for k, v in LANGUAGE.items() if k != "model_type"}
    theirs = hf_model(text_config=Qwen2Config(**sizes))
    theirs.save_pretrained(tmp_path)
    net = ours(tmp_path)
    assert net.config.language["model_type"] == "qwen2"
    expected = theirs(**hf_inputs(ROWS["two"])).logits
    torch.testing.assert_close(net.language.logits(net.embed_prompt(batch([ROWS["two"]]))), expected, atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    good = load_file(tmp_path / "model.safetensors")

    def refuse(state: dict[str, torch.Tensor], match: str) -> None:
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            read_llava_folder(tmp_path)

    def without(name: str) -> dict[str, torch.Tensor]:
        return {k: v for k, v in good.items() if not k.startswith(name)}

    refuse({**good, "image_newline": torch.zeros(3)}, r"unexpected image_newline\. It belongs to LLaVA-NeXT")
    refuse({**good, "surprise": torch.zeros(3)}, "unexpected surprise")
    refuse(without("multi_modal_projector.linear_2"), r"missing: linear_2\.bias, linear_2\.weight")
    refuse(without("vision_tower.encoder.layers.0.mlp.fc1.bias"), r"missing: encoder\.layers\.0\.mlp\.fc1\.bias")
    refuse(without("language_model.lm_head"), r"lacks 1 tensors, among them lm_head\.weight")

    config = theirs.config.to_dict()
    for change, match in (
        ({"projector_hidden_act": "relu"}, "only 'gelu'"),
        ({"model_type": "llava_onevision"}, "is not"),
        ({"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "keeps the class token"),
        ({"mm_vision_tower": "x"}, "original repository"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "no class token to drop"),
    ):
        with pytest.raises(CheckpointError, match=match):
            llava_config_from_hf({**config, **change})
    with pytest.raises(CheckpointError, match="two-layer projector only; this model has 'linear'"):
        llava_config_to_hf(tiny(projector="linear").config, image_token_id=IMAGE)


def test_the_published_configuration_is_understood() -> None:
    """The fields that config.json of the 1.5 conversions carries."""
    published = {
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "torch_dtype": "float16",
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vocab_size": 32064,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
    }
    config = llava_config_from_hf(published)
    with torch.device("meta"):
        net = Llava(config)
    assert sum(p.numel() for p in net.parameters()) == 7_063_427_072
    assert net.num_tokens(336, 336) == 576
    assert llava_config_from_hf({"model_type": "llava"}).vision == config.vision


@torch.no_grad()
def test_heads_are_tied_where_either_configuration_says_so(tmp_path: Path) -> None:
    """Told in text_config alone, a head that is not stored is the table; one that is stored and differs is not tied."""
    theirs = hf_model(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    del values["tie_word_embeddings"]
    values["text_config"]["tie_word_embeddings"] = True
    file.write_text(json.dumps(values))
    weights = {n: t for n, t in load_file(tmp_path / "model.safetensors").items() if "lm_head" not in n}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for own_head in (False, True):
        if own_head:
            head = torch.randn(V, theirs.config.text_config.hidden_size)
            save_file(
                {**weights, "language_model.lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"}
            )
        again, net = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval(), ours(tmp_path)
        assert net.config.language["tie_word_embeddings"] is not own_head
        row = ROWS[next(iter(ROWS))]
        logits = net.language.logits(net.embed_prompt(batch([row])))
        torch.testing.assert_close(logits, again(**hf_inputs(row)).logits, atol=1e-4, rtol=0)
