"""A tiny Model of every kind, with its processor, weights large enough that nothing is vacuous."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from isthmus.data.blip2 import PairProcessor, PromptProcessor
from isthmus.data.clip_tokenizer import IDS, ClipTokenizer
from isthmus.data.images import ImageTransform
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor
from isthmus.data.processor import (
    ContrastiveProcessor,
    ImagesProcessor,
    SpliceProcessor,
    TextProcessor,
    TextsProcessor,
)
from isthmus.data.record import Record, Text
from isthmus.data.text import render
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import train_wordpiece
from isthmus.interop.hf_files import swapped
from isthmus.interop.hf_idefics import TOKENS as IDEFICS_TOKENS
from isthmus.model import Model
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.models.lm import BareLM, LmConfig
from isthmus.models.towers import ImageEncoder, ImageEncoderConfig, TextEncoder, TextEncoderConfig
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.tiles import PINPOINTS
from isthmus.nn.vit import VisionConfig
from tests.fixtures import OPEN_CLIP
from tests.models.tiny_blip2 import T5, redraw
from tests.models.tiny_blip2 import VISION as EVA
from tests.models.tiny_flamingo import blocks_of
from tests.narrow import there

SIZE, ROWS = 32, 400
VISION = VisionConfig(image_size=SIZE, patch_size=8, width=64, layers=3, heads=1, mlp_width=256)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": ROWS,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


@cache
def tokenizer() -> Tokenizer:
    told = str(render(Record(id="", parts=(Text("a red cube?", role="user"),)), "vicuna_v1", prompt=True))
    return Tokenizer.train([told, told, "two rings and a small green ball beside a large blue cube"] * 2, ROWS - 4)


@cache
def words() -> Tokenizer:
    return train_wordpiece(["a red cube and a large blue ring, two small balls beside; is what? a photo of"] * 3, 120)


def clip(**changes: Any) -> Model:
    """CLIP in OpenAI's proportions but with our tokenizer, whose end of text has the id 2."""
    text = TextConfig(
        context=40, vocab_size=ROWS, width=64, layers=2, heads=1, mlp_width=256, eot_id=tokenizer().eos_id
    )
    torch.manual_seed(0)
    net = Clip(ClipConfig(**{"vision": VISION, "text": text, "embed_dim": 24, **changes}))
    redraw(net)
    return Model(net, ContrastiveProcessor(tokenizer(), ImageTransform.clip(SIZE), context=net.config.text.context))


def openai_clip() -> Model:
    """With OpenAI's activation, and a tokenizer whose end of text has the largest id, where their code looks."""
    told = swapped(tokenizer(), tokenizer().eos_id, tokenizer().vocab_size - 1)
    text = TextConfig(
        context=40, vocab_size=told.vocab_size, width=64, layers=2, heads=1, mlp_width=256, eot_id=told.eos_id
    )
    torch.manual_seed(0)
    net = Clip(ClipConfig(vision=VISION, text=text, embed_dim=24))
    redraw(net)
    return Model(net, ContrastiveProcessor(told, ImageTransform.clip(SIZE), context=40))


def published_clip() -> Model:
    """With CLIP's own ids and context, the only ones of OpenAI's code; its table of merges is a part of theirs."""
    told = ClipTokenizer.load(OPEN_CLIP / "tokenizer")
    text = TextConfig(context=77, vocab_size=IDS, width=64, layers=2, heads=1, mlp_width=256, eot_id=told.eos_id)
    torch.manual_seed(0)
    net = Clip(ClipConfig(vision=VISION, text=text, embed_dim=24))
    redraw(net)
    return Model(net, ContrastiveProcessor(told, ImageTransform.clip(SIZE)))


def siglip() -> Model:
    vision = VisionConfig.siglip(image_size=SIZE, patch_size=8, width=32, layers=2, heads=4, mlp_width=48)
    text = replace(TextConfig.siglip(32, 2, 4, 48), vocab_size=ROWS, context=40, eot_id=2, pad_id=0)
    torch.manual_seed(0)
    net = Clip(
        ClipConfig(
            vision=vision,
            text=text,
            embed_dim=32,
            loss="sigmoid",
            vision_projection=False,
            text_projection_bias=True,
        )
    )
    redraw(net)
    return Model(net, ContrastiveProcessor(tokenizer(), ImageTransform.siglip(SIZE), context=40))


def image_encoder(whole: Model | None = None, *, projected: bool = True) -> Model:
    """The image tower of a CLIP (or of ``whole``), with its projection or without."""
    whole = whole or openai_clip()
    space = whole.net.config.embed_dim if projected and whole.net.config.vision_projection else None
    net = ImageEncoder(ImageEncoderConfig(vision=whole.net.config.vision, embed_dim=space))
    net.vision.load_state_dict(whole.net.vision.state_dict())
    if space is not None:
        net.projection.load_state_dict(whole.net.heads.vision_projection.state_dict())
    return Model(net, ImagesProcessor(there(whole.processor.image)))


def text_encoder(whole: Model | None = None, *, projected: bool = True) -> Model:
    """The text tower, likewise."""
    whole = whole or openai_clip()
    config = TextEncoderConfig(
        text=whole.net.config.text,
        embed_dim=whole.net.config.embed_dim if projected else None,
        projection_bias=projected and whole.net.config.text_projection_bias,
    )
    net = TextEncoder(config)
    net.text.load_state_dict(whole.net.text.state_dict())
    if projected:
        net.projection.load_state_dict(whole.net.heads.text_projection.state_dict())
    return Model(net, TextsProcessor(whole.processor.tokenizer, context=whole.net.config.text.context))


def lm(language: dict[str, Any] = LLAMA, template: str = "vicuna_v1") -> Model:
    torch.manual_seed(0)
    net = BareLM(LmConfig(language=language))
    redraw(net)
    return Model(net, TextProcessor(tokenizer(), template=template, max_length=256))


def llava(*, template: str = "vicuna_v1", mode: Any = "square", **changes: Any) -> Model:
    torch.manual_seed(0)
    net = Llava(LlavaConfig(**{"vision": VISION, "language": LLAMA, **changes}))
    redraw(net)
    image = replace(ImageTransform.clip(SIZE), mode=mode, pinpoints=net.config.pinpoints)
    return Model(
        net,
        SpliceProcessor(
            tokenizer(),
            image,
            num_tokens=net.num_tokens(SIZE, SIZE),
            template=template,
            max_length=256,
        ),
    )


def llava_next(**changes: Any) -> Model:
    """The published canvases in the proportions of a small tile."""
    pinpoints = tuple((height * SIZE // 336, width * SIZE // 336) for height, width in PINPOINTS)
    return llava(mode="anyres", pinpoints=pinpoints, **changes)


def flamingo(*, template: str = "open_flamingo", **changes: Any) -> Model:
    """In OpenFlamingo's proportions: heads of 64 everywhere."""
    told = tokenizer().with_tokens(*NEW_TOKENS)
    end, image = (told.id_of(token) for token in NEW_TOKENS)
    fields: dict[str, Any] = {
        "vision": replace(VISION, width=32, heads=4, mlp_width=48),
        "language": {**LLAMA, "vocab_size": end},
        "end_id": end,
        "image_id": image,
        "resampler": ResamplerConfig.open_flamingo(),
        "xattn": GatedConfig.open_flamingo(),
        "every": 2,
        "offset": 1,
    }
    torch.manual_seed(0)
    net = Flamingo(FlamingoConfig(**{**fields, **changes}))
    redraw(net)
    for block in blocks_of(net):
        block.attn_gate.data.fill_(0.7)
        block.mlp_gate.data.fill_(0.5)
    return Model(net, InterleaveProcessor(told, ImageTransform.clip(SIZE), max_length=120, template=template))


def idefics(*, gate: Any = "scalar", instruct: bool = False) -> Model:
    """A Flamingo in the proportions of transformers' IDEFICS."""
    tokens = IDEFICS_TOKENS if instruct else IDEFICS_TOKENS[:2]
    told = tokenizer().with_tokens(*tokens)
    end, image, *turn = (told.id_of(token) for token in tokens)
    language = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"vocab_size": end}
    torch.manual_seed(0)
    net = Flamingo(
        FlamingoConfig(
            vision=replace(VISION, width=32, heads=4, mlp_width=48, activation="gelu"),
            language={**language, "rms_norm_eps": 1e-6},
            end_id=end,
            image_id=image,
            turn_id=turn[0] if turn else None,
            resampler=ResamplerConfig(layers=2, latents=5, heads=2, head_width=8, activation="relu", qk_norm=True),
            xattn=GatedConfig.idefics(32, 4, 48, gate=gate),
            class_token=True,
        )
    )
    redraw(net)
    for block in blocks_of(net):
        block.attn_gate.data.add_(0.7)
        block.mlp_gate.data.add_(0.5)
    image_transform, template = ImageTransform.clip(SIZE, "squash"), "idefics" if instruct else "paper"
    processor = InterleaveProcessor(
        told, image_transform, max_length=256, template=template, tokens=tokens, around=True
    )
    return Model(net, processor)


def blip2(language: dict[str, Any] | None = OPT, *, instruct: bool = False, **changes: Any) -> Model:
    """With a language model, or without one the first stage."""
    told = words()
    qformer = QFormerConfig(
        vision_width=24,
        width=32,
        layers=4,
        heads=4,
        mlp_width=40,
        queries=4,
        vocab_size=told.vocab_size,
        positions=60,
        dec_id=told.bos_id or 0,
        dropout=0.0,
    )
    fields: dict[str, Any] = {
        "vision": replace(EVA, image_size=SIZE, patch_size=8),
        "qformer": qformer,
        "embed_dim": 12,
    }
    fields |= {"norm_eps": 1e-6, "instruct": instruct, "language": language}
    torch.manual_seed(0)
    net = Blip2(Blip2Config(**{**fields, "phase": "generate" if language else "represent", **changes}))
    redraw(net)
    image = ImageTransform.clip(SIZE, "squash")
    if language is None:
        return Model(net, PairProcessor(told, image))
    t5 = language["model_type"] == "t5"
    return Model(
        net,
        PromptProcessor(
            tokenizer(),
            image,
            num_tokens=net.num_tokens(SIZE, SIZE),
            max_text=60,
            prompt="" if instruct else "a photo of",
            end="eos" if instruct or t5 else "newline",
            question="{}" if instruct else f"Question: {{}} {'Short answer' if t5 else 'Answer'}:",
            start_id=net.language.start_id if t5 else None,  # type: ignore[union-attr]
            qformer=told if instruct else None,
            clean=not instruct,
        ),
    )


def lavis(
    language: dict[str, Any] | None = OPT, *, norm_eps: float = 1e-5, instruct: bool = False, **changes: Any
) -> Model:
    """With the eps of LAVIS, its heads (64 and 88 wide), and keys without a bias."""
    vision = replace(EVA, image_size=SIZE, patch_size=8, width=88, heads=1, activation="gelu", eps=1e-6)
    qformer = replace(blip2(language).net.config.qformer, vision_width=88, width=64, heads=1, dropout=0.1)
    model = blip2(language, norm_eps=norm_eps, instruct=instruct, vision=vision, qformer=qformer, **changes)
    for block in model.net.vision.blocks:
        block.attn.k_proj.bias.data.zero_()
    return model


def save_language(model: Model, folder: Path) -> Path:
    """The model's LM as transformers saves it, with its tokenizer."""
    model.net.language.lm.save_pretrained(folder)
    for name, text in model.processor.tokenizer.files().items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


MODELS = {
    "clip": clip,
    "siglip": siglip,
    "image encoder": image_encoder,
    "text encoder": text_encoder,
    "lm": lm,
    "lm opt": lambda: lm(OPT, "document"),
    "lm gpt_neox": lambda: lm(NEOX, "document"),
    "llava": llava,
    "llava_next": llava_next,
    "flamingo": flamingo,
    "idefics": idefics,
    "blip2 represent": lambda: blip2(None),
    "blip2 opt": blip2,
    "blip2 t5": lambda: blip2({**T5, "vocab_size": ROWS}),
    "instructblip": lambda: blip2(LLAMA, instruct=True),
}
