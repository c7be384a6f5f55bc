"""A tiny Flamingo with open gates and weights large enough that nothing is vacuous, and batches for it."""

from typing import Any

import torch

from isthmus.batch import IGNORE, Batch, Places, Tokens, Visuals
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedBlock, GatedConfig
from isthmus.nn.vit import VisionConfig
from tests.models.redrawn import redraw
from tests.narrow import must_be

V, END, IMAGE, SIZE = 53, 53, 54, 16
VISION = VisionConfig(image_size=SIZE, patch_size=4, width=24, layers=2, heads=4, mlp_width=32)
SHARED = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {**SHARED, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 96}
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "opt": {**SHARED, "ffn_dim": 48, "max_position_embeddings": 96, "word_embed_proj_dim": 16, "dropout": 0.0},
    "gpt_neox": {**SHARED, "intermediate_size": 48, "max_position_embeddings": 96},
    "mpt": {"vocab_size": V, "d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 96, "expansion_ratio": 2},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt2": {
        "vocab_size": V,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 96,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
RESAMPLER = ResamplerConfig(layers=2, latents=5, heads=2, head_width=8, frames=3)


def tiny(language: str = "llama", *, gates: tuple[float, float] = (0.7, 0.5), **changes: Any) -> Flamingo:
    """Gates are (attention, MLP) of every block."""
    lm = {"model_type": language, **LANGUAGES[language], **changes.pop("lm", {})}
    fields = {"vision": VISION, "resampler": RESAMPLER, "xattn": GatedConfig(heads=2, head_width=8), "every": 2}
    torch.manual_seed(0)
    net = Flamingo(FlamingoConfig(**{**fields, **changes}, language=lm, end_id=END, image_id=IMAGE)).eval()
    redraw(net)
    with torch.no_grad():
        for block in blocks_of(net):
            block.attn_gate.fill_(gates[0])
            block.mlp_gate.fill_(gates[1])
    return net


def blocks_of(net: Flamingo) -> list[GatedBlock]:
    """Its gated blocks."""
    return [must_be(GatedBlock, block) for block in net.xattn]


def picture(name: str, size: tuple[int, int] = (SIZE, SIZE), frames: int = 1) -> torch.Tensor:
    """(F, 3, H, W), different for every name."""
    g = torch.Generator().manual_seed(100 + ord(name))
    return torch.randn(frames, 3, *size, generator=g)


Row = list[int | str]
"""Text ids, and ``"a"``, ``"b"``, … where a picture stands; a capital letter is a clip of three frames."""

ROWS: dict[str, Row] = {
    "none": [1, 7, 8, 9, 10],
    "one": [1, 4, "a", 5, 6, 7, 8],
    "two": ["b", 9, 9, END, "c", 30, 31, 32, 33],
    "clip": [1, "D", 12, 13],
}
SIZES = {"c": (SIZE, 8)}
"""Pictures of another shape than the encoder's own."""


def batch(rows: list[Row], *, learn_from: int = 3, sources: tuple[str, ...] | None = None, **changes: Any) -> Batch:
    """Right-padded rows; text ids from position ``learn_from`` on are labelled."""
    ids = [[IMAGE if isinstance(item, str) else item for item in row] for row in rows]
    labels = [[i if n >= learn_from and i != IMAGE else IGNORE for n, i in enumerate(line)] for line in ids]
    names = [(r, n, item) for r, row in enumerate(rows) for n, item in enumerate(row) if isinstance(item, str)]
    groups: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
    for number, (_, _, name) in enumerate(names):
        pixels = picture(name, SIZES.get(name, (SIZE, SIZE)), 3 if name.isupper() else 1)
        groups.setdefault(tuple(pixels.shape), []).append((number, pixels))
    width = max(map(len, ids))
    one = torch.ones(len(names), dtype=torch.long)
    places = Places(
        row=torch.tensor([r for r, _, _ in names], dtype=torch.long),
        visual=torch.arange(len(names)),
        start=torch.tensor([n for _, n, _ in names], dtype=torch.long),
        length=one,
    )
    fields: dict[str, Any] = {
        "ids": tuple(f"row {i}" for i in range(len(rows))),
        "sources": sources or ("test",) * len(rows),
        "text": {
            "lm": Tokens(
                ids=torch.tensor([r + [0] * (width - len(r)) for r in ids]),
                lengths=torch.tensor([len(r) for r in ids]),
                labels=torch.tensor([r + [IGNORE] * (width - len(r)) for r in labels]),
            )
        },
        "visuals": tuple(
            Visuals(index=torch.tensor([n for n, _ in g]), pixels=torch.stack([p for _, p in g]))
            for g in groups.values()
        ),
        "places": {"lm": places} if names else {},
        "owner": torch.tensor([r for r, _, _ in names], dtype=torch.long),
        "keys": tuple(name for _, _, name in names),
    }
    return Batch(**{**fields, **changes})
