"""A tiny LLaVA with weights large enough that nothing is vacuous, and batches for it."""

from typing import Any

import torch

from isthmus.batch import IGNORE, Batch, Places, Tokens, Visuals
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.vit import VisionConfig
from tests.models.redrawn import redraw

V, SIZE, PATCHES = 61, 16, 16
VISION = VisionConfig(image_size=SIZE, patch_size=4, width=24, layers=3, heads=4, mlp_width=32)
LANGUAGE = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def tiny(**changes: Any) -> Llava:
    return redraw(Llava(LlavaConfig(**{"vision": VISION, "language": LANGUAGE, **changes})).eval())


def picture(number: int) -> torch.Tensor:
    """(1, 3, 16, 16), different for every number."""
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(100 + number))


Row = list[int | str]
"""Text ids, and ``"a"``, ``"b"``, … where a picture stands."""

ROWS: dict[str, Row] = {
    "none": [1, 7, 8, 9, 10, 11, 12],
    "one": [1, "a", 5, 6, 7, 8],
    "two": [1, 4, "b", 9, 9, "c", 30, 31, 32, 33, 34],
}


def batch(rows: list[Row], *, per_picture: int = PATCHES, frames: int = 1, learn_from: int = 3) -> Batch:
    """Right-padded rows; text ids from position ``learn_from`` on are labelled. Ids under pictures mean nothing."""
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    places: list[tuple[int, int, int, int]] = []
    pixels, owner = [], []
    for row in rows:
        line, wanted = [], []
        for item in row:
            if isinstance(item, str):
                places.append((len(ids), len(pixels), len(line), per_picture))
                owner.append(len(ids))
                pixels.append(torch.cat([picture(ord(item) + 50 * f) for f in range(frames)]))
                line += [-200] * per_picture
                wanted += [IGNORE] * per_picture
            else:
                wanted.append(item if len(line) >= learn_from else IGNORE)
                line.append(item)
        ids.append(line)
        labels.append(wanted)
    width = max(map(len, ids))
    stream = Tokens(
        ids=torch.tensor([r + [0] * (width - len(r)) for r in ids]),
        lengths=torch.tensor([len(r) for r in ids]),
        labels=torch.tensor([r + [IGNORE] * (width - len(r)) for r in labels]),
    )
    visuals = (Visuals(index=torch.arange(len(pixels)), pixels=torch.stack(pixels)),) if pixels else ()
    kept: dict[str, Places] = {}
    if places:
        row_, visual, start, length = torch.tensor(places).T
        kept = {"lm": Places(row=row_, visual=visual, start=start, length=length)}
    return Batch(
        ids=tuple(f"row {i}" for i in range(len(rows))),
        sources=("test",) * len(rows),
        text={"lm": stream},
        visuals=visuals,
        places=kept,
        owner=torch.tensor(owner, dtype=torch.long),
        keys=tuple(f"picture {i}" for i in range(len(pixels))),
    )
