"""The config.json of transformers' BLIP-2 and InstructBLIP, from and to our configuration."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NotRequired, TypedDict, cast

from isthmus import load_report
from isthmus.interop.export import must
from isthmus.interop.hf_towers import TowerFields, filled
from isthmus.language import known_fields
from isthmus.load_report import Account
from isthmus.models.blip2 import Blip2Config
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.vit import VisionConfig

_WHO = "transformers' BLIP-2"


class _VisionFields(TowerFields):
    image_size: int
    patch_size: int


class _QFormerFields(TowerFields):
    vocab_size: int
    max_position_embeddings: int
    cross_attention_frequency: int
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float


# What transformers fills in for a key that a config.json leaves out.
_VISION: _VisionFields = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_QFORMER: _QFormerFields = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "cross_attention_frequency": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
}


class _Fields(TypedDict):
    """What is read of a config.json."""

    vision_config: Mapping[str, object]
    qformer_config: Mapping[str, object]
    text_config: Mapping[str, object]
    num_query_tokens: NotRequired[int]
    image_text_hidden_size: NotRequired[int]


def config_from_hf(config: Mapping[str, object], account: Account | None = None) -> Blip2Config:
    """Our configuration from the contents of a config.json; phase ``generate``, the norm's eps transformers' own."""
    values = cast(_Fields, config)
    vision, qformer = filled(_VISION, values["vision_config"]), filled(_QFORMER, values["qformer_config"])
    text = values["text_config"]
    hidden, attention = qformer["hidden_dropout_prob"], qformer["attention_probs_dropout_prob"]
    if hidden != attention:
        load_report.noted(
            account,
            f"qformer_config.attention_probs_dropout_prob {attention:g}: in training attention drops {hidden:g} here, "
            "as everything in the Q-Former; answers are the same",
        )
    return Blip2Config(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
            activation=vision["hidden_act"],
            eps=vision["layer_norm_eps"],
            pre_norm=False,
            patch_bias=True,
            post_norm="none",
            pool="none",
        ),
        qformer=QFormerConfig(
            vision_width=vision["hidden_size"],
            width=qformer["hidden_size"],
            layers=qformer["num_hidden_layers"],
            heads=qformer["num_attention_heads"],
            mlp_width=qformer["intermediate_size"],
            queries=values.get("num_query_tokens", 32),
            cross_every=qformer["cross_attention_frequency"],
            vocab_size=qformer["vocab_size"],
            positions=qformer["max_position_embeddings"],
            dec_id=qformer["vocab_size"] - 1,
            activation=qformer["hidden_act"],
            eps=qformer["layer_norm_eps"],
            dropout=hidden,
        ),
        language=known_fields(text) | {k: text[k] for k in ("dense_act_fn",) if k in text},
        instruct=config.get("model_type") == "instructblip",
        embed_dim=values.get("image_text_hidden_size", 256),
        norm_eps=vision["layer_norm_eps"],
    )


class WrittenBlip2(TypedDict):
    """The config.json that is written."""

    architectures: list[str]
    model_type: str
    vision_config: dict[str, object]
    qformer_config: dict[str, object]
    text_config: dict[str, object]
    num_query_tokens: int
    image_text_hidden_size: int
    image_token_index: int | None


def config_to_hf(config: Blip2Config, *, image_token_id: int | None) -> WrittenBlip2:
    """A config.json for what :func:`to_hf` wrote. Raises CheckpointError, naming the field, for what has no place."""
    vision, qformer = config.vision, config.qformer
    plain = replace(vision, pre_norm=False, patch_bias=True, post_norm="none", pool="none")
    for field in ("pre_norm", "patch_bias", "post_norm"):
        must(
            getattr(vision, field) == getattr(plain, field), f"vision.{field}", getattr(vision, field), _WHO, "another"
        )
    must(config.feature_layer % (vision.layers + 1) == vision.layers, "feature_layer", config.feature_layer, _WHO, "-1")
    must(not config.patch_positions, "patch_positions", config.patch_positions, _WHO, "false")
    for field, value in (("vision.activation", vision.activation), ("qformer.activation", qformer.activation)):
        must(value in ("gelu", "quick_gelu", "relu"), field, value, _WHO, "gelu, quick_gelu or relu")
    represent = config.phase == "represent"
    writes = "InstructBlipForConditionalGeneration" if config.instruct else "Blip2ForConditionalGeneration"
    more = {} if config.instruct else {"use_qformer_text_input": represent}
    return {
        "architectures": ["Blip2ForImageTextRetrieval" if represent else writes],
        "model_type": "instructblip" if config.instruct else "blip-2",
        "vision_config": {
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.eps,
            "qkv_bias": True,
        },
        "qformer_config": {
            "vocab_size": qformer.vocab_size,
            "hidden_size": qformer.width,
            "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads,
            "intermediate_size": qformer.mlp_width,
            "hidden_act": qformer.activation,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.dropout,
            "max_position_embeddings": qformer.positions,
            "layer_norm_eps": qformer.eps,
            "cross_attention_frequency": qformer.cross_every,
            "encoder_hidden_size": qformer.vision_width,
            **more,
        },
        "text_config": dict(config.language or {"model_type": "opt"}) if not represent else {"model_type": "opt"},
        "num_query_tokens": qformer.queries,
        "image_text_hidden_size": config.embed_dim,
        "image_token_index": image_token_id,
    }
