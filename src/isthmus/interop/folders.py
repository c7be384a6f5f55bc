"""Folders that transformers wrote: a net and a processor from what is in them, by content.

CLIP and SigLIP, both towers or one, LLaVA and LLaVA-NeXT in all key layouts, BLIP-2 and InstructBLIP, IDEFICS, any
causal LM. Nothing in a folder is executed.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from isthmus.checkpoint import read_json
from isthmus.data.blip2 import PairProcessor
from isthmus.data.chat import OWN
from isthmus.data.interleave import InterleaveProcessor
from isthmus.data.processor import (
    ContrastiveProcessor,
    ImagesProcessor,
    SpliceProcessor,
    TextProcessor,
    TextsProcessor,
)
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import load_wordpiece
from isthmus.errors import CheckpointError, IsthmusWarning
from isthmus.interop.archives import read_state
from isthmus.interop.given import Given, Opened
from isthmus.interop.hf_blip2 import published_prompts, read_blip2_folder
from isthmus.interop.hf_clip import read_clip_folder
from isthmus.interop.hf_encoders import read_image_encoder_folder, read_text_encoder_folder
from isthmus.interop.hf_files import further_stops
from isthmus.interop.hf_idefics import TOKENS as IDEFICS_TOKENS
from isthmus.interop.hf_idefics import read_idefics_folder
from isthmus.interop.hf_images import image_transform
from isthmus.interop.hf_language import read_language_folder
from isthmus.interop.hf_llava import llava_from_folder
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.interop.recognised_template import chat_template_of, places_pictures, recognise_template
from isthmus.interop.special_ids import must_agree, must_agree_on_image, must_end_alike
from isthmus.interop.written_template import template_named
from isthmus.load_report import Account
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.models.clip import Clip
from isthmus.models.flamingo import Flamingo
from isthmus.models.llava import Llava
from isthmus.models.lm import BareLM, LmConfig
from isthmus.models.towers import ImageEncoder, TextEncoder
from isthmus.nn.text_tower import TextConfig
from isthmus.weights import load_into

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def load_foreign(folder: Path, config: Mapping[str, object], given: Given) -> Opened:
    """The net, its processor, and ids it must never answer with. Raises CheckpointError for what is not known, and
    for something given that has no use."""
    model_type = config.get("model_type")
    if model_type is None:
        raise CheckpointError(f"{folder}/config.json names neither a format of ours nor a model_type of transformers.")
    if model_type in ("clip_vision_model", "siglip_vision_model"):
        given.only(where=folder)
        return _image_encoder(folder, given.account)
    given.only("tokenizer", where=folder)
    words = _words(folder, given)
    readers: dict[object, Callable[[Path, Path, Account], Opened]] = {
        **dict.fromkeys(("clip", "siglip"), _clip),
        **dict.fromkeys(("llava", "llava_next"), _llava),
        **dict.fromkeys(("blip-2", "instructblip"), _blip2),
        **dict.fromkeys(("clip_text_model", "siglip_text_model"), _text_encoder),
        "idefics": _idefics,
    }
    return readers.get(model_type, _language)(folder, words, given.account)


def _words(folder: Path, given: Given) -> Path:
    """Where the tokenizer lies: in the folder named for it, or beside the weights."""
    if given.tokenizer is None:
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            given.need("tokenizer", folder, f"holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
        return folder
    path = Path(given.tokenizer)
    if path.is_file() and path.name in TOKENIZER_FILES:
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(f"tokenizer={path} is no folder of a tokenizer; {folder} reads text by one.")
    return path


def _clip(folder: Path, words: Path, account: Account) -> Opened:
    config, state = read_clip_folder(folder, account)
    tokenizer = open_tokenizer(words)
    must_end_alike(folder, words, tokenizer, config.text)
    config = replace(config, text=padded_by(tokenizer, config.text))
    net = Clip(config)
    load_into(net, state, where=folder, account=account)
    image = image_transform(folder, config.vision.image_size, siglip=not config.vision.class_token)
    return net, ContrastiveProcessor(tokenizer, image=image, context=config.text.context), ()


def padded_by(tokenizer: Tokenizer, text: TextConfig) -> TextConfig:
    """SigLIP reads its padding like any token, and rows are padded by the tokenizer: what config.json says of it is
    mostly a default that nobody reads."""
    named = tokenizer.specials["pad_token"]
    return text if text.causal or named is None else replace(text, pad_id=tokenizer.id_of(named))


def _image_encoder(folder: Path, account: Account) -> Opened:
    config, state = read_image_encoder_folder(folder, account)
    net = ImageEncoder(config)
    load_into(net, state, where=folder, account=account)
    image = image_transform(folder, config.vision.image_size, siglip=not config.vision.class_token)
    return net, ImagesProcessor(image), ()


def _text_encoder(folder: Path, words: Path, account: Account) -> Opened:
    config, state = read_text_encoder_folder(folder, account)
    tokenizer = open_tokenizer(words)
    must_end_alike(folder, words, tokenizer, config.text)
    config = replace(config, text=padded_by(tokenizer, config.text))
    net = TextEncoder(config)
    load_into(net, state, where=folder, account=account)
    return net, TextsProcessor(tokenizer, context=config.text.context), ()


def _llava(folder: Path, words: Path, account: Account) -> Opened:
    return llava_of(folder, words, read_state(folder, account), account)


def llava_of(folder: Path, words: Path, stored: Mapping[str, Tensor], account: Account) -> Opened:
    """A LLaVA from its weights under transformers' names, which may be others than those in ``folder``."""
    config, state, image_token = llava_from_folder(folder, stored, account)
    net = Llava(config)  # not from the meta device: ties and computed buffers (rotary frequencies) would be lost
    load_into(net, state, where=folder, account=account)
    if not net.language.plain_head():
        raise CheckpointError(
            f"{folder}: its language model, {config.language['model_type']}, does more to its logits than a linear "
            "head, and transformers' LLaVA puts a bare head on its body; the answers would be others."
        )
    siglip = not config.vision.class_token
    transform = image_transform(folder, config.vision.image_size, config.pinpoints, siglip=siglip)
    tokenizer = open_tokenizer(words)
    must_agree(folder, words, tokenizer, net.language.vocab_size)
    must_agree_on_image(folder, words, tokenizer)
    template, tokenizer = template_and_tokenizer(
        chat_template_of(folder), tokenizer, where=folder, otherwise="vicuna_v1", pictures=True
    )
    processor = SpliceProcessor(
        tokenizer.around_pictures(tokenizer.backend.id_to_token(image_token)),
        image=transform,
        template=template,
        max_length=net.language.context or 2048,
        num_tokens=net.num_tokens(transform.size, transform.size),
        stop_ids=further_stops(folder, tokenizer),
    )
    return net, processor, (image_token,)


def _idefics(folder: Path, words: Path, account: Account) -> Opened:
    config, state = read_idefics_folder(folder, account)
    net = Flamingo(config)  # not from the meta device, as LLaVA's
    load_into(net, state, where=folder, account=account)
    tokenizer = open_tokenizer(words)
    if (begin := tokenizer.specials["bos_token"]) is not None:  # its processor writes it, whatever the tokenizer adds
        tokenizer = tokenizer.beginning(begin)
    must_agree(folder, words, tokenizer, net.language.vocab_size)
    tokens = IDEFICS_TOKENS[: len(config.new_ids)]
    ids = tuple(tokenizer.id_of(token) for token in tokens)
    if ids != config.new_ids:
        raise CheckpointError(f"{folder}: its tokenizer has {tokens} at {ids}, its model after the vocabulary.")
    image = image_transform(folder, config.vision.image_size)
    processor = InterleaveProcessor(
        tokenizer.around_pictures(tokens[1], *tokens),
        image,
        max_length=net.language.context or 2048,
        template="paper" if config.turn_id is None else "idefics",
        tokens=tokens,
        around=True,
    )
    return net, processor, ()


def _blip2(folder: Path, words: Path, account: Account) -> Opened:
    return blip2_of(folder, words, read_state(folder, account), account)


def blip2_of(folder: Path, words: Path, stored: Mapping[str, Tensor], account: Account) -> Opened:
    """A BLIP-2 from its weights under transformers' names, which may be others than those in ``folder``. The prompts
    are the paper's; InstructBLIP's instruction stands by itself, its Q-Former has a tokenizer too."""
    config, state = read_blip2_folder(folder, account, stored)
    if config.phase == "represent":
        return _retrieval(folder, words, config, state, account)
    net = Blip2(config)
    load_into(net, state, where=folder, account=account)
    transform = image_transform(folder, config.vision.image_size)
    qformer = load_wordpiece(folder / "qformer_tokenizer") if config.instruct else None
    tokenizer = open_tokenizer(words)
    must_agree_on_image(folder, words, tokenizer)  # its other ids stand elsewhere: OPT's end here is a newline
    processor = published_prompts(net, tokenizer, transform, qformer)
    return (
        net,
        processor,
        tuple(i for i in (read_json(folder / "config.json").get("image_token_index"),) if i is not None),
    )


def _retrieval(folder: Path, words: Path, config: Blip2Config, state: Mapping[str, Tensor], account: Account) -> Opened:
    net = Blip2(config)
    load_into(net, state, where=folder, account=account)
    image = image_transform(folder, config.vision.image_size)
    return net, PairProcessor(load_wordpiece(words), image), ()


def _language(folder: Path, words: Path, account: Account) -> Opened:
    config, state = read_language_folder(folder, account)
    net = BareLM(LmConfig(language=config))
    load_into(net.language.lm, state, where=folder, account=account)
    tokenizer = open_tokenizer(words)
    must_agree(folder, words, tokenizer, net.language.vocab_size)
    template, tokenizer = template_and_tokenizer(
        chat_template_of(folder), tokenizer, where=folder, otherwise="document", pictures=False
    )
    processor = TextProcessor(
        tokenizer,
        template=template,
        max_length=net.language.context or 2048,
        stop_ids=further_stops(folder, tokenizer),
    )
    return net, processor, ()


def template_and_tokenizer(
    text: str, tokenizer: Tokenizer, *, where: Path, otherwise: str, pictures: bool
) -> tuple[str, Tokenizer]:
    """The template of ours that a chat template is, or its own, and the tokenizer as it begins a conversation there:
    once, whether the template writes its beginning or the tokenizer does. Warns of a template that none of ours is."""
    if not text:
        return otherwise, tokenizer
    if not pictures:  # a LLaVA's is its processor's, which reads pictures as parts of a turn
        tokenizer = tokenizer.with_chat_template(text)
    recognised = recognise_template(text, tokenizer, pictures=pictures)
    bos = tokenizer.specials["bos_token"]
    alike = recognised.name is not None and recognised.further and (pictures or recognised.system)
    if recognised.begins and bos is not None:  # text behind a token may be cut otherwise than at the front
        alike &= tokenizer.encode(f"{tokenizer.stand_in(bos)}a") == [tokenizer.id_of(bos), *tokenizer.encode("a")]
    if not alike and (not pictures or places_pictures(text, tokenizer)):
        return OWN, tokenizer.with_chat_template(text)
    if not pictures and tokenizer.begins and not recognised.begins and template_named(text) is None:
        return OWN, tokenizer  # in our words texts begin with what this template leaves out
    if recognised.name is None and pictures:
        warnings.warn(
            f"{where}: its chat template is none that is known here (what it makes of a question is none of "
            f"{', '.join(n for n, t in TEMPLATES.items() if isinstance(t, Grammar))}); questions are put in "
            f"{otherwise}, which this model may not have been trained with.",
            IsthmusWarning,
            stacklevel=2,
        )
    elif recognised.name is not None and not recognised.further:
        warnings.warn(
            f"{where}: its chat template writes a first question as {recognised.name} does and further turns "
            f"otherwise; here they are written as {recognised.name} writes them.",
            IsthmusWarning,
            stacklevel=2,
        )
    if recognised.name is not None and recognised.begins and bos is not None and not tokenizer.begins:
        tokenizer = tokenizer.beginning(bos)
    return recognised.name or otherwise, tokenizer
