"""Folders written by transformers load behind `isthmus.load`, tokenizer and image processor included."""

import json

import pytest
import torch
from PIL import Image as PilImage
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import isthmus
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
PICTURES = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture
def tokenizer():
    return Tokenizer.train(["a red cube and a blue ring"] * 3, 300)


def finish(folder, tokenizer, pictures=PICTURES):
    tokenizer.save(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))


def redraw(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_clip(tmp_path, tokenizer):
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_id,
    }
    peer = redraw(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)))
    peer.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer)
    model = isthmus.load(tmp_path)
    picture = PilImage.effect_noise((50, 40), 90).convert("RGB")
    pixels = model.processor.image(picture)[None]
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("a red cube"), tokenizer.eos_id]])
    with torch.no_grad():
        logits = peer(input_ids=ids, pixel_values=pixels).logits_per_image
    ours = model.similarity([picture], ["a red cube"]) * peer.logit_scale.exp()
    torch.testing.assert_close(ours, logits.detach(), atol=1e-4, rtol=1e-4)


def test_llava_forbids_its_image_token(tmp_path, tokenizer):
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=LANGUAGE | {"model_type": "llama"},
        image_token_index=310,
        image_seq_length=16,
    )
    peer = redraw(LlavaForConditionalGeneration(config))
    peer.save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"do_pad": True})
    model = isthmus.load(tmp_path)
    # Buffers that no file holds are computed, not left as the memory happened to be.
    ours, theirs = (m.rotary_emb.inv_freq for m in (model.net.language.lm.model, peer.model.language_model))
    assert torch.equal(ours, theirs)
    assert model.forbidden == (310,)
    assert model.processor.image.mode == "pad"
    assert isinstance(model.answer(PilImage.new("RGB", (20, 30), "red"), "what?", max_new_tokens=3), str)
    again = isthmus.load(model.save(tmp_path / "ours"))
    assert again.forbidden == (310,)


def test_language_model(tmp_path, tokenizer):
    redraw(LlamaForCausalLM(LlamaConfig(**LANGUAGE))).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model = isthmus.load(tmp_path)
    assert model.kind == "lm"
    assert isinstance(
        model.generate([isthmus.Record(id="x", parts=(isthmus.Text("a red"),))], max_new_tokens=3)[0], str
    )


def test_what_does_not_fit_is_named(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="neither a format of ours nor a model_type"):
        isthmus.load(tmp_path)
    redraw(
        CLIPModel(
            CLIPConfig(
                text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
                vision_config=VISION,
                projection_dim=16,
            )
        )
    ).save_pretrained(tmp_path)
    finish(tmp_path, tokenizer, PICTURES | {"crop_size": 64})
    with pytest.raises(CheckpointError, match="pictures of 64 pixels"):
        isthmus.load(tmp_path)
