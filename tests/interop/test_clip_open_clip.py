"""CLIP against open_clip's own outputs (tools/write_open_clip_fixtures.py), and OpenAI's layout."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from isthmus.batch import Tokens
from isthmus.errors import CheckpointError
from isthmus.interop.open_clip import clip_config_from_open_clip, clip_from_open_clip, clip_to_open_clip
from isthmus.interop.openai import SCALARS, clip_config_from_openai, clip_from_openai, clip_to_openai
from isthmus.models.clip import Clip, ClipConfig
from tests.fixtures import OPEN_CLIP

NAMES = ["clip_quick_gelu", "clip_gelu", "custom_text_clip"]


def _fixture(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Their configuration, weights, and what else the file holds."""
    tensors = load_file(OPEN_CLIP / f"{name}.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    rest = {key: value for key, value in tensors.items() if not key.startswith("weights/")}
    return json.loads((OPEN_CLIP / f"{name}.json").read_text()), weights, rest


def _outputs(net: Clip, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tokens = Tokens(ids=data["ids"], lengths=(data["ids"] == 63).int().argmax(dim=1) + 1)
    with torch.no_grad():
        images, texts = net.embed_images(data["pixels"]), net.embed_texts(tokens)
        return {"image_embeds": images, "text_embeds": texts, "logits": net.logits(images, texts)}


def _net(config: ClipConfig, state: dict[str, torch.Tensor]) -> Clip:
    net = Clip(config)
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_open_clip(name):
    values, weights, data = _fixture(name)
    config = clip_config_from_open_clip(values)
    for key, value in _outputs(_net(config, clip_from_open_clip(weights, config)), data).items():
        torch.testing.assert_close(value, data[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_bit_identical(name):
    values, weights, _ = _fixture(name)
    config = clip_config_from_open_clip(values)
    back = clip_to_open_clip(clip_from_open_clip(weights, config), config, custom_text=name == "custom_text_clip")
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_a_trainer_checkpoint_is_unwrapped():
    values, weights, _ = _fixture("clip_gelu")
    config = clip_config_from_open_clip(values)
    wrapped = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}}
    plain, found = clip_from_open_clip(weights, config), clip_from_open_clip(wrapped, config)
    assert all(torch.equal(found[key], value) for key, value in plain.items())


def test_openai_state_dict_with_its_three_scalars():
    _, weights, data = _fixture("clip_quick_gelu")
    state = weights | {name: torch.tensor(size) for name, size in zip(SCALARS, (32, 12, 64), strict=True)}
    config = clip_config_from_openai(state, activation="quick_gelu", head_width=16)
    for key, value in _outputs(_net(config, clip_from_openai(state, config)), data).items():
        torch.testing.assert_close(value, data[key], atol=1e-5, rtol=0)
    back = clip_to_openai(clip_from_openai(state, config), config)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_the_shapes_of_the_published_sizes_give_their_configurations():
    for preset in ("vit_b_32", "vit_b_16", "vit_l_14", "vit_l_14_336"):
        config = getattr(ClipConfig, preset)()
        with torch.device("meta"):
            state = clip_to_openai(Clip(config).state_dict(), config)
        assert clip_config_from_openai(state, activation="quick_gelu") == replace(
            config, text=replace(config.text, pool="argmax")
        )


def test_the_wrong_activation_loads_and_degrades():
    """Why it is asked for: nothing in the weights tells."""
    _, weights, data = _fixture("clip_quick_gelu")
    config = clip_config_from_openai(weights, activation="gelu", head_width=16)
    error = (_outputs(_net(config, clip_from_openai(weights, config)), data)["logits"] - data["logits"]).abs().max()
    assert error > 1e-3


def test_misfits_are_named():
    values, weights, _ = _fixture("clip_gelu")
    config = clip_config_from_open_clip(values)
    del weights["visual.ln_pre.weight"]
    weights["visual.proj"] = weights["visual.proj"].T.contiguous()
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        clip_from_open_clip(weights, config)
    for part in ("missing: visual.ln_pre.weight", "unexpected: extra", "visual.proj is (24, 32), expected (32, 24)"):
        assert part in str(caught.value)
    with pytest.raises(CheckpointError, match="not CLIP with a vision transformer"):
        clip_config_from_openai({"a": torch.zeros(1)}, activation="gelu")
    with pytest.raises(CheckpointError, match="not the configured model's: heads"):
        clip_to_open_clip({k: v for k, v in Clip(config).state_dict().items() if not k.startswith("heads")}, config)


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"pool_type": "first"}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("text_cfg", {"pool_type": "last"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"act_kwargs": {"approximate": "erf"}}),
        ("text_cfg", {"tokenizer_kwargs": {"strip_sep_token": True}}),
    ],
)
def test_variants_beyond_clip_are_refused(where, field):
    values, _, _ = _fixture("clip_gelu")
    with pytest.raises(CheckpointError, match="both directions|" + next(iter(field))):
        clip_config_from_open_clip({**values, where: {**values[where], **field}})


def test_switched_off_variants_are_fine():
    values, _, _ = _fixture("clip_gelu")
    off = {"patch_dropout": 0.0, "attentional_pool": False, "timm_model_name": None}
    assert clip_config_from_open_clip(
        {**values, "vision_cfg": {**values["vision_cfg"], **off}}
    ) == clip_config_from_open_clip(values)


def test_a_sigmoid_head_is_recognised_by_its_bias():
    values, weights, _ = _fixture("clip_gelu")
    config = clip_config_from_open_clip({**values, "init_logit_scale": 2.3, "init_logit_bias": -10.0})
    assert (config.loss, config.init_bias) == ("sigmoid", -10.0)
    state = clip_from_open_clip(weights | {"logit_bias": torch.tensor(-9.0)}, config)
    assert state["heads.logit_bias"].item() == -9.0
