"""Tiny BLIP-2s with weights large enough that nothing is vacuous, their transformers peers, and batches."""

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    Blip2Config as PeerConfig,
)
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from isthmus.batch import IGNORE, Batch, Places, Tokens, Visuals
from isthmus.interop.hf_blip2 import from_hf
from isthmus.interop.hf_blip2_config import config_from_hf
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.vit import VisionConfig
from tests.models import redrawn
from tests.models.redrawn import Net

V, SIZE, QUERIES, WORDS = 61, 16, 4, 53
DEC, PAD, CLS, SEP = WORDS - 1, 0, 2, 3
OPT = {
    "model_type": "opt",
    "vocab_size": V,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
}
T5 = {
    "model_type": "t5",
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
}
VISION = VisionConfig(
    image_size=SIZE,
    patch_size=4,
    width=24,
    layers=2,
    heads=4,
    mlp_width=36,
    activation="gelu",
    eps=1e-6,
    pre_norm=False,
    patch_bias=True,
    post_norm="none",
    pool="none",
)
QFORMER = QFormerConfig(
    vision_width=24,
    width=32,
    layers=4,
    heads=4,
    mlp_width=40,
    queries=QUERIES,
    vocab_size=WORDS,
    positions=40,
    dec_id=DEC,
)


def redraw(net: Net, std: float = 0.2) -> Net:
    """In eval mode with weights of its own, for transformers' random BLIP-2 hardly sees (trap 16)."""
    return redrawn.redraw(net, std).eval()


def tiny(phase: str = "represent", language: dict[str, Any] | None = OPT, **changes: Any) -> Blip2:
    config = Blip2Config(vision=VISION, qformer=QFORMER, language=language, phase=phase, embed_dim=12)  # type: ignore[arg-type]
    return redraw(Blip2(replace(config, **changes)))


def peer_config(language: dict[str, Any], kind: type = PeerConfig, **changes: Any) -> Any:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
    }
    qformer = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
        "encoder_hidden_size": 24,
        **changes.pop("qformer", {}),
    }
    return kind(
        vision_config=vision,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=QUERIES,
        image_text_hidden_size=12,
        **changes,
    )


def retrieval_peer() -> tuple[Any, Blip2]:
    """transformers' retrieval model, redrawn, and ours with its weights."""
    config = peer_config(OPT, qformer={"use_qformer_text_input": True})
    config.image_token_index = None
    peer = redraw(Blip2ForImageTextRetrieval(config))
    net = tiny(norm_eps=1e-6)
    missing, unexpected = net.load_state_dict(from_hf(peer.state_dict()), strict=False)
    assert not unexpected
    assert all(name == "heads.temperature" or name.startswith("heads.lm_") for name in missing)
    return peer, net


def generation_peer(language: dict[str, Any], *, instruct: bool = False) -> tuple[Any, Blip2]:
    """transformers' BLIP-2 (or InstructBLIP) over that LM, redrawn, and ours with its weights."""
    if instruct:
        config = peer_config(language, InstructBlipConfig, image_token_index=V - 1)
        peer = redraw(InstructBlipForConditionalGeneration(config))
    else:
        config = peer_config(language, image_token_index=V - 1)
        peer = redraw(Blip2ForConditionalGeneration(config))
    read = config_from_hf(config.to_dict())
    net = Blip2(replace(read, language=language, instruct=instruct))
    state = from_hf(peer.state_dict())
    if language["model_type"] == "t5":  # transformers ties what the configuration does not
        net.language.lm.lm_head.weight.data.copy_(peer.language_model.lm_head.weight)  # type: ignore[union-attr]
    net.load_state_dict(state)
    return peer, net.eval()


def picture(number: int) -> torch.Tensor:
    """(1, 3, 16, 16), different for every number."""
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 + number))


def tokens(rows: list[list[int]], learn_from: int | None = None) -> Tokens:
    """Right-padded; ids from position ``learn_from`` on are labelled."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    labels = None
    if learn_from is not None:
        kept = [[i if n >= learn_from else IGNORE for n, i in enumerate(row)] for row in rows]
        labels = torch.tensor([row + [IGNORE] * (width - len(row)) for row in kept])
    return Tokens(ids=ids, lengths=torch.tensor([len(row) for row in rows]), labels=labels)


TEXTS = [[CLS, 7, 8, 9, 10, SEP], [CLS, 11, SEP], [CLS, 12, 13, 14, SEP], [CLS, 9, 8, 7, SEP]]


def pairs(texts: list[list[int]] = TEXTS, keys: tuple[str, ...] | None = None, first: int = 0) -> Batch:
    """One picture and one text per row, for phase represent."""
    rows = len(texts)
    names = tuple(f"row {first + i}" for i in range(rows))
    return Batch(
        ids=names,
        sources=("test",) * rows,
        text={"qformer": tokens(texts)},
        visuals=(Visuals(index=torch.arange(rows), pixels=torch.stack([picture(first + i) for i in range(rows)])),),
        owner=torch.arange(rows),
        keys=keys or names,
    )


def prompts(
    rows: list[list[int]],
    *,
    stream: str = "lm",
    learn_from: int | None = None,
    decoder: list[list[int]] | None = None,
    question: list[list[int]] | None = None,
    first: int = 0,
) -> Batch:
    """Rows of text behind the soft prompt of one picture each, for phase generate."""
    count = len(rows)
    wide = [[0] * QUERIES + row for row in rows]
    text = {stream: tokens(wide, None if learn_from is None else QUERIES + learn_from)}
    if decoder is not None:
        text["decoder"] = tokens(decoder, 1)
    if question is not None:
        text["qformer"] = tokens(question)
    index = torch.arange(count)
    return Batch(
        ids=tuple(f"row {i}" for i in range(count)),
        sources=("test",) * count,
        text=text,
        visuals=(Visuals(index=index, pixels=torch.stack([picture(first + i) for i in range(count)])),),
        places={
            stream: Places(
                row=index, visual=index, start=torch.zeros_like(index), length=torch.full_like(index, QUERIES)
            )
        },
        owner=index,
        keys=tuple(f"picture {first + i}" for i in range(count)),
    )
