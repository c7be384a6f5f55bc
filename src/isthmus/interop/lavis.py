"""LAVIS, the original code of BLIP-2: its names as ours, both ways, as pure maps over state dicts.

Files hold ``{"model": state_dict}``; those of the second stage leave the frozen LM out, and often the encoder. The EVA
encoder's keys have no bias there: ours is zero. CLIP's ViT-L as encoder has OpenAI's names (``open_lavis``).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.errors import CheckpointError
from isthmus.load_report import Account

HEAD, EVA_HEAD = 64, 88
"""Widths of an attention head: of the Q-Former and CLIP's tower, and of EVA's."""

NORM_EPS = 1e-5
"""``ln_vision``'s eps in LAVIS; transformers' conversion has 1e-6 (``Blip2Config.norm_eps``)."""

_LAYER = {
    "attn.q_proj.": "attention.self.query.",
    "attn.k_proj.": "attention.self.key.",
    "attn.v_proj.": "attention.self.value.",
    "attn.out_proj.": "attention.output.dense.",
    "ln_attn.": "attention.output.LayerNorm.",
    "cross.q_proj.": "crossattention.self.query.",
    "cross.k_proj.": "crossattention.self.key.",
    "cross.v_proj.": "crossattention.self.value.",
    "cross.out_proj.": "crossattention.output.dense.",
    "ln_cross.": "crossattention.output.LayerNorm.",
    "ffn_text.mlp.fc1.": "intermediate.dense.",
    "ffn_text.mlp.fc2.": "output.dense.",
    "ffn_text.ln.": "output.LayerNorm.",
    "ffn_query.mlp.fc1.": "intermediate_query.dense.",
    "ffn_query.mlp.fc2.": "output_query.dense.",
    "ffn_query.ln.": "output_query.LayerNorm.",
}
_BLOCK = {"ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.": "mlp.", "attn.out_proj.": "attn.proj."}
_PREFIXES = {
    "vision.patch_embed.": "visual_encoder.patch_embed.proj.",
    "connector.norm.": "ln_vision.",
    "connector.qformer.words.": "Qformer.bert.embeddings.word_embeddings.",
    "connector.qformer.positions.": "Qformer.bert.embeddings.position_embeddings.",
    "connector.qformer.ln.": "Qformer.bert.embeddings.LayerNorm.",
    "heads.image_proj.": "vision_proj.",
    "heads.text_proj.": "text_proj.",
    "heads.itm.": "itm_head.",
    "heads.lm_dense.": "Qformer.cls.predictions.transform.dense.",
    "heads.lm_ln.": "Qformer.cls.predictions.transform.LayerNorm.",
}
_NAMES = {
    "vision.class_token": "visual_encoder.cls_token",
    "vision.positions": "visual_encoder.pos_embed",
    "connector.queries": "query_tokens",
    "heads.temperature": "temp",
    "heads.lm_bias": "Qformer.cls.predictions.bias",
}
LM = {"opt": ("opt_proj.", "opt_model."), "t5": ("t5_proj.", "t5_model."), "llama": ("llm_proj.", "llm_model.")}
_DERIVED = ("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.")


def lavis_name(name: str, language: str = "opt") -> str:
    """LAVIS's name of one of our tensors, the encoder's q, k and v apart. ``language``: opt, t5 or llama."""
    if name in _NAMES:
        return _NAMES[name]
    projection, model = LM[language]
    tables = [("connector.projection.", projection), ("language.lm.", model), *_PREFIXES.items()]
    for ours, theirs in tables:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for prefix, theirs, table in (
        ("vision.blocks.", "visual_encoder.blocks.", _BLOCK),
        ("connector.qformer.layers.", "Qformer.bert.encoder.layer.", _LAYER),
    ):
        if name.startswith(prefix):
            number, _, tail = name.removeprefix(prefix).partition(".")
            for ours, their_tail in table.items():
                if tail.startswith(ours):
                    return f"{theirs}{number}.{their_tail}{tail.removeprefix(ours)}"
    raise CheckpointError(f"{name!r} has no name in LAVIS.")


def to_lavis(state: Mapping[str, Tensor], language: str = "opt") -> dict[str, Tensor]:
    """A BLIP-2's state dict under LAVIS's names and shapes. Raises CheckpointError for what has no place there."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, tail = name.rpartition(".attn.")
        if head.startswith("vision.blocks.") and tail.split(".")[0] in ("q_proj", "k_proj", "v_proj"):
            _join(found, head.replace("vision.", "visual_encoder."), tail, state, f"{head}.attn.")
            continue
        if name == "vision.class_token":
            tensor = tensor.reshape(1, 1, -1)
        elif name == "vision.positions":
            tensor = tensor[None]
        found[lavis_name(name, language)] = tensor
        if name == "connector.qformer.words.weight" and "heads.lm_bias" in state:
            found["Qformer.cls.predictions.decoder.weight"] = tensor
            found["Qformer.cls.predictions.decoder.bias"] = state["heads.lm_bias"]
    return found


def from_lavis(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    language: str = "opt",
    account: Account | None = None,
) -> dict[str, Tensor]:
    """Our names for a LAVIS state dict. ``expected`` is our net's state dict (it may live on the meta device).

    What LAVIS leaves out of its files, a frozen LM or encoder, stays out here as well. Raises CheckpointError for a
    tensor that belongs nowhere, and for one that is missing of a part that is there.
    """
    left = {name: tensor for name, tensor in state.items() if not name.startswith(_DERIVED)}
    load_report.ignored(account, set(state) - set(left), "made anew, or the word table once more")
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, target in expected.items():
        head, _, tail = name.rpartition(".attn.")
        part, _, suffix = tail.partition(".")
        if head.startswith("vision.blocks.") and part in ("q_proj", "k_proj", "v_proj"):
            block = head.replace("vision.", "visual_encoder.") + ".attn."
            tensor = _piece(left, block, part, suffix)
        else:
            tensor = left.get(lavis_name(name, language))
        if tensor is None:
            missing.append(name)
        else:
            if head.startswith("vision.blocks.") and (part, suffix) == ("k_proj", "bias"):
                load_report.absent(account, [name], "LAVIS's keys have no bias; it is zero")
            found[name] = tensor.reshape(target.shape) if tensor.numel() == target.numel() else tensor
    used = {t for name in found for t in _sources(name, language)}
    strange = sorted(set(left) - used)
    if strange:
        raise CheckpointError(f"the LAVIS file holds {strange[0]!r} ({len(strange)} such), which has no place here.")
    absent = {part for part in ("vision.", "language.") if not any(n.startswith(part) for n in found)}
    lost = [name for name in missing if not name.startswith(tuple(absent))] if absent else missing
    if lost:
        raise CheckpointError(f"the LAVIS file lacks {lost[0]!r} and {len(lost) - 1} more tensors of this model.")
    return found


def _join(found: dict[str, Tensor], block: str, tail: str, state: Mapping[str, Tensor], ours: str) -> None:
    """Write a block's joint qkv weight and its q and v biases, once."""
    if tail == "q_proj.weight":
        found[f"{block}.attn.qkv.weight"] = torch.cat([state[f"{ours}{part}_proj.weight"] for part in "qkv"])
    elif tail in ("q_proj.bias", "v_proj.bias"):
        found[f"{block}.attn.{tail[0]}_bias"] = state[ours + tail]
    elif tail == "k_proj.bias" and bool(state[ours + tail].any()):
        raise CheckpointError(
            f"{ours}k_proj.bias is not zero, and LAVIS's encoder has no key bias (no softmax feels it)."
        )


def _piece(state: Mapping[str, Tensor], block: str, part: str, suffix: str) -> Tensor | None:
    if suffix == "weight":
        joint = state.get(f"{block}qkv.weight")
        return None if joint is None else joint.chunk(3)["qkv".index(part[0])]
    if part == "k_proj":
        query = state.get(f"{block}q_bias")
        return None if query is None else torch.zeros_like(query)
    return state.get(f"{block}{part[0]}_bias")


def _sources(name: str, language: str) -> tuple[str, ...]:
    """The LAVIS tensors one of ours comes from."""
    head, _, tail = name.rpartition(".attn.")
    part, _, suffix = tail.partition(".")
    if head.startswith("vision.blocks.") and part in ("q_proj", "k_proj", "v_proj"):
        block = head.replace("vision.", "visual_encoder.") + ".attn."
        return (f"{block}qkv.weight",) if suffix == "weight" else (f"{block}{part[0]}_bias",)
    return (lavis_name(name, language),)
