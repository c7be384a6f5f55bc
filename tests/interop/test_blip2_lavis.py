"""LAVIS's layout of BLIP-2: what its own code wrote and computed, no key missing, none left over, round trips, zero key
biases."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isthmus.batch import Visuals
from isthmus.errors import CheckpointError
from isthmus.interop.hf_blip2 import from_hf
from isthmus.interop.lavis import NORM_EPS, from_lavis, to_lavis
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.vit import VisionConfig
from tests.fixtures import LAVIS
from tests.models.tiny_blip2 import OPT, T5, pairs, retrieval_peer, tiny, tokens


def written() -> tuple[Blip2Config, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Configuration, LAVIS's tensors, what it computed by name (pixels among it), and the texts."""
    facts = json.loads((LAVIS / "first_stage.json").read_text(encoding="utf-8"))
    tensors = {
        n: t.float() if t.is_floating_point() else t for n, t in load_file(LAVIS / "first_stage.safetensors").items()
    }
    computed = {
        n.removeprefix("expected."): tensors.pop(n) for n in list(tensors) if n.startswith(("expected.", "pixels"))
    }
    sizes, bert = facts["vision"], facts["qformer"]
    width = sizes["embed_dim"]
    vision = replace(
        VisionConfig.eva_g_14(),
        image_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        width=width,
        layers=sizes["depth"],
        heads=sizes["num_heads"],
        mlp_width=int(width * sizes["mlp_ratio"]),
    )
    qformer = QFormerConfig(
        vision_width=width,
        width=bert["hidden_size"],
        layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"],
        mlp_width=bert["intermediate_size"],
        queries=facts["queries"],
        vocab_size=bert["vocab_size"],
        positions=bert["max_position_embeddings"],
        dec_id=facts["dec"],
        dropout=0.0,
    )
    config = Blip2Config(vision=vision, qformer=qformer, phase="represent", embed_dim=facts["embed"])
    return config, tensors, computed, facts


@torch.no_grad()
def test_the_first_stage_is_what_lavis_wrote_and_computed(monkeypatch) -> None:
    config, theirs, computed, facts = written()
    net = Blip2(config).eval()
    net.load_state_dict(from_lavis(theirs, net.state_dict()))
    texts, pixels = tokens(facts["texts"]), computed["pixels"]
    batch = replace(pairs(facts["texts"]), visuals=(Visuals(index=torch.arange(len(pixels)), pixels=pixels[:, None]),))
    wrong = torch.tensor(facts["wrong_image"]), torch.tensor(facts["wrong_text"])
    monkeypatch.setattr("isthmus.models.blip2.hard_negatives", lambda *_: wrong)

    vision = net.normed(pixels)
    found = {
        "vision": vision,
        "images": net.connector.encode_image(vision).hidden,
        "texts": net.connector.encode_text(texts),
        "matching": net.match_logits(vision, texts)[:, 1],
        **{{"itg": "lm"}.get(name, name): term.mean for name, term in net.loss(batch).items()},
    }
    assert set(found) == set(computed) - {"pixels"}
    for name, value in found.items():
        torch.testing.assert_close(value, computed[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_lavis_s_own_keys_are_written_again() -> None:
    config, theirs, *_ = written()
    net = Blip2(config)
    net.load_state_dict(from_lavis(theirs, net.state_dict()))
    again = to_lavis(net.state_dict())
    # A number line, and the head's table and bias under the second of their two names.
    derived = {"Qformer.bert.embeddings.position_ids"} | {
        f"Qformer.cls.predictions.decoder.{n}" for n in ("weight", "bias")
    }
    assert set(theirs) - set(again) <= derived
    assert set(again) <= set(theirs)
    assert all(torch.equal(again[name], theirs[name]) for name in again)


def without_key_bias(net: Blip2) -> Blip2:
    with torch.no_grad():
        for name, parameter in net.vision.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.zero_()
    return net


@pytest.mark.parametrize(("phase", "kind"), [("represent", "opt"), ("generate", "opt"), ("generate", "t5")])
def test_round_trips(phase: str, kind: str) -> None:
    net = without_key_bias(tiny(phase, T5 if kind == "t5" else OPT))
    state = net.state_dict()
    theirs = to_lavis(state, kind)
    assert theirs["visual_encoder.blocks.0.attn.qkv.weight"].shape == (72, 24)
    assert {n for n in theirs if "attn" in n and "bias" in n and n.startswith("visual_encoder.blocks.0")} == {
        f"visual_encoder.blocks.0.attn.{n}" for n in ("q_bias", "v_bias", "proj.bias")
    }
    assert theirs["visual_encoder.pos_embed"].shape == (1, 17, 24)
    assert ("temp" in theirs) == (phase == "represent")
    assert (f"{kind}_proj.weight" in theirs) == (phase == "generate")
    extra = {"Qformer.bert.embeddings.position_ids": torch.arange(40)[None]}
    again = from_lavis(theirs | extra, state, kind)
    assert set(again) == set(state)
    assert all(torch.equal(again[n], state[n]) for n in state)


def test_files_of_stage_two_leave_the_frozen_parts_out() -> None:
    state = without_key_bias(tiny("generate", OPT)).state_dict()
    theirs = {n: t for n, t in to_lavis(state).items() if not n.startswith(("opt_model.", "visual_encoder."))}
    again = from_lavis(theirs, state)
    assert set(again) == {n for n in state if n.startswith("connector.")}


def test_through_transformers_names_the_outputs_are_the_same() -> None:
    """What the published conversion makes of a LAVIS file and what ours makes of it is one model."""
    peer, net = retrieval_peer()
    hf = from_hf(peer.state_dict())
    for name in hf:
        if name.startswith("vision.") and name.endswith("k_proj.bias"):
            hf[name] = torch.zeros_like(hf[name])
    own = net.state_dict() | hf
    read = Blip2(net.config).eval()
    read.load_state_dict(from_lavis(to_lavis(own), own))
    net.load_state_dict(own)
    batch = pairs()
    pixels = batch.visuals[0].pixels
    assert pixels is not None
    with torch.no_grad():
        ours, theirs = (n.match_logits(n.normed(pixels[:, 0]), batch.text["qformer"]) for n in (read, net))
    assert torch.equal(ours, theirs)


def test_what_does_not_fit_is_named() -> None:
    net = without_key_bias(tiny())
    state, theirs = net.state_dict(), to_lavis(net.state_dict())
    with pytest.raises(CheckpointError, match=r"'Qformer\.gate'"):
        from_lavis(theirs | {"Qformer.gate": torch.zeros(1)}, state)
    del theirs["Qformer.bert.encoder.layer.0.crossattention.self.key.weight"]
    with pytest.raises(CheckpointError, match=r"lacks 'connector\.qformer\.layers\.0\.cross\.k_proj\.weight'"):
        from_lavis(theirs, state)
    with pytest.raises(CheckpointError, match="is not zero"):
        to_lavis(tiny().state_dict())
    assert Blip2Config.vit_g_opt_2_7b().norm_eps == NORM_EPS == 1e-5
