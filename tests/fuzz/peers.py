"""Folders as transformers saves them, drawn at random: a small model of a family, tokenizer and image processor."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.fuzz.words import LLAVA, bert, tokenizer

GPT = ("gpt2", "gptj", "gpt_neo", "gpt_neox", "bloom", "mpt", "falcon", "opt")
LIKE_LLAMA = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "stablelm", "starcoder2", "olmo"),
    *("olmo2", "granite", "cohere", "cohere2", "smollm3", "glm", "helium"),
)


@dataclass(frozen=True)
class Drawn:
    """``family`` and what was drawn, for the report."""

    family: str
    facts: dict[str, Any]


def redraw(model: torch.nn.Module, seed: int) -> Any:
    """Matrices from N(0, 0.2²), vectors moved a little: nothing is vacuous."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=g) * 0.2
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


def language(dice: random.Random, kind: str, rows: int, **more: Any) -> Any:
    """A configuration of the kind with sizes that differ where they can."""
    heads = dice.choice((2, 4))
    width = heads * dice.choice((8, 16))
    layers = dice.choice((1, 2, 3))
    tied = dice.random() < 0.3
    shared = {"vocab_size": rows, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None, **more}
    if kind in ("gpt2", "gptj"):
        own = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 512}
        own |= {"rotary_dim": 4} if kind == "gptj" else {}
    elif kind == "gpt_neo":
        own = {"hidden_size": width, "num_layers": 2, "num_heads": heads, "attention_types": [[["global", "local"], 1]]}
        own |= {"max_position_embeddings": 512, "window_size": 16}
    elif kind == "mpt":
        own = {"d_model": width, "n_layers": layers, "n_heads": heads, "max_seq_len": 512, "expansion_ratio": 2}
    elif kind == "bloom":
        own = {"hidden_size": width, "n_layer": layers, "n_head": heads}
    elif kind == "falcon":
        own = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        own |= {"alibi": dice.random() < 0.3, "new_decoder_architecture": dice.random() < 0.3}
    elif kind == "opt":
        own = {"hidden_size": width, "word_embed_proj_dim": dice.choice((width, 16)), "ffn_dim": 40}
        own |= {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 512}
        own |= {"do_layer_norm_before": dice.random() < 0.7}
    else:
        own = {"hidden_size": width, "intermediate_size": dice.choice((40, 56)), "num_hidden_layers": layers}
        own |= {"num_attention_heads": heads, "max_position_embeddings": 512}
        if kind not in ("gpt_neox",):
            own |= {"num_key_value_heads": dice.choice((1, heads)), "head_dim": width // heads}
        own |= {"logits_scaling": 4.0, "embedding_multiplier": 2.0} if kind == "granite" else {}
        own |= {"logit_scale": 0.5} if kind.startswith("cohere") else {}
    if kind in ("phi3", "glm", "starcoder2", "cohere2", "gemma2", "smollm3", "helium", "mistral"):
        shared |= {"pad_token_id": 0}
    return AutoConfig.for_model(kind, **{**own, **shared})


def _below(config: Any) -> Any:
    """An LM under pictures: their projection is as wide as the blocks there, so only such an OPT runs at all."""
    if config.model_type == "opt":
        config.word_embed_proj_dim = config.hidden_size
    return config


def _pieces(dice: random.Random) -> str:
    """How the words of a language model are cut."""
    return dice.choice(("", "", "each", "first"))


def clip_vision(dice: random.Random, **more: Any) -> dict[str, Any]:
    heads = dice.choice((2, 4))
    return {
        "hidden_size": heads * 8,
        "intermediate_size": dice.choice((32, 48)),
        "num_hidden_layers": dice.choice((2, 3)),
        "num_attention_heads": heads,
        "image_size": 32,
        "patch_size": dice.choice((8, 16)),
        "hidden_act": dice.choice(("quick_gelu", "gelu", "gelu_pytorch_tanh")),
        "layer_norm_eps": dice.choice((1e-5, 1e-6)),
        **more,
    }


def _square(dice: random.Random, kind: Any, **more: Any) -> Any:
    """A processor that crops; statistics other than CLIP's now and then."""
    means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]} if dice.random() < 0.5 else {}
    filters = {"resample": dice.choice((2, 3))}
    side = {"height": 32, "width": 32}
    return kind(size={"shortest_edge": 32}, crop_size=side, **means, **filters, **more)


def _clip(dice: random.Random, folder: Path) -> Any:
    words = tokenizer(dice, folder, begin=True, end=True)
    text = {
        "vocab_size": len(words) + dice.choice((0, 7)),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": dice.choice((24, 77)),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": 0,
        "hidden_act": dice.choice(("quick_gelu", "gelu")),
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=clip_vision(dice), projection_dim=24)
    _square(dice, CLIPImageProcessorPil).save_pretrained(folder)
    return transformers.CLIPModel(config)


def _siglip(dice: random.Random, folder: Path) -> Any:
    """Padded by its tokenizer, read at its last place."""
    words = tokenizer(dice, folder, begin=False, end=True)
    text = {
        "vocab_size": len(words) + dice.choice((0, 7)),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": dice.choice((40, 64)),
        "projection_size": 32,
        "pad_token_id": dice.choice((1, words.pad_token_id)),
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
    }
    vision = clip_vision(dice) | {"hidden_size": 32, "num_attention_heads": 4}
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def _siglip_tower(dice: random.Random, folder: Path) -> Any:
    vision = clip_vision(dice, vision_use_head=dice.random() < 0.7)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))


def _tower(dice: random.Random, folder: Path) -> Any:
    config = transformers.CLIPVisionConfig(**clip_vision(dice), projection_dim=20)
    _square(dice, CLIPImageProcessorPil).save_pretrained(folder)
    kinds = (transformers.CLIPVisionModel, transformers.CLIPVisionModelWithProjection)
    return dice.choice(kinds)(config)


def _text_tower(dice: random.Random, folder: Path) -> Any:
    """CLIP's with its projection or without, or SigLIP's."""
    siglip = dice.random() < 0.4
    words = tokenizer(dice, folder, begin=not siglip, end=True)
    text = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": dice.choice((40, 64)),
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    if siglip:
        return transformers.SiglipTextModel(transformers.SiglipTextConfig(**text, projection_size=32))
    kind = dice.choice((transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection))
    return kind(transformers.CLIPTextConfig(**text, projection_dim=24, hidden_act=dice.choice(("quick_gelu", "gelu"))))


def _lm(dice: random.Random, folder: Path) -> Any:
    words = tokenizer(dice, folder, begin=dice.random() < 0.5, pieces=_pieces(dice), chat=dice.random() < 0.3)
    kind = dice.choice((*GPT, *LIKE_LLAMA))
    return AutoModelForCausalLM.from_config(language(dice, kind, len(words) + dice.choice((0, 5))))


def _llava(dice: random.Random, folder: Path) -> Any:
    words = tokenizer(dice, folder, begin=dice.random() < 0.7, pieces=_pieces(dice), further=("<image>",))
    kind = dice.choice((*(k for k in GPT if k != "mpt"), *LIKE_LLAMA))
    siglip = dice.random() < 0.3
    tower = {"model_type": f"{'siglip' if siglip else 'clip'}_vision_model", **clip_vision(dice)}
    config = transformers.LlavaConfig(
        vision_config=tower,
        text_config=_below(language(dice, kind, len(words) + dice.choice((0, 5)), tie_word_embeddings=False)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full" if siglip else dice.choice(("default", "full")),
        vision_feature_layer=dice.choice((-1, -2, [-2, -1])),
        tie_word_embeddings=False,
    )
    images = _square(dice, LlavaImageProcessorPil, do_pad=dice.random() < 0.4)
    _together(dice, folder, transformers.LlavaProcessor, images, words, config)
    return transformers.LlavaForConditionalGeneration(config)


def _together(dice: random.Random, folder: Path, kind: Any, images: Any, words: Any, config: Any) -> None:
    """Image processor and tokenizer in one processor that knows the model, or apart, as older folders have them."""
    if dice.random() < 0.3:
        images.save_pretrained(folder)
        return
    vision = config.vision_config
    kind(
        image_processor=images,
        tokenizer=words,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int("clip" in vision.model_type),
        chat_template=LLAVA if dice.random() < 0.5 else None,
    ).save_pretrained(folder)


def _next(dice: random.Random, folder: Path) -> Any:
    words = tokenizer(dice, folder, begin=True, pieces=_pieces(dice), further=("<image>",))
    siglip = dice.random() < 0.4
    canvases = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96], [32, 32]]
    canvases = dice.sample(canvases, dice.choice((2, 4, 6)))
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": f"{'siglip' if siglip else 'clip'}_vision_model", **clip_vision(dice)},
        text_config=language(dice, dice.choice(("llama", "mistral", "qwen2")), len(words), tie_word_embeddings=False),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full" if siglip else "default",
        image_grid_pinpoints=canvases,
        tie_word_embeddings=False,
    )
    images = _square(dice, LlavaNextImageProcessorPil, image_grid_pinpoints=canvases)
    _together(dice, folder, transformers.LlavaNextProcessor, images, words, config)
    return transformers.LlavaNextForConditionalGeneration(config)


def _blip2_parts(dice: random.Random, folder: Path, rows: int, **more: Any) -> dict[str, Any]:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": dice.choice((1, 2)),
        "num_attention_heads": dice.choice((2, 4)),
        "image_size": 32,
        "patch_size": dice.choice((8, 16)),
        "hidden_act": dice.choice(("gelu", "relu")),
    }
    layers = dice.choice((2, 4))
    qformer = {
        "vocab_size": rows,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": dice.choice((2, 4)),
        "intermediate_size": 40,
        "max_position_embeddings": 80,
        "encoder_hidden_size": 24,
        "cross_attention_frequency": dice.choice((1, 2)),
        **more,
    }
    return {"vision_config": vision, "qformer_config": qformer, "num_query_tokens": dice.choice((3, 5))}


def _blip2(dice: random.Random, folder: Path) -> Any:
    """Over OPT, Llama or T5; or InstructBLIP over one of them."""
    instruct = dice.random() < 0.4
    seq2seq = dice.random() < 0.4
    words = tokenizer(dice, folder, begin=not seq2seq, end=seq2seq, pieces=_pieces(dice), further=("<image>",))
    place = words.convert_tokens_to_ids("<image>")
    if seq2seq:
        text: Any = {
            "model_type": "t5",
            "vocab_size": len(words),
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 1,
            "num_heads": 4,
            "feed_forward_proj": dice.choice(("relu", "gated-gelu")),
            "tie_word_embeddings": dice.random() < 0.5,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        }
    else:
        text = _below(language(dice, dice.choice(("opt", "llama", "qwen2", "gpt_neox", "granite")), len(words) + 3))
    reader = bert(folder / "qformer_tokenizer") if instruct else None
    parts = _blip2_parts(dice, folder, 60 if reader is None else len(reader))
    images, queries = BlipImageProcessorPil(size={"height": 32, "width": 32}), parts["num_query_tokens"]
    if dice.random() < 0.3:  # as folders from before the library had places for pictures
        images.save_pretrained(folder)
    elif instruct:
        transformers.InstructBlipProcessor(images, words, reader, num_query_tokens=queries).save_pretrained(folder)
    else:
        transformers.Blip2Processor(images, words, num_query_tokens=queries).save_pretrained(folder)
    if instruct:
        config = transformers.InstructBlipConfig(**parts, text_config=text, image_token_index=place)
        return transformers.InstructBlipForConditionalGeneration(config)
    return transformers.Blip2ForConditionalGeneration(
        transformers.Blip2Config(**parts, text_config=text, image_token_index=place)
    )


def _retrieval(dice: random.Random, folder: Path) -> Any:
    words = bert(folder)
    parts = _blip2_parts(dice, folder, len(words), use_qformer_text_input=True)
    transformers.Blip2Processor(BlipImageProcessorPil(size={"height": 32, "width": 32}), words).save_pretrained(folder)
    config = transformers.Blip2Config(
        **parts, text_config=language(dice, "opt", 40), image_text_hidden_size=dice.choice((12, 16))
    )
    config.image_token_index = None
    return transformers.Blip2ForImageTextRetrieval(config)


def _idefics(dice: random.Random, folder: Path) -> Any:
    extra = dice.choice((2, 3))
    words = tokenizer(dice, folder, begin=dice.random() < 0.7, pieces=_pieces(dice))
    rows = len(words)
    tokens = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"][:extra]
    words.bos_token = "<s>"  # their processor writes the named one, whether the tokenizer adds it or not
    words.add_special_tokens({"additional_special_tokens": tokens})
    words.save_pretrained(folder)
    heads = dice.choice((2, 4))
    norm = dice.random() < 0.5
    config = transformers.IdeficsConfig(
        vocab_size=rows,
        additional_vocab_size=extra,
        hidden_size=heads * 8,
        num_attention_heads=heads,
        num_hidden_layers=dice.choice((2, 4)),
        intermediate_size=48,
        cross_layer_interval=dice.choice((1, 2)),
        qk_layer_norms=norm,
        alpha_type=dice.choice(("float", "vector")),
        use_resampler=True,
        hidden_act=dice.choice(("silu", "silu", "gelu", "relu")),
        rope_parameters=dice.choice((None, {"rope_type": "default", "rope_theta": 100.0})),
        tie_word_embeddings=dice.random() < 0.3,
        vision_config={
            "embed_dim": 24,
            "image_size": 32,
            "patch_size": 8,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
        },
        perceiver_config={
            "resampler_n_latents": dice.choice((3, 5)),
            "resampler_depth": dice.choice((1, 2)),
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": norm,
        },
    )
    images = IdeficsImageProcessorPil(image_size=32)
    images.save_pretrained(folder)
    if dice.random() < 0.7:
        transformers.IdeficsProcessor(images, words, image_size=32).save_pretrained(folder)
    return transformers.IdeficsForVisionText2Text(config)


FAMILIES: dict[str, Callable[[random.Random, Path], Any]] = {
    "clip": _clip,
    "siglip": _siglip,
    "siglip-tower": _siglip_tower,
    "clip-tower": _tower,
    "text-tower": _text_tower,
    "lm": _lm,
    "llava": _llava,
    "llava-next": _next,
    "blip-2": _blip2,
    "retrieval": _retrieval,
    "idefics": _idefics,
}


def save(seed: int, folder: Path) -> Drawn:
    """A folder drawn by ``seed``."""
    dice = random.Random(seed)
    family = list(FAMILIES)[seed % len(FAMILIES)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = redraw(FAMILIES[family](dice, folder), seed)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    model.save_pretrained(folder)
    text = getattr(model.config, "text_config", None)
    return Drawn(family, {"class": type(model).__name__, "language": getattr(text or model.config, "model_type", "")})
