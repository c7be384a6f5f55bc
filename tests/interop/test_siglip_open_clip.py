"""SigLIP as open_clip holds it, its image tower timm's, against its own outputs (tools/write_open_clip_fixtures.py)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import isthmus
from isthmus.errors import CheckpointError
from isthmus.interop import timm_siglip
from isthmus.interop.convert import write_model
from isthmus.interop.open_clip import clip_config_from_open_clip, clip_from_open_clip, clip_to_open_clip
from isthmus.models.clip import Clip, ClipConfig
from isthmus.nn.vit import VisionConfig
from tests.fixtures import OPEN_CLIP
from tests.narrow import there

FOLDER = OPEN_CLIP / "siglip"
CONFIG = json.loads((FOLDER / "open_clip_config.json").read_text())["model_cfg"]
TEXTS = json.loads((OPEN_CLIP / "siglip_texts.json").read_text())


@pytest.fixture(autouse=True)
def _tiny_trunk(monkeypatch):
    """The fixture's tower is named as the published ones are; its size is known to this test alone."""
    monkeypatch.setitem(timm_siglip.SIZES, "fixture", (32, 2, 2, int(32 * 3.7362)))


def test_pictures_and_raw_texts_give_the_embeddings_of_open_clip():
    """Texts go through cleaning, splitting, and padding with the tokenizer's own token: all of it is seen."""
    model, data = isthmus.load(FOLDER), load_file(OPEN_CLIP / "siglip_outputs.safetensors")
    with torch.no_grad():
        images = model.net.embed_images(data["pixels"])
        torch.testing.assert_close(images, data["image_embeds"], atol=1e-5, rtol=0)
        expected = torch.nn.functional.normalize(data["text_embeds"], dim=-1)
        torch.testing.assert_close(model.embed_texts(TEXTS), expected, atol=1e-5, rtol=0)
        logits = model.net.logits(images, data["text_embeds"])
    torch.testing.assert_close(logits, data["logits"], atol=1e-5, rtol=0)
    assert (there(model.processor.image).mode, there(model.processor.image).mean) == ("squash", (0.5, 0.5, 0.5))


def test_padding_and_cleaning_matter_to_the_fixture():
    """Else the test above would show nothing of them."""
    data, model = load_file(OPEN_CLIP / "siglip_outputs.safetensors"), isthmus.load(FOLDER)
    assert data["ids"][0, -1] == model.processor.tokenizer.pad_id == 1
    texts = model.embed_texts(
        ["a photo of a cat", "A photo of a Cat...", "two dogs one frisbee", "twodogs one frisbee"]
    )
    torch.testing.assert_close(texts[0], texts[1])
    torch.testing.assert_close(texts[2], model.embed_texts(["Two_dogs, one frisbee?"])[0])
    assert (texts[2] - texts[3]).abs().max() > 1e-3


def test_round_trip_is_bit_identical():
    weights = load_file(FOLDER / "open_clip_model.safetensors")
    config = clip_config_from_open_clip(CONFIG)
    back = clip_to_open_clip(clip_from_open_clip(weights, config), config)
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_an_exported_folder_opens_to_the_same_model(tmp_path):
    model = isthmus.load(FOLDER)
    write_model(model, tmp_path / "out", "open_clip")
    again = isthmus.load(tmp_path / "out")
    assert again.net.config == model.net.config
    assert all(torch.equal(again.net.state_dict()[k], v) for k, v in model.net.state_dict().items())
    assert torch.equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    told = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert {k: told["vision_cfg"].get(k, v) for k, v in CONFIG["vision_cfg"].items()} == CONFIG["vision_cfg"]


def test_a_tower_that_no_name_stands_for_is_not_exported(tmp_path, monkeypatch):
    model = isthmus.load(FOLDER)
    monkeypatch.delitem(timm_siglip.SIZES, "fixture")
    with pytest.raises(CheckpointError, match="no name stands for this one"):
        write_model(model, tmp_path / "out", "open_clip")


def test_weights_alone_do_not_tell_the_tower():
    with pytest.raises(CheckpointError, match=r"image tower is timm's.*open_clip_config\.json beside"):
        isthmus.load(FOLDER / "open_clip_model.safetensors")


def test_a_trainers_checkpoint_in_the_folder_opens_too(tmp_path):
    """Under ``state_dict``, each name behind ``module.``, as open_clip's trainer saves it."""
    shutil.copytree(FOLDER, tmp_path / "a")
    weights = load_file(FOLDER / "open_clip_model.safetensors")
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / "a" / "epoch_3.pt"
    )
    model = isthmus.load(tmp_path / "a")
    assert torch.equal(model.embed_texts(TEXTS), isthmus.load(FOLDER).embed_texts(TEXTS))


def test_a_missing_weight_and_an_unknown_tower_are_named(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "a")
    weights = load_file(FOLDER / "open_clip_model.safetensors")
    del weights["visual.trunk.attn_pool.q.bias"]
    save_file(weights, tmp_path / "a" / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: visual\.trunk\.attn_pool\.q\.bias"):
        isthmus.load(tmp_path / "a")
    for name in ("vit_base_patch16_siglip_gap_224", "convnext_base", "vit_mega_patch16_siglip_224"):
        vision = {**CONFIG["vision_cfg"], "timm_model_name": name}
        with pytest.raises(CheckpointError, match=f"{name}.*known are"):
            clip_config_from_open_clip({**CONFIG, "vision_cfg": vision})
    with pytest.raises(CheckpointError, match="image_size 64 is not that of"):
        clip_config_from_open_clip({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 64}})


@pytest.mark.parametrize(
    ("name", "preset", "activation"),
    [
        ("vit_base_patch16_siglip_224", VisionConfig.siglip_b_16(224), "gelu"),
        ("vit_so400m_patch14_siglip_384", VisionConfig.siglip_so400m_14(384), "gelu"),
        ("vit_so400m_patch16_siglip_256", None, "gelu_tanh"),
        ("vit_large_patch16_siglip_384", None, "gelu"),
        ("vit_large_patch16_siglip_512", None, "gelu_tanh"),
        ("vit_giantopt_patch16_siglip_256", None, "gelu_tanh"),
    ],
)
def test_published_names_and_their_activations(name, preset, activation):
    config = timm_siglip.trunk_config(name)
    assert config.activation == activation
    assert timm_siglip.trunk_name(config) == name
    if preset is not None:
        assert (config.width, config.layers, config.mlp_width) == (preset.width, preset.layers, preset.mlp_width)


def test_the_published_base_model_has_timms_names():
    """ViT-B-16-SigLIP has 314 tensors in open_clip 3.3.0, 162 of them timm's."""
    config = ClipConfig.siglip_b_16()
    with torch.device("meta"):
        names = clip_to_open_clip(Clip(config).state_dict(), config)
    trunk = {n for n in names if n.startswith("visual.trunk.")}
    assert (len(names), len(trunk)) == (314, 162)
    assert names["visual.trunk.pos_embed"].shape == (1, 196, 768)
    assert names["visual.trunk.attn_pool.kv.weight"].shape == (1536, 768)
