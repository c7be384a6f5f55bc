"""LLaVA in the original repository's layout: equal to the same weights read by the other route."""

import pytest
import torch

from isthmus.errors import CheckpointError
from isthmus.interop.entries import part_of
from isthmus.interop.hf_llava import llava_from_hf, llava_to_hf
from isthmus.interop.original_llava import (
    is_original_llava,
    llava_config_from_original,
    llava_from_original,
    llava_to_original,
    projector_from_original,
    without_newline,
)
from isthmus.models.llava import Llava, LlavaConfig
from tests.models.tiny_llava import SIZE, tiny

CONFIG = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 2048,
    "torch_dtype": "float16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_full_models_round_trip_with_and_without_tower(projector: str) -> None:
    net = tiny(projector=projector)
    state = dict(net.state_dict())
    full, bare = (llava_to_original(state, net.config, vision=tower) for tower in (True, False))
    names = {
        "linear": ["weight"],
        "mlp2x_gelu": ["0.weight", "2.weight"],
        "mlp3x_gelu": ["0.weight", "2.weight", "4.weight"],
    }[projector]
    assert {f"model.mm_projector.{n}" for n in names} <= set(bare)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(bare)
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in full
    assert not any("vision_tower" in name for name in bare)
    tower = part_of(state, "vision.")
    assert equal(llava_from_original(full, net.config), state)
    assert equal(llava_from_original(bare, net.config, vision=tower), state)
    other = {name: torch.zeros_like(tensor) for name, tensor in tower.items()}
    assert equal(llava_from_original(full, net.config, vision=other), state)  # a tower in the file wins
    with pytest.raises(CheckpointError, match="holds no vision tower"):
        llava_from_original(bare, net.config)


def test_equal_to_the_same_weights_by_way_of_transformers() -> None:
    net = tiny()
    state = dict(net.state_dict())
    theirs = llava_to_hf(state, net.config)
    original = {}
    for name, tensor in theirs.items():
        new = name.replace("language_model.", "").replace("vision_tower.", "model.vision_tower.vision_tower.")
        new = new.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
        original[new.replace("multi_modal_projector.linear_2", "model.mm_projector.2")] = tensor
    assert equal(llava_from_original(original, net.config), llava_from_hf(theirs, net.config))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", "mm_projector."])
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_projector_files(projector: str, prefix: str) -> None:
    net = tiny(projector=projector)
    expected = dict(net.connector.state_dict())
    numbers = {"linear_1.": "" if projector == "linear" else "0.", "linear_2.": "2."}
    file = {f"{prefix}{numbers[k[:9]]}{k[9:]}": v for k, v in expected.items()}
    assert equal(projector_from_original(file, net.config), expected)
    with pytest.raises(CheckpointError, match=r"also holds embed_tokens\.weight"):
        projector_from_original({**file, "model.embed_tokens.weight": torch.zeros(1)}, net.config)
    with pytest.raises(CheckpointError, match="missing"):
        projector_from_original(dict(list(file.items())[1:]), net.config)


@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.model."])
def test_the_newline_of_anyres_is_found_beside_a_projector(prefix: str) -> None:
    config = tiny(pinpoints=((SIZE, 2 * SIZE),)).config
    side = {f"{prefix}image_newline": torch.ones(3), f"{prefix}mm_projector.0.bias": torch.zeros(3)}
    rest, newline = without_newline(side, config)
    assert list(rest) == [f"{prefix}mm_projector.0.bias"]
    assert torch.equal(newline["image_newline"], torch.ones(3))
    assert without_newline(side, tiny().config) == (side, {})


def test_what_does_not_fit_is_refused() -> None:
    net = tiny()
    state = llava_to_original(dict(net.state_dict()), net.config)
    for name in (
        "model.mm_projector.2.bias",
        "model.norm.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
    ):
        with pytest.raises(CheckpointError, match=r"norm|bias"):
            llava_from_original({k: v for k, v in state.items() if k != name}, net.config)
    with pytest.raises(CheckpointError, match=r"image_newline"):
        llava_from_original({**state, "model.image_newline": torch.zeros(1)}, net.config)


def test_configurations() -> None:
    assert is_original_llava(CONFIG)
    assert not is_original_llava({"model_type": "llava"})
    config = llava_config_from_original(CONFIG)
    with torch.device("meta"):
        net = Llava(config)
    assert sum(p.numel() for p in net.parameters()) == 7_062_902_784
    first = {**CONFIG, "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14"}
    del first["mm_projector_type"]
    assert llava_config_from_original(first).projector == LlavaConfig.v1_7b().projector
    for change, match in (
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"mm_vision_tower": "some/eva"}, "not known here"),
    ):
        with pytest.raises(CheckpointError, match=match):
            llava_config_from_original({**CONFIG, **change})
