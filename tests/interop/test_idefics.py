"""The IDEFICS preset equal to transformers' IdeficsForVisionText2Text: a second oracle for the gated blocks."""

import pytest
import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from isthmus.batch import Batch, Tokens, Visuals
from isthmus.interop.entries import Entry, from_theirs, same, shapes_of
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.vit import VisionConfig
from tests.models.tiny_flamingo import redraw

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
V, LATENTS = 40, 5


def pair(interval: int, *, qk_norm: bool, gate: str) -> tuple[IdeficsForVisionText2Text, Flamingo]:
    config = IdeficsConfig(
        vocab_size=V,
        additional_vocab_size=2,
        **SIZES,
        cross_layer_interval=interval,
        qk_layer_norms=qk_norm,
        alpha_type="vector" if gate == "vector" else "float",
        alpha_initializer="ones",
        use_resampler=True,
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
    theirs = IdeficsForVisionText2Text(config).eval()
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
            xattn=GatedConfig.idefics(32, 4, 48, eps=config.rms_norm_eps, qk_norm=qk_norm, gate=gate),  # type: ignore[arg-type]
            every=interval,
        )
    ).eval()
    _copy(theirs, ours, qk_norm)
    return theirs, ours


def _copy(theirs: IdeficsForVisionText2Text, ours: Flamingo, qk_norm: bool) -> None:
    state = theirs.state_dict()
    found: dict[str, torch.Tensor] = {}
    entries = [Entry("latents", ("connector.latents",)), *same("layer_norm", "connector.norm")]
    for i in range(2):
        a, b, o = f"blocks.{i}.0", f"blocks.{i}.1", f"connector.layers.{i}"
        entries += [
            *same(f"{a}.context_layer_norm", f"{o}.media_norm"),
            *same(f"{a}.latents_layer_norm", f"{o}.latent_norm"),
        ]
        for x, y in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("output_proj", "out_proj")):
            entries += same(f"{a}.{x}", f"{o}.attn.{y}", "weight")
        if qk_norm:
            entries += [*same(f"{a}.q_layer_norm", f"{o}.attn.q_norm"), *same(f"{a}.k_layer_norm", f"{o}.attn.k_norm")]
        entries += [
            *same(f"{b}.ln", f"{o}.mlp_norm"),
            *same(f"{b}.fc", f"{o}.mlp.fc1", "weight"),
            *same(f"{b}.c_proj", f"{o}.mlp.fc2", "weight"),
        ]
    prefix = "model.perceiver_resampler."
    resampler = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found |= from_theirs(entries, resampler, shapes_of(ours), "the resampler")
    entries = []
    for i in range(len(ours.xattn)):
        o = f"xattn.{i}"
        entries += [
            *same(f"{i}.input_layernorm", f"{o}.attn_norm", "weight"),
            *same(f"{i}.post_attention_layernorm", f"{o}.mlp_norm", "weight"),
        ]
        for x, y in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj")):
            entries += same(f"{i}.cross_attn.{x}", f"{o}.attn.{y}", "weight")
        if qk_norm:
            entries += [
                *same(f"{i}.cross_attn.q_layer_norm", f"{o}.attn.q_norm", "weight"),
                *same(f"{i}.cross_attn.k_layer_norm", f"{o}.attn.k_norm", "weight"),
            ]
        for x in ("gate", "up", "down"):
            entries += same(f"{i}.mlp.{x}_proj", f"{o}.mlp.{x}", "weight")
        entries += [Entry(f"{i}.alpha_cross_attn", (f"{o}.attn_gate",)), Entry(f"{i}.alpha_dense", (f"{o}.mlp_gate",))]
    prefix = "model.gated_cross_attn_layers."
    blocks = {
        k.removeprefix(prefix): v.flatten() if "alpha" in k else v for k, v in state.items() if k.startswith(prefix)
    }
    found |= from_theirs(entries, blocks, shapes_of(ours), "the gated blocks")
    found["language.new_rows.input"] = state["model.embed_tokens.additional_embedding.weight"]
    found["language.new_rows.output"] = state["lm_head.additional_fc.weight"]
    for name in ours.language.lm.state_dict():
        found[f"language.lm.{name}"] = state[name]
    missing = ours.load_state_dict(found, strict=False).missing_keys
    assert all(name.startswith("vision.") for name in missing)


@pytest.mark.parametrize(
    ("interval", "qk_norm", "gate"),
    [(1, True, "scalar"), (2, False, "vector"), (1, False, "scalar"), (2, True, "vector")],
)
@torch.no_grad()
def test_logits_equal(interval: int, qk_norm: bool, gate: str) -> None:
    theirs, ours = pair(interval, qk_norm=qk_norm, gate=gate)
    image = V + 1
    ids = torch.tensor([[3, image, 5, 6, image, 7, 8], [4, 4, 9, image, 10, image, 11]])
    features = torch.randn(2, 2, 16, 24)
    tags = (ids == image).cumsum(1)
    look = torch.nn.functional.one_hot(tags, 3)[..., 1:]  # (B, L, N): the last image before each token, or none
    expected = theirs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        image_encoder_embeddings=features,
        image_attention_mask=look,
        use_cache=False,
    ).logits
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
