"""OpenFlamingo's ``checkpoint.pt`` layout, read and written (open_flamingo 2.0.1).

A checkpoint holds the resampler (``perceiver``), the gated blocks inside the wrapped decoder layers, and the resized
embedding table. The vision encoder and the language model come from their own folders. Keys and values are fused there
(``to_kv``, keys first).
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import Content
from isthmus.config import plain, section
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor
from isthmus.errors import CheckpointError
from isthmus.interop.archives import tensors_of, unwrapped
from isthmus.interop.entries import Entry, from_theirs, part_of, same, shapes_of, to_theirs
from isthmus.interop.export import Export, Source, common_dtype, must, pickled, shards
from isthmus.interop.given import Given, Opened, language_of
from isthmus.interop.hf_files import image_processor
from isthmus.interop.hf_language import language_files, language_tensors, published
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.hf_towers import vision_config_to_hf, vision_to_hf
from isthmus.load_report import Account
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.nn.gated import GatedConfig
from isthmus.nn.vit import VisionConfig
from isthmus.weights import load_into

LAYERS = {
    "llama": "model.layers",
    "opt": "model.decoder.layers",
    "gpt_neox": "gpt_neox.layers",
    "gptj": "transformer.h",
    "mpt": "transformer.blocks",
}
"""Kind of language model -> where its decoder layers are."""


_HEAD_WIDTH = 64
"""Of every attention in open_flamingo; the tensors give only heads times width."""


def config_from_open_flamingo(
    state: Mapping[str, Tensor], *, vision: VisionConfig, language: Mapping[str, object], end_id: int, image_id: int
) -> FlamingoConfig:
    """The configuration that a checkpoint's shapes and layer numbers imply, for its encoder and language model.

    Raises CheckpointError when the gated blocks do not stand at every n-th layer.
    """
    try:
        inner = len(state["perceiver.layers.0.0.to_q.weight"])
        resampler = ResamplerConfig(
            layers=1 + max(int(n.split(".")[2]) for n in state if n.startswith("perceiver.layers.")),
            latents=len(state["perceiver.latents"]),
            heads=inner // _HEAD_WIDTH,
            head_width=_HEAD_WIDTH,
            frames=len(state.get("perceiver.frame_embs", ())),
        )
        gated = [n for n in state if n.endswith(".gated_cross_attn_layer.attn.to_q.weight")]
        heads = len(state[gated[0]]) // _HEAD_WIDTH
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"this is no checkpoint of OpenFlamingo: {error} is not in it.") from error
    places = sorted(int(n.split(".gated_cross_attn_layer.")[0].rpartition(".")[2]) for n in gated)
    every = places[0] + 1
    if places != [every * (n + 1) - 1 for n in range(len(places))]:
        raise CheckpointError(f"OpenFlamingo's gated blocks stand before every n-th layer; here before {places}.")
    return FlamingoConfig(
        vision=vision,
        language=language,
        end_id=end_id,
        image_id=image_id,
        resampler=resampler,
        xattn=GatedConfig(heads=heads, head_width=_HEAD_WIDTH),
        every=every,
        offset=every - 1,
    )


def trained_from_open_flamingo(
    checkpoint: Mapping[str, object], net: Flamingo, account: Account | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under ``net``'s names: ``connector.*``, ``xattn.*`` and ``language.new_rows.*``.

    Takes both a released file and one of a training run (``model_state_dict`` with ``module.`` before each name). The
    embedding table gives the new tokens' rows; its other rows are the language model's own. Raises CheckpointError
    for a tensor missing, left over or of another shape.
    """
    state = tensors_of(unwrapped(checkpoint), "the checkpoint")
    frozen = [name for name in state if name.endswith(".embed_positions.weight")]
    load_report.ignored(account, frozen, "OPT's positions, which stay as its language model has them")
    state = {name: value for name, value in state.items() if name not in frozen}
    tables = {name: state.pop(name) for name in list(state) if _is_table(name)}
    found = from_theirs(_entries(net), state, shapes_of(net), "this Flamingo", account=account)
    rows = net.language.new_rows
    for name, table in tables.items():
        ours = "output" if name.rsplit(".", 2)[-2] in ("lm_head", "embed_out") else "input"
        if getattr(rows, ours) is not None:
            if len(table) <= max(net.language.new_ids):
                raise CheckpointError(
                    f"{name} has {len(table)} rows and the new tokens are {list(net.language.new_ids)}; the tokenizer "
                    "does not belong to this checkpoint."
                )
            found[f"language.new_rows.{ours}"] = table[list(net.language.new_ids)]
    if "language.new_rows.input" not in found:
        raise CheckpointError("the checkpoint holds no embedding table, so the new tokens have no rows.")
    return found


def trained_to_open_flamingo(net: Flamingo, rows: int) -> dict[str, Tensor]:
    """The inverse: resampler, gated blocks, and the embedding tables with the new rows in their places.

    Their code gives a table as many ``rows`` as the tokenizer has tokens: padding after them is cut off, and a row
    that nothing here speaks of (``<PAD>``) is the mean of the others.
    """
    state = net.state_dict()
    theirs = to_theirs(_entries(net), {k: v for k, v in state.items() if k.startswith(("connector.", "xattn."))})
    language = net.language
    ends = {"input": language.lm.get_input_embeddings(), "output": language.lm.get_output_embeddings()}
    for name, end in ends.items():
        new = getattr(language.new_rows, name)
        if new is not None:
            known = end.weight.detach()[:rows]
            mean = known.float().mean(0, keepdim=True).to(known.dtype)
            table = torch.cat([known, mean.expand(rows - len(known), -1)])
            table[list(language.new_ids)] = new.detach()
            (place,) = [n for n, p in language.lm.named_parameters(remove_duplicate=False) if p is end.weight][:1]
            theirs[f"lang_encoder.{published(language.lm, place)}"] = table
    return theirs


def _is_table(name: str) -> bool:
    """An embedding table, input or output. Position tables (OPT's) are the language model's and stay out."""
    return name.startswith("lang_encoder.") and name.rsplit(".", 2)[-2] in (
        "embed_tokens",
        "embed_in",
        "embed_out",
        "lm_head",
        "wte",
    )


def _entries(net: Flamingo) -> list[Entry]:
    model_type = net.language.lm.config.model_type
    if model_type not in LAYERS:
        raise CheckpointError(
            f"OpenFlamingo has no layout for a {model_type} language model; known: {', '.join(LAYERS)}."
        )
    entries = [Entry("perceiver.latents", ("connector.latents",)), *same("perceiver.norm", "connector.norm")]
    if net.connector.times is not None:
        entries.append(Entry("perceiver.frame_embs", ("connector.times",)))
    for i in range(len(net.connector.layers)):
        theirs, ours = f"perceiver.layers.{i}", f"connector.layers.{i}"
        entries += same(f"{theirs}.0.norm_media", f"{ours}.media_norm")
        entries += same(f"{theirs}.0.norm_latents", f"{ours}.latent_norm")
        entries += _attention(f"{theirs}.0", ours) + _mlp(f"{theirs}.1", ours)
    places = [i for i in range(len(net.language.decoder_layers())) if i % net.config.every == net.config.offset]
    for number, place in enumerate(places):
        theirs = f"lang_encoder.{LAYERS[model_type]}.{place}.gated_cross_attn_layer"
        ours = f"xattn.{number}"
        entries += [
            Entry(f"{theirs}.attn_gate", (f"{ours}.attn_gate",)),
            *same(f"{theirs}.attn.norm", f"{ours}.attn_norm"),
        ]
        entries += [Entry(f"{theirs}.ff_gate", (f"{ours}.mlp_gate",))]
        entries += _attention(f"{theirs}.attn", ours) + _mlp(f"{theirs}.ff", ours)
    return entries


def _attention(theirs: str, ours: str) -> list[Entry]:
    return [
        Entry(f"{theirs}.to_q.weight", (f"{ours}.attn.q_proj.weight",)),
        Entry(f"{theirs}.to_kv.weight", (f"{ours}.attn.k_proj.weight", f"{ours}.attn.v_proj.weight")),
        Entry(f"{theirs}.to_out.weight", (f"{ours}.attn.out_proj.weight",)),
    ]


def _mlp(theirs: str, ours: str) -> list[Entry]:
    return [
        *same(f"{theirs}.0", f"{ours}.mlp_norm"),
        *same(f"{theirs}.1", f"{ours}.mlp.fc1", "weight"),
        *same(f"{theirs}.3", f"{ours}.mlp.fc2", "weight"),
    ]


def open_flamingo_export(model: Source[Flamingo, InterleaveProcessor], *, shard_bytes: int) -> Export:
    """``checkpoint.pt`` of what is trained, the new tokens' rows merged into the embedding table, and the two frozen
    parts in transformers' form: ``lang_encoder`` and ``vision_encoder``."""
    net, who = model.net, "OpenFlamingo"
    config = net.config
    model_type = str(config.language["model_type"])
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
        for field in fields(fixed):
            value, allowed = getattr(part, field.name), getattr(fixed, field.name)
            must(value == allowed, f"{name}.{field.name}", value, who, repr(allowed))
    template, tokenizer = model.processor.template, model.processor.tokenizer
    # Their code adds <PAD> to a tokenizer that has no token for padding, then makes the tables as long as it is.
    rows = tokenizer.vocab_size + (tokenizer.specials["pad_token"] is None)
    must(max(config.new_ids) < rows, "new_ids", config.new_ids, who, f"within the tokenizer's {rows} tokens")
    lm = language_tensors(net.language.lm)
    tower = vision_to_hf(part_of(net.state_dict(), "vision."), config.vision, prefix="vision_model.")
    files: dict[str, Content] = {
        "checkpoint.pt": pickled(trained_to_open_flamingo(net, rows)),
        **{f"lang_encoder/{name}": content for name, content in language_files(model, net.language, lm).items()},
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


def open_trained(path: Path, state: dict[str, Tensor], given: Given) -> Opened:
    given.only("vision", "language", "tokenizer", where=path)
    encoder = given.encoder(given.need("vision", path, "holds no vision encoder"))
    language = given.open(given.need("language", path, "holds no language model"))
    own = language.processor.tokenizer if given.tokenizer is None else open_tokenizer(given.tokenizer)
    tokenizer = own.with_tokens(*NEW_TOKENS)
    ids = {name: tokenizer.id_of(token) for name, token in zip(("end_id", "image_id"), NEW_TOKENS, strict=True)}
    described = section(plain(language.net.config), "language")
    config = config_from_open_flamingo(state, vision=encoder.config, language=described, **ids)
    net, lm = Flamingo(config), language_of(language).lm
    tensors = {f"vision.{n}": t for n, t in encoder.state.items()}
    tensors |= {f"language.lm.{n}": t for n, t in lm.state_dict().items()}
    tensors |= trained_from_open_flamingo(state, net, given.account)
    head = lm.get_output_embeddings().weight
    if net.language.new_rows.output is not None:
        # Their runs train the input table only, so files know no such rows; a new row is the mean, as there.
        mean = head.detach().float().mean(0).to(head.dtype)
        if "language.new_rows.output" not in tensors:
            why = "their runs train the input rows only; this is the mean row"
            load_report.absent(given.account, ["language.new_rows.output"], why)
            tensors["language.new_rows.output"] = mean.repeat(len(NEW_TOKENS), 1)
    load_into(net, tensors, where=path, account=given.account)
    # Whatever form the encoder has here, their code reads pictures by open_clip's transform.
    image = replace(encoder.image, crop="round", deep="clip")
    processor = InterleaveProcessor(tokenizer, image, template="open_flamingo", max_length=net.language.context or 2048)
    return net, processor, ()
