"""Language models in transformers' folders, causal and T5-like: configuration and weights, strictly, no code run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isthmus import load_report
from isthmus.checkpoint import Content, read_json
from isthmus.data.processor import TextProcessor
from isthmus.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.archives import read_state
from isthmus.interop.export import AnySource, Export, Source, must, shards
from isthmus.interop.hf_files import generation_config, tokenizer_files, with_dtype
from isthmus.interop.written_template import begun, chat_template
from isthmus.language import T5_LIKE, LanguageModel, LibraryLM, Seq2SeqLM, known_fields, vocabulary_tables
from isthmus.load_report import Account
from isthmus.models.lm import BareLM
from isthmus.net import Net
from isthmus.weights import state_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE = "<image>"
_WHO = "transformers"

RENAMED = {"embed_out.weight": "lm_head.weight"}
"""Stored name -> name in the library's class, where they differ (GPT-NeoX files keep the old name of the head)."""


def published(lm: "PreTrainedModel", name: str) -> str:
    """The name of a tensor of ``lm`` in published files."""
    return next((t for t, ours in RENAMED.items() if ours == name and lm.config.model_type == "gpt_neox"), name)


def read_language_folder(
    path: str | Path, account: Account | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A saved LM of transformers as (configuration, state dict under the library class's own keys), strictly.

    Reads config.json and the weights, one file or shards; nothing in the folder is executed. Explained differences
    are mended: a missing base prefix, a tied head that was not stored, recomputed buffers that were. A head that is
    stored beside another table of embeddings is not tied, whatever config.json says. Anything else that is missing,
    left over or of another shape raises CheckpointError.
    """
    folder = Path(path)
    config = known_fields(read_json(folder / "config.json"))
    stored = read_state(folder, account)
    with torch.device("meta"):
        lm = LanguageModel.build(config).lm
    state = match_keys(lm, stored, where=str(folder), account=account)
    table = lm.get_input_embeddings().weight
    first, *others = (state[name] for name, own in lm.state_dict(keep_vars=True).items() if own is table)
    if any(not torch.equal(first, other) for other in others):
        config = {**config, "tie_word_embeddings": False}
    return config, state


def read_seq2seq_folder(
    path: str | Path, account: Account | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A saved T5 of transformers as (configuration, state dict under the library's keys), strictly; no code is run.

    A head that is stored beside another embedding table is taken as untied, whatever config.json says.
    """
    folder = Path(path)
    raw = read_json(folder / "config.json")
    if raw.get("model_type") not in T5_LIKE:
        raise ConfigError(f"{folder} is a {raw.get('model_type')} model; an encoder-decoder is one of {T5_LIKE}.")
    stored = read_state(folder, account)
    config = seq2seq_ties(known_fields(raw), raw, stored.get("lm_head.weight"), stored.get("shared.weight"))
    if "dense_act_fn" in raw:
        config["dense_act_fn"] = raw["dense_act_fn"]
    with torch.device("meta"):
        lm = Seq2SeqLM.build(config).lm
    return config, match_keys(lm, stored, where=str(folder), account=account)


def seq2seq_ties(
    config: Mapping[str, object], raw: Mapping[str, object], head: Tensor | None, table: Tensor | None
) -> dict[str, object]:
    """``config`` with what a T5's files say of its head: a table of its own where one is stored, else the embedding's,
    its input scaled or not. Versions of the library before 5 say "not scaled" by ``tie_word_embeddings``, later ones,
    which tie all that they make, by a field of its own."""
    unscaled = False in (raw.get("scale_decoder_outputs"), raw.get("tie_word_embeddings"))
    rest = {k: v for k, v in config.items() if k not in ("tie_word_embeddings", "scale_decoder_outputs")}
    if head is not None and table is not None and (unscaled or not torch.equal(head, table)):
        return {**rest, "tie_word_embeddings": False}
    return {**rest, "scale_decoder_outputs": False} if unscaled else rest


def match_keys(
    lm: "PreTrainedModel", stored: Mapping[str, Tensor], *, where: str, account: Account | None = None
) -> dict[str, Tensor]:
    """``stored`` under the keys of ``lm`` (which may live on the meta device). Raises CheckpointError."""
    expected = lm.state_dict(keep_vars=True)
    prefix = f"{lm.base_model_prefix}."
    derived = [
        *(lm._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq$",
        r"\.attn\.(masked_)?bias$",
        r"\.attention\.(masked_)?bias$",
    ]
    state: dict[str, Tensor] = {}
    left_over: list[str] = []
    for name, tensor in stored.items():
        name = RENAMED.get(name, name) if RENAMED.get(name) in expected else name
        key = name if name in expected else prefix + name
        if key in expected:
            state[key] = tensor
        elif any(re.search(pattern, name) for pattern in derived):
            load_report.ignored(account, [name], load_report.DERIVED)
        else:
            left_over.append(name)
    by_parameter = {id(expected[key]): tensor for key, tensor in state.items()}
    for key, parameter in expected.items():
        if key not in state and id(parameter) in by_parameter:
            state[key] = by_parameter[id(parameter)]
    missing = [key for key in expected if key not in state]
    for problem, names in (("lacks", missing), ("holds unexplained", left_over)):
        if names:
            raise CheckpointError(
                f"{where}: the {type(lm).__name__} checkpoint {problem} {len(names)} tensors, "
                f"among them {', '.join(names[:3])}. Is config.json the one saved with the weights?"
            )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"{where}: {key} is stored as {tuple(tensor.shape)} but the configuration says "
                f"{tuple(expected[key].shape)}."
            )
    return state


def lm_export(model: Source[BareLM, TextProcessor], *, shard_bytes: int) -> Export:
    weights, words = language_tensors(model.net.language.lm), model.processor.tokenizer
    template = begun(chat_template(getattr(model.processor, "template", "")), words) or words.chat_template
    files = {
        **language_files(model, model.net.language, weights),
        **shards(weights, shard_bytes),
        **({CHAT_TEMPLATE: template} if template else {}),
    }
    return Export(files=files, opens="transformers.AutoModelForCausalLM.from_pretrained(FOLDER)")


def language_files(model: AnySource, language: LanguageModel, weights: Mapping[str, Tensor]) -> dict[str, Content]:
    """Configuration, decoding and tokenizer of the model's bare LM."""
    described = {**language.config, "architectures": [type(language.lm).__name__]}
    return {
        "config.json": with_dtype(described, weights),
        "generation_config.json": generation_config(model),
        **tokenizer_files(model.processor.tokenizer, begin=True, end=False, context=language.context, side="left"),
    }


def language_tensors(lm: "PreTrainedModel") -> dict[str, Tensor]:
    """Under the names of published files, a tied tensor once."""
    return {published(lm, name): tensor for name, tensor in state_tensors(lm).items()}


def with_image_token(
    net: Net, lm: LibraryLM, config: Mapping[str, object], tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], dict[str, object], Tokenizer, int]:
    """State, the LM's configuration, tokenizer and id for a layout whose place of a picture is a token. ``lm`` is the
    net's, and ``config`` its configuration as it is.

    The token is the tokenizer's own ``<image>``, or a new one after its vocabulary. Where the LM's tables have no row
    to spare they get one more, the mean of the others; the model overwrites it wherever the token stands.
    """
    tokenizer = tokenizer if tokenizer.backend.token_to_id(IMAGE) is not None else tokenizer.with_tokens(IMAGE)
    token, rows = tokenizer.id_of(IMAGE), lm.vocab_size
    state, language = net.state_dict(), dict(config)
    must(token <= rows, "tokenizer", f"{token} tokens", _WHO, f"no larger than the LM's vocabulary of {rows}")
    if token == rows:
        for name in vocabulary_tables(lm):
            table = state[f"language.{name}"]
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            state[f"language.{name}"] = torch.cat([table, mean])
        language["vocab_size"] = rows + 1
    return state, language, tokenizer, token
