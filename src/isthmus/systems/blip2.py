"""BLIP-2 and InstructBLIP as a system: two tokenizers, an encoder and an LM from parts, BERT for the Q-Former's start.

Its stages are phases of one net, with other parts in each: what a phase has no place for is kept until it has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isthmus.batch import Batch
from isthmus.checkpoint import read_json
from isthmus.config import merged, section
from isthmus.data.blip2 import PairProcessor, PromptProcessor
from isthmus.data.chat import OWN
from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor
from isthmus.data.record import Example
from isthmus.data.tokenizer import Tokenizer
from isthmus.data.wordpiece import cls_id
from isthmus.errors import CheckpointError, ConfigError
from isthmus.interop.hf_bert import read_bert_folder
from isthmus.interop.hf_language import read_seq2seq_folder
from isthmus.interop.hf_tokenizer import open_tokenizer
from isthmus.language import T5_LIKE, Seq2SeqLM
from isthmus.models.blip2 import Blip2
from isthmus.net import Net
from isthmus.nn.vit import resize_positions
from isthmus.systems import peers
from isthmus.systems.base import (
    WRITES,
    HasNet,
    PartModel,
    Parts,
    StageOptions,
    System,
    Tokenizers,
    model_of,
    piece_of,
    recall,
)

QFORMER = "qformer"
_POSITIONS = "vision.positions"


@dataclass(frozen=True)
class _Language:
    """An LM as the part brings it: configuration, tensors, tokenizer."""

    config: Mapping[str, object]
    state: Mapping[str, Tensor]
    tokenizer: Tokenizer


class Blip2System(System[Blip2]):
    """2301.12597, 2305.06500."""

    kind = "blip2"
    title = "BLIP-2"
    pipeline = "image-to-text"
    net = Blip2
    parts = ("vision", "language", "bert", "init")

    def capabilities(self, net: Blip2) -> tuple[str, ...]:
        """By phase. Attention maps need a causal language model."""
        if net.config.phase == "represent":
            writes = ("generate", "caption") if "itg" in net.config.objectives else ()
            return (*writes, "embed_images", "embed_texts", "similarity", "match")
        return (*WRITES, *(("attend",) if net.prompt_stream == "lm" else ()))

    def open_part(self, name: str, path: str, load: Callable[[str], PartModel[Net]]) -> object:
        """``bert`` is a folder of transformers; ``language`` may be one of a T5, which is no model of ours alone."""
        if name == "bert":
            return Path(path)
        if name == "language":
            return _language(path, load)
        return load(path)

    def tokenizers(self, parts: Parts, make: Callable[[], Tokenizer] | None) -> Tokenizers:
        """The LM's, and beside it the Q-Former's; in the first phase the latter stands for both. Of a finished BLIP-2
        both are its own."""
        if "init" in parts:
            if make is not None:
                raise ConfigError("The tokenizers come with the part 'init'; take `tokenizer` out of the recipe.")
            model = self.begun(parts)
            main = model.processor.tokenizer
            if model.net.config.phase == "represent":
                return Tokenizers(main, {QFORMER: main})
            return Tokenizers(main, model.processor.others)
        qformer = None if make is None else make()
        if qformer is not None:
            cls_id(qformer)  # refuses a tokenizer that is not the Q-Former's
        main = _language_of(parts).tokenizer if "language" in parts else qformer
        if main is None:
            raise ConfigError("A blip2 recipe needs a `tokenizer` for the Q-Former: WordPiece, or BERT's folder.")
        return Tokenizers(main, {} if qformer is None else {QFORMER: qformer})

    def configuration(self, own: dict[str, object], parts: Parts, tokenizers: Tokenizers) -> dict[str, object]:
        if "vision" in parts:
            theirs = piece_of("vision", model_of(parts, "vision"))
            own["vision"] = _cut(section(own, "vision"), theirs) if own.get("vision") is not None else theirs
        elif "vision" not in own:
            raise ConfigError("A blip2 recipe needs the part 'vision': a folder with a vision encoder, such as a CLIP.")
        if "language" in parts:
            own["language"] = _language_of(parts).config
        facts: dict[str, object] = {"vision_width": section(own, "vision")["width"]}
        if QFORMER in tokenizers.others:
            qformer = tokenizers.others[QFORMER]
            facts |= {"vocab_size": qformer.vocab_size, "dec_id": qformer.bos_id}
        return own | {"qformer": merged(section(own, "qformer") if "qformer" in own else {}, facts)}

    def take(self, net: Blip2, parts: Parts) -> Mapping[str, Tensor]:
        """Raises CheckpointError for a part that lacks a tensor."""
        if "init" in parts:
            tensors = _stretched(self.begun(parts).net, net)
        else:
            tensors = {}
            if "vision" in parts:
                tensors |= {f"vision.{n}": t for n, t in model_of(parts, "vision").net.vision.state_dict().items()}
            if "language" in parts:
                tensors |= {f"language.{n}": t for n, t in _language_of(parts).state.items()}
            if "bert" in parts:
                own, bert = net.config.qformer, parts["bert"]
                assert isinstance(bert, Path)  # as open_part gives it
                tensors |= read_bert_folder(bert, layers=own.layers, rows=own.vocab_size)
        recall(net, tensors, "a part")
        for part in {"vision", "language"} & parts.keys():
            lost = [n for n in net.state_dict() if n.startswith(f"{part}.") and n not in tensors]
            if lost:
                raise CheckpointError(f"The part {part!r} has no {lost[0]!r} (and {len(lost) - 1} more like it).")
        return tensors

    def processor(
        self, net: Blip2, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        """The processor of the phase the net is in. A stage of prompts without a ``template``, and without words of its
        own for questions, takes the chat template that the language model carries."""
        assert image is not None
        if stage.template is not None and (net.config.phase == "represent" or "question" in stage.processor):
            raise ConfigError(
                f"Stage {stage.name!r}: a blip2 stage without a language model has no chat template, and one with a "
                "template has no `question` among its processor's options; take one of them out."
            )
        options: dict[str, object] = {} if stage.max_length is None else {"max_text": stage.max_length}
        options |= stage.processor
        talks = tokenizers.main.chat_template is not None and "question" not in options
        if stage.template or (talks and net.config.phase == "generate" and not isinstance(net.language, Seq2SeqLM)):
            assert net.language is not None  # a phase without one was refused above
            room = (net.language.context or 2048) - net.num_tokens(image.size, image.size)
            options = {"clean": False, "max_text": room, **options, "template": stage.template or OWN}
        try:
            if net.config.phase == "represent":
                return _made(PairProcessor, tokenizers.others[QFORMER], image, **options)
            if isinstance(net.language, Seq2SeqLM):
                options["start_id"] = net.language.start_id
            return _made(
                PromptProcessor,
                tokenizers.main,
                image,
                num_tokens=net.num_tokens(image.size, image.size),
                qformer=tokenizers.others[QFORMER] if net.config.instruct else None,
                **options,
            )
        except TypeError as error:
            raise ConfigError(
                f"Stage {stage.name!r}: unknown processor option among {sorted(options)} ({error})."
            ) from None
        except KeyError:
            raise ConfigError("The Q-Former reads text in this stage: give the recipe a `tokenizer` for it.") from None

    def prompt_limit(self, net: Blip2) -> int | None:
        """None: ``max_length`` is the text beside the visual tokens, and a prompt's as well."""
        return None

    def outputs(self, net: Blip2, batch: Batch) -> list[Tensor]:
        """Logits; in the first phase pictures (one vector per query) and texts, unit vectors there, and the matching
        logits, or of a text alone its vector."""
        if net.config.phase == "generate":
            return super().outputs(net, batch)
        text = batch.text[QFORMER]
        if not batch.visuals:
            return list(net.embed_texts(text).float())
        pixels = peers.pictures(batch)
        rows = [F.normalize(net.embed_images(pixels), dim=-1).flatten(1), F.normalize(net.embed_texts(text), dim=-1)]
        return list(torch.cat([*rows, net.match_logits(net.normed(pixels), text)], dim=1).float())

    def peer_outputs(self, model: HasNet[Blip2], peer: Any, example: Example, token: int | None) -> Tensor:
        """As :meth:`outputs` has them."""
        if model.net.config.phase == "generate":
            return super().peer_outputs(model, peer, example, token)
        ids = torch.tensor([example.streams[QFORMER].ids])
        given = {"pixel_values": peers.pixels_of(example), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        contrast = peer(**given, use_image_text_matching_head=False)
        matched = peer(**given, use_image_text_matching_head=True)
        rows = [contrast.image_embeds.flatten(1), contrast.text_embeds.flatten(1), matched.logits_per_image]
        return torch.cat(rows, dim=1)[0].float()


def _made(kind: Callable[..., Processor], *given: object, **options: object) -> Processor:
    """Options that do not fit are a TypeError."""
    return kind(*given, **options)


def _stretched(start: Blip2, net: Blip2) -> dict[str, Tensor]:
    """The tensors to start from; the encoder's position table is stretched where ``net`` reads larger pictures (the
    papers' fine-tuning at 364 and 490 pixels), bicubic with the class token apart, as LAVIS does."""
    tensors = dict(start.state_dict())
    old, new = start.config.vision.grid, net.config.vision.grid
    if old != new and _POSITIONS in tensors:
        tensors[_POSITIONS] = resize_positions(
            tensors[_POSITIONS].float(), (old, old), (new, new), how="hf", class_token=start.config.vision.class_token
        )
    return tensors


def _cut(own: Mapping[str, object], theirs: Mapping[str, object]) -> Mapping[str, object]:
    """The encoder to build: the part's, or the recipe's own (a published size) where it is the part's without its last
    blocks and norm. Raises ConfigError where the two differ in more than that."""
    free = ("layers", "post_norm", "pool")
    wrong = [k for k in theirs if k not in free and own.get(k) != theirs[k]]
    cut, whole = own["layers"], theirs["layers"]  # another kind of value than a number is refused where the net is made
    if wrong or (isinstance(cut, int) and isinstance(whole, int) and cut > whole):
        name = (wrong or ["layers"])[0]
        raise ConfigError(
            f"The part 'vision' has {name} {theirs[name]}, the recipe's configuration {own.get(name)}: they do not fit."
        )
    return own


def _language_of(parts: Parts) -> _Language:
    found = parts["language"]
    assert isinstance(found, _Language)  # as open_part gives it
    return found


def _language(path: str, load: Callable[[str], PartModel[Net]]) -> _Language:
    """A model folder of ours, or a transformers folder, T5 included. Raises ConfigError for a model without an LM."""
    file = Path(path) / "config.json"
    if file.is_file() and read_json(file).get("model_type") in T5_LIKE:
        config, state = read_seq2seq_folder(path)
        return _Language(config, {f"lm.{n}": t for n, t in state.items()}, open_tokenizer(path))
    model = load(path)
    return _Language(piece_of("language", model), model.net.language.state_dict(), model.processor.tokenizer)
