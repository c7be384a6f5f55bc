"""transformers' IDEFICS, a Flamingo over Llama (2306.16527): ``IdeficsForVisionText2Text`` folders, both ways.

Where it differs from OpenFlamingo is configuration here: RMSNorm and SwiGLU in the blocks, the encoder's class token
among the features, and ``<fake_token_around_image>`` on both sides of each picture, which thereby ends the text before.
The instruct models have a third new token, which ends every turn.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.interleave import InterleaveProcessor
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_state
from isthmus.interop.entries import Entry, Shapes, from_theirs, part_of, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, must, shards
from isthmus.interop.hf_files import (
    generation_config,
    tokenizer_files,
    with_dtype,
)
from isthmus.interop.hf_towers import (
    activation_from_hf,
    vision_config_from_hf,
    vision_config_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from isthmus.load_report import Account
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.weights import state_tensors

TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
"""The instruct models' three; the others have the first two."""

_VISION, _RESAMPLER, _BLOCKS = "model.vision_model.", "model.perceiver_resampler.", "model.gated_cross_attn_layers."
_ROWS = {
    "model.embed_tokens.additional_embedding.weight": "language.new_rows.input",
    "lm_head.additional_fc.weight": "language.new_rows.output",
}
_VISION_DEFAULTS = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
"""IdeficsVisionConfig's, where a folder leaves a field out; CLIP's are others."""

_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")
"""The positions' settings, in the library's spelling and in older ones; Llama's are the same."""

_DERIVED = ("rotary_emb.inv_freq", "embeddings.position_ids")
_WHO = "IdeficsForVisionText2Text"


class _LlamaFields(TypedDict):
    """The language model's sizes. The first five stand in what is written here; a config.json may leave them out."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: NotRequired[int]
    head_dim: NotRequired[int | None]
    hidden_act: NotRequired[str]
    rms_norm_eps: NotRequired[float]
    max_position_embeddings: NotRequired[int]
    tie_word_embeddings: NotRequired[bool]


class _PerceiverFields(TypedDict, total=False):
    resampler_depth: int
    resampler_n_latents: int
    resampler_n_heads: int
    resampler_head_dim: int
    qk_layer_norms_perceiver: bool


class _Fields(_LlamaFields, total=False):
    """What is read of a config.json, which has the language model's sizes among its own."""

    use_resampler: bool
    additional_vocab_size: int
    vision_config: Mapping[str, object]
    perceiver_config: _PerceiverFields | None
    qk_layer_norms: bool
    alpha_type: str
    cross_layer_interval: int


def idefics_config_from_hf(config: Mapping[str, object]) -> FlamingoConfig:
    """From a config.json. Raises CheckpointError for a variant that is no Flamingo."""
    raw = cast(_Fields, config)
    must(raw.get("use_resampler", False), "use_resampler", raw.get("use_resampler"), "a Flamingo here", "true")
    extra = raw.get("additional_vocab_size", 0)
    must(extra in (2, 3), "additional_vocab_size", extra, "a Flamingo here", f"2 or 3, the rows of {', '.join(TOKENS)}")
    vision = {**_VISION_DEFAULTS, **raw.get("vision_config", {}), "model_type": "clip_vision_model"}
    vision["hidden_size"] = vision.pop("embed_dim")
    perceiver: _PerceiverFields = raw.get("perceiver_config") or {}
    rows, act, eps = raw.get("vocab_size", 32000), raw.get("hidden_act", "silu"), raw.get("rms_norm_eps", 1e-6)
    width, heads = raw.get("hidden_size", 4096), raw.get("num_attention_heads", 32)
    mlp_width = raw.get("intermediate_size", 11008)
    language = {
        "model_type": "llama",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": raw.get("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "hidden_act": act,
        "rms_norm_eps": eps,
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        **{name: config[name] for name in _ROTARY if config.get(name) is not None},
    }
    return FlamingoConfig(
        vision=vision_config_from_hf(vision),
        language=language,
        end_id=rows,
        image_id=rows + 1,
        turn_id=rows + 2 if extra == 3 else None,
        resampler=ResamplerConfig(
            layers=perceiver.get("resampler_depth", 6),
            latents=perceiver.get("resampler_n_latents", 64),
            heads=perceiver.get("resampler_n_heads", 16),
            head_width=perceiver.get("resampler_head_dim", 96),
            activation="relu",
            qk_norm=perceiver.get("qk_layer_norms_perceiver", False),
        ),
        xattn=GatedConfig.idefics(
            width,
            heads,
            mlp_width,
            eps=eps,
            qk_norm=raw.get("qk_layer_norms", False),
            gate="vector" if raw.get("alpha_type", "float") == "vector" else "scalar",
            activation=activation_from_hf(act),
        ),
        every=raw.get("cross_layer_interval", 1),
        class_token=True,
    )


def idefics_config_to_hf(config: FlamingoConfig) -> dict[str, object]:
    """A config.json. Raises CheckpointError, naming the field, for a Flamingo that is not of this kind."""
    described, resampler = config.language, config.resampler
    must(described["model_type"] == "llama", "language.model_type", described["model_type"], _WHO, "llama")
    language = cast(_LlamaFields, described)
    width, heads = language.get("hidden_size"), language.get("num_attention_heads")
    mlp_width = language.get("intermediate_size")
    shared = language.get("num_key_value_heads", heads)
    must(shared == heads, "language.num_key_value_heads", shared, _WHO, f"num_attention_heads = {heads}")
    for name in ("attention_bias", "mlp_bias"):
        must(not described.get(name), f"language.{name}", described.get(name), _WHO, "false")
    if (head := language.get("head_dim")) is not None:
        must(head * heads == width, "language.head_dim", head, _WHO, "hidden_size / num_attention_heads")
    for name, value, fixed in (("offset", config.offset, 0), ("media", config.media, "previous")):
        must(value == fixed, name, value, _WHO, repr(fixed))
    must(config.class_token, "class_token", config.class_token, _WHO, "true")
    last = config.feature_layer % (config.vision.layers + 1) == config.vision.layers
    must(last, "feature_layer", config.feature_layer, _WHO, "-1")
    must(not config.patch_positions, "patch_positions", config.patch_positions, _WHO, "false")
    new, first = config.new_ids, language["vocab_size"]
    must(new == tuple(range(first, first + len(new))), "end_id", config.end_id, _WHO, "vocab_size, the others after")
    eps = language.get("rms_norm_eps", 1e-6)
    act = language.get("hidden_act", "silu")
    xattn = config.xattn
    own = GatedConfig.idefics(
        width, heads, mlp_width, eps=eps, qk_norm=xattn.qk_norm, gate=xattn.gate, activation=activation_from_hf(act)
    )
    must(xattn == own, "xattn", xattn, _WHO, repr(own))
    for name, value, fixed in (
        ("activation", resampler.activation, "relu"),
        ("final_norm", resampler.final_norm, True),
        ("frames", resampler.frames, 0),
    ):
        must(value == fixed, f"resampler.{name}", value, _WHO, repr(fixed))
    vision = vision_config_to_hf(config.vision)
    must(vision.pop("model_type") == "clip_vision_model", "vision", "SigLIP's", _WHO, "CLIP's")
    return {
        "architectures": [_WHO],
        "model_type": "idefics",
        **{name: described[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")},
        "num_attention_heads": heads,
        "max_position_embeddings": language.get("max_position_embeddings", 2048),
        "hidden_act": act,
        "rms_norm_eps": eps,
        "tie_word_embeddings": language.get("tie_word_embeddings", False),
        **{name: described[name] for name in _ROTARY if described.get(name) is not None},
        "additional_vocab_size": len(new),
        "cross_layer_interval": config.every,
        "qk_layer_norms": xattn.qk_norm,
        "alpha_type": "vector" if xattn.gate == "vector" else "float",
        "use_resampler": True,
        "vision_config": {**vision, "embed_dim": vision.pop("hidden_size")},
        "perceiver_config": {
            "use_resampler": True,
            "resampler_depth": resampler.layers,
            "resampler_n_latents": resampler.latents,
            "resampler_n_heads": resampler.heads,
            "resampler_head_dim": resampler.head_width,
            "qk_layer_norms_perceiver": resampler.qk_norm,
        },
    }


def idefics_from_hf(
    state: Mapping[str, Tensor], config: FlamingoConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """Our state dict from theirs. Raises CheckpointError on any misfit."""
    with torch.device("meta"):
        shapes = shapes_of(Flamingo(config))
    vision = {n.removeprefix("model."): t for n, t in state.items() if n.startswith(_VISION)}
    rest = {n: t.flatten() if ".alpha_" in n else t for n, t in state.items() if not n.startswith(_VISION)}
    if config.language.get("tie_word_embeddings"):  # the library writes what is tied once
        rest.setdefault("lm_head.weight", rest["model.embed_tokens.weight"])
        rest.pop("lm_head.additional_fc.weight", None)
    ours = {f"vision.{n}": t for n, t in vision_from_hf(vision, config.vision, account).items()}
    return ours | from_theirs(_entries(config, shapes), rest, shapes, _WHO, tolerated=_DERIVED, account=account)


def idefics_to_hf(state: Mapping[str, Tensor], config: FlamingoConfig) -> dict[str, Tensor]:
    """Their state dict."""
    vision = part_of(state, "vision.")
    rest = {n: t for n, t in state.items() if not n.startswith("vision.")}
    theirs = to_theirs(_entries(config, {n: t.shape for n, t in rest.items()}), rest)
    if config.xattn.gate == "vector":
        theirs = {n: t[None, None] if ".alpha_" in n else t for n, t in theirs.items()}
    return vision_to_hf(vision, config.vision, prefix=_VISION) | theirs


def read_idefics_folder(folder: Path, account: Account | None = None) -> tuple[FlamingoConfig, dict[str, Tensor]]:
    """Configuration and our state dict."""
    config = idefics_config_from_hf(read_json(folder / "config.json"))
    try:
        return config, idefics_from_hf(read_state(folder, account), config, account)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def _entries(config: FlamingoConfig, shapes: Shapes) -> list[Entry]:
    rows = [Entry(theirs, (ours,)) for theirs, ours in _ROWS.items() if ours in shapes]
    prefix = "language.lm."
    rows += [Entry(n.removeprefix(prefix), (n,)) for n in shapes if n.startswith(prefix)]
    rows += _resampler(config.resampler)
    for i in range(len({n.split(".")[1] for n in shapes if n.startswith("xattn.")})):
        rows += _block(config.xattn, f"{_BLOCKS}{i}", f"xattn.{i}")
    return rows


def _resampler(config: ResamplerConfig) -> list[Entry]:
    rows = [Entry(f"{_RESAMPLER}latents", ("connector.latents",)), *same(f"{_RESAMPLER}layer_norm", "connector.norm")]
    for i in range(config.layers):
        a, b, ours = f"{_RESAMPLER}blocks.{i}.0", f"{_RESAMPLER}blocks.{i}.1", f"connector.layers.{i}"
        rows += same(f"{a}.context_layer_norm", f"{ours}.media_norm")
        rows += same(f"{a}.latents_layer_norm", f"{ours}.latent_norm")
        rows += _projections(f"{a}.", f"{ours}.attn", "output_proj")
        if config.qk_norm:
            rows += same(f"{a}.q_layer_norm", f"{ours}.attn.q_norm") + same(f"{a}.k_layer_norm", f"{ours}.attn.k_norm")
        rows += same(f"{b}.ln", f"{ours}.mlp_norm")
        rows += same(f"{b}.fc", f"{ours}.mlp.fc1", "weight") + same(f"{b}.c_proj", f"{ours}.mlp.fc2", "weight")
    return rows


def _block(config: GatedConfig, theirs: str, ours: str) -> list[Entry]:
    rows = [
        Entry(f"{theirs}.alpha_cross_attn", (f"{ours}.attn_gate",)),
        Entry(f"{theirs}.alpha_dense", (f"{ours}.mlp_gate",)),
        *same(f"{theirs}.input_layernorm", f"{ours}.attn_norm", "weight"),
        *same(f"{theirs}.post_attention_layernorm", f"{ours}.mlp_norm", "weight"),
    ]
    rows += _projections(f"{theirs}.cross_attn.", f"{ours}.attn", "o_proj")
    if config.qk_norm:
        for part in "qk":
            rows += same(f"{theirs}.cross_attn.{part}_layer_norm", f"{ours}.attn.{part}_norm", "weight")
    for part in ("gate", "up", "down"):
        rows += same(f"{theirs}.mlp.{part}_proj", f"{ours}.mlp.{part}", "weight")
    return rows


def _projections(theirs: str, ours: str, last: str) -> list[Entry]:
    """Queries, keys and values have one name; that of what comes out is ``last`` there."""
    names = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", last: "out_proj"}
    return [row for name, own in names.items() for row in same(f"{theirs}{name}", f"{ours}.{own}", "weight")]


def idefics_export(model: Source[Flamingo, InterleaveProcessor], *, shard_bytes: int) -> Export:
    """A Flamingo in the proportions of IDEFICS; any other can be written as `open_flamingo`."""
    config, processor = model.net.config, model.processor
    described = idefics_config_to_hf(config)
    tokens = TOKENS[: len(config.new_ids)]
    for name, value, fixed in (("tokens", processor.tokens, tokens), ("around", processor.around, True)):
        must(value == fixed, f"processor.{name}", value, "transformers", repr(fixed))
    read = "paper" if config.turn_id is None else "idefics"
    template_loss = f"processor.template {processor.template!r}: such a model gets {read!r}"
    weights = idefics_to_hf(state_tensors(model.net), config)
    described |= {"bos_token_id": processor.tokenizer.bos_id, "eos_token_id": processor.tokenizer.eos_id}
    files = {
        "config.json": with_dtype(described | {"pad_token_id": processor.tokenizer.pad_id}, weights),
        "generation_config.json": generation_config(model),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            processor.tokenizer,
            begin=True,
            end=False,
            context=processor.max_length,
            side="left",
            processor_class="IdeficsProcessor",
        ),
        "preprocessor_config.json": {
            "image_processor_type": "IdeficsImageProcessor",
            "processor_class": "IdeficsProcessor",
            "image_size": processor.image.size,
            "image_mean": list(processor.image.mean),
            "image_std": list(processor.image.std),
            "image_num_channels": 3,
        },
    }
    losses = (template_loss,) if processor.template != read else ()
    return Export(files=files, losses=losses, opens=f"transformers.{_WHO}.from_pretrained(FOLDER)")
