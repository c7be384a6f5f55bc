"""Flamingo equal to open_flamingo 2.0.1 (fixtures of tools/write_open_flamingo_fixtures.py), and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from isthmus.batch import Batch, Tokens, Visuals
from isthmus.errors import CheckpointError
from isthmus.interop.hf_towers import vision_from_hf
from isthmus.interop.open_flamingo import trained_from_open_flamingo, trained_to_open_flamingo
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import media_index, media_mask
from isthmus.nn.vit import VisionConfig

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "open_flamingo"
FAMILIES = ("llama", "gpt_neox", "mpt")


def fixture(family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Facts, tensors to compare, and the state dict of their net."""
    facts = json.loads((FOLDER / f"{family}.json").read_text())
    tensors = {
        k: v.float() if v.dtype == torch.float16 else v for k, v in load_file(FOLDER / f"{family}.safetensors").items()
    }
    state = {k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")}
    return facts, tensors, state


def checkpoint(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What open_flamingo would save of it: nothing of the encoder and of the frozen layers."""
    return {
        k: v
        for k, v in state.items()
        if k.startswith("perceiver") or "gated_cross_attn_layer" in k or "embed" in k or k.endswith("wte.weight")
        if not k.startswith("vision_encoder")
    }


def build(family: str) -> tuple[Flamingo, dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    facts, tensors, state = fixture(family)
    v = facts["vision"]
    vision = VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["hidden_size"],
        layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"],
        mlp_width=v["intermediate_size"],
    )
    r = facts["resampler"]
    net = Flamingo(
        FlamingoConfig(
            vision=vision,
            language={"model_type": family, "vocab_size": facts["text"], **facts["language"]},
            end_id=facts["end"],
            image_id=facts["image"],
            resampler=ResamplerConfig(
                layers=r["depth"], latents=r["num_latents"], heads=r["heads"], head_width=r["dim_head"]
            ),
            every=facts["every"],
            offset=facts["every"] - 1,
        )
    ).eval()
    trained = trained_from_open_flamingo(checkpoint(state), net)
    own = net.state_dict()
    if "language.new_rows.output" in own and "language.new_rows.output" not in trained:  # an untied head: not saved
        head = next(state[k] for k in state if k.endswith(("lm_head.weight", "embed_out.weight")))
        trained["language.new_rows.output"] = head[-2:]
    theirs = {k.replace(".decoder_layer.", ".").removeprefix("lang_encoder."): x for k, x in state.items()}
    for name in own:
        if name.startswith("language.lm."):
            value = theirs.get(name.removeprefix("language.lm."))
            if value is None:  # a tied head
                value = theirs["transformer.wte.weight"]
            trained[name] = value[: facts["text"]] if value.shape != own[name].shape else value
    tower = {k.removeprefix("vision_encoder.tower."): x for k, x in state.items() if k.startswith("vision_encoder")}
    trained |= {f"vision.{k}": x for k, x in vision_from_hf(tower, vision).items()}
    net.load_state_dict(trained)
    return net, tensors, state, facts


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_with_ragged_tags_and_open_gates(family: str) -> None:
    net, tensors, _, facts = build(family)
    ids = tensors["ids"]
    rows = len(ids)
    batch = Batch(
        ids=tuple(map(str, range(rows))),
        sources=("",) * rows,
        text={"lm": Tokens(ids=ids, lengths=torch.full((rows,), ids.shape[1]))},
        visuals=(Visuals(index=torch.arange(2 * rows), pixels=tensors["pixels"].flatten(0, 1)),),
        owner=torch.arange(rows).repeat_interleave(2),
        keys=tuple(map(str, range(2 * rows))),
    )
    with torch.no_grad():
        logits = net.logits(batch)
        torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=1e-5)
        with net.language.blind():  # the gates matter
            bare = net.language.logits(net.embed_prompt(batch))
    assert (bare - logits).abs().max() > 0.1
    assert facts["every"] == len(net.language.decoder_layers()) // len(net.xattn)


@pytest.mark.parametrize("family", FAMILIES)
def test_resampler_and_block_equal_separately(family: str) -> None:
    """In float64 to 1e-12; in float32 to what both sides round."""
    net, tensors, _, _ = build(family)
    for dtype, exact, atol, rtol in ((torch.float32, "", 3e-6, 2e-6), (torch.float64, "64", 1e-12, 0)):
        net = net.to(dtype)
        with torch.no_grad():
            resampled = net.connector(tensors["features"].to(dtype).flatten(0, 1)).unflatten(0, (2, 3))
            torch.testing.assert_close(resampled, tensors[f"resampled{exact}"], atol=atol, rtol=rtol)
            block, media = net.xattn[0], tensors["resampled"].to(dtype)[:, :2]
            mask = media_mask(media_index(tensors["tags"].bool()), 2, media.shape[2])
            found = block(tensors["hidden"].to(dtype), *block.keys_values(media), mask)  # type: ignore[operator]
        torch.testing.assert_close(found, tensors[f"blocked{exact}"], atol=atol, rtol=rtol)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_round_trips_with_no_key_left(family: str) -> None:
    net, _, state, facts = build(family)
    saved = checkpoint(state)
    written = trained_to_open_flamingo(net, net.language.vocab_size)
    tied = net.language.new_rows.output is None
    head = "embed_out" if family == "gpt_neox" else "lm_head"  # as published files call it
    assert set(written) - set(saved) == (set() if tied else {f"lang_encoder.{head}.weight"})
    for name, value in saved.items():
        torch.testing.assert_close(written[name], value, atol=0, rtol=0, msg=name)
    run = {"epoch": 1, "model_state_dict": {f"module.{k}": v for k, v in saved.items()}}
    again = trained_from_open_flamingo(run, net)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in again.items())
    extra = {**saved, "perceiver.strange": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"perceiver\.strange"):
        trained_from_open_flamingo(extra, net)
    with pytest.raises(CheckpointError, match="latents"):
        trained_from_open_flamingo({k: v for k, v in saved.items() if k != "perceiver.latents"}, net)
    short = {
        k: v[: facts["text"]] if k.endswith(("wte.weight", "embed_tokens.weight", "embed_in.weight")) else v
        for k, v in saved.items()
    }
    with pytest.raises(CheckpointError, match="tokenizer does not belong"):
        trained_from_open_flamingo(short, net)
