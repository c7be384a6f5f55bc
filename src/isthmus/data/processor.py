"""Processors: a Record to an Example, for one system and one stage. They never need the net.

A processor is saved as ``processor.json`` in a model folder, its tokenizer beside it. ``example(record, draw)``
makes a training sample, ``draw`` choosing among alternative texts; ``prompt(record)`` makes what a model continues
or embeds, without labels.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Self

from torch import Tensor

from isthmus.batch import IGNORE
from isthmus.data.chat import OWN, chosen, form_of, with_stop
from isthmus.data.images import ImageTransform, image_size
from isthmus.data.record import Example, Image, Place, Record, Span
from isthmus.data.text import TEMPLATES, Encoded, drawn, encode, render
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, ConfigError, DataError, nearest
from isthmus.nn.tiles import num_tokens


class Processor:
    """What loaders, evaluation and serving see of a processor, with a default for all that one may lack."""

    kind: ClassVar[str]
    """Its name in ``processor.json``."""
    contrasts: ClassVar[bool] = False
    """Whether a batch's samples are each other's negatives, so that like lengths must not meet on purpose."""
    full_batches: ClassVar[bool] = False
    """Whether a batch of fewer rows, at an epoch's end, is left out."""
    limits: ClassVar[tuple[str, ...]] = ()
    """Its attributes that cut training samples or refuse prompts; the first is its length in tokens."""
    text_limit: ClassVar[bool] = False
    """Whether that length leaves the visual places out."""

    tokenizer: Tokenizer
    others: Mapping[str, Tokenizer] = MappingProxyType({})
    """Further tokenizers by option name."""
    image: ImageTransform | None = None
    """None: it reads no pictures."""
    template: str | None = None
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer besides end-of-sequence."""
    forbidden_ids: tuple[int, ...] = ()
    """Special ids that an answer never holds."""

    def example(self, record: Record, draw: int) -> Example:
        """A training sample. Raises DataError for a record that does not fit."""
        raise NotImplementedError

    def prompt(self, record: Record) -> Example:
        """What a model continues or embeds, without labels. Raises DataError for a record that does not fit."""
        raise NotImplementedError

    def scored(self, record: Record, draw: int = 0) -> Example:
        """An example for the score of its answer, where that may be another than a training sample."""
        return self.example(record, draw)

    def text_example(self, text: str) -> Example:
        """A text alone, for its embedding."""
        raise CapabilityError(f"A processor of kind {self.kind!r} lays out no text for embedding.")

    def uncut(self) -> Self:
        """The same without its limits."""
        found = copy(self)
        for limit in self.limits:
            setattr(found, limit, sys.maxsize)
        return found

    def to_dict(self) -> dict[str, object]:
        """What a model folder keeps of it beside its tokenizers."""
        raise NotImplementedError


class ContrastiveProcessor(Processor):
    """One picture and one caption (stream ``text``): bos where the tokenizer has one (CLIP's, not SigLIP's), ids, eos.

    An over-long caption keeps its first ``context`` tokens, the last of them overwritten by eos (CLIP).
    """

    kind = "contrastive"
    contrasts = True
    image: ImageTransform

    def __init__(self, tokenizer: Tokenizer, image: ImageTransform, *, context: int = 77) -> None:
        self.tokenizer, self.image, self.context = tokenizer, image, _context(context)

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError unless the record holds one picture and a caption (a running text or an answer)."""
        if len(record.images) != 1:
            raise DataError(
                f"bad pair: contrastive training takes one picture a sample and this has "
                f"{len(record.images)}; split the sample"
            )
        captions = [p for p in drawn(record, draw).texts if p.role in ("text", "assistant")]
        if len(captions) != 1:
            raise DataError(
                f"bad pair: contrastive training takes one caption a sample and this has {len(captions)}; "
                "join or split them"
            )
        example = self.text_example(str(captions[0].text))
        return replace(
            example,
            id=record.id,
            source=record.source,
            visuals=record.images,
            pixels=pixels_of(self.image, record.images),
        )

    def text_example(self, text: str) -> Example:
        """A caption without a picture, for embedding texts. Raises DataError when it is empty."""
        return _caption(text, self.tokenizer, self.context)

    def prompt(self, record: Record) -> Example:
        """The pair itself, first alternative: embedding has nothing to leave out."""
        return self.example(record, 0)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "context": self.context, "image": self.image.to_dict()}


class TextsProcessor(Processor):
    """Texts alone for a text tower (stream ``text``), as :class:`ContrastiveProcessor` reads a caption."""

    kind = "texts"

    def __init__(self, tokenizer: Tokenizer, *, context: int = 77) -> None:
        self.tokenizer, self.context = tokenizer, _context(context)

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError unless the record holds one text and no picture."""
        texts = drawn(record, draw).texts
        if record.images or len(texts) != 1:
            raise DataError(
                f"bad text: a text tower reads one text and no picture; this sample has {len(texts)} and "
                f"{len(record.images)}"
            )
        return replace(self.text_example(str(texts[0].text)), id=record.id, source=record.source)

    def text_example(self, text: str) -> Example:
        """Raises DataError when the text is empty."""
        return _caption(text, self.tokenizer, self.context)

    def prompt(self, record: Record) -> Example:
        """The text itself: embedding has nothing to leave out."""
        return self.example(record, 0)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "context": self.context}


class ImagesProcessor(Processor):
    """Pictures alone for a vision tower, which has no text stream."""

    kind = "images"
    image: ImageTransform

    def __init__(self, image: ImageTransform) -> None:
        self.image = image

    @property
    def tokenizer(self) -> Tokenizer:  # type: ignore[override]
        raise CapabilityError("an image encoder reads no text, so it has no tokenizer")

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError unless the record holds one picture."""
        if len(record.images) != 1:
            raise DataError(
                f"bad picture: an image encoder reads one picture a sample and this has {len(record.images)}"
            )
        return Example(
            id=record.id,
            source=record.source,
            streams={},
            visuals=record.images,
            pixels=pixels_of(self.image, record.images),
            keyed=False,
        )

    def prompt(self, record: Record) -> Example:
        """The picture itself."""
        return self.example(record, 0)

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "image": self.image.to_dict()}


class SpliceProcessor(Processor):
    """Conversations with pictures for a decoder that takes visual tokens in its sequence (stream ``lm``).

    Args:
        num_tokens: visual tokens a picture takes, from the connector for this transform's fixed size; of image mode
            ``anyres`` those of one view, a square number; of ``aspect`` one number for each of the transform's shapes,
            ``{"64x48": 12, ...}``, height first.
        template: one of :data:`isthmus.data.text.TEMPLATES`, or ``chat``, the one that the tokenizer carries, with its
            switches after a colon: ``chat:enable_thinking=false``.
        max_length: tokens after widening; what is over is cut off, never through a picture.
        around: names of the tokens before and after each picture, for models trained with such.
        stop_ids: ids that end an answer besides end-of-sequence.
    """

    kind = "splice"
    image: ImageTransform
    template: str
    limits = ("max_length",)

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageTransform,
        *,
        num_tokens: int | Mapping[str, int],
        template: str = "vicuna_v1",
        max_length: int = 2048,
        around: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> None:
        template, tokenizer = chosen(template, tokenizer)
        _check(template, max_length)
        if len(around) not in (0, 2):
            raise ConfigError(f"around is a token before each picture and one after it, not {list(around)}")
        _check_counts(num_tokens, image)
        self.tokenizer, self.image = tokenizer, image
        self.num_tokens, self.template, self.max_length = num_tokens, template, max_length
        self._form = form_of(template, tokenizer)
        self.around, self.stop_ids = tuple(around), with_stop(self._form, tokenizer, stop_ids)
        self._before, self._after = [tokenizer.id_of(t) for t in around[:1]], [tokenizer.id_of(t) for t in around[1:]]

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError when the record does not fit the template or nothing of it would be learnt."""
        rendered = render(record, self._form, draw=draw)
        example = self._widen(record, encode(rendered, self.tokenizer), rendered.images)
        must_learn(example.streams["lm"], self.max_length, rendered.learns)
        return example

    def prompt(self, record: Record) -> Example:
        """Up to the place where the answer begins, without labels. Raises DataError when it is too long or empty."""
        rendered = render(record, self._form, prompt=True)
        encoded = encode(rendered, self.tokenizer)
        if not encoded.ids and not rendered.images:
            raise DataError(
                f"empty prompt: the template {self.template!r} leaves out what is asked, and no picture is shown; ask "
                "in another one (template='chat', on the command line --template chat, is the language model's own)"
            )
        visual = sum(self._measured(rendered.images)[0]) + len(self.around) * len(rendered.images)
        must_fit(len(encoded.ids) + visual, self.max_length)
        example = self._widen(record, encoded, rendered.images)
        return replace(example, streams={"lm": Span(example.streams["lm"].ids)})

    def _measured(self, images: Sequence[Image]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """Tokens of each picture, and where a net must know it its size, read from its header."""
        if not isinstance(self.num_tokens, int):
            shapes = [self.image.shape(*image_size(image.source)) for image in images]
            return [self.num_tokens[shape_name(shape)] for shape in shapes], ()
        if self.image.mode != "anyres":
            return [self.num_tokens] * len(images), ()
        sizes = tuple(image_size(image.source) for image in images)
        side = math.isqrt(self.num_tokens)
        return [num_tokens(s, self.image.pinpoints, tile=self.image.size, side=side) for s in sizes], sizes

    def _widen(self, record: Record, encoded: Encoded, images: Sequence[Image]) -> Example:
        """Put each picture's number of sentinels (the pad id, never learnt) at its mark, then cut to ``max_length``."""
        counts, sizes = self._measured(images)
        ids: list[int] = []
        labels: list[int] = []
        places: list[Place] = []
        end = self.max_length
        # The marks cut the text into pieces: text, picture 0, text, picture 1, ... The first piece has no picture
        # before it, so its number is -1.
        for visual, (start, stop) in enumerate(
            zip([0, *encoded.marks], [*encoded.marks, len(encoded.ids)], strict=True), start=-1
        ):
            if visual >= 0:
                count = counts[visual]
                if len(ids) + count + len(self.around) > self.max_length:  # a cut never goes through a picture
                    end = min(end, len(ids))
                    break
                places.append(Place(visual, "lm", len(ids) + len(self._before), count))
                ids += [*self._before, *[self.tokenizer.pad_id] * count, *self._after]
                labels += [IGNORE] * (count + len(self.around))
            ids += encoded.ids[start:stop]
            labels += encoded.labels[start:stop]
        kept = tuple(images[: len(places)])
        return Example(
            id=record.id,
            source=record.source,
            streams={"lm": Span(ids[:end], labels[:end])},
            visuals=kept,
            pixels=pixels_of(self.image, kept),
            keyed=False,
            places=tuple(places),
            sizes=sizes[: len(places)],
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "template": self.template,
            "max_length": self.max_length,
            "num_tokens": self.num_tokens if isinstance(self.num_tokens, int) else dict(self.num_tokens),
            **({"around": list(self.around)} if self.around else {}),
            **({"stop_ids": list(self.stop_ids)} if self.stop_ids else {}),
            "image": self.image.to_dict(),
        }


def shape_name(shape: tuple[int, int]) -> str:
    """Height and width in pixels as ``64x48``."""
    return f"{shape[0]}x{shape[1]}"


def _check_counts(num_tokens: int | Mapping[str, int], image: ImageTransform) -> None:
    """Raises ConfigError for numbers of visual tokens that do not fit how pictures are read."""
    if isinstance(num_tokens, int):
        if num_tokens < 1:
            raise ConfigError(f"a picture takes at least one visual token, not {num_tokens}")
        if image.mode == "anyres" and math.isqrt(num_tokens) ** 2 != num_tokens:
            raise ConfigError(f"the views of image mode anyres make square maps of tokens, not {num_tokens}")
    elif missing := [name for shape in image.shapes if (name := shape_name(shape)) not in num_tokens]:
        raise ConfigError(f"num_tokens must name every shape of a picture; {missing[0]} is missing")
    elif few := [name for name, count in num_tokens.items() if count < 1]:
        raise ConfigError(
            f"a picture takes at least one visual token, and one of {few[0]} pixels would take {num_tokens[few[0]]}; "
            "with a larger image.patch no side is smaller than that"
        )


class TextProcessor(Processor):
    """Text for a language model without eyes (stream ``lm``): running text, or conversations in ``template``.

    ``chat`` is the template that the tokenizer carries.

    ``stop_ids`` end an answer besides end-of-sequence.
    """

    kind = "text"
    limits = ("max_length",)

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: str = "document",
        max_length: int = 2048,
        stop_ids: Sequence[int] = (),
    ) -> None:
        template, tokenizer = chosen(template, tokenizer)
        _check(template, max_length)
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self._form = form_of(template, tokenizer)
        self.stop_ids = with_stop(self._form, tokenizer, stop_ids)

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError when the record holds a picture, does not fit the template, or teaches nothing."""
        encoded, learns = self._encode(record, draw, prompt=False)
        span = Span(encoded.ids[: self.max_length], encoded.labels[: self.max_length])
        must_learn(span, self.max_length, learns)
        return Example(id=record.id, source=record.source, streams={"lm": span})

    def prompt(self, record: Record) -> Example:
        """Up to the place where the answer begins, without labels. Raises DataError when it is too long."""
        encoded, _ = self._encode(record, 0, prompt=True)
        must_fit(len(encoded.ids), self.max_length)
        return Example(id=record.id, source=record.source, streams={"lm": Span(encoded.ids)})

    def _encode(self, record: Record, draw: int, *, prompt: bool) -> tuple[Encoded, bool]:
        if record.images:
            raise DataError(
                "picture without eyes: this model reads only text and the sample holds a picture; "
                "take the picture out or use a model with a vision encoder"
            )
        rendered = render(record, self._form, draw=draw, prompt=prompt)
        return encode(rendered, self.tokenizer), rendered.learns

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "template": self.template,
            "max_length": self.max_length,
            **({"stop_ids": list(self.stop_ids)} if self.stop_ids else {}),
        }


def _context(context: int) -> int:
    if context < 2:
        raise ConfigError(f"context must be at least 2 tokens (start and end of text), not {context}")
    return context


def _caption(text: str, tokenizer: Tokenizer, context: int) -> Example:
    if not text.strip():
        raise DataError("empty text: the caption is empty; write one or drop the sample")
    ids = [*tokenizer.begin_ids, *tokenizer.encode(text), tokenizer.eos_id]
    if len(ids) > context:
        ids = [*ids[: context - 1], tokenizer.eos_id]
    return Example(id=text, source="", streams={"text": Span(ids)})


def pixels_of(transform: ImageTransform, images: Sequence[Image]) -> tuple[Callable[[Image], Tensor], ...]:
    """What decodes each picture, called with it."""
    return (transform,) * len(images)


def _check(template: str, max_length: int) -> None:
    if template not in (*TEMPLATES, OWN):
        raise ConfigError(f"unknown template {template!r}; {nearest(template, (*TEMPLATES, OWN))}")
    if max_length < 2:
        raise ConfigError(f"max_length must be at least 2 tokens, not {max_length}")


def must_learn(span: Span, max_length: int, learns: bool) -> None:
    """Raises DataError for a span without a target; ``learns``: the uncut text had one."""
    # Position 0 is never predicted, so a label there teaches nothing.
    if span.labels is None or all(label == IGNORE for label in span.labels[1:]):
        why = (
            f"the first {max_length} tokens hold no token to be learnt; raise max_length or shorten the sample"
            if learns
            else "no part of the sample is marked to be learnt; mark the answer"
        )
        raise DataError(f"nothing learnt: {why}")


def must_fit(length: int, max_length: int, do: str = "shorten it") -> None:
    """Raises DataError for a prompt that is too long."""
    if length > max_length:
        raise DataError(f"prompt too long: it takes {length} tokens and the model reads {max_length}; {do}")


def tokenizer_files(processor: Processor) -> dict[str, str]:
    """The tokenizer's files, where the processor reads text; those of further ones each in a folder of its name."""
    own = {} if isinstance(processor, ImagesProcessor) else processor.tokenizer.files()
    return own | {
        f"{name}/{file}": text for name, tok in processor.others.items() for file, text in tok.files().items()
    }
