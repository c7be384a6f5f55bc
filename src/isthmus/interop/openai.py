"""CLIP in OpenAI's layout (openai/CLIP), which open_clip's ``CLIP`` class shares.

Their state dict gives every size but two things. The activation: OpenAI's own weights need ``quick_gelu``, most weights
trained elsewhere ``gelu``, and the wrong one loads cleanly and degrades quietly, so it must always be named. The number
of attention heads: OpenAI's are 64 wide; of others it is known for the widths of open_clip's own configurations only.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import Content
from isthmus.data.clip_tokenizer import IDS, ClipTokenizer, clip_tokenizer, is_published
from isthmus.data.images import ImageTransform
from isthmus.data.processor import ContrastiveProcessor
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.entries import Entry, depth, from_theirs, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, must, pickled
from isthmus.interop.given import Given, Opened, lacking
from isthmus.interop.hf_files import tokenizer_files
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.load_report import Account
from isthmus.models.clip import Clip, ClipConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig
from isthmus.weights import load_into

SCALARS = ("input_resolution", "context_length", "vocab_size")
"""Sizes that OpenAI's archives carry among the weights."""

HEAD_WIDTH = 64
_HEAD_WIDTHS = {**dict.fromkeys((384, 512, 640, 768, 896, 1024), HEAD_WIDTH), 1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""An image tower's width -> the width of its heads, in the configurations that come with open_clip; S to e."""


def clip_config_from_openai(
    state: Mapping[str, Tensor], *, activation: str, head_width: int | None = None
) -> ClipConfig:
    """The configuration that the shapes of an OpenAI state dict imply; without ``head_width`` a published one.

    Raises CheckpointError when the keys are not those of CLIP with a vision transformer, or for widths whose number of
    heads nobody has published.
    """
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        rows = len(state["visual.positional_embedding"])
        vocab_size, text_width = state["token_embedding.weight"].shape
        context, embed_dim = len(state["positional_embedding"]), state["text_projection"].shape[1]
        hidden = len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"])
        text_hidden = len(state["transformer.resblocks.0.mlp.c_fc.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"this is not CLIP with a vision transformer in OpenAI's layout: {error}.") from error
    if head_width is None and (width not in _HEAD_WIDTHS or text_width % HEAD_WIDTH):
        raise CheckpointError(
            f"the weights do not say how many attention heads the towers have, and the widths {width} (pictures) and "
            f"{text_width} (texts) are of no published model: give head_width=… (on the command line --head-width), or "
            "put open_clip_config.json beside them and open the folder."
        )
    vision = VisionConfig(
        image_size=math.isqrt(rows - 1) * patch,
        patch_size=patch,
        width=width,
        heads=width // (head_width or _HEAD_WIDTHS[width]),
        layers=depth(state, "visual.transformer.resblocks."),
        mlp_width=hidden,
        activation=activation,
    )
    text = TextConfig(
        context=context,
        vocab_size=vocab_size,
        width=text_width,
        heads=text_width // (head_width or HEAD_WIDTH),
        layers=depth(state, "transformer.resblocks."),
        mlp_width=text_hidden,
        activation=activation,
        pool="argmax",
        eot_id=vocab_size - 1,
    )
    return ClipConfig(vision=vision, text=text, embed_dim=embed_dim)


def clip_from_openai(
    state: Mapping[str, Tensor], config: ClipConfig, account: Account | None = None
) -> dict[str, Tensor]:
    """Our state dict; dtypes stay (OpenAI's archives are partly float16). Raises CheckpointError unless all fits."""
    weights = {name: value for name, value in state.items() if name not in SCALARS}
    return from_theirs(entries(config), weights, clip_shapes(config), "CLIP in OpenAI's layout", account=account)


def clip_to_openai(state: Mapping[str, Tensor], config: ClipConfig) -> dict[str, Tensor]:
    """Their state dict with its three scalars."""
    sizes = (config.vision.image_size, config.text.context, config.text.vocab_size)
    scalars = {name: torch.tensor(size) for name, size in zip(SCALARS, sizes, strict=True)}
    return {**to_theirs(entries(config), state), **scalars}


def entries(config: ClipConfig, *, text: str = "") -> list[Entry]:
    """The layout of OpenAI's CLIP; open_clip's ``CustomTextCLIP`` puts the text tower under the prefix ``text.``.

    Raises CheckpointError for variants that have no place in it.
    """
    vision = config.vision
    if (
        not (
            vision.class_token
            and vision.pool == "class"
            and vision.post_norm == "pooled"
            and config.vision_projection
            and config.text.causal
        )
        or vision.patch_bias
    ):
        raise CheckpointError("this layout holds CLIP's towers only (class token, projections, causal text).")
    return [
        Entry("visual.class_embedding", ("vision.class_token",)),
        Entry("visual.positional_embedding", ("vision.positions",)),
        Entry("visual.conv1.weight", ("vision.patch_embed.weight",)),
        *(same("visual.ln_pre", "vision.ln_pre") if vision.pre_norm else []),
        *blocks("visual.transformer.resblocks", "vision.blocks", vision.layers),
        *same("visual.ln_post", "vision.ln_post"),
        Entry("visual.proj", ("heads.vision_projection.weight",), transposed=True),
        *text_entries(config, text),
    ]


def text_entries(config: ClipConfig, text: str) -> list[Entry]:
    """The layout of all but the image tower: text tower, its projection, temperature and bias of the logits."""
    rows = [
        Entry("logit_scale", ("heads.logit_scale",)),
        *same(f"{text}token_embedding", "text.tokens", "weight"),
        Entry(f"{text}positional_embedding", ("text.positions",)),
        *blocks(f"{text}transformer.resblocks", "text.blocks", config.text.layers),
        *same(f"{text}ln_final", "text.ln_final"),
    ]
    if config.init_bias is not None:
        rows.append(Entry("logit_bias", ("heads.logit_bias",)))
    if config.text_projection_bias:
        return rows + same(f"{text}text_projection", "heads.text_projection")
    return [*rows, Entry(f"{text}text_projection", ("heads.text_projection.weight",), transposed=True)]


def clip_shapes(config: ClipConfig) -> Mapping[str, torch.Size]:
    """Name -> shape of the configured model's weights."""
    with torch.device("meta"):
        return shapes_of(Clip(config))


def blocks(theirs: str, ours: str, layers: int) -> list[Entry]:
    """A tower's blocks: q, k and v in one matrix."""
    rows: list[Entry] = []
    for i in range(layers):
        a, b = f"{theirs}.{i}", f"{ours}.{i}"
        for leaf in ("weight", "bias"):
            stacked = tuple(f"{b}.attn.{part}_proj.{leaf}" for part in "qkv")
            rows.append(Entry(f"{a}.attn.in_proj_{leaf}", stacked))
        rows += same(f"{a}.attn.out_proj", f"{b}.attn.out_proj")
        rows += same(f"{a}.ln_1", f"{b}.ln_1") + same(f"{a}.ln_2", f"{b}.ln_2")
        rows += same(f"{a}.mlp.c_fc", f"{b}.mlp.fc1") + same(f"{a}.mlp.c_proj", f"{b}.mlp.fc2")
    return rows


def openai_export(model: Source[Clip, ContrastiveProcessor], *, shard_bytes: int) -> Export:
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
    files = {"model.pt": pickled(clip_to_openai(state, config)), **tokenizer_written(tokenizer, config)}
    return Export(
        files=files,
        losses=published_transform(model.processor.image, ImageTransform.clip(config.vision.image_size)),
        opens="clip.load('FOLDER/model.pt', jit=False)",
    )


def _cosine_clip(config: ClipConfig, who: str) -> None:
    must(config.similarity == "cosine", "similarity", config.similarity, who, "cosine")
    must(config.vision.class_token, "vision.class_token", config.vision.class_token, who, "true (CLIP's tower)")


def tokenizer_written(tokenizer: Tokenizer, config: ClipConfig) -> dict[str, Content]:
    return tokenizer_files(tokenizer, begin=True, end=True, context=config.text.context)


def published_transform(image: ImageTransform, own: ImageTransform) -> tuple[str, ...]:
    """The image transform is part of their code: say it where ours is another."""
    same = replace(image, crop=own.crop, deep=own.deep) == own  # of these two every writer takes note
    return () if same else (f"processor.image {image.to_dict()}: their code has its own, {own.to_dict()}",)


def open_openai(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    """OpenAI's own archives carry three sizes among the weights, and their code knows one activation."""
    if "text.token_embedding.weight" in state:  # open_clip's CustomTextCLIP: the same with its text tower under a name
        state = {name.removeprefix("text."): value for name, value in state.items()}
    given.only("tokenizer", "activation", "head_width", where=path)
    own = any(name in state for name in SCALARS)
    activation = given.activation or ("quick_gelu" if own else None)
    if activation is None:
        raise lacking("activation", path, "does not say its activation, quick_gelu or gelu")
    weights = {name: value for name, value in state.items() if name not in SCALARS}
    load_report.ignored(given.account, set(state) - set(weights), "sizes, which the weights have too")
    width = given.head_width or (HEAD_WIDTH if own else None)
    try:
        config = clip_config_from_openai(weights, activation=activation, head_width=width)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    net = Clip(config)
    load_into(net, clip_from_openai(weights, config, given.account), where=path, account=given.account)
    image = replace(ImageTransform.clip(config.vision.image_size), crop="round", deep="clip")
    tokenizer = tokenizer_read(path, config, given, own=True)
    return net, ContrastiveProcessor(tokenizer, image=image, context=config.text.context), ()


def tokenizer_read(where: Path, config: ClipConfig, given: Given, *, own: bool) -> Tokenizer:
    """The tokenizer named, or else beside the weights. ``own``: their code read text by the tokenizer it comes with,
    CLIP's, whatever form of it transformers was given; a vocabulary that is not CLIP's is taken as it is."""
    folder = where if where.is_dir() else where.parent
    named = given.tokenizer
    if named is None and not any((folder / name).is_file() for name in ("tokenizer.json", "merges.txt")):
        given.need("tokenizer", where, "comes without a tokenizer (a folder, or bpe_simple_vocab_16e6.txt.gz)")
    found = Path(named) if named is not None else folder
    if not found.is_dir():
        tokenizer: Tokenizer = ClipTokenizer.load(found)
    else:
        tokenizer = (clip_tokenizer(found) if own else None) or open_tokenizer(found)
    if tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"{found} has {tokenizer.vocab_size:,} tokens and {where} rows for {config.text.vocab_size:,}: another "
            "model's tokenizer."
        )
    return tokenizer
