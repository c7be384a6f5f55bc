"""A model in the form of the code that first published its kind: OpenAI's CLIP, open_clip, LLaVA, LAVIS, OpenFlamingo.

Where that code has a size or a rule fixed, a model with another one is refused by the name of the field. Files that
torch.save writes hold plain tensors only.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import tokenizers
from torch import Tensor

from isthmus.checkpoint import Content
from isthmus.data.clip_tokenizer import IDS, is_published
from isthmus.data.images import ImageTransform
from isthmus.data.tokenizer import Tokenizer
from isthmus.interop.entries import part_of
from isthmus.interop.export import Export, Source, common_dtype, must, pickled, shards
from isthmus.interop.export_hf import IMAGE, language_files, language_tensors
from isthmus.interop.folders import asked_otherwise
from isthmus.interop.hf_clip import vision_config_to_hf, vision_to_hf
from isthmus.interop.hf_files import image_processor, tokenizer_files
from isthmus.interop.lavis import EVA_HEAD, HEAD, NORM_EPS, to_lavis
from isthmus.interop.open_clip import clip_to_open_clip
from isthmus.interop.open_flamingo import LAYERS, trained_to_open_flamingo
from isthmus.interop.openai import clip_to_openai
from isthmus.interop.original_llava import AROUND, TOWERS, llava_to_original, template_of
from isthmus.interop.timm_siglip import trunk_name
from isthmus.language import vocabulary_tables
from isthmus.models.clip import ClipConfig
from isthmus.models.llava import LlavaConfig
from isthmus.nn.connectors import named_mlp
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.tiles import turned
from isthmus.nn.vit import VisionConfig

TOWER = "vision_tower"
_OF_TRANSFORMERS = {IMAGE, "<pad>"}
"""What transformers' LLaVA adds after the language model's vocabulary."""


# CLIP.


def openai_export(model: Source, *, shard_bytes: int) -> Export:
    """``model.pt``: a state dict that ``clip.load`` builds a model from; their code fixes all but the sizes."""
    config, who = model.net.config, "OpenAI's CLIP"
    _cosine_clip(config, who)
    for name, tower in (("vision", config.vision), ("text", config.text)):
        must(tower.activation == "quick_gelu", f"{name}.activation", tower.activation, who, "quick_gelu")
        must(tower.heads * 64 == tower.width, f"{name}.heads", tower.heads, who, f"width / 64 = {tower.width / 64:g}")
        must(tower.mlp_width == 4 * tower.width, f"{name}.mlp_width", tower.mlp_width, who, "4 · width")
        must(tower.eps == 1e-5, f"{name}.eps", tower.eps, who, "1e-5")
    must(config.init_bias is None, "init_bias", config.init_bias, who, "none")
    # clip.tokenize reads by the table that comes with it, pads to 77, and the model searches the largest id.
    text, tokenizer = config.text, model.processor.tokenizer
    for name, value, fixed in (("context", text.context, 77), ("vocab_size", text.vocab_size, IDS)):
        must(value == fixed, f"text.{name}", value, who, str(fixed))
    must(text.eot_id == IDS - 1, "text.eot_id", text.eot_id, who, str(IDS - 1))
    must(is_published(tokenizer), "processor.tokenizer", f"{tokenizer.vocab_size} tokens", who, f"CLIP's own of {IDS}")
    state = model.net.state_dict()
    files = {"model.pt": pickled(clip_to_openai(state, config)), **_clip_tokenizer(tokenizer, config)}
    return Export(
        files=files,
        losses=_published_transform(model.processor.image, ImageTransform.clip(config.vision.image_size)),
        opens="clip.load('FOLDER/model.pt', jit=False)",
    )


def open_clip_export(model: Source, *, shard_bytes: int) -> Export:
    """The folder that open_clip pushes to the hub and opens by ``local-dir:FOLDER``; SigLIP's towers go by timm's name.

    A SigLIP's cleaning of texts is written into its tokenizer's file, so none is named beside it.
    """
    config, image, who = model.net.config, model.processor.image, "open_clip"
    must(config.similarity == "cosine", "similarity", config.similarity, who, "cosine")
    vision, text = config.vision, config.text
    siglip = not vision.class_token
    if not siglip:
        must(vision.activation == text.activation, "text.activation", text.activation, who, "the vision tower's")
        fits = vision.activation in ("gelu", "quick_gelu")
        must(fits, "vision.activation", vision.activation, who, "gelu or quick_gelu")
    must(siglip != text.causal, "text.pool", text.pool, who, "'last' for SigLIP's image tower, another for CLIP's")
    must(image.mode in ("square", "squash"), "processor.image.mode", image.mode, who, "square or squash")
    described = {
        "embed_dim": config.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "init_logit_scale": config.init_scale,
        **({} if config.init_bias is None else {"init_logit_bias": config.init_bias}),
        **({"custom_text": True} if siglip else {}),
        "vision_cfg": _open_clip_timm(vision) if siglip else _open_clip_vision(vision),
        "text_cfg": _open_clip_text(text, model.processor.tokenizer, proj_bias=config.text_projection_bias),
    }
    preprocess = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.resample,
        "resize_mode": "shortest" if image.mode == "square" else "squash",
    }
    files = {
        "open_clip_config.json": {"model_cfg": described, "preprocess_cfg": preprocess},
        "open_clip_model.safetensors": clip_to_open_clip(model.net.state_dict(), config),
        **_clip_tokenizer(model.processor.tokenizer, config),
    }
    return Export(files=files, opens="open_clip.create_model_and_transforms('local-dir:FOLDER')")


def _open_clip_vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.layers,
        "head_width": vision.width // vision.heads,
        "mlp_ratio": vision.mlp_width / vision.width,
        **({} if vision.pre_norm else {"no_ln_pre": True}),
        **_norm(vision.eps),
    }


def _open_clip_timm(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "timm_model_name": trunk_name(vision),
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }


def _open_clip_text(text: TextConfig, tokenizer: Tokenizer, *, proj_bias: bool) -> dict[str, Any]:
    """Without the name of a tokenizer their code reads by CLIP's own; with any, by the one in the folder."""
    must(
        text.activation != "relu" and (text.causal or text.activation in ("gelu", "gelu_tanh")),
        "text.activation",
        text.activation,
        "open_clip",
        "gelu or gelu_tanh",
    )
    pools = {"eot": {"pool_type": "eos", "eos_id": text.eot_id}, "last": {"pool_type": "last", "no_causal_mask": True}}
    return {
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "layers": text.layers,
        "heads": text.heads,
        "mlp_ratio": text.mlp_width / text.width,
        "pad_id": text.pad_id,
        **pools.get(text.pool, {}),
        **({} if text.causal and is_published(tokenizer) else {"hf_tokenizer_name": "."}),
        **({"act_kwargs": {"approximate": "tanh"}} if text.activation == "gelu_tanh" else {}),
        **({"proj_bias": True} if proj_bias else {}),
        **_norm(text.eps),
    }


def _norm(eps: float) -> dict[str, Any]:
    return {} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}


def _cosine_clip(config: ClipConfig, who: str) -> None:
    must(config.similarity == "cosine", "similarity", config.similarity, who, "cosine")
    must(config.vision.class_token, "vision.class_token", config.vision.class_token, who, "true (CLIP's tower)")


def _clip_tokenizer(tokenizer: Any, config: ClipConfig) -> dict[str, Content]:
    return tokenizer_files(tokenizer, begin=True, end=True, context=config.text.context)


def _published_transform(image: ImageTransform, own: ImageTransform) -> tuple[str, ...]:
    """The image transform is part of their code: say it where ours is another."""
    same = replace(image, crop=own.crop, deep=own.deep) == own  # of these two every writer takes note
    return () if same else (f"processor.image {image.to_dict()}: their code has its own, {own.to_dict()}",)


# LLaVA.


def original_llava_export(model: Source, *, shard_bytes: int) -> Export:
    """A folder of haotian-liu/LLaVA: the full model with its tower, and the tower alone in a folder of its own."""
    config, image, who = model.net.config, model.processor.image, "the original LLaVA"
    bases = {"llama": "llava_llama", "mistral": "llava_mistral"}
    model_type = config.language["model_type"]
    must(model_type in bases, "language.model_type", model_type, who, " or ".join(bases))
    must(isinstance(config.feature_layer, int), "feature_layer", config.feature_layer, who, "one number")
    must(named_mlp(config.projector) is not None, "projector", config.projector, who, "linear or mlpNx_gelu")
    modes = ("square", "pad", "anyres")
    must(image.mode in modes, "processor.image.mode", image.mode, who, "square, pad or anyres")
    around = model.processor.around
    must(around in ((), AROUND), "processor.around", around, who, f"nothing or {AROUND}")
    tower = vision_config_to_hf(config.vision)
    must(tower["model_type"] == "clip_vision_model", "vision", tower["model_type"], who, "a tower of CLIP")
    state, config, tokenizer, losses = _without_image_token(model)
    weights = llava_to_original(state, config)
    if config.language.get("tie_word_embeddings"):
        weights.pop("lm_head.weight")
    tower_weights = vision_to_hf(part_of(state, "vision."), config.vision, prefix="vision_model.")
    described = _original_config(model, config, bases[model_type])
    template, stops = template_of(described), [tokenizer.eos_id, *model.processor.stop_ids]
    if model.processor.template != template:
        losses += (f"processor.template {model.processor.template!r}: such a model gets {template!r}",)
    files = {
        "config.json": {**described, "torch_dtype": common_dtype(list(weights.values()))},
        "generation_config.json": {"eos_token_id": stops if stops[1:] else stops[0], "do_sample": False},
        **shards(weights, shard_bytes),
        **tokenizer_files(tokenizer, begin=True, end=False, context=model.net.language.context, side="right"),
        f"{TOWER}/config.json": {**tower, "architectures": ["CLIPVisionModel"]},
        f"{TOWER}/preprocessor_config.json": image_processor(ImageTransform.clip(config.vision.image_size)),
        f"{TOWER}/model.safetensors": tower_weights,
    }
    own = replace(ImageTransform.clip(config.vision.image_size), mode=image.mode, pinpoints=image.pinpoints)
    return Export(
        files=files,
        losses=(*losses, *_published_transform(image, own)),
        opens="llava.model.builder.load_pretrained_model('FOLDER', None, 'llava-own')",
    )


def _without_image_token(model: Source) -> tuple[dict[str, Tensor], LlavaConfig, Tokenizer, tuple[str, ...]]:
    """State, configuration and tokenizer without transformers' token for the place of a picture and all rows after it,
    which their code could write and never reads; and the loss where a token after it is in use."""
    net, tokenizer = model.net, model.processor.tokenizer
    state, config = net.state_dict(), net.config
    if not model.forbidden:
        return state, config, tokenizer, ()
    first = min(model.forbidden)
    tree = json.loads(tokenizer.backend.to_str())
    above = {name for name, number in tokenizer.backend.get_vocab().items() if number >= first}
    if not above <= _OF_TRANSFORMERS & {token["content"] for token in tree["added_tokens"]}:
        return state, config, tokenizer, (f"forbidden {list(model.forbidden)}: their code may write these tokens",)
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in above]
    kept = {name.removesuffix("_token"): None if t in above else t for name, t in tokenizer.specials.items()}
    for name in vocabulary_tables(net.language):
        state[f"language.{name}"] = state[f"language.{name}"][:first]
    config = replace(config, language={**config.language, "vocab_size": min(first, net.language.vocab_size)})
    return state, config, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tree)), **kept), ()  # type: ignore[arg-type]


def _original_config(model: Source, config: LlavaConfig, model_type: str) -> dict[str, Any]:
    known = {f"openai/{name}": tower() for name, tower in TOWERS.items()}
    return {
        **config.language,
        "architectures": ["LlavaLlamaForCausalLM" if model_type == "llava_llama" else "LlavaMistralForCausalLM"],
        "model_type": model_type,
        "mm_vision_tower": next((name for name, tower in known.items() if tower == config.vision), TOWER),
        # Their code then reads the tower out of these weights instead of keeping the named one's.
        "unfreeze_mm_vision_tower": True,
        "mm_hidden_size": config.feature_width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_select_feature": config.feature_select,
        "mm_patch_merge_type": "spatial_unpad" if config.pinpoints else "flat",
        **({"image_grid_pinpoints": [list(c) for c in turned(config.pinpoints)]} if config.pinpoints else {}),
        "mm_use_im_start_end": bool(model.processor.around),
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": model.processor.image.mode,
        "tokenizer_model_max_length": model.processor.max_length,
        "tokenizer_padding_side": "right",
    }


# BLIP-2.


def lavis_export(model: Source, *, shard_bytes: int) -> Export:
    """``model.pth`` with ``{"model": state dict}``, the LM included, and both tokenizers."""
    config, tokenizer, who = model.net.config, model.processor.tokenizer, "LAVIS"
    vision = config.vision
    for field, value, allowed in (
        ("vision.pre_norm", vision.pre_norm, False),
        ("vision.patch_bias", vision.patch_bias, True),
        ("vision.post_norm", vision.post_norm, "none"),
        ("vision.activation", vision.activation, "gelu"),
        ("vision.eps", vision.eps, 1e-6),
        ("qformer.activation", config.qformer.activation, "gelu"),
        ("qformer.eps", config.qformer.eps, 1e-12),
        ("vision.heads", vision.heads, vision.width / EVA_HEAD),
        ("qformer.heads", config.qformer.heads, config.qformer.width / HEAD),
        ("qformer.cross_every", config.qformer.cross_every, 2),
        ("feature_layer", config.feature_layer, -1),
        ("patch_positions", config.patch_positions, False),
    ):
        must(value == allowed, field, value, who, repr(allowed))
    model_type = "opt" if config.language is None or config.phase == "represent" else config.language["model_type"]
    must(model_type in ("opt", "t5", "llama"), "language.model_type", model_type, who, "opt, t5 or llama")
    losses = []
    if config.norm_eps != NORM_EPS:
        losses.append(f"norm_eps {config.norm_eps:g}: there it is {NORM_EPS:g}; answers differ in the last digits")
    if config.phase == "generate":
        losses += asked_otherwise(model.net, model.processor)
    files: dict[str, Content] = {
        "model.pth": pickled({"model": to_lavis(model.net.state_dict(), model_type)}),
        **tokenizer.files(),
    }
    for name, other in getattr(model.processor, "others", {}).items():
        files |= {f"{name}/{file}": text for file, text in other.files().items()}
    return Export(files=files, losses=tuple(losses), opens="lavis' load_checkpoint('FOLDER/model.pth')")


# Flamingo.


def open_flamingo_export(model: Source, *, shard_bytes: int) -> Export:
    """``checkpoint.pt`` of what is trained, the new tokens' rows merged into the embedding table, and the two frozen
    parts in transformers' form: ``lang_encoder`` and ``vision_encoder``."""
    net, who = model.net, "OpenFlamingo"
    config = net.config
    model_type = config.language["model_type"]
    must(model_type in LAYERS, "language.model_type", model_type, who, ", ".join(LAYERS))
    must(config.media == "previous", "media", config.media, who, "'previous'")
    must(config.offset == config.every - 1, "offset", config.offset, who, f"every - 1 = {config.every - 1}")
    must(not config.class_token, "class_token", config.class_token, who, "false")
    last = config.feature_layer % (config.vision.layers + 1) == config.vision.layers
    must(last, "feature_layer", config.feature_layer, who, "-1")
    must(not config.patch_positions, "patch_positions", config.patch_positions, who, "false")
    must(config.turn_id is None, "turn_id", config.turn_id, who, "none")
    own, theirs = ResamplerConfig.open_flamingo(), GatedConfig.open_flamingo()
    for name, part, fixed in (("resampler", config.resampler, own), ("xattn", config.xattn, theirs)):
        for field in _fields(fixed):
            value, allowed = getattr(part, field), getattr(fixed, field)
            must(value == allowed, f"{name}.{field}", value, who, repr(allowed))
    template, tokenizer = model.processor.template, model.processor.tokenizer
    # Their code adds <PAD> to a tokenizer that has no token for padding, then makes the tables as long as it is.
    rows = tokenizer.vocab_size + (tokenizer.specials["pad_token"] is None)
    must(max(config.new_ids) < rows, "new_ids", config.new_ids, who, f"within the tokenizer's {rows} tokens")
    lm = language_tensors(net.language.lm)
    tower = vision_to_hf(part_of(net.state_dict(), "vision."), config.vision, prefix="vision_model.")
    files: dict[str, Content] = {
        "checkpoint.pt": pickled(trained_to_open_flamingo(net, rows)),
        **{f"lang_encoder/{name}": content for name, content in language_files(model, lm).items()},
        **{f"lang_encoder/{name}": content for name, content in shards(lm, shard_bytes).items()},
        "vision_encoder/config.json": {
            **vision_config_to_hf(config.vision),
            "architectures": ["CLIPVisionModel"],
            "torch_dtype": common_dtype(list(tower.values())),
        },
        "vision_encoder/model.safetensors": tower,
        "vision_encoder/preprocessor_config.json": image_processor(model.processor.image),
        "open_flamingo.json": {
            "lang_encoder_path": "lang_encoder",
            "tokenizer_path": "lang_encoder",
            "cross_attn_every_n_layers": config.every,
            "decoder_layers_attr_name": LAYERS[model_type],
        },
    }
    kept = template == "open_flamingo"
    return Export(
        files=files,
        losses=() if kept else (f"processor.template {template!r}: such a model gets 'open_flamingo'",),
        opens="open_flamingo.create_model_and_transforms(...), then load_state_dict('checkpoint.pt', strict=False)",
    )


def _fields(config: Any) -> Mapping[str, Tensor]:
    return config.__dataclass_fields__
