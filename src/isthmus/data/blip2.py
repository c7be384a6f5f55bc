"""BLIP-2's processors, one for each phase.

pairs    picture and caption            -> stream qformer: [CLS] caption [SEP], every token after [CLS] labelled
prompts  picture, maybe question/answer -> stream lm: visual places, <s>, text, end; or for an encoder-decoder
         streams encoder: visual places, prompt or prefix, </s> and decoder: start, answer or suffix, </s>;
         with a Q-Former that reads along also stream qformer: [CLS] question [SEP]
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from isthmus.batch import IGNORE
from isthmus.data.chat import OWN, chosen, form_of, with_stop
from isthmus.data.images import ImageTransform
from isthmus.data.mix import key
from isthmus.data.processor import Processor, must_fit, must_learn, pixels_of
from isthmus.data.record import Example, Part, Place, Record, Span, Text, without_answer
from isthmus.data.text import Rendered, Template, drawn, encode
from isthmus.data.tokenizer import END, Tokenizer
from isthmus.data.wordpiece import cls_id, other_specials
from isthmus.errors import ConfigError, DataError

MOST_WORDS = 50
_PUNCTUATION = re.compile(r'[.!"()*#:;~]')


def clean_caption(text: str) -> str:
    """The paper's code on captions: lower case, ``. ! " ( ) * # : ; ~`` to spaces, one space at a time, 50 words."""
    return " ".join(_PUNCTUATION.sub(" ", text.lower()).split()[:MOST_WORDS])


def clean_question(text: str) -> str:
    """LAVIS's code on questions: punctuation vanishes without a space, spaces within stay as they are, 50 words."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).rstrip(" ").split(" ")[:MOST_WORDS])


class PairProcessor(Processor):
    """Phase represent: one picture and one caption of at most ``max_text`` tokens, [CLS] and [SEP] included.

    A longer caption loses its end, [SEP] stays. ``clean`` applies :func:`clean_caption`. Raises ConfigError for a
    tokenizer without [CLS] and [DEC].
    """

    kind = "blip2-pairs"
    image: ImageTransform
    limits = ("max_text",)
    text_limit = True
    contrasts = True
    full_batches = True  # the matching head's negatives come from the batch, which must not be a remnant of few rows

    def __init__(self, tokenizer: Tokenizer, image: ImageTransform, *, max_text: int = 32, clean: bool = True) -> None:
        self.tokenizer, self.image, self.max_text, self.clean = tokenizer, image, _room(max_text), clean
        self._cls = cls_id(tokenizer)

    @property
    def forbidden_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        """What a caption never holds, besides [DEC] and [PAD]."""
        return other_specials(self.tokenizer)

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError unless the record holds one picture and a caption (a running text or an answer)."""
        _one_picture(record)
        captions = [p for p in drawn(record, draw).texts if p.role in ("text", "assistant")]
        if len(captions) != 1:
            raise DataError(
                f"bad pair: BLIP-2's first stage takes one caption a sample and this has {len(captions)}; "
                "join or split them"
            )
        span = self.text_example(str(captions[0].text)).streams["qformer"]
        labelled = Span(span.ids, [IGNORE, *span.ids[1:]])
        return self._with_picture(record, labelled)

    def text_example(self, text: str) -> Example:
        """A caption without a picture. Raises DataError when it is empty, or empty once cleaned."""
        text = clean_caption(text) if self.clean else text
        if not text.strip():
            raise DataError("empty text: the caption is empty (punctuation does not count); write one or drop it")
        return Example(id=text, source="", streams={"qformer": _bert(self.tokenizer, self._cls, text, self.max_text)})

    def prompt(self, record: Record) -> Example:
        """The picture, and [DEC] for the Q-Former to write after. A question is beyond it."""
        _one_picture(record)
        assert self.tokenizer.bos_id is not None  # checked when built
        return self._with_picture(record, Span([self.tokenizer.bos_id]))

    def _with_picture(self, record: Record, span: Span) -> Example:
        return Example(
            id=record.id,
            source=record.source,
            streams={"qformer": span},
            visuals=record.images,
            pixels=pixels_of(self.image, record.images),
        )

    def to_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "max_text": self.max_text, "clean": self.clean, "image": self.image.to_dict()}


def newline_id(tokenizer: Tokenizer) -> int | None:
    """The id that a newline ends in; none where the tokenizer drops it or has no token for it."""
    ids = tokenizer.encode("\n")
    unknown = tokenizer.specials.get("unk_token")
    return ids[-1] if ids and (unknown is None or ids[-1] != tokenizer.id_of(unknown)) else None


class PromptProcessor(Processor):
    """Phase generate: the soft prompt of ``num_tokens`` places, then text.

    Args:
        prompt: said before a caption, ``a photo of``; without one all of the caption is learnt, <s> included (a
            decoder) or split at random into the encoder's prefix and the decoder's suffix (the prefix LM).
        question: how a question is put, with one ``{}`` for it. Several turns follow each other with a space.
        end: what ends a decoder's text, ``newline`` (OPT in the paper) or ``eos``.
        max_text: tokens of text after the soft prompt, in the encoder and in the decoder each; training text that
            is longer loses its end, a prompt that is longer is an error.
        start_id: an encoder-decoder's start token; with it the streams are ``encoder`` and ``decoder``.
        qformer: the Q-Former's tokenizer where it reads the question too (InstructBLIP; fine-tuning on VQA).
        clean: captions and questions as in :func:`clean_caption` and :func:`clean_question`.
        template: ``chat`` for conversations in the chat template that the tokenizer carries, in ``question``'s place
            and with the system's text, after the soft prompt as the rest.
    """

    kind = "blip2-prompts"
    image: ImageTransform
    limits = ("max_text",)
    text_limit = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageTransform,
        *,
        num_tokens: int,
        prompt: str = "",
        question: str = "Question: {} Answer:",
        end: Literal["newline", "eos"] = "eos",
        max_text: int = 32,
        max_question: int = 128,
        start_id: int | None = None,
        qformer: Tokenizer | None = None,
        clean: bool = True,
        template: str | None = None,
    ) -> None:
        if (places := question.count("{}")) != 1:
            raise ConfigError(f"question: {question!r} has {places or 'no'} {{}} for the question and needs one")
        if end not in ("newline", "eos"):
            raise ConfigError(f"end: {end!r} is neither newline nor eos")
        if end == "newline" and newline_id(tokenizer) is None:
            raise ConfigError("end: newline ends no text, for the tokenizer has no token for one; take `end: eos`")
        self._form: Template | None = None
        self._stops: tuple[int, ...] = ()
        if template is not None:
            template, tokenizer = chosen(template, tokenizer)
            if template != OWN or start_id is not None:
                raise ConfigError(
                    f"template: BLIP-2 uses the chat template of a decoder that carries one ({OWN}), or without a "
                    f"template in the words of `question`; not in {template!r}"
                    + " with an encoder-decoder"
                    * (start_id is not None)
                )
            form = form_of(template, tokenizer)
            assert not isinstance(form, str)  # it is OWN
            self._form, self._stops = form, with_stop(form, tokenizer, ())
        self.tokenizer, self.image, self.num_tokens, self.template = tokenizer, image, num_tokens, template
        self.prompt_text, self.question, self.end, self.clean = prompt, question, end, clean
        self.max_text, self.max_question, self.start_id = _room(max_text), _room(max_question), start_id
        self.others = {} if qformer is None else {"qformer": qformer}
        self._cls = None if qformer is None else cls_id(qformer)

    @property
    def stop_ids(self) -> tuple[int, ...]:  # type: ignore[override]
        """Ids that end an answer besides end-of-sequence."""
        newline = newline_id(self.tokenizer) if self.end == "newline" else None
        return self._stops if newline is None else (newline, *self._stops)

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError without exactly one picture, with an empty text, or when nothing would be learnt."""
        _one_picture(record)
        return self._learnt(record, draw)

    def scored(self, record: Record, draw: int = 0) -> Example:
        """An example with as many pictures as a prompt may have; an encoder-decoder's caption is not split. Raises
        DataError for a caption that cleaning cuts."""
        captions = [] if any(p.role == "user" for p in record.texts) else [str(p.text) for p in record.texts if p.learn]
        if self.clean and any(len(_PUNCTUATION.sub(" ", text).split()) > MOST_WORDS for text in captions):
            raise DataError(f"{record.id} is too long: the model reads {MOST_WORDS} words of a caption; shorten it")
        return self._learnt(record, draw, split=False)

    def _learnt(self, record: Record, draw: int, *, split: bool = True) -> Example:
        said, asked = self._said(drawn(record, draw))
        if not said.learns:
            raise DataError("nothing learnt: no part of the sample is marked to be learnt; mark the answer")
        if self.start_id is None:
            streams = {"lm": self._whole(said)}
        else:
            streams = self._split(said, draw if split else None)
        return self._finish(record, streams, asked)

    def prompt(self, record: Record) -> Example:
        """Up to the place where the answer begins, without labels; a picture may be missing. Too long: DataError."""
        said, asked = self._said(drawn(record, 0), prompt=True)
        ids = encode(said, self.tokenizer).ids
        if self.start_id is not None:
            ids = [*ids[len(self.tokenizer.begin_ids) :], self.tokenizer.eos_id]
        must_fit(len(ids), self.max_text, "shorten it, or train with a larger max_length, which its last stage set")
        return self._finish(record, {"lm" if self.start_id is None else "encoder": Span(ids)}, asked)

    def _said(self, record: Record, *, prompt: bool = False) -> tuple[Rendered, str]:
        """The text with what is learnt of it, and what the Q-Former may read beside its queries."""
        out, asked = Rendered(), ""
        turns = _turns(record.texts)
        if prompt and turns and turns[-1][0].role != "user":
            turns.pop()
        spoken = any(turn[0].role == "user" for turn in turns)
        if not spoken:
            captions = [p for turn in turns for p in turn if prompt or p.learn or p.role == "assistant"]
            if not prompt and len(captions) != 1:
                raise DataError(f"bad caption: one caption a sample is due and this has {len(captions)}")
            out.write(self.prompt_text)
            if not prompt:
                text = str(captions[0].text)
                text = clean_caption(text) if self.clean else text
                self._answer(out, [(text, captions[0].learn)])
            return out, self.prompt_text
        if self._form is not None:
            return self._chatted(self._form, record, prompt)
        before, after = self.question.split("{}")  # not str.format, which reads any other brace as a field
        for turn in turns:
            said = [(str(p.text), p.learn) for p in turn]
            if turn[0].role == "user":
                text = "".join(piece for piece, _ in said)
                asked = clean_question(text) if self.clean else text.strip()
                out.write((" " if str(out) else "") + before + asked + after)
            else:
                self._answer(out, said, ends=turn is turns[-1])
        if prompt and turns[-1][0].role != "user":
            raise DataError("bad conversation: it has no question to answer; end it with a user's turn")
        return out, asked

    def _chatted(self, form: Template, record: Record, prompt: bool) -> tuple[Rendered, str]:
        """A conversation in the language model's own template; its pictures stand in front of all of it."""
        parts: list[Part] = []
        for part in (without_answer(record) if prompt else record).parts:
            if not isinstance(part, Text):
                part = Text("", role="user")
            elif self.clean and part.role == "user":
                part = Text(clean_question(str(part.text)), role="user")
            parts.append(part)
        asked = [str(p.text) for p in parts if isinstance(p, Text) and p.role == "user" and p.text]
        return form(Record(record.id, tuple(parts)), prompt), asked[-1].strip() if asked else ""

    def _answer(self, out: Rendered, said: Sequence[tuple[str, bool]], *, ends: bool = True) -> None:
        """The pieces of one answer, each with its being learnt, without white space at either end of the answer."""
        filled = [n for n, (text, _) in enumerate(said) if text.strip()]
        if not filled:
            raise DataError("empty answer: the caption or answer is empty; write one or drop the sample")
        gap = " " if str(out) else ""
        for n in range(filled[0], filled[-1] + 1):
            text, learn = said[n]
            text = gap + text.lstrip() if n == filled[0] else text
            out.write(text.rstrip() if n == filled[-1] else text, learn=learn)
        if ends:
            end = "\n" if self.end == "newline" and self.start_id is None else END
            out.write(end, learn=said[filled[-1]][1])

    def _whole(self, said: Rendered) -> Span:
        """A decoder's text. Where nothing was said before it, its <s> is a target too (the paper's code)."""
        encoded = encode(said, self.tokenizer)
        labels = list(encoded.labels)
        if said.chunks[0].spans[0][0] == 0:
            labels[: len(self.tokenizer.begin_ids)] = self.tokenizer.begin_ids
        span = Span(encoded.ids[: self.max_text], labels[: self.max_text])
        must_learn(span, self.max_text, said.learns)
        return span

    def _split(self, said: Rendered, draw: int | None) -> dict[str, Span]:
        """Encoder and decoder of a T5: what is said and what is learnt, or with a ``draw`` a caption cut at random."""
        encoded = encode(said, self.tokenizer)
        skip = len(self.tokenizer.begin_ids)
        ids, labels = encoded.ids[skip:], encoded.labels[skip:]
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        if any(label == IGNORE for label in labels[first:]):
            raise DataError("several answers: an encoder-decoder learns the last one only; unmark the others")
        if first == 0 and draw is not None:
            # No prefix is longer than the encoder reads: a caption that is too long loses its end, not its middle.
            first = key("split", draw) % max(1, min(len(ids) - 1, self.max_text))
        assert self.start_id is not None
        before = [*ids[:first][: self.max_text - 1], self.tokenizer.eos_id]
        after = ids[first:][: self.max_text - 1]
        return {"encoder": Span(before), "decoder": Span([self.start_id, *after], [IGNORE, *after])}

    def _finish(self, record: Record, streams: dict[str, Span], asked: str) -> Example:
        """Put the visual places in front, and the Q-Former's text beside."""
        name = next(iter(streams))
        front = self.num_tokens * len(record.images)
        span = streams[name]
        labels = None if span.labels is None else [IGNORE] * front + span.labels
        streams = {**streams, name: Span([self.tokenizer.pad_id] * front + span.ids, labels)}
        if self._cls is not None:
            streams["qformer"] = _bert(self.others["qformer"], self._cls, asked, self.max_question, keep_end=True)
        places = [Place(n, name, n * self.num_tokens, self.num_tokens) for n in range(len(record.images))]
        return Example(
            id=record.id,
            source=record.source,
            streams=streams,
            visuals=record.images,
            pixels=pixels_of(self.image, record.images),
            keyed=False,
            places=tuple(places),
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "num_tokens": self.num_tokens,
            "prompt": self.prompt_text,
            "question": self.question,
            "end": self.end,
            "max_text": self.max_text,
            "max_question": self.max_question,
            "start_id": self.start_id,
            "clean": self.clean,
            "template": self.template,
            "image": self.image.to_dict(),
        }


def _bert(tokenizer: Tokenizer, cls: int, text: str, longest: int, *, keep_end: bool = False) -> Span:
    """[CLS] text [SEP]; what is over ``longest`` is lost at the end, or with ``keep_end`` at the beginning."""
    ids = tokenizer.encode(text)
    room = longest - 2
    kept = ids[-room:] if keep_end and len(ids) > room else ids[:room]
    return Span([cls, *kept, tokenizer.eos_id])


def _turns(texts: Sequence[Text]) -> list[list[Text]]:
    """The parts of one speaker in a row together, whatever pictures stand between them; the system says nothing."""
    return [list(turn) for _, turn in groupby((p for p in texts if p.role != "system"), lambda part: part.role)]


def _one_picture(record: Record) -> None:
    if len(record.images) != 1:
        raise DataError(
            f"bad pair: BLIP-2 is trained on one picture a sample and this has {len(record.images)}; split the sample"
        )


def _room(tokens: int) -> int:
    if tokens < 3:
        raise ConfigError(f"a text needs room for at least 3 tokens, not {tokens}")
    return tokens


PROCESSORS = {PairProcessor.kind: PairProcessor, PromptProcessor.kind: PromptProcessor}
