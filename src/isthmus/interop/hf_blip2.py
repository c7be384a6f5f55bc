"""transformers' BLIP-2 and InstructBLIP folders: their names as ours, as pure maps.

``Blip2ForConditionalGeneration``, ``Blip2Model`` and ``InstructBlipForConditionalGeneration`` become phase
``generate``; ``Blip2ForImageTextRetrieval`` has the weights of phase ``represent`` but for temperature and LM head.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import Content, read_json
from isthmus.data.blip2 import PairProcessor, PromptProcessor, newline_id
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor
from isthmus.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from isthmus.errors import CheckpointError
from isthmus.interop.archives import read_state
from isthmus.interop.export import Export, Source, shards
from isthmus.interop.hf_blip2_config import config_from_hf, config_to_hf
from isthmus.interop.hf_files import generation_config, image_processor, tokenizer_files, with_dtype
from isthmus.interop.hf_language import RENAMED, seq2seq_ties, with_image_token
from isthmus.interop.written_template import blip2_template
from isthmus.language import Seq2SeqLM, vocabulary_tables
from isthmus.load_report import Account
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.weights import state_tensors

TEMPERATURE = float(torch.tensor(0.07))
"""Where the paper's contrast begins."""

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_LAYER = {
    "attention.attention.": "attn.",
    "attention.output.dense.": "attn.out_proj.",
    "attention.output.LayerNorm.": "ln_attn.",
    "crossattention.attention.": "cross.",
    "crossattention.output.dense.": "cross.out_proj.",
    "crossattention.output.LayerNorm.": "ln_cross.",
    "intermediate.dense.": "ffn_text.mlp.fc1.",
    "output.dense.": "ffn_text.mlp.fc2.",
    "output.LayerNorm.": "ffn_text.ln.",
    "intermediate_query.dense.": "ffn_query.mlp.fc1.",
    "output_query.dense.": "ffn_query.mlp.fc2.",
    "output_query.LayerNorm.": "ffn_query.ln.",
}
_BLOCK = {"layer_norm1.": "ln_1.", "layer_norm2.": "ln_2.", "mlp.": "mlp.", "self_attn.projection.": "attn.out_proj."}
_REST = {
    "vision_model.embeddings.patch_embedding.": "vision.patch_embed.",
    "vision_model.embeddings.class_embedding": "vision.class_token",
    "vision_model.embeddings.position_embedding": "vision.positions",
    "vision_model.post_layernorm.": "connector.norm.",
    "query_tokens": "connector.queries",
    "qformer.layernorm.": "connector.qformer.ln.",
    "qformer.embeddings.layernorm.": "connector.qformer.ln.",
    "embeddings.word_embeddings.": "connector.qformer.words.",
    "qformer.embeddings.word_embeddings.": "connector.qformer.words.",
    "embeddings.position_embeddings.": "connector.qformer.positions.",
    "qformer.embeddings.position_embeddings.": "connector.qformer.positions.",
    "language_projection.": "connector.projection.",
    "language_model.": "language.lm.",
    "vision_projection.": "heads.image_proj.",
    "text_projection.": "heads.text_proj.",
    "itm_head.": "heads.itm.",
}


def from_hf(
    state: Mapping[str, Tensor], where: str = "the checkpoint", account: Account | None = None
) -> dict[str, Tensor]:
    """The same tensors under our names and shapes; the joint qkv is split. A strange name: CheckpointError."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name.endswith("position_ids"):
            load_report.ignored(account, [name], load_report.DERIVED)
            continue
        joint = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.(weight|bias)", name)
        if joint:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"vision.blocks.{joint[1]}.attn.{part}_proj.{joint[2]}"] = piece
            continue
        ours = _ours(name)
        if ours is None:
            raise CheckpointError(f"{where} holds {name!r}, which belongs to no part of a BLIP-2 that is known here.")
        single = ours in ("vision.class_token", "vision.positions")
        found[ours] = tensor.reshape(tensor.shape[-1]) if ours == "vision.class_token" else tensor
        if single and ours == "vision.positions":
            found[ours] = tensor.reshape(tensor.shape[-2:])
    return found


def _ours(name: str) -> str | None:
    layer = re.fullmatch(r"qformer\.encoder\.layer\.(\d+)\.(.+)", name)
    if layer:
        for theirs, own in _LAYER.items():
            if layer[2].startswith(theirs):
                rest = layer[2].removeprefix(theirs)
                part, _, end = rest.partition(".")
                rest = f"{_ATTENTION[part]}.{end}" if part in _ATTENTION else rest
                return f"connector.qformer.layers.{layer[1]}.{own}{rest}"
        return None
    block = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", name)
    table, prefix = (_BLOCK, f"vision.blocks.{block[1]}.") if block else (_REST, "")
    tail = block[2] if block else name
    for theirs, own in table.items():
        if tail.startswith(theirs):
            return prefix + own + tail.removeprefix(theirs)
    return None


def to_hf(state: Mapping[str, Tensor], config: Blip2Config) -> dict[str, Tensor]:
    """The inverse of :func:`from_hf`. ``Blip2ForImageTextRetrieval`` has no temperature and no LM head: they are left
    out. Raises CheckpointError for a tensor without a name there."""
    # The Q-Former's text side stands beside it in BLIP-2 and within it in InstructBLIP; the later entry wins.
    rest = {ours: theirs for theirs, ours in reversed(_REST.items())}
    if config.instruct:
        rest |= {ours: theirs for theirs, ours in _REST.items() if theirs.startswith("qformer.embeddings.")}
    layer = {ours: theirs for theirs, ours in _LAYER.items()}
    block = {ours: theirs for theirs, ours in _BLOCK.items()}
    renamed = {own: theirs for theirs, own in _renamed(config)}
    state = {renamed.get(name, name): tensor for name, tensor in state.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "heads.temperature" or name.startswith("heads.lm_"):
            continue
        joint = re.fullmatch(r"vision\.blocks\.(\d+)\.attn\.([qkv])_proj\.(weight|bias)", name)
        if joint:
            if joint[2] == "q":
                parts = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
                found[f"vision_model.encoder.layers.{joint[1]}.self_attn.qkv.{joint[3]}"] = torch.cat(parts)
            continue
        for pattern, prefix, table in (
            (r"connector\.qformer\.layers\.(\d+)\.(.+)", "qformer.encoder.layer.{}.", layer),
            (r"vision\.blocks\.(\d+)\.(.+)", "vision_model.encoder.layers.{}.", block),
        ):
            if inside := re.fullmatch(pattern, name):
                found[prefix.format(inside[1]) + _theirs(inside[2], table, name)] = tensor
                break
        else:
            single = name in ("vision.class_token", "vision.positions")
            found[_theirs(name, rest, name)] = tensor.reshape(1, -1, tensor.shape[-1]) if single else tensor
    return found


def _renamed(config: Blip2Config) -> list[tuple[str, str]]:
    """Tensors of the language model that files call otherwise than its class, both with our prefix."""
    if (config.language or {}).get("model_type") != "gpt_neox":
        return []
    return [(f"language.lm.{theirs}", f"language.lm.{own}") for theirs, own in RENAMED.items()]


def _theirs(tail: str, table: Mapping[str, str], name: str) -> str:
    ours = max((prefix for prefix in table if tail.startswith(prefix)), key=len, default=None)
    if ours is None:
        raise CheckpointError(f"{name!r} has no name in transformers' BLIP-2.")
    rest = tail.removeprefix(ours)
    part, _, end = rest.partition(".")
    attention = {mine: theirs for theirs, mine in _ATTENTION.items()}
    return table[ours] + (f"{attention[part]}.{end}" if part in attention else rest)


def _retrieval(
    config: Blip2Config, state: dict[str, Tensor], account: Account | None
) -> tuple[Blip2Config, dict[str, Tensor]]:
    """``Blip2ForImageTextRetrieval`` has neither temperature nor LM head: the one only training reads and starts at
    the paper's value, the other is zero, and by its ``objectives`` the model cannot write."""
    config = replace(config, phase="represent", language=None, objectives=("itc", "itm"))
    with torch.device("meta"):
        absent = {n: t for n, t in Blip2(config).state_dict().items() if n == "heads.temperature" or ".lm_" in n}
    why = "transformers' retrieval class has none: the model is not trained on, nor does it write"
    load_report.absent(account, absent, why)
    filled = {name: torch.zeros(tensor.shape) for name, tensor in absent.items()}
    return config, {**state, **filled, "heads.temperature": torch.tensor(TEMPERATURE)}


def read_blip2_folder(
    folder: Path, account: Account | None = None, stored: Mapping[str, Tensor] | None = None
) -> tuple[Blip2Config, dict[str, Tensor]]:
    """Configuration and state dict of a saved BLIP-2 or InstructBLIP, or of a BLIP-2 for retrieval; ``stored`` are its
    weights where they are others than the folder's.

    A T5 head stored beside another embedding table is taken as untied. Raises CheckpointError for strange tensors.
    """
    raw = read_json(folder / "config.json")
    stored = read_state(folder, account) if stored is None else stored
    config, state = config_from_hf(raw, account), from_hf(stored, str(folder), account)
    for theirs, own in _renamed(config):
        if theirs in state:
            state[own] = state.pop(theirs)
    if "heads.itm.weight" in state:
        return _retrieval(config, state, account)
    head, table = state.get("language.lm.lm_head.weight"), state.get("language.lm.shared.weight")
    if table is not None:
        assert config.language is not None
        text: Mapping[str, object] = raw["text_config"]
        scaled = False not in (text.get("scale_decoder_outputs"), text.get("tie_word_embeddings"))
        if scaled and head is not None and not torch.equal(head, table):
            raise CheckpointError(f"{folder}: its T5 has a head of its own, but its configuration ties and scales it.")
        language = seq2seq_ties(config.language, text, head, table)
        config = replace(config, language=language)
    return config, state


def blip2_export(model: Source[Blip2, Processor], *, shard_bytes: int) -> Export:
    config = model.net.config
    losses = []
    if config.norm_eps != config.vision.eps:
        losses.append(
            f"norm_eps {config.norm_eps:g}: transformers has one eps for the encoder and the norm after it, "
            f"{config.vision.eps:g}; answers differ in the last digits"
        )
    if config.phase == "represent":
        losses += _unread(model.net)
        return _retrieval_export(model, tuple(losses), shard_bytes)
    return _prompted(model, tuple(losses), shard_bytes)


def _unread(net: Blip2) -> list[str]:
    """What the retrieval class has no place for. A folder of that class has neither, and goes back as it came."""
    losses = []
    if net.heads is not None and net.heads.temperature.item() != TEMPERATURE:
        losses.append("heads.temperature: only training reads it")
    if "itg" in net.config.objectives:
        losses.append("heads.lm_*: captions without a language model")
    return losses


def _retrieval_export(model: Source[Blip2, Processor], losses: tuple[str, ...], shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    assert isinstance(processor, PairProcessor)
    weights = to_hf(state_tensors(net), net.config)
    files = {
        "config.json": with_dtype(config_to_hf(net.config, image_token_id=None), weights),
        **shards(weights, shard_bytes),
        **_bert_files(processor.tokenizer, "Blip2Processor", net.config.qformer.positions),
        "preprocessor_config.json": image_processor(processor.image),
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": None},
    }
    return Export(files=files, losses=losses, opens="transformers.Blip2ForImageTextRetrieval.from_pretrained(FOLDER)")


def _prompted(model: Source[Blip2, Processor], losses: tuple[str, ...], shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    assert isinstance(processor, PromptProcessor)
    assert net.language is not None  # both of the phase that writes
    assert net.config.language is not None
    seq2seq = isinstance(net.language, Seq2SeqLM)
    state, language, tokenizer, token = with_image_token(net, net.language, net.config.language, processor.tokenizer)
    tied = {f"language.{name}" for name in vocabulary_tables(net.language)} - set(state_tensors(net))
    config = replace(net.config, language=language)
    described = config_to_hf(config, image_token_id=token)
    if seq2seq:  # their BLIP-2 lets the language model generate by its own configuration
        described["text_config"]["decoder_start_token_id"] = processor.start_id
    weights = to_hf({name: tensor for name, tensor in state.items() if name not in tied}, config)
    owner = "InstructBlipProcessor" if config.instruct else "Blip2Processor"
    more = {"decoder_start_token_id": processor.start_id} if seq2seq else {}
    files = {
        "config.json": with_dtype(described, weights),
        "generation_config.json": generation_config(model, forbidden=[token], **more),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            tokenizer,
            begin=not seq2seq and processor.template is None,  # a template writes its beginning itself
            end=seq2seq,
            context=net.language.context,
            side="right" if seq2seq else "left",
            processor_class=owner,
        ),
        "preprocessor_config.json": image_processor(processor.image),
        "processor_config.json": {"processor_class": owner, "num_query_tokens": config.qformer.queries},
        CHAT_TEMPLATE: blip2_template(processor),
    }
    if config.instruct:
        beside = _bert_files(processor.others["qformer"], owner, config.qformer.positions)
        files |= {f"qformer_tokenizer/{name}": content for name, content in beside.items()}
    return Export(
        files=files,
        losses=(*losses, *asked_otherwise(net, processor)),
        opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)",
    )


def _bert_files(tokenizer: Tokenizer, owner: str, context: int) -> dict[str, Content]:
    """The Q-Former's tokenizer: [CLS] text [SEP], although [DEC] is its beginning-of-sequence token here."""
    cls = Tokenizer(tokenizer.backend, eos="[SEP]", bos="[CLS]", pad="[PAD]", unk="[UNK]")
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    return tokenizer_files(cls, begin=True, end=True, context=context, processor_class=owner, **names)


def published_prompts(
    net: Blip2, tokenizer: Tokenizer, image: ImageTransform, qformer: Tokenizer | None
) -> PromptProcessor:
    """Captions and questions in the form of the published models of phase ``generate``."""
    instruct, seq2seq = net.config.instruct, isinstance(net.language, Seq2SeqLM)
    return PromptProcessor(
        tokenizer,
        image=image,
        num_tokens=net.num_tokens(image.size, image.size),
        prompt="" if instruct else "a photo of",
        question="{}" if instruct else "Question: {} Short answer:" if seq2seq else "Question: {} Answer:",
        end="eos" if instruct or seq2seq or newline_id(tokenizer) is None else "newline",
        max_text=256 if instruct else 64,
        start_id=net.language.start_id if isinstance(net.language, Seq2SeqLM) else None,
        qformer=qformer,
        clean=not instruct,
    )


def asked_otherwise(net: Blip2, processor: PromptProcessor) -> tuple[str, ...]:
    """The words of a processor that such a folder does not keep, for whoever reads it uses the above."""
    read = published_prompts(net, processor.tokenizer, processor.image, processor.others.get("qformer")).to_dict()
    own = processor.to_dict()
    return tuple(
        f"processor.{name} {own[name]!r}: such a model gets {read[name]!r}"
        for name in ("prompt", "question", "end", "clean", "template")
        if own[name] != read[name]
    )
