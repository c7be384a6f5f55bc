"""LAVIS, the original code of BLIP-2: its checkpoints read and written.

Files hold ``{"model": state_dict}``; those of the second stage leave the frozen LM out, and often the encoder. The EVA
encoder's keys have no bias there: ours is zero. CLIP's ViT-L as encoder has OpenAI's names.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import Content, read_json
from isthmus.config import plain, section
from isthmus.data.blip2 import PairProcessor, PromptProcessor
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import load_wordpiece
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, tensors_of, unwrapped
from isthmus.interop.entries import Entry, depth, same
from isthmus.interop.export import Export, Source, must, pickled
from isthmus.interop.given import Given, Opened, language_of
from isthmus.interop.hf_blip2 import asked_otherwise, published_prompts
from isthmus.interop.hf_language import read_seq2seq_folder
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.openai import blocks
from isthmus.language import T5_LIKE
from isthmus.load_report import Account
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.weights import load_into

_VISION, _QFORMER_LAYER = "visual_encoder.", "Qformer.bert.encoder.layer."
_EVA_ONLY = ("norm.", "fc_norm.", "head.")
"""After EVA's last block, which BLIP-2 does without."""

HEAD, EVA_HEAD = 64, 88
"""Widths of an attention head: of the Q-Former and CLIP's tower, and of EVA's."""

NORM_EPS = 1e-5
"""``ln_vision``'s eps in LAVIS; transformers' conversion has 1e-6 (``Blip2Config.norm_eps``)."""

_LAYER = {
    "attn.q_proj.": "attention.self.query.",
    "attn.k_proj.": "attention.self.key.",
    "attn.v_proj.": "attention.self.value.",
    "attn.out_proj.": "attention.output.dense.",
    "ln_attn.": "attention.output.LayerNorm.",
    "cross.q_proj.": "crossattention.self.query.",
    "cross.k_proj.": "crossattention.self.key.",
    "cross.v_proj.": "crossattention.self.value.",
    "cross.out_proj.": "crossattention.output.dense.",
    "ln_cross.": "crossattention.output.LayerNorm.",
    "ffn_text.mlp.fc1.": "intermediate.dense.",
    "ffn_text.mlp.fc2.": "output.dense.",
    "ffn_text.ln.": "output.LayerNorm.",
    "ffn_query.mlp.fc1.": "intermediate_query.dense.",
    "ffn_query.mlp.fc2.": "output_query.dense.",
    "ffn_query.ln.": "output_query.LayerNorm.",
}
_BLOCK = {"ln_1.": "norm1.", "ln_2.": "norm2.", "mlp.": "mlp.", "attn.out_proj.": "attn.proj."}
_PREFIXES = {
    "vision.patch_embed.": "visual_encoder.patch_embed.proj.",
    "connector.norm.": "ln_vision.",
    "connector.qformer.words.": "Qformer.bert.embeddings.word_embeddings.",
    "connector.qformer.positions.": "Qformer.bert.embeddings.position_embeddings.",
    "connector.qformer.ln.": "Qformer.bert.embeddings.LayerNorm.",
    "heads.image_proj.": "vision_proj.",
    "heads.text_proj.": "text_proj.",
    "heads.itm.": "itm_head.",
    "heads.lm_dense.": "Qformer.cls.predictions.transform.dense.",
    "heads.lm_ln.": "Qformer.cls.predictions.transform.LayerNorm.",
}
_NAMES = {
    "vision.class_token": "visual_encoder.cls_token",
    "vision.positions": "visual_encoder.pos_embed",
    "connector.queries": "query_tokens",
    "heads.temperature": "temp",
    "heads.lm_bias": "Qformer.cls.predictions.bias",
}
LM = {"opt": ("opt_proj.", "opt_model."), "t5": ("t5_proj.", "t5_model."), "llama": ("llm_proj.", "llm_model.")}
_DERIVED = ("Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.")


def lavis_name(name: str, language: str = "opt") -> str:
    """LAVIS's name of one of our tensors, the encoder's q, k and v apart. ``language``: opt, t5 or llama."""
    if name in _NAMES:
        return _NAMES[name]
    projection, model = LM[language]
    tables = [("connector.projection.", projection), ("language.lm.", model), *_PREFIXES.items()]
    for ours, theirs in tables:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    for prefix, theirs, table in (
        ("vision.blocks.", "visual_encoder.blocks.", _BLOCK),
        ("connector.qformer.layers.", "Qformer.bert.encoder.layer.", _LAYER),
    ):
        if name.startswith(prefix):
            number, _, tail = name.removeprefix(prefix).partition(".")
            for ours, their_tail in table.items():
                if tail.startswith(ours):
                    return f"{theirs}{number}.{their_tail}{tail.removeprefix(ours)}"
    raise CheckpointError(f"{name!r} has no name in LAVIS.")


def to_lavis(state: Mapping[str, Tensor], language: str = "opt") -> dict[str, Tensor]:
    """A BLIP-2's state dict under LAVIS's names and shapes. Raises CheckpointError for what has no place there."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        head, _, tail = name.rpartition(".attn.")
        if head.startswith("vision.blocks.") and tail.split(".")[0] in ("q_proj", "k_proj", "v_proj"):
            _join(found, head.replace("vision.", "visual_encoder."), tail, state, f"{head}.attn.")
            continue
        if name == "vision.class_token":
            tensor = tensor.reshape(1, 1, -1)
        elif name == "vision.positions":
            tensor = tensor[None]
        found[lavis_name(name, language)] = tensor
        if name == "connector.qformer.words.weight" and "heads.lm_bias" in state:
            found["Qformer.cls.predictions.decoder.weight"] = tensor
            found["Qformer.cls.predictions.decoder.bias"] = state["heads.lm_bias"]
    return found


def from_lavis(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    language: str = "opt",
    account: Account | None = None,
) -> dict[str, Tensor]:
    """Our names for a LAVIS state dict. ``expected`` is our net's state dict (it may live on the meta device).

    What LAVIS leaves out of its files, a frozen LM or encoder, stays out here as well. Raises CheckpointError for a
    tensor that belongs nowhere, and for one that is missing of a part that is there.
    """
    left = {name: tensor for name, tensor in state.items() if not name.startswith(_DERIVED)}
    load_report.ignored(account, set(state) - set(left), "made anew, or the word table once more")
    found: dict[str, Tensor] = {}
    missing: list[str] = []
    for name, target in expected.items():
        head, _, tail = name.rpartition(".attn.")
        part, _, suffix = tail.partition(".")
        if head.startswith("vision.blocks.") and part in ("q_proj", "k_proj", "v_proj"):
            block = head.replace("vision.", "visual_encoder.") + ".attn."
            tensor = _piece(left, block, part, suffix)
        else:
            tensor = left.get(lavis_name(name, language))
        if tensor is None:
            missing.append(name)
        else:
            if head.startswith("vision.blocks.") and (part, suffix) == ("k_proj", "bias"):
                load_report.absent(account, [name], "LAVIS's keys have no bias; it is zero")
            found[name] = tensor.reshape(target.shape) if tensor.numel() == target.numel() else tensor
    used = {t for name in found for t in _sources(name, language)}
    strange = sorted(set(left) - used)
    if strange:
        raise CheckpointError(f"the LAVIS file holds {strange[0]!r} ({len(strange)} such), which has no place here.")
    absent = {part for part in ("vision.", "language.") if not any(n.startswith(part) for n in found)}
    lost = [name for name in missing if not name.startswith(tuple(absent))] if absent else missing
    if lost:
        raise CheckpointError(f"the LAVIS file lacks {lost[0]!r} and {len(lost) - 1} more tensors of this model.")
    return found


def _join(found: dict[str, Tensor], block: str, tail: str, state: Mapping[str, Tensor], ours: str) -> None:
    """Write a block's joint qkv weight and its q and v biases, once."""
    if tail == "q_proj.weight":
        found[f"{block}.attn.qkv.weight"] = torch.cat([state[f"{ours}{part}_proj.weight"] for part in "qkv"])
    elif tail in ("q_proj.bias", "v_proj.bias"):
        found[f"{block}.attn.{tail[0]}_bias"] = state[ours + tail]
    elif tail == "k_proj.bias" and bool(state[ours + tail].any()):
        raise CheckpointError(
            f"{ours}k_proj.bias is not zero, and LAVIS's encoder has no key bias (no softmax feels it)."
        )


def _piece(state: Mapping[str, Tensor], block: str, part: str, suffix: str) -> Tensor | None:
    if suffix == "weight":
        joint = state.get(f"{block}qkv.weight")
        return None if joint is None else joint.chunk(3)["qkv".index(part[0])]
    if part == "k_proj":
        query = state.get(f"{block}q_bias")
        return None if query is None else torch.zeros_like(query)
    return state.get(f"{block}{part[0]}_bias")


def _sources(name: str, language: str) -> tuple[str, ...]:
    """The LAVIS tensors one of ours comes from."""
    head, _, tail = name.rpartition(".attn.")
    part, _, suffix = tail.partition(".")
    if head.startswith("vision.blocks.") and part in ("q_proj", "k_proj", "v_proj"):
        block = head.replace("vision.", "visual_encoder.") + ".attn."
        return (f"{block}qkv.weight",) if suffix == "weight" else (f"{block}{part[0]}_bias",)
    return (lavis_name(name, language),)


@dataclass(frozen=True)
class _Encoder:
    """``state`` under our names; empty where the file's own encoder is mapped with the rest."""

    config: VisionConfig
    state: Mapping[str, Tensor]


def open_lavis(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    """Net, processor and forbidden ids. Raises CheckpointError: a tensor that is missing or left over, or a part that
    must be given: ``vision``, ``language``, or BERT's ``tokenizer``."""
    family = next((name for name, (projection, _) in LM.items() if f"{projection}weight" in state), None)
    texts = "Qformer.bert.embeddings.word_embeddings.weight" in state
    if family is None and not texts:
        raise CheckpointError(f"{path} holds neither the projection into a language model nor the first stage's texts.")
    inside = any(name.startswith(_VISION) for name in state)
    used = {"vision": not inside, "language": family is not None, "tokenizer": texts}
    given.only(*(name for name, needed in used.items() if needed), where=path)
    encoder, state = _encoder(path, state, given)
    language = _language(given.need("language", path, "holds no language model's sizes"), given) if family else None
    config = Blip2Config(
        vision=encoder.config,
        qformer=_qformer(state, encoder.config.width),
        language=None if language is None else language[0],
        phase="generate" if family else "represent",
        instruct=bool(family) and texts,
        embed_dim=256 if family else len(state["vision_proj.weight"]),
    )
    with torch.device("meta"):
        expected = {n: t for n, t in Blip2(config).state_dict().items() if n not in encoder.state}
    own = from_lavis(state, expected, family or "opt", given.account)
    ours = {**(language[1] if language else {}), **encoder.state, **own}
    net = Blip2(config)
    load_into(net, ours, where=path, account=given.account)
    image = replace(ImageTransform.clip(config.vision.image_size), mode="squash", deep="clip")
    if language is None:
        return net, PairProcessor(load_wordpiece(_beside(path, "", given)), image), ()
    words = load_wordpiece(_beside(path, "qformer_tokenizer", given)) if config.instruct else None
    return net, published_prompts(net, language[2], image, words), ()


def _beside(path: Path, name: str, given: Given) -> Path:
    """Where BERT's tokenizer is: as given, else beside the file."""
    folder = path.parent / name
    if given.tokenizer is None and not any((folder / file).is_file() for file in ("vocab.txt", "tokenizer.json")):
        given.need("tokenizer", path, "needs BERT's tokenizer (a folder with vocab.txt or tokenizer.json)")
    return Path(given.tokenizer or folder)


def _qformer(state: Mapping[str, Tensor], vision_width: int) -> QFormerConfig:
    """Sizes by shapes; where the text half was dropped, BERT's table is not needed and its size is LAVIS's."""
    try:
        _, queries, width = state["query_tokens"].shape
        mlp_width = len(state[f"{_QFORMER_LAYER}0.intermediate_query.dense.weight"])
    except KeyError as error:
        raise CheckpointError(f"this is no BLIP-2 of LAVIS: it lacks {error}.") from None
    layers = depth(state, _QFORMER_LAYER)
    crossing = [i for i in range(layers) if f"{_QFORMER_LAYER}{i}.crossattention.self.key.weight" in state]
    words = state.get("Qformer.bert.embeddings.word_embeddings.weight")
    places = state.get("Qformer.bert.embeddings.position_embeddings.weight")
    vocab_size = 30523 if words is None else len(words)
    return QFormerConfig(
        vision_width=vision_width,
        width=width,
        layers=layers,
        heads=max(1, width // HEAD),
        mlp_width=mlp_width,
        queries=queries,
        cross_every=crossing[1] - crossing[0] if len(crossing) > 1 else layers,
        vocab_size=vocab_size,
        positions=512 if places is None else len(places),
        dec_id=vocab_size - 1,
    )


def _language(path: str | Path, given: Given) -> tuple[Mapping[str, object], dict[str, Tensor], Tokenizer]:
    """Configuration, weights under our names and tokenizer of the frozen LM; a T5 by itself is no model here."""
    folder = Path(path)
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if raw.get("model_type") in T5_LIKE:
        part = Account()
        config, state = read_seq2seq_folder(folder, part)
        load_report.beside(given.account, part)
        tokenizer = open_tokenizer(folder)
    else:
        model = given.open(folder)
        config = section(plain(model.net.config), "language")
        state = language_of(model).lm.state_dict()
        tokenizer = model.processor.tokenizer
    return config, {f"language.lm.{name}": tensor for name, tensor in state.items()}, tokenizer


def _encoder(path: Path, state: dict[str, Tensor], given: Given) -> tuple[_Encoder, dict[str, Tensor]]:
    """The file's own encoder, or the one given; and the file without what is read here."""
    if f"{_VISION}pos_embed" in state:
        return _Encoder(_eva(state), {}), state
    if f"{_VISION}conv1.weight" in state:
        own = {n.removeprefix(_VISION): t for n, t in state.items() if n.startswith(_VISION)}
        return _clip(own), {n: t for n, t in state.items() if not n.startswith(_VISION)}
    source = Path(given.need("vision", path, "holds no vision encoder"))
    if source.is_file():
        part = Account()
        raw = read_archive(source, part)
        load_report.beside(given.account, part)
        weights = tensors_of(unwrapped(raw), source)
        return _eva_file(source, weights, given.account), state
    found = given.encoder(source)
    return _Encoder(*_without_last(found.config, found.state, given.account)), state


def _eva(state: Mapping[str, Tensor]) -> VisionConfig:
    _, places, width = state[f"{_VISION}pos_embed"].shape
    patch = state[f"{_VISION}patch_embed.proj.weight"].shape[-1]
    return replace(
        VisionConfig.eva_g_14(),
        image_size=math.isqrt(places - 1) * patch,
        patch_size=patch,
        width=width,
        layers=depth(state, f"{_VISION}blocks."),
        heads=max(1, width // EVA_HEAD),
        mlp_width=len(state[f"{_VISION}blocks.0.mlp.fc1.weight"]),
    )


def _eva_file(source: Path, weights: Mapping[str, Tensor], account: Account) -> _Encoder:
    """EVA-CLIP's own file (``eva_vit_g.pth``), all 40 blocks of it; BLIP-2 reads before the last."""
    if "pos_embed" not in weights or "blocks.0.attn.qkv.weight" not in weights:
        raise CheckpointError(f"{source} is no EVA vision encoder; give a folder that holds the encoder, or that file.")
    last = f"blocks.{depth(weights, 'blocks.') - 1}."
    kept = {f"{_VISION}{n}": t for n, t in weights.items() if not n.startswith((last, *_EVA_ONLY))}
    unread = (n for n in weights if n.startswith((last, *_EVA_ONLY)))
    load_report.ignored(account, unread, "BLIP-2 reads before the last block")
    config = _eva(kept)
    with torch.device("meta"):
        expected = {f"vision.{n}": t for n, t in VisionTransformer(config).state_dict().items()}
    return _Encoder(config, from_lavis(kept, expected, account=account))


def _clip(own: Mapping[str, Tensor]) -> _Encoder:
    """CLIP's tower as LAVIS keeps it: OpenAI's names, without the last block and what stands after it."""
    width, _, patch, _ = own["conv1.weight"].shape
    config = VisionConfig(
        image_size=math.isqrt(len(own["positional_embedding"]) - 1) * patch,
        patch_size=patch,
        width=width,
        layers=depth(own, "transformer.resblocks."),
        heads=max(1, width // HEAD),
        mlp_width=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
        post_norm="none",
        pool="none",
    )
    rows = [
        Entry("class_embedding", ("vision.class_token",)),
        Entry("positional_embedding", ("vision.positions",)),
        Entry("conv1.weight", ("vision.patch_embed.weight",)),
        *same("ln_pre", "vision.ln_pre"),
        *blocks("transformer.resblocks", "vision.blocks", config.layers),
    ]
    strange = sorted(set(own) - {row.theirs for row in rows})
    if strange:
        raise CheckpointError(
            f"the LAVIS file holds {_VISION}{strange[0]!r} ({len(strange)} such), which has no place."
        )
    return _Encoder(config, {name: value for row in rows for name, value in row.decode(own[row.theirs])})


def _without_last(
    config: VisionConfig, state: Mapping[str, Tensor], account: Account
) -> tuple[VisionConfig, dict[str, Tensor]]:
    """A full CLIP tower as BLIP-2 reads it, before its last block; an encoder that was cut already stays."""
    last = f"blocks.{config.layers - 1}."
    full_tower = config.post_norm != "none"
    kept = {n: t for n, t in state.items() if not (full_tower and n.startswith((last, "ln_post.", "pool.")))}
    load_report.ignored(account, set(state) - set(kept), "BLIP-2 reads before the last block")
    cut = replace(config, layers=config.layers - 1, post_norm="none", pool="none") if full_tower else config
    return cut, {f"vision.{name}": tensor for name, tensor in kept.items()}


def lavis_export(model: Source[Blip2, Processor], *, shard_bytes: int) -> Export:
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
    language = config.language if config.phase == "generate" else None
    model_type = "opt" if language is None else str(language["model_type"])
    must(model_type in ("opt", "t5", "llama"), "language.model_type", model_type, who, "opt, t5 or llama")
    losses = []
    if config.norm_eps != NORM_EPS:
        losses.append(f"norm_eps {config.norm_eps:g}: there it is {NORM_EPS:g}; answers differ in the last digits")
    if isinstance(model.processor, PromptProcessor):
        losses += asked_otherwise(model.net, model.processor)
    files: dict[str, Content] = {
        "model.pth": pickled({"model": to_lavis(model.net.state_dict(), model_type)}),
        **tokenizer.files(),
    }
    for name, other in getattr(model.processor, "others", {}).items():
        files |= {f"{name}/{file}": text for file, text in other.files().items()}
    return Export(files=files, losses=tuple(losses), opens="lavis' load_checkpoint('FOLDER/model.pth')")
