"""A model as a folder that plain transformers opens, and with it vLLM, SGLang and llama.cpp's converter.

Weights in the layout that every version reads, safetensors in shards; beside them the processor, the tokenizer, the
chat template and the decoding of our processor. Every writer raises CheckpointError, naming the field, for a model that
transformers cannot hold.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from isthmus.checkpoint import Content, state_tensors
from isthmus.data.blip2 import PairProcessor, PromptProcessor
from isthmus.data.chat import OWN, ChatForm, form_of
from isthmus.data.tokenizer import CHAT_TEMPLATE, Tokenizer
from isthmus.interop.export import Export, Source, common_dtype, must, shards
from isthmus.interop.folders import asked_otherwise
from isthmus.interop.hf_blip2 import TEMPERATURE, config_to_hf, to_hf
from isthmus.interop.hf_clip import clip_config_to_hf, clip_to_hf
from isthmus.interop.hf_files import (
    begun,
    chat_template,
    generation_config,
    image_processor,
    own_chat_template,
    question_template,
    swapped,
    tokenizer_files,
)
from isthmus.interop.hf_idefics import TOKENS as IDEFICS_TOKENS
from isthmus.interop.hf_idefics import idefics_config_to_hf, idefics_to_hf
from isthmus.interop.hf_language import published
from isthmus.interop.hf_llava import llava_config_to_hf, llava_to_hf
from isthmus.interop.hf_towers import image_encoder_to_hf, text_encoder_to_hf
from isthmus.language import Seq2SeqLM, vocabulary_tables
from isthmus.models.clip import ClipConfig
from isthmus.models.towers import TextEncoderConfig

WHO = "transformers"
IMAGE = "<image>"
_Reads = TypeVar("_Reads", ClipConfig, TextEncoderConfig)
_LEGACY_EOT = 2
"""transformers' CLIP takes this end-of-text id for a sign to read at the largest id instead."""


def clip_export(model: Source, *, shard_bytes: int) -> Export:
    config, state, tokenizer = model.net.config, model.net.state_dict(), model.processor.tokenizer
    must(config.similarity == "cosine", "similarity", config.similarity, WHO, "cosine")
    if config.text.causal and config.text.pool == "eot" and config.text.eot_id == _LEGACY_EOT:
        state, config, tokenizer = last_eot(state, config, tokenizer)
    described = clip_config_to_hf(config)
    described["text_config"]["bos_token_id"] = tokenizer.bos_id
    siglip = described["model_type"] == "siglip"
    weights = clip_to_hf(state, config)
    files = {
        "config.json": _config(described, weights),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            tokenizer,
            begin=True,
            end=True,
            context=config.text.context,
            processor_class="SiglipProcessor" if siglip else "CLIPProcessor",
            pad_token=str(tokenizer.backend.id_to_token(config.text.pad_id if siglip else tokenizer.pad_id)),
        ),
        "preprocessor_config.json": image_processor(model.processor.image),
    }
    kind = "SiglipModel" if siglip else "CLIPModel"
    return Export(files=files, opens=f"transformers.{kind}.from_pretrained(FOLDER)")


def image_encoder_export(model: Source, *, shard_bytes: int) -> Export:
    described, weights = image_encoder_to_hf(model.net.state_dict(), model.net.config)
    files = {
        "config.json": _config(described, weights),
        **shards(weights, shard_bytes),
        "preprocessor_config.json": image_processor(model.processor.image),
    }
    return Export(files=files, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)")


def text_encoder_export(model: Source, *, shard_bytes: int) -> Export:
    config, state, tokenizer = model.net.config, model.net.state_dict(), model.processor.tokenizer
    if config.text.causal and config.text.pool == "eot" and config.text.eot_id == _LEGACY_EOT:
        state, config, tokenizer = last_eot(state, config, tokenizer)
    described, weights = text_encoder_to_hf(state, config)
    described["bos_token_id"] = tokenizer.bos_id
    pad = tokenizer.backend.id_to_token(tokenizer.pad_id if config.text.causal else config.text.pad_id)
    files = {
        "config.json": _config(described, weights),
        **shards(weights, shard_bytes),
        **tokenizer_files(tokenizer, begin=True, end=True, context=config.text.context, pad_token=str(pad)),
    }
    return Export(files=files, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)")


def last_eot(
    state: Mapping[str, Tensor], config: _Reads, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], _Reads, Tokenizer]:
    """The same model with its end-of-text under the tokenizer's largest id, where every reader finds it."""
    old, new = config.text.eot_id, tokenizer.vocab_size - 1
    table = state["text.tokens.weight"].clone()
    table[[old, new]] = table[[new, old]]
    text = replace(config.text, eot_id=new)
    return {**state, "text.tokens.weight": table}, replace(config, text=text), swapped(tokenizer, old, new)


def lm_export(model: Source, *, shard_bytes: int) -> Export:
    weights = language_tensors(model.net.language.lm)
    words = model.processor.tokenizer
    template = begun(chat_template(getattr(model.processor, "template", "")), words) or words.chat_template
    files = {
        **language_files(model, weights),
        **shards(weights, shard_bytes),
        **({CHAT_TEMPLATE: template} if template else {}),
    }
    return Export(files=files, opens="transformers.AutoModelForCausalLM.from_pretrained(FOLDER)")


def language_files(model: Source, weights: Mapping[str, Tensor]) -> dict[str, Content]:
    """Configuration, decoding and tokenizer of the bare LM."""
    language = model.net.language
    described = {**language.config, "architectures": [type(language.lm).__name__]}
    return {
        "config.json": _config(described, weights),
        "generation_config.json": generation_config(model),
        **tokenizer_files(model.processor.tokenizer, begin=True, end=False, context=language.context, side="left"),
    }


def language_tensors(lm: Any) -> dict[str, Tensor]:
    """Under the names of published files, a tied tensor once."""
    return {published(lm, name): tensor for name, tensor in state_tensors(lm).items()}


def llava_export(model: Source, *, shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    lm = net.language.lm
    kind = net.config.language["model_type"]
    bias = getattr(lm.get_output_embeddings(), "bias", None)
    must(bias is None or not bias.any(), "language.lm.lm_head.bias", "not zero", f"{WHO}' LLaVA", "a head without bias")
    must(net.language.plain_head(), "language.model_type", kind, f"{WHO}' LLaVA", "an LM with a plain output head")
    must(not processor.around, "processor.around", processor.around, f"{WHO}' LLaVA", "nothing")
    state, language, tokenizer, token = with_image_token(net, processor.tokenizer)
    config = replace(net.config, language=language)
    described = llava_config_to_hf(config, image_token_id=token)
    weights = llava_to_hf(state, config)
    form = form_of(processor.template, processor.tokenizer)
    template = own_chat_template(form) if isinstance(form, ChatForm) else chat_template(processor.template)
    kind = "LlavaNext" if config.pinpoints else "Llava"
    files = {
        "config.json": _config(described, weights),
        "generation_config.json": generation_config(model, forbidden=[token]),
        **shards(weights, shard_bytes),
        **tokenizer_files(
            tokenizer,
            begin=not isinstance(form, ChatForm),  # which writes its beginning itself
            end=False,
            context=net.language.context,
            side="left",
            processor_class=f"{kind}Processor",
        ),
        "preprocessor_config.json": image_processor(processor.image),
        "processor_config.json": {
            "processor_class": f"{kind}Processor",
            "image_token": IMAGE,
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": described["vision_feature_select_strategy"],
            "num_additional_image_tokens": int(config.vision.class_token),
        },
        **({CHAT_TEMPLATE: template} if template else {}),
    }
    return Export(files=files, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)")


def with_image_token(net: Any, tokenizer: Tokenizer) -> tuple[dict[str, Tensor], dict[str, Any], Tokenizer, int]:
    """State, the LM's configuration, tokenizer and id for a layout whose place of a picture is a token.

    The token is the tokenizer's own ``<image>``, or a new one after its vocabulary. Where the LM's tables have no row
    to spare they get one more, the mean of the others; the model overwrites it wherever the token stands.
    """
    tokenizer = tokenizer if tokenizer.backend.token_to_id(IMAGE) is not None else tokenizer.with_tokens(IMAGE)
    token, rows = tokenizer.id_of(IMAGE), net.language.vocab_size
    state, language = net.state_dict(), dict(net.config.language)
    must(token <= rows, "tokenizer", f"{token} tokens", WHO, f"no larger than the LM's vocabulary of {rows}")
    if token == rows:
        for name in vocabulary_tables(net.language):
            table = state[f"language.{name}"]
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            state[f"language.{name}"] = torch.cat([table, mean])
        language["vocab_size"] = rows + 1
    return state, language, tokenizer, token


def idefics_export(model: Source, *, shard_bytes: int) -> Export:
    """A Flamingo in the proportions of IDEFICS; any other can be written as `open_flamingo`."""
    config, processor = model.net.config, model.processor
    described = idefics_config_to_hf(config)
    tokens = IDEFICS_TOKENS[: len(config.new_ids)]
    for name, value, fixed in (("tokens", processor.tokens, tokens), ("around", processor.around, True)):
        must(value == fixed, f"processor.{name}", value, WHO, repr(fixed))
    read = "paper" if config.turn_id is None else "idefics"
    template_loss = f"processor.template {processor.template!r}: such a model gets {read!r}"
    weights = idefics_to_hf(state_tensors(model.net), config)
    described |= {"bos_token_id": processor.tokenizer.bos_id, "eos_token_id": processor.tokenizer.eos_id}
    files = {
        "config.json": _config(described | {"pad_token_id": processor.tokenizer.pad_id}, weights),
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
    losses = (template_loss,) if processor.template == OWN else ()
    return Export(
        files=files, losses=losses, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)"
    )


def blip2_export(model: Source, *, shard_bytes: int) -> Export:
    config = model.net.config
    losses = []
    if config.norm_eps != config.vision.eps:
        losses.append(
            f"norm_eps {config.norm_eps:g}: transformers has one eps for the encoder and the norm after it, "
            f"{config.vision.eps:g}; answers differ in the last digits"
        )
    if config.phase == "represent":
        losses += _unread(model.net)
        return _retrieval(model, tuple(losses), shard_bytes)
    return _prompted(model, (*losses, *asked_otherwise(model.net, model.processor)), shard_bytes)


def _unread(net: Any) -> list[str]:
    """What the retrieval class has no place for. A folder of that class has neither, and goes back as it came."""
    losses = []
    if net.heads.temperature.item() != TEMPERATURE:
        losses.append("heads.temperature: only training reads it")
    if "itg" in net.config.objectives:
        losses.append("heads.lm_*: captions without a language model")
    return losses


def _retrieval(model: Source, losses: tuple[str, ...], shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    assert isinstance(processor, PairProcessor)
    weights = to_hf(state_tensors(net), net.config)
    files = {
        "config.json": _config(config_to_hf(net.config, image_token_id=None), weights),
        **shards(weights, shard_bytes),
        **_bert_files(processor.tokenizer, "Blip2Processor", net.config.qformer.positions),
        "preprocessor_config.json": image_processor(processor.image),
        "processor_config.json": {"processor_class": "Blip2Processor", "num_query_tokens": None},
    }
    return Export(files=files, losses=losses, opens="transformers.Blip2ForImageTextRetrieval.from_pretrained(FOLDER)")


def _prompted(model: Source, losses: tuple[str, ...], shard_bytes: int) -> Export:
    net, processor = model.net, model.processor
    assert isinstance(processor, PromptProcessor)
    seq2seq = isinstance(net.language, Seq2SeqLM)
    state, language, tokenizer, token = with_image_token(net, processor.tokenizer)
    tied = {f"language.{name}" for name in vocabulary_tables(net.language)} - set(state_tensors(net))
    config = replace(net.config, language=language)
    described = config_to_hf(config, image_token_id=token)
    if seq2seq:  # their BLIP-2 lets the language model generate by its own configuration
        described["text_config"]["decoder_start_token_id"] = processor.start_id
    weights = to_hf({name: tensor for name, tensor in state.items() if name not in tied}, config)
    owner = "InstructBlipProcessor" if config.instruct else "Blip2Processor"
    more = {"decoder_start_token_id": processor.start_id} if seq2seq else {}
    files = {
        "config.json": _config(described, weights),
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
        CHAT_TEMPLATE: (processor.template and processor.tokenizer.chat_template)
        or question_template(processor.question, clean=processor.clean),
    }
    if config.instruct:
        beside = _bert_files(processor.others["qformer"], owner, config.qformer.positions)
        files |= {f"qformer_tokenizer/{name}": content for name, content in beside.items()}
    return Export(
        files=files, losses=losses, opens=f"transformers.{described['architectures'][0]}.from_pretrained(FOLDER)"
    )


def _bert_files(tokenizer: Tokenizer, owner: str, context: int) -> dict[str, Content]:
    """The Q-Former's tokenizer: [CLS] text [SEP], although [DEC] is its beginning-of-sequence token here."""
    cls = Tokenizer(tokenizer.backend, eos="[SEP]", bos="[CLS]", pad="[PAD]", unk="[UNK]")
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "bos_token": "[DEC]"}
    return tokenizer_files(cls, begin=True, end=True, context=context, processor_class=owner, **names)


def _config(described: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """With the dtype under the name that every version reads."""
    return {**described, "torch_dtype": common_dtype(list(weights.values()))}
