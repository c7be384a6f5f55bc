"""BERT's weights as the start of a Q-Former: tables, layers, text FFNs, query FFNs copied from them, LM head."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_state

_LAYER = {
    "attention.self.query.": "attn.q_proj.",
    "attention.self.key.": "attn.k_proj.",
    "attention.self.value.": "attn.v_proj.",
    "attention.output.dense.": "attn.out_proj.",
    "attention.output.LayerNorm.": "ln_attn.",
    "intermediate.dense.": "ffn_text.mlp.fc1.",
    "output.dense.": "ffn_text.mlp.fc2.",
    "output.LayerNorm.": "ffn_text.ln.",
}
_REST = {
    "embeddings.word_embeddings.weight": "connector.qformer.words.weight",
    "embeddings.position_embeddings.weight": "connector.qformer.positions.weight",
    "embeddings.LayerNorm.": "connector.qformer.ln.",
    "cls.predictions.transform.dense.": "heads.lm_dense.",
    "cls.predictions.transform.LayerNorm.": "heads.lm_ln.",
    "cls.predictions.bias": "heads.lm_bias",
}
_UNUSED = (
    "embeddings.token_type",
    "embeddings.position_ids",
    "pooler.",
    "cls.seq_relationship",
    "cls.predictions.decoder",
)


def from_bert(
    state: Mapping[str, Tensor], *, layers: int, rows: int, where: str = "the checkpoint"
) -> dict[str, Tensor]:
    """Tensors under a BLIP-2's names (``connector.qformer.*``, ``heads.lm_*``), cross-attention left out.

    ``rows`` is the Q-Former's vocabulary: rows BERT does not have ([DEC]) start as the mean of its own, their bias at
    zero. Token types, pooler and next-sentence head have no place. Raises CheckpointError for too few layers or an
    unknown name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name.startswith(_UNUSED):
            continue
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", name)
        tail, table = (layer[2], _LAYER) if layer else (name, _REST)
        theirs = next((prefix for prefix in table if tail.startswith(prefix)), None)
        if theirs is None:
            raise CheckpointError(f"{where} holds {name!r}, which a BERT has not; is it another model?")
        ours = table[theirs] + tail.removeprefix(theirs)
        if layer and int(layer[1]) >= layers:
            continue
        found[f"connector.qformer.layers.{layer[1]}.{ours}" if layer else ours] = tensor
    if f"connector.qformer.layers.{layers - 1}.ln_attn.weight" not in found:
        raise CheckpointError(f"{where} has fewer than the {layers} layers of this Q-Former.")
    found |= {n.replace(".ffn_text.", ".ffn_query."): t.clone() for n, t in found.items() if ".ffn_text." in n}
    words = found["connector.qformer.words.weight"]
    extra = rows - len(words)
    if extra < 0:
        raise CheckpointError(f"{where} has {len(words)} words, the Q-Former's tokenizer only {rows}: they differ.")
    found["connector.qformer.words.weight"] = torch.cat([words, words.mean(0, keepdim=True).expand(extra, -1)])
    if "heads.lm_bias" in found:
        found["heads.lm_bias"] = torch.nn.functional.pad(found["heads.lm_bias"], (0, extra))
    return found


def read_bert_folder(folder: Path, *, layers: int, rows: int) -> dict[str, Tensor]:
    """:func:`from_bert` on the weights of a transformers folder."""
    return from_bert(read_state(folder), layers=layers, rows=rows, where=str(folder))
