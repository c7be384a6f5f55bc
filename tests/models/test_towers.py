"""Single towers: transformers' own classes as they save themselves, and what such a model can do."""

from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

import isthmus
from isthmus.data.record import Record, Text
from isthmus.errors import CapabilityError, CheckpointError, DataError
from isthmus.model import Model
from isthmus.models.towers import ImageEncoder, ImageEncoderConfig
from isthmus.nn.vit import VisionConfig
from isthmus.testing import probe
from tests.interop import tiny_models
from tests.models.tiny_blip2 import redraw

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 400, "max_position_embeddings": 20, "bos_token_id": 1, "pad_token_id": 0}


def _saved(cls, config, folder):
    """As the library's newest version writes it: without the prefix that older files have."""
    torch.manual_seed(0)
    model = redraw(cls(config)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel"])
def test_pictures_give_the_vectors_of_transformers(kind, tmp_path):
    configs = {"C": transformers.CLIPVisionConfig, "S": transformers.SiglipVisionConfig}
    more = {"projection_dim": 24} if "Projection" in kind else {}
    theirs = _saved(getattr(transformers, kind), configs[kind[0]](**VISION, **more), tmp_path)
    model = isthmus.load(tmp_path)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        found = theirs(pixel_values=pixels)
        expected = getattr(found, "image_embeds", None)
        expected = found.pooler_output if expected is None else expected
        torch.testing.assert_close(model.net.embed_images(pixels), expected, atol=1e-5, rtol=0)
    joint = kind != "CLIPVisionModel"
    assert model.capabilities == (("embed_images", "vision_features") if joint else ("vision_features",))


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "SiglipTextModel"])
def test_texts_give_the_vectors_of_transformers(kind, tmp_path):
    configs = {"C": transformers.CLIPTextConfig, "S": transformers.SiglipTextConfig}
    tokenizer = tiny_models.openai_clip().processor.tokenizer
    more = {"projection_dim": 24} if "Projection" in kind else {}
    config = configs[kind[0]](**{**TEXT, **more, "eos_token_id": tokenizer.eos_id})
    theirs = _saved(getattr(transformers, kind), config, tmp_path)
    for name, text in tokenizer.files().items():
        (tmp_path / name).write_text(text)
    model = isthmus.load(tmp_path)
    texts = ["a red cube", "two rings and a small green ball"]
    for text in texts:
        ids = list(model.processor.text_example(text).streams["text"].ids)
        if kind.startswith("Siglip"):
            ids += [0] * (20 - len(ids))
        with torch.no_grad():
            found = theirs(input_ids=torch.tensor([ids]))
        expected = getattr(found, "text_embeds", None)
        expected = found.pooler_output if expected is None else expected
        unit = torch.nn.functional.normalize(expected, dim=-1)
        torch.testing.assert_close(model.embed_texts([text]), unit, atol=1e-5, rtol=0)
    assert model.embed_texts(texts).shape[0] == 2


def test_both_towers_of_a_clip_give_its_similarities(tmp_path):
    whole = tiny_models.openai_clip()
    for name, tower in (("image", tiny_models.image_encoder(whole)), ("text", tiny_models.text_encoder(whole))):
        tower.save(tmp_path / name)
    images, texts = isthmus.load(tmp_path / "image"), isthmus.load(tmp_path / "text")
    shown = [probe.picture(n) for n in range(3)]
    told = ["a red cube", "two rings"]
    found = images.embed_images(shown) @ texts.embed_texts(told).T
    torch.testing.assert_close(found, whole.similarity(shown, told))
    assert not (tmp_path / "image" / "tokenizer.json").exists()


def test_what_a_tower_cannot_do_is_named():
    image, text = tiny_models.image_encoder(projected=False), tiny_models.text_encoder()
    for model, ask in (
        (image, lambda m: m.embed_texts(["a"])),
        (image, lambda m: m.embed_images([])),
        (text, lambda m: m.vision_features([])),
        (text, lambda m: m.answer(None, "what?")),
    ):
        with pytest.raises(CapabilityError, match=f"This {model.kind} model cannot"):
            ask(model)
    with pytest.raises(CapabilityError, match="no tokenizer"):
        _ = image.processor.tokenizer
    with pytest.raises(DataError, match="one picture a sample and this has 0"):
        image.processor.example(Record("a", (Text("x"),)), 0)
    with pytest.raises(DataError, match="one text and no picture"):
        text.processor.example(Record("a", ()), 0)
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_width": 32}
    part = ImageEncoder(ImageEncoderConfig(vision=VisionConfig.siglip(**sizes, pool="none")))
    with pytest.raises(CapabilityError, match="it can: serve as a part of other models"):
        Model(part, image.processor).vision_features([])


def test_a_tower_with_a_tensor_too_many_is_refused(tmp_path):
    model = _saved(transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**VISION), tmp_path)
    save_file({**model.state_dict(), "text_projection.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: text_projection"):
        isthmus.load(tmp_path)
