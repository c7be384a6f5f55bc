"""The IDEFICS preset equal to transformers' IdeficsForVisionText2Text: a second oracle for the gated blocks."""

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor

import isthmus
from isthmus.batch import Batch, Tokens, Visuals
from isthmus.data.record import Record, Text
from isthmus.errors import CheckpointError
from isthmus.interop.convert import write_model
from isthmus.interop.hf_idefics import (
    idefics_config_from_hf,
    idefics_config_to_hf,
    idefics_from_hf,
    idefics_to_hf,
    read_idefics_folder,
)
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.vit import VisionConfig
from isthmus.systems.peers import pixels_of
from isthmus.testing import probe
from tests.interop import tiny_models
from tests.models.redrawn import redraw

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
V, LATENTS = 40, 5
Gate = Literal["scalar", "vector"]


def pair(interval: int, *, qk_norm: bool, gate: Gate, **more: Any) -> tuple[Any, Flamingo]:
    """transformers' model and ours with its weights."""
    config = IdeficsConfig(
        vocab_size=V,
        additional_vocab_size=2,
        **SIZES,
        cross_layer_interval=interval,
        qk_layer_norms=qk_norm,
        alpha_type="vector" if gate == "vector" else "float",
        alpha_initializer="ones",
        use_resampler=True,
        **more,
        vision_config={
            "embed_dim": 24,
            "image_size": 16,
            "patch_size": 4,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "hidden_act": "gelu",
        },
        perceiver_config={
            "resampler_n_latents": LATENTS,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": qk_norm,
        },
    )
    torch.manual_seed(0)
    theirs: Any = IdeficsForVisionText2Text(config).eval()
    redraw(theirs)
    with torch.no_grad():
        for layer in theirs.model.gated_cross_attn_layers:
            layer.alpha_cross_attn.normal_(0.7, 0.2)
            layer.alpha_dense.normal_(0.5, 0.2)
    ours = Flamingo(
        FlamingoConfig(
            vision=VisionConfig(
                image_size=16, patch_size=4, width=24, layers=2, heads=4, mlp_width=32, activation="gelu"
            ),
            language={
                "model_type": "llama",
                "vocab_size": V,
                **SIZES,
                "max_position_embeddings": 64,
                "rms_norm_eps": config.rms_norm_eps,
            },
            end_id=V,
            image_id=V + 1,
            resampler=ResamplerConfig(
                layers=2, latents=LATENTS, heads=2, head_width=8, activation="relu", qk_norm=qk_norm
            ),
            xattn=GatedConfig.idefics(32, 4, 48, eps=config.rms_norm_eps, qk_norm=qk_norm, gate=gate),
            every=interval,
        )
    ).eval()
    _copy(theirs, ours)
    return theirs, ours


def their_logits(
    theirs: IdeficsForVisionText2Text, ids: torch.Tensor, look: torch.Tensor, **pictures: torch.Tensor
) -> torch.Tensor:
    """``look`` (B, L, N): which pictures each token sees."""
    return theirs(
        input_ids=ids, attention_mask=torch.ones_like(ids), image_attention_mask=look, use_cache=False, **pictures
    ).logits


def _copy(theirs: IdeficsForVisionText2Text, ours: Flamingo) -> None:
    ours.load_state_dict(idefics_from_hf(theirs.state_dict(), ours.config))


@pytest.mark.parametrize(
    ("interval", "qk_norm", "gate"),
    [(1, True, "scalar"), (2, False, "vector"), (1, False, "scalar"), (2, True, "vector")],
)
@torch.no_grad()
def test_logits_equal(interval: int, qk_norm: bool, gate: Gate) -> None:
    theirs, ours = pair(interval, qk_norm=qk_norm, gate=gate)
    ours.vision.requires_grad_(False)  # an open encoder refuses features that were kept
    image = V + 1
    ids = torch.tensor([[3, image, 5, 6, image, 7, 8], [4, 4, 9, image, 10, image, 11]])
    features = torch.randn(2, 2, 16, 24)
    tags = (ids == image).cumsum(1)
    look = torch.nn.functional.one_hot(tags, 3)[..., 1:]  # (B, L, N): the last image before each token, or none
    expected = their_logits(theirs, ids, look, image_encoder_embeddings=features)
    batch = Batch(
        ids=("a", "b"),
        sources=("", ""),
        text={"lm": Tokens(ids=ids, lengths=torch.tensor([7, 7]))},
        visuals=(Visuals(index=torch.arange(4), features=features.flatten(0, 1)[:, None]),),
        owner=torch.tensor([0, 0, 1, 1]),
        keys=("a", "b", "c", "d"),
    )
    found = ours.logits(batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with ours.language.blind():
        assert (ours.language.logits(ours.embed_prompt(batch)) - found).abs().max() > 0.1


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
)
@torch.no_grad()
def test_activation_and_positions_are_the_configurations_there_and_back(more, tmp_path):
    theirs, _ = pair(1, qk_norm=True, gate="scalar", **more)
    theirs.save_pretrained(tmp_path)
    config, state = read_idefics_folder(tmp_path)
    ours = Flamingo(config).eval()
    ours.load_state_dict(state)
    again = IdeficsForVisionText2Text(IdeficsConfig.from_dict(idefics_config_to_hf(config))).eval()
    again.load_state_dict(idefics_to_hf(ours.state_dict(), config), strict=False)
    ids = torch.tensor([[3, V + 1, 5, 6, 7, 8, 9]])
    pixels, look = torch.randn(1, 1, 3, 16, 16), (ids == V + 1).cumsum(1)[..., None]
    batch = Batch(
        ids=("a",),
        sources=("",),
        text={"lm": Tokens(ids=ids, lengths=torch.tensor([7]))},
        visuals=(Visuals(index=torch.arange(1), pixels=pixels),),
        owner=torch.tensor([0]),
        keys=("a",),
    )
    expected = their_logits(theirs, ids, look, pixel_values=pixels)
    torch.testing.assert_close(ours.logits(batch), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(their_logits(again, ids, look, pixel_values=pixels), expected, atol=1e-4, rtol=1e-4)
    plain = IdeficsConfig(**{**idefics_config_to_hf(config), "hidden_act": "silu", "rope_parameters": None})
    again = IdeficsForVisionText2Text(plain).eval()
    again.load_state_dict(theirs.state_dict(), strict=False)
    assert (their_logits(again, ids, look, pixel_values=pixels) - expected).abs().max() > 1e-2


def test_an_activation_that_is_not_here_is_refused():
    values = IdeficsConfig(use_resampler=True, additional_vocab_size=2, hidden_act="tanh").to_dict()
    with pytest.raises(CheckpointError, match="hidden_act 'tanh' is unknown here"):
        idefics_config_from_hf(values)


def test_a_saved_folder_reads_as_the_librarys_processor(tmp_path):
    """Ids with a fake token on both sides of a picture, shared by two in a row; pixels; what each token sees."""
    model = tiny_models.idefics()
    write_model(model, tmp_path / "out", "hf")
    peer: Any = IdeficsProcessor.from_pretrained(tmp_path / "out")
    pictures = [probe.picture(n) for n in (1, 2, 3)]
    record = Record("a", (*pictures[:2], Text(" two rings"), pictures[2], Text(" a red cube", learn=True)))
    record = replace(record, parts=tuple(replace(p, role="text") for p in record.parts))
    shown = [p.source.read() for p in pictures]
    theirs = peer(text=[[*shown[:2], "two rings", shown[2], "a red cube"]], add_eos_token=True, return_tensors="pt")
    example = isthmus.load(tmp_path / "out").processor.example(record, 0)
    assert list(example.streams["lm"].ids) == theirs["input_ids"][0].tolist()
    ours = pixels_of(example)
    torch.testing.assert_close(ours, theirs["pixel_values"][0], atol=1e-5, rtol=0)
    seen = torch.tensor(example.streams["lm"].media_index)
    mask = theirs["image_attention_mask"][0]
    assert torch.equal(torch.where(mask.any(-1), mask.int().argmax(-1) + 1, 0), seen)


def test_an_instruct_models_turns_read_and_end_as_the_librarys(tmp_path):
    """IDEFICS-instruct: a third token ends every turn, the user's too, and stops an answer."""
    write_model(tiny_models.idefics(instruct=True), tmp_path / "out", "hf")
    peer: Any = IdeficsProcessor.from_pretrained(tmp_path / "out")
    model = isthmus.load(tmp_path / "out")
    picture, other = probe.picture(1), probe.picture(2)
    record = Record(
        "a",
        (
            replace(picture, role="user"),
            Text("what is it?", role="user"),
            Text("a red cube", role="assistant", learn=True),
            replace(other, role="user"),
            Text("and this?", role="user"),
            Text("a ring", role="assistant", learn=True),
        ),
    )
    end = "<end_of_utterance>"
    said = ["User:", picture.source.read(), f"what is it?{end}", f"\nAssistant: a red cube{end}", "\nUser:"]
    said += [other.source.read(), f"and this?{end}", "\nAssistant:"]
    theirs = peer(text=[said], add_end_of_utterance_token=False, return_tensors="pt")["input_ids"][0].tolist()
    assert list(model.processor.prompt(record).streams["lm"].ids) == theirs
    span = model.processor.example(record, 0).streams["lm"]
    turn = model.net.config.turn_id
    assert [i for i, label in zip(span.ids, span.labels or (), strict=True) if label == turn] == [turn, turn]

    def always(_: torch.nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([turn]), 100.0)

    model.net.language.lm.get_output_embeddings().register_forward_hook(always)
    assert model.answer_records([record], max_new_tokens=5) == [""]


@pytest.mark.parametrize(("extra", "tied"), [(2, True), (3, True), (2, False)])
@torch.no_grad()
def test_folders_with_fields_left_out_and_tied_tables(tmp_path, extra, tied):
    """What a config.json leaves out is the library's default, not CLIP's; tied tables are written once."""
    vision = {"embed_dim": 32, "image_size": 28, "num_hidden_layers": 2, "intermediate_size": 48}
    config = IdeficsConfig(
        vocab_size=V,
        additional_vocab_size=extra,
        **SIZES,
        use_resampler=True,
        tie_word_embeddings=tied,
        vision_config=vision,
        perceiver_config={"resampler_n_latents": LATENTS, "resampler_depth": 1, "resampler_n_heads": 2},
    )
    torch.manual_seed(0)
    theirs = IdeficsForVisionText2Text(config).eval()
    redraw(theirs)
    theirs.tie_weights()
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["vision_config"] = vision  # 16 heads and patches of 14 pixels are the library's
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, state = read_idefics_folder(tmp_path)
    assert (config.vision.heads, config.vision.patch_size) == (16, 14)
    ours = Flamingo(config).eval()
    ours.load_state_dict(state)
    ids = torch.tensor([[3, V + 1, 5, 6, V + 2 if extra == 3 else V]])
    pixels = torch.randn(1, 1, 3, 28, 28)
    look = (ids == V + 1).cumsum(1)[..., None]
    expected = their_logits(theirs, ids, look, pixel_values=pixels)
    batch = Batch(
        ids=("a",),
        sources=("",),
        text={"lm": Tokens(ids=ids, lengths=torch.tensor([5]))},
        visuals=(Visuals(index=torch.arange(1), pixels=pixels),),
        owner=torch.tensor([0]),
        keys=("a",),
    )
    torch.testing.assert_close(ours.logits(batch), expected, atol=1e-4, rtol=1e-4)


def test_what_is_no_flamingo_is_refused(tmp_path):
    model = tiny_models.idefics()
    write_model(model, tmp_path / "out", "hf")
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    for field, value in (("use_resampler", False), ("additional_vocab_size", 4)):
        file.write_text(json.dumps({**values, field: value}))
        with pytest.raises(CheckpointError, match=field):
            isthmus.load(tmp_path / "out")
    file.write_text(json.dumps({**values, "cross_layer_interval": 2}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.gated_cross_attn_layers\.1"):
        isthmus.load(tmp_path / "out")


def test_the_published_sizes(tmp_path):
    """Blocks of IDEFICS 9B and 80B count 1,434,519,568 and 13,925,422,120 numbers (spec of the checkpoints)."""
    nine = {
        "vision_config": {
            "embed_dim": 1280,
            "image_size": 224,
            "patch_size": 14,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "intermediate_size": 5120,
        },
        "perceiver_config": {"qk_layer_norms_perceiver": True},
        "use_resampler": True,
        "additional_vocab_size": 2,
        "qk_layer_norms": True,
        "cross_layer_interval": 4,
    }
    eighty = {
        **nine,
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    for raw, blocks in ((nine, 1_434_519_568), (eighty, 13_925_422_120)):
        config = idefics_config_from_hf(raw)
        with torch.device("meta"):
            ours, theirs = (
                Flamingo(config),
                IdeficsForVisionText2Text(IdeficsConfig.from_dict(idefics_config_to_hf(config))),
            )
        assert sum(p.numel() for p in ours.xattn.parameters()) == blocks
        written = idefics_to_hf(ours.state_dict(), config)
        assert {n: t.shape for n, t in written.items()} == {n: t.shape for n, t in theirs.state_dict().items()}
