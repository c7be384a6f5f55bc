"""A BLIP-2 or InstructBLIP of LAVIS, from its file and what the file leaves out.

The file gives the Q-Former's sizes, and the encoder's when it is there. Heads are what LAVIS builds: 64 wide in the
Q-Former and in CLIP, 88 in EVA's ViT-g.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import load_into, read_json
from isthmus.config import plain
from isthmus.data.blip2 import PairProcessor
from isthmus.data.images import ImageTransform
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import load_wordpiece
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_archive, tensors_of
from isthmus.interop.entries import Entry, depth, same
from isthmus.interop.folders import published_prompts
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_language import read_seq2seq_folder
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.lavis import EVA_HEAD, HEAD, LM, from_lavis
from isthmus.interop.openai import blocks
from isthmus.language import T5_LIKE
from isthmus.load_report import Account
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.nn.connectors.qformer import QFormerConfig
from isthmus.nn.vit import VisionConfig, VisionTransformer

_VISION, _LAYER = "visual_encoder.", "Qformer.bert.encoder.layer."
_EVA_ONLY = ("norm.", "fc_norm.", "head.")
"""After EVA's last block, which BLIP-2 does without."""


@dataclass(frozen=True)
class _Encoder:
    """``state`` under our names; empty where the file's own encoder is mapped with the rest."""

    config: VisionConfig
    state: Mapping[str, Tensor]


def open_lavis(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    """Net, processor and forbidden ids. Raises CheckpointError: a tensor that is missing or left over, or a part that
    must be given: ``vision``, ``language``, or BERT's ``tokenizer``."""
    kind = next((kind for kind, (projection, _) in LM.items() if f"{projection}weight" in state), None)
    texts = "Qformer.bert.embeddings.word_embeddings.weight" in state
    if kind is None and not texts:
        raise CheckpointError(f"{path} holds neither the projection into a language model nor the first stage's texts.")
    inside = any(name.startswith(_VISION) for name in state)
    used = {"vision": not inside, "language": kind is not None, "tokenizer": texts}
    given.only(*(name for name, needed in used.items() if needed), where=path)
    encoder, state = _encoder(path, state, given)
    language = _language(given.need("language", path, "holds no language model's sizes"), given) if kind else None
    config = Blip2Config(
        vision=encoder.config,
        qformer=_qformer(state, encoder.config.width),
        language=None if language is None else language[0],
        phase="generate" if kind else "represent",
        instruct=bool(kind) and texts,
        embed_dim=256 if kind else len(state["vision_proj.weight"]),
    )
    with torch.device("meta"):
        expected = {n: t for n, t in Blip2(config).state_dict().items() if n not in encoder.state}
    own = from_lavis(state, expected, kind or "opt", given.account)
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
        mlp_width = len(state[f"{_LAYER}0.intermediate_query.dense.weight"])
    except KeyError as error:
        raise CheckpointError(f"this is no BLIP-2 of LAVIS: it lacks {error}.") from None
    layers = depth(state, _LAYER)
    crossing = [i for i in range(layers) if f"{_LAYER}{i}.crossattention.self.key.weight" in state]
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


def _language(path: str | Path, given: Given) -> tuple[dict[str, Any], dict[str, Tensor], Tokenizer]:
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
        config, state = plain(model.net.config)["language"], model.net.language.lm.state_dict()
        tokenizer = model.processor.tokenizer
    return config, {f"language.lm.{name}": tensor for name, tensor in state.items()}, tokenizer


# The encoder.


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
        weights = tensors_of(raw.get("module", raw.get("model", raw)), source)
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
