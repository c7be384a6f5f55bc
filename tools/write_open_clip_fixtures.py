"""Writes tests/fixtures/open_clip with open_clip 3.3.0: what isthmus' CLIP and its tokenizer are held against.

Run in the peers' environment:  .venv-peers/bin/python tools/write_open_clip_fixtures.py

Tiny random models (weights, inputs, embeddings, logits), a SigLIP with its folder's tokenizer and texts, position
tables resized by open_clip, and token ids of a corpus. The tokenizer's table is reduced to the merges that this corpus
uses, in their order and with their ids: the reduced table splits the corpus exactly as the whole one, since at every
step the best pair is among them.
"""

# Its libraries are in the peers' environment alone.
# pyright: reportMissingImports=false

import json
from pathlib import Path
from types import SimpleNamespace

import timm
import tokenizers
import torch
from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "open_clip"

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 4.0}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
MODELS = {
    "clip_quick_gelu": (CLIP, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}),
    "clip_gelu": (CLIP, {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}),
    "custom_text_clip": (
        CustomTextCLIP,
        {
            "embed_dim": 24,
            "vision_cfg": VISION,
            "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 63},
            "custom_text": True,
        },
    ),
}

TRUNK = "vit_fixture_patch8_siglip_32"
SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": TRUNK,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 200,
        "hf_tokenizer_name": "siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 32,
        "heads": 2,
        "layers": 2,
        "mlp_ratio": 3.7362,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}
TEXTS = ["a photo of a cat", "A Photo, of a CAT!", "two_dogs; one frisbee", "supercalifragilistic " * 4, "x"]

CORPUS = [
    "",
    "a photo of a cat",
    "A Photo of a CAT.",
    "two dogs, one frisbee!",
    "itap of a {}.",
    "don't they'll we've I'm",
    "room 1234 at 5:30pm, 3.14 + 2²",
    "½ cup of x² and ①",
    "fish &amp; chips",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; &quot;so&quot;",
    "café naïve São Paulo Zürich Łódź",
    "cafe\u0301 with a combining accent",
    "“curly” ‘quotes’ and ’tis",
    "efﬁcient ﬂower oﬀer ﬃ ﬄ",
    "ＦＵＬＬ width ！",
    "😀🐱‍👤 ❤️ emoji 🇫🇷",
    "猫の写真",
    "кошка и собака",
    "قطة",
    "tabs\tand\nnew lines   and  spaces  ",
    "snake_case under_score #hashtag @name https://example.org/a?b=c",
    "!!! ... --- ??? ;-)",
    "supercalifragilisticexpialidocious",
    "a very long caption about a red cube " * 12,
    "\u00a0non-breaking\u00a0space\u00a0",
    "İstanbul STRASSE straße Οδός",
]


def write_model(name: str) -> None:
    cls, config = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    model = cls(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias is zero and no gain is one
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = torch.zeros(5, TEXT["context_length"], dtype=torch.long)
    for row, length in enumerate((2, 4, 7, 11, 12)):
        ids[row, :length] = torch.randint(1, 62, (length,))
        ids[row, 0], ids[row, length - 1] = 62, 63
    pixels = torch.randn(4, 3, VISION["image_size"], VISION["image_size"])
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(ids)
        logits, _ = model.get_logits(pixels, ids)
    tensors = {f"weights/{key}": value for key, value in model.state_dict().items()}
    tensors |= {"pixels": pixels, "ids": ids, "image_embeds": images, "text_embeds": texts, "logits": logits}
    save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / f"{name}.safetensors")
    write_json(FOLDER / f"{name}.json", config)


def vit_fixture_patch8_siglip_32(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """A trunk as timm builds its SigLIP towers, tiny; like the published ones it has the exact GELU."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 3.7362}
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith(("pretrained", "cache"))}
    return VisionTransformer(**{**sizes, "class_token": False, "global_pool": "map", **kwargs})


def write_siglip() -> None:
    """A folder as on the hub (configuration, weights, tokenizer), and what it gives for pictures and texts."""
    folder = FOLDER / "siglip"
    folder.mkdir(exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"])
    backend.train_from_iterator([t.lower() for t in CORPUS if t.isascii()], trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
    wrapped.save_pretrained(folder)
    timm.models.register_model(vit_fixture_patch8_siglip_32)
    torch.manual_seed(7)
    model = CustomTextCLIP(**{k: v for k, v in SIGLIP.items() if k != "custom_text"}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = HFTokenizer(str(folder), context_length=12, clean="canonicalize")(TEXTS)
    pixels = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        images, texts = model.encode_image(pixels), model.encode_text(ids)
        logits, _ = model.get_logits(pixels, ids)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    write_json(folder / "open_clip_config.json", {"model_cfg": SIGLIP, "preprocess_cfg": preprocess})
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    outputs = {"pixels": pixels, "ids": ids, "image_embeds": images, "text_embeds": texts, "logits": logits}
    save_file({key: value.contiguous() for key, value in outputs.items()}, FOLDER / "siglip_outputs.safetensors")
    write_json(FOLDER / "siglip_texts.json", TEXTS)


def write_positions() -> None:
    torch.manual_seed(0)
    table = torch.randn(1 + 8 * 8, 6)
    tensors = {"table": table}
    for side in (12, 4):
        state = {"visual.positional_embedding": table.clone()}
        resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
        tensors[f"resized_{side}"] = state["visual.positional_embedding"].contiguous()
    save_file(tensors, FOLDER / "positions.safetensors")


class Recording(dict[tuple[str, str], int]):
    """Ranks of merges that notes which of them were the best on some step."""

    def __init__(self, ranks: dict[tuple[str, str], int]) -> None:
        super().__init__(ranks)
        self.used: set[tuple[str, str]] = set()

    def __contains__(self, pair: object) -> bool:  # asked once per step, of the best pair
        found = super().__contains__(pair)
        if found and isinstance(pair, tuple):
            self.used.add(pair)
        return found


def write_tokenizer() -> None:
    tokenizer = SimpleTokenizer()
    tokenizer.bpe_ranks = ranks = Recording(tokenizer.bpe_ranks)
    rows = []
    for text, ids in zip(CORPUS, tokenizer(CORPUS).tolist(), strict=True):
        rows.append({"text": text, "ids": ids[: ids.index(tokenizer.eot_token_id) + 1]})
    merges = sorted(ranks.used, key=ranks.__getitem__)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    kept = {"".join(pair) for pair in merges} | set(names)
    vocab = {
        names.get(token, token): number for token, number in tokenizer.encoder.items() if number < 512 or token in kept
    }
    (FOLDER / "tokenizer").mkdir(exist_ok=True)
    write_json(FOLDER / "tokenizer" / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (FOLDER / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(FOLDER / "tokenizer" / "rows.json", rows)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        write_model(name)
    write_siglip()
    write_positions()
    write_tokenizer()
