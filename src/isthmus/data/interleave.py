"""InterleaveProcessor: text with pictures among it, for a decoder that attends to them by cross-attention.

    <image>a red cube<|endofchunk|></s>                                            a caption pair, a web document
    <image>Question: what? Answer: a cube<|endofchunk|><image>Question: … Answer:  shots, and the question to answer

A picture or clip takes one token, ``<image>``; ``<|endofchunk|>`` ends what is said about it (2204.14198, fig. 8). Ids,
labels and the number of the picture that each token sees are built together, piece by piece: nothing is searched for.
In the language model's own chat template turns are the template's, and end as it ends them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from isthmus.batch import IGNORE
from isthmus.data.chat import OWN, chosen, form_of, with_stop
from isthmus.data.images import ImageTransform
from isthmus.data.mix import key
from isthmus.data.processor import Processor, pixels_of
from isthmus.data.record import Example, Image, Part, Place, Record, Role, Span, Text, without_answer
from isthmus.data.text import Chunk, Template, drawn, encode_chunk
from isthmus.data.tokenizer import END, PLACE, Tokenizer
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.nn.gated import Media, media_index

IMAGE_TOKEN = "<image>"
END_TOKEN = "<|endofchunk|>"
NEW_TOKENS = (END_TOKEN, IMAGE_TOKEN)
"""In the order in which OpenFlamingo adds them to a vocabulary; another vocabulary may name them otherwise."""


@dataclass(frozen=True, slots=True)
class Style:
    """The words around questions, answers and captions.

    ``between`` stands after each finished shot, ``user`` before the pictures of a question.
    """

    question: str
    answer: str
    caption: str
    space: str
    between: str
    user: str = ""


STYLES = {
    "paper": Style(question="Question: ", answer=" Answer:", caption="Output:", space=" ", between=""),
    "open_flamingo": Style(question="Question:", answer=" Short answer:", caption="Output:", space="", between="\n"),
    "idefics": Style(question="", answer="\nAssistant:", caption="\nAssistant:", space=" ", between="\n", user="User:"),
    "bare": Style(question="", answer="", caption="", space=" ", between=""),
}
"""2204.14198, appendix B.2; open_flamingo 2.0.1's evaluation; IDEFICS-instruct's; ours, nothing but what was said."""


class InterleaveProcessor(Processor):
    """Records of any order of text and pictures to stream ``lm``.

    Running text is a document: ``<|endofchunk|>`` before each picture that follows text, and at its end. Turns of user
    and assistant are shots or a conversation: ``<image>Question: q Answer: a<|endofchunk|>``, or, when the user shows a
    picture and says nothing, ``<image>Output: caption<|endofchunk|>``.

    Args:
        max_length: tokens. A longer document is read through a window at a place drawn at random, which
            holds a picture if the document does; a longer conversation loses its end.
        max_images: most visuals of a document; a window ends before the next one.
        template: ``paper``, ``open_flamingo``, ``idefics`` or ``bare``, one of STYLES; or ``chat``, the one that the
            tokenizer carries.
        p_next: how often a document's text is paired with the picture after it instead of the one before (training).
        space: how often a caption pair gets a space before its text (training; ½ in the paper).
        blind: whether a document's text before its first picture is learnt (not so in OpenFlamingo).
        tokens: the names of the token that ends a chunk, of a picture's, and of one that ends every turn if there is
            such a one (IDEFICS-instruct); without it the first ends an answer.
        around: whether the former stands on both sides of each picture (IDEFICS), and so not after the last text.
    """

    kind = "interleave"
    image: ImageTransform
    template: str
    limits = ("max_length", "max_images")

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageTransform,
        *,
        max_length: int = 256,
        max_images: int = 5,
        template: str = "paper",
        p_next: float = 0.0,
        space: float = 0.0,
        blind: bool = True,
        tokens: Sequence[str] = NEW_TOKENS,
        around: bool = False,
    ) -> None:
        template, tokenizer = chosen(template, tokenizer)
        if template not in (*STYLES, OWN):
            raise ConfigError(f"unknown template {template!r}; {nearest(template, (*STYLES, OWN))}")
        if max_length < 2 or max_images < 1:
            raise ConfigError(f"max_length must be at least 2 and max_images at least 1: {max_length}, {max_images}")
        for name, share in (("p_next", p_next), ("space", space)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, not {share}")
        self.tokenizer, self.image, self.template = tokenizer, image, template
        self.max_length, self.max_images = max_length, max_images
        self.p_next, self.space, self.blind = p_next, space, blind
        self.tokens, self.around = tuple(tokens), around
        self.end_id, self.image_id, *turn = (tokenizer.id_of(token) for token in self.tokens)
        self.turn_id = turn[0] if turn else None
        form = form_of(template, tokenizer)
        self._form = None if isinstance(form, str) else form
        self.stop_ids = with_stop(form, tokenizer, ())

    def example(self, record: Record, draw: int = 0) -> Example:
        """Raises DataError when the record does not fit, or nothing of it would be learnt."""
        complete, document = drawn(record, draw), _is_document(record)
        line = self._document(complete, False, draw) if document else self._spoken(complete, False)
        ids, labels, visuals, places = line.encode()
        if document:
            ids, labels, visuals, places = self._window(ids, labels, visuals, places, draw)
            if not self.blind and places:
                labels = [IGNORE] * places[0] + labels[places[0] :]
        else:
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            places = [p for p in places if p < self.max_length]
        if all(label == IGNORE for label in labels[1:]):
            raise DataError(
                f"nothing learnt: the {len(ids)} tokens read of the sample hold none to be learnt; mark the answer, "
                "raise max_length or shorten the sample"
            )
        page = document and not _is_pair(record)
        ahead = page and key("next", draw) < self.p_next * 2**64
        return self._example(record, ids, labels, visuals[: len(places)], places, "next" if ahead else "previous")

    def prompt(self, record: Record) -> Example:
        """Up to the place where the answer begins, without labels. Raises DataError when it is too long."""
        prompt_record = drawn(without_answer(record), 0)
        line = self._document(prompt_record, True, 0) if _is_document(record) else self._spoken(prompt_record, True)
        ids, _, visuals, places = line.encode()
        if len(ids) > self.max_length:
            raise DataError(
                f"prompt too long: it takes {len(ids)} tokens and the model reads {self.max_length}; shorten it"
            )
        return self._example(record, ids, None, visuals, places, "previous")

    def _document(self, record: Record, prompt: bool, draw: int) -> "_Line":
        line, learn = _Line(self), False
        pair = _is_pair(record)
        for number, part in enumerate(record.parts):
            if isinstance(part, Image):
                if line.open:
                    line.token(self.end_id, learn)
                line.place(part)
                continue
            text, learn = str(part.text), part.learn and not prompt
            neighbours = [record.parts[i] for i in (number - 1, number + 1) if 0 <= i < len(record.parts)]
            if number == 0 or isinstance(neighbours[0], Image):
                text = text.lstrip()
            if number + 1 == len(record.parts) or isinstance(neighbours[-1], Image):
                text = text.rstrip()
            spaced = pair and not prompt and key("space", draw) < self.space * 2**64
            line.write(f" {text}" if spaced else text, learn)
        if not prompt:
            if not any(str(p.text).strip() for p in record.texts):
                raise DataError("empty text: the document holds no text; drop the sample")
            line.close(learn)
        return line

    def _spoken(self, record: Record, prompt: bool) -> "_Line":
        """A conversation, or shots: in the language model's own template or in a style."""
        return self._turns(record, prompt) if self._form is None else self._chat(self._form, record, prompt)

    def _chat(self, form: Template, record: Record, prompt: bool) -> "_Line":
        line, rendered = _Line(self), form(record, prompt)
        line.begun = rendered.begun
        for number, chunk in enumerate(rendered.chunks):
            if number:
                line.place(rendered.images[number - 1])
            if chunk.text:
                line.pieces.append(chunk)
        return line

    def _turns(self, record: Record, prompt: bool) -> "_Line":
        style, line = STYLES[self.template], _Line(self)
        turns = _by_speaker(record.parts)
        for number, (role, parts) in enumerate(turns):
            text = "".join(str(p.text) for p in parts if isinstance(p, Text))
            learn = any(isinstance(p, Text) and p.learn for p in parts) and not prompt
            if role == "system":
                line.write(text, False)
            elif role == "user":
                line.write(style.between if number and turns[number - 1][0] == "assistant" else "", False)
                first = next((i for i, p in enumerate(parts) if isinstance(p, Text)), len(parts))
                line.write(f"{style.user} " if style.user and not first else style.user, False)
                for part in parts[:first]:
                    line.place(part)  # type: ignore[arg-type]
                line.write(style.question if text.strip() else "", False)
                for part in parts[first:]:
                    line.write(str(part.text), False) if isinstance(part, Text) else line.place(part)
                if self.turn_id is not None:
                    line.token(self.turn_id, False)
                line.write(style.answer if text.strip() else style.caption, False)
            else:
                if not text.strip():
                    raise DataError("empty answer: a turn of the assistant says nothing; write an answer or drop it")
                if any(isinstance(p, Image) for p in parts):
                    raise DataError("bad conversation: a picture stands in the assistant's turn; only users show them")
                line.write(f"{style.space}{text}", learn)
                line.token(self.end_id if self.turn_id is None else self.turn_id, learn)
        last = turns[-1][0] if turns else "nobody"
        if last != ("user" if prompt else "assistant"):
            raise DataError(
                f"bad conversation: it ends with a turn of the {last}; "
                + ("end it with a question" if prompt else "add the answer to be learnt")
            )
        if not prompt:
            line.write(END, bool(line.learnt))
        return line

    def _window(
        self, ids: list[int], labels: list[int], visuals: Sequence[Image], places: list[int], draw: int
    ) -> tuple[list[int], list[int], list[Image], list[int]]:
        """At most max_length tokens from a place drawn at random, cut before the picture that is one too many."""
        start = self._start(labels, places, draw)
        end = start + self.max_length
        inside = [n for n, place in enumerate(places) if start <= place < end]
        if len(inside) > self.max_images:
            end = places[inside[self.max_images]]
            inside = inside[: self.max_images]
        kept = [places[n] - start for n in inside]
        return ids[start:end], labels[start:end], [visuals[n] for n in inside], kept

    def _start(self, labels: list[int], places: list[int], draw: int) -> int:
        """Where the window begins: drawn among the places that let it hold a picture, if the document does.

        It also holds something to be learnt: anywhere, or after its first picture where ``blind`` is off.
        """
        spare = len(labels) - self.max_length
        if spare <= 0:
            return 0
        after = [len(labels)] * len(labels)  # the next place to be learnt after each
        for i in range(len(labels) - 2, -1, -1):
            after[i] = after[i + 1] if labels[i + 1] == IGNORE else i + 1
        starts: list[int] = []
        first = 0
        for start in range(spare + 1 if places else 0):
            first += places[first] < start
            if first == len(places):
                break
            cut = places[first + self.max_images] if first + self.max_images < len(places) else len(labels)
            learnt = after[start if self.blind else places[first]]
            if max(places[first], learnt) < min(start + self.max_length, cut):
                starts.append(start)
        number = key("window", draw)
        return starts[number % len(starts)] if starts else number % (spare + 1)

    def _example(
        self,
        record: Record,
        ids: list[int],
        labels: list[int] | None,
        visuals: Sequence[Image],
        places: Sequence[int],
        mode: Media,
    ) -> Example:
        tags = torch.zeros(1, len(ids), dtype=torch.bool)
        tags[0, list(places)] = True
        index = media_index(tags, mode=mode)[0].tolist()
        return Example(
            id=record.id,
            source=record.source,
            streams={"lm": Span(ids, labels, index)},
            visuals=tuple(visuals),
            pixels=pixels_of(self.image, visuals),
            keyed=False,
            places=tuple(Place(n, "lm", place, 1) for n, place in enumerate(places)),
        )

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "template": self.template,
            "max_length": self.max_length,
            "max_images": self.max_images,
            "p_next": self.p_next,
            "space": self.space,
            "blind": self.blind,
            "tokens": list(self.tokens),
            "around": self.around,
            "image": self.image.to_dict(),
        }


class _Line:
    """Pieces in order: chunks of text, pictures, and single tokens with whether they are learnt."""

    def __init__(self, processor: InterleaveProcessor) -> None:
        self.processor = processor
        self.pieces: list[Chunk | Image | tuple[int, bool]] = []
        self.learnt = self.begun = False

    @property
    def open(self) -> bool:
        """Does text stand after the last picture or token?"""
        return bool(self.pieces) and isinstance(self.pieces[-1], Chunk)

    def write(self, text: str, learn: bool) -> None:
        if not text:
            return
        if not self.open:
            self.pieces.append(Chunk())
        chunk = self.pieces[-1]
        assert isinstance(chunk, Chunk)
        start = len(chunk.text)
        chunk.text += text
        self.learnt |= learn
        if learn and chunk.spans and chunk.spans[-1][1] == start:
            start = chunk.spans.pop()[0]
        if learn:
            chunk.spans.append((start, len(chunk.text)))

    def place(self, image: Image) -> None:
        if not self.processor.around:
            self.pieces.append(image)
            return
        end = self.processor.end_id
        ended = bool(self.pieces) and isinstance(last := self.pieces[-1], tuple) and last[0] == end
        self.pieces += [*([] if ended else [(end, False)]), image, (end, False)]

    def token(self, token: int, learn: bool) -> None:
        self.pieces.append((token, learn))

    def close(self, learn: bool) -> None:
        """``<|endofchunk|></s>``."""
        if not self.processor.around:
            self.token(self.processor.end_id, learn)
        self.write(END, learn)

    def encode(self) -> tuple[list[int], list[int], list[Image], list[int]]:
        """Ids with beginning-of-sequence at the front, unless what is said begins itself (``begun``), labels, visuals,
        and the positions of their tags."""
        tokenizer, image_id = self.processor.tokenizer, self.processor.image_id
        if tokenizer.whole:
            return self._encode_whole()
        ids = [] if self.begun else list(tokenizer.begin_ids)
        labels = [IGNORE] * len(ids)
        visuals: list[Image] = []
        places: list[int] = []
        for piece in self.pieces:
            if isinstance(piece, Chunk):
                found, learnt = encode_chunk(piece, tokenizer)
                ids += found
                labels += learnt
            elif isinstance(piece, Image):
                visuals.append(piece)
                places.append(len(ids))
                ids.append(image_id)
                labels.append(IGNORE)
            else:
                token, learn = piece
                ids.append(token)
                labels.append(token if learn else IGNORE)
        return ids, labels, visuals, places

    def _encode_whole(self) -> tuple[list[int], list[int], list[Image], list[int]]:
        """The same of one text in which characters stand for the tokens, its beginning's among them."""
        tokenizer = self.processor.tokenizer
        line = Chunk("" if self.begun else "".join(map(tokenizer.stand_in, tokenizer.begins)))
        for piece in self.pieces:
            start = len(line.text)
            if isinstance(piece, Chunk):
                line.text += piece.text
                line.spans += [(start + first, start + last) for first, last in piece.spans]
            elif isinstance(piece, Image):
                line.text += PLACE
            else:
                line.text += tokenizer.stand_in(str(tokenizer.backend.id_to_token(piece[0])))
                line.spans += [(start, start + 1)] if piece[1] else []
        ids, labels = encode_chunk(line, tokenizer)
        places = [number for number, token in enumerate(ids) if token == tokenizer.place_id]
        for number in places:
            ids[number] = self.processor.image_id
        return ids, labels, [piece for piece in self.pieces if isinstance(piece, Image)], places


def hateful_memes(image: Image, written: str, answer: str = "") -> tuple[Part, ...]:
    """The paper's form of a HatefulMemes shot, or with no ``answer`` its query; parts of a document."""
    question = Text(f'is an image with written: "{written}" on it. Is it hateful? Answer:')
    return (replace(image, role="text"), question, *((Text(f" {answer}", learn=True),) if answer else ()))


def _is_document(record: Record) -> bool:
    """Running text, or nothing but pictures the user did not ask about."""
    return not any(p.role in ("user", "assistant") for p in record.texts) and all(
        p.role == "text" or record.texts for p in record.images
    )


def _is_pair(record: Record) -> bool:
    return len(record.images) == 1 and len(record.texts) == 1


def _by_speaker(parts: Sequence[Part]) -> list[tuple[Role, list[Part]]]:
    """Parts of one speaker in a row together; running text and its pictures are the user's."""
    turns: list[tuple[Role, list[Part]]] = []
    for part in parts:
        role: Role = "user" if part.role == "text" else part.role
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].append(part)
    return turns
