"""A whole story in miniature: the demo's three models by recipes of a few steps."""

import copy
from pathlib import Path
from typing import Any

from isthmus.recipes.run import train
from isthmus.recipes.schema import parse_recipe

TOKENIZER: dict[str, Any] = {
    "vocab_size": 300,
    "samples": 50,
    "template": "vicuna_bare",
    "data": [{"kind": "scenes", "form": "captions", "count": 50}],
}
STAGE: dict[str, Any] = {"steps": 3, "batch_size": 4, "precision": "fp32", "log_every": 1, "save_every": 1}
LANGUAGE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TREES: dict[str, dict[str, Any]] = {
    "clip": {
        "model": "clip",
        "tokenizer": TOKENIZER,
        "config": {
            "vision": {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48},
            "text": {"context": 48, "width": 32, "layers": 1, "heads": 2, "mlp_width": 48},
            "embed_dim": 16,
        },
        "stages": [
            STAGE
            | {
                "name": "contrast",
                "data": [{"kind": "scenes", "form": "captions", "count": 40}],
                "train": [{"pattern": "*", "lr": 1e-3}],
            }
        ],
        "evaluate": [
            {
                "name": "retrieval",
                "task": "retrieval",
                "data": {"kind": "scenes", "form": "captions", "split": "test", "count": 12},
            }
        ],
    },
    "lm": {
        "model": "lm",
        "tokenizer": TOKENIZER,
        "config": {"language": LANGUAGE},
        "stages": [
            STAGE
            | {
                "name": "pretrain",
                "template": "vicuna_bare",
                "train": [{"pattern": "*", "lr": 1e-3}],
                "data": [{"kind": "scenes", "form": "symbols", "count": 40}],
            }
        ],
        "evaluate": [
            {
                "name": "readings",
                "task": "vqa",
                "options": {"controls": [], "decoding": {"max_new_tokens": 3}},
                "data": {"kind": "scenes", "form": "readings", "split": "test", "count": 12},
            }
        ],
    },
    "llava": {
        "model": "llava",
        "prompts": {"caption": "describe the picture."},
        "parts": {"vision": "runs/demo/clip", "language": "runs/demo/lm"},
        "stages": [
            STAGE
            | {
                "name": "align",
                "template": "plain",
                "train": [{"pattern": "connector.*", "lr": 1e-3}],
                "data": [{"kind": "scenes", "form": "captions", "count": 40}],
            },
            STAGE
            | {
                "name": "instruct",
                "template": "vicuna_bare",
                "train": [{"pattern": "connector.*", "lr": 1e-3}, {"pattern": "language.*", "lr": 1e-3}],
                "data": [
                    {"kind": "scenes", "form": "conversations", "count": 40, "turns": 3},
                    {"kind": "scenes", "form": "symbols", "count": 10, "weight": 0.5},
                ],
            },
        ],
        "evaluate": [
            {
                "name": "vqa",
                "task": "vqa",
                "options": {"decoding": {"max_new_tokens": 3}},
                "data": {"kind": "scenes", "form": "questions", "split": "test", "count": 12},
                "train": {"kind": "scenes", "form": "questions", "count": 60},
            }
        ],
    },
}


def tree(name: str, story: Path | None = None) -> dict[str, Any]:
    """A fresh copy of a miniature recipe, its parts taken from ``story``."""
    found = copy.deepcopy(TREES[name])
    if story is not None and "parts" in found:
        found["parts"] = {part: str(story / Path(folder).name) for part, folder in found["parts"].items()}
    return found


def run_story(folder: Path) -> Path:
    """Finished runs clip, lm and llava below ``folder``."""
    for name in TREES:
        train(parse_recipe(tree(name, folder)), folder / name, progress=False)
    return folder
