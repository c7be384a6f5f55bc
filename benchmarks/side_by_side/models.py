"""Models of the sizes of the table, with random weights, and transformers' class over the same weights."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image as PilImage

from isthmus.checkpoint import read_json
from isthmus.data.blip2 import PromptProcessor
from isthmus.data.images import ImageTransform, as_image
from isthmus.data.interleave import InterleaveProcessor
from isthmus.data.processor import ContrastiveProcessor, SpliceProcessor
from isthmus.data.record import Image
from isthmus.data.tokenizer import Tokenizer
from isthmus.interop.convert import write_model
from isthmus.interop.hf_idefics import TOKENS
from isthmus.interop.hf_peer import open_class
from isthmus.model import Model
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedBlock, GatedConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig


@dataclass(frozen=True, eq=False)
class Sizes:
    """Those of the table, or tiny ones that try whether a row runs at all; and the precision of both sides."""

    side: int
    patch: int
    vision: dict[str, int]
    language: dict[str, int]
    llama_rows: int
    opt_rows: int
    qformer: dict[str, Any]
    resampler: dict[str, Any]
    dtype: torch.dtype = torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """What forward passes of training run in, on both sides."""
        half = self.dtype != torch.float32
        return torch.autocast("cpu", self.dtype, cache_enabled=False) if half else nullcontext()


PUBLISHED = Sizes(
    side=224,
    patch=14,
    vision={"width": 384, "layers": 12, "heads": 6, "mlp_width": 1536},
    language={"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
    llama_rows=32_000,
    opt_rows=50_304,
    qformer={"width": 384, "layers": 6, "heads": 6, "mlp_width": 1536, "queries": 32},
    resampler={"layers": 6, "latents": 64, "heads": 6, "head_width": 64},
)
TINY = Sizes(
    side=32,
    patch=8,
    vision={"width": 64, "layers": 2, "heads": 1, "mlp_width": 128},
    language={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    llama_rows=400,
    opt_rows=400,
    qformer={"width": 64, "layers": 2, "heads": 1, "mlp_width": 128, "queries": 4},
    resampler={"layers": 2, "latents": 5, "heads": 1, "head_width": 64},
)
OPEN_TOKENS = ("<|endofchunk|>", "<image>")
WORDS = "what is it? a small red cube beside two large blue rings, seen from the left; how many of them are there?"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([WORDS] * 2, 390)


def picture(number: int, side: int) -> Image:
    """A picture of noise, another for every number."""
    pixels = numpy.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=numpy.uint8)
    return as_image(PilImage.fromarray(pixels))


def _vision(sizes: Sizes, **changes: Any) -> VisionConfig:
    return replace(VisionConfig.vit_l_14(), image_size=sizes.side, patch_size=sizes.patch, **sizes.vision, **changes)


def _llama(sizes: Sizes) -> dict[str, Any]:
    width = sizes.language["hidden_size"]
    own = {"intermediate_size": width * 43 // 16, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    return {"model_type": "llama", "vocab_size": sizes.llama_rows, **sizes.language, **own, "rms_norm_eps": 1e-6}


def clip(sizes: Sizes) -> Model:
    """CLIP ViT-B/32 itself, but with a small vocabulary's ids."""
    torch.manual_seed(0)
    config = ClipConfig.vit_b_32()
    text = replace(config.text, eot_id=tokenizer().eos_id)
    if sizes.side == TINY.side:
        text = TextConfig(context=40, vocab_size=400, width=64, layers=2, heads=1, mlp_width=256, eot_id=text.eot_id)
        config = replace(config, vision=_vision(sizes), embed_dim=24)
    net = Clip(replace(config, text=text))
    side = net.config.vision.image_size
    return Model(net, ContrastiveProcessor(tokenizer(), ImageTransform.clip(side), context=text.context))


def llava(sizes: Sizes) -> Model:
    torch.manual_seed(0)
    net = Llava(LlavaConfig(vision=_vision(sizes), language=_llama(sizes)))
    count = net.num_tokens(sizes.side, sizes.side)
    image = ImageTransform.clip(sizes.side)
    return Model(net, SpliceProcessor(tokenizer(), image, num_tokens=count, template="vicuna_v1", max_length=4096))


def blip2(sizes: Sizes) -> Model:
    width = sizes.language["hidden_size"]
    language = {
        "model_type": "opt",
        "vocab_size": sizes.opt_rows,
        **sizes.language,
        "word_embed_proj_dim": width,
        "ffn_dim": 4 * width,
        "max_position_embeddings": 2048,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    vision = replace(
        VisionConfig.eva_g_14(), image_size=sizes.side, patch_size=sizes.patch, **sizes.vision, activation="gelu"
    )
    qformer = QFormerConfig(vision_width=vision.width, dropout=0.0, **sizes.qformer)
    net = Blip2(Blip2Config(vision=vision, qformer=qformer, language=language, norm_eps=1e-6))
    count = net.num_tokens(sizes.side, sizes.side)
    image = ImageTransform.clip(sizes.side, "squash")
    return Model(
        net, PromptProcessor(tokenizer(), image, num_tokens=count, prompt="a photo of", end="newline", max_text=60)
    )


def idefics(sizes: Sizes) -> Model:
    """A Flamingo in the form of transformers' IDEFICS, a gated block before every second layer."""
    told = tokenizer().with_tokens(*TOKENS[:2])
    language = _llama(sizes)
    end = language["vocab_size"]
    width, heads = language["hidden_size"], language["num_attention_heads"]
    torch.manual_seed(0)
    net = Flamingo(
        FlamingoConfig(
            vision=_vision(sizes, activation="gelu"),
            language=language,
            end_id=end,
            image_id=end + 1,
            resampler=ResamplerConfig(activation="relu", qk_norm=True, **sizes.resampler),
            xattn=GatedConfig.idefics(width, heads, language["intermediate_size"]),
            every=2,
            class_token=True,
        )
    )
    _half_open(net)
    image = ImageTransform.clip(sizes.side, "squash")
    processor = InterleaveProcessor(
        _placed(told, net), image, max_length=2048, template="paper", tokens=TOKENS[:2], around=True
    )
    return Model(net, processor)


def flamingo(sizes: Sizes) -> Model:
    """A Flamingo in OpenFlamingo's proportions, a gated block before every second layer."""
    told = tokenizer().with_tokens(*OPEN_TOKENS)
    language = _llama(sizes)
    end = language["vocab_size"]
    torch.manual_seed(0)
    net = Flamingo(
        FlamingoConfig(
            vision=_vision(sizes),
            language=language,
            end_id=end,
            image_id=end + 1,
            resampler=ResamplerConfig.open_flamingo(),
            xattn=GatedConfig.open_flamingo(),
            every=2,
            offset=1,
        )
    )
    _half_open(net)
    fill = [f"<fill{n}>" for n in range(end - (told.vocab_size - 2))]
    placed = tokenizer().with_tokens(*fill, *OPEN_TOKENS)
    image = ImageTransform.clip(sizes.side)
    return Model(net, InterleaveProcessor(placed, image, max_length=2048, template="open_flamingo", tokens=OPEN_TOKENS))


def _half_open(net: Flamingo) -> None:
    for block in net.xattn:
        assert isinstance(block, GatedBlock)
        block.attn_gate.data.fill_(0.5)
        block.mlp_gate.data.fill_(0.5)


def _placed(told: Tokenizer, net: Flamingo) -> Tokenizer:
    """The tokenizer whose two new tokens have the ids right behind the language model's rows."""
    have = told.vocab_size - 2
    fill = [f"<fill{n}>" for n in range(net.config.end_id - have)]
    return tokenizer().with_tokens(*fill, *TOKENS[:2])


@dataclass(frozen=True)
class Beside:
    """A model of ours, transformers' class over the same weights, and the id that stands for a picture there."""

    ours: Model
    theirs: Any
    token: int | None


@cache
def beside(make: Callable[[Sizes], Model], sizes: Sizes) -> Beside:
    """Through a folder in transformers' layout, as a user converts one."""
    model = make(sizes)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "hf"
        write_model(model, folder, "hf")
        return Beside(model, open_class(folder), read_json(folder / "config.json").get("image_token_index"))
