"""LAVIS's layout of BLIP-2: no key missing, none left over, round trips, zero key biases."""

import pytest
import torch

from isthmus.errors import CheckpointError
from isthmus.interop.hf_blip2 import from_hf
from isthmus.interop.lavis import NORM_EPS, from_lavis, to_lavis
from isthmus.models.blip2 import Blip2, Blip2Config
from tests.models.tiny_blip2 import OPT, T5, pairs, retrieval_peer, tiny


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
