"""From a record to tokens: conversation templates, and labels that are known by construction.

A template renders a record to chunks of text with pictures between them. Every chunk knows, while it is put
together, which of its characters are to be learnt; it is then tokenised as one string and a token is supervised iff
its characters lie within such a span. Nothing is ever searched for in the rendered string, so an answer may contain
anything, even ``ASSISTANT:``. Chunks are tokenised apart, as the published models saw them (LLaVA, arXiv:2310.03744),
unless the tokenizer is one of a folder of transformers, where a text with its pictures is tokenised as one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from isthmus.batch import IGNORE
from isthmus.data.record import Image, Record, Role, Text, without_answer
from isthmus.data.tokenizer import END, PLACE, RESERVED, Tokenizer
from isthmus.errors import ConfigError, DataError, nearest

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAVA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


@dataclass(slots=True)
class Chunk:
    """Text between two pictures. ``spans`` are the character ranges [start, end) to be learnt."""

    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)


class Rendered:
    """A rendered record: chunk, picture, chunk, picture, …, chunk. There is one picture fewer than chunks.

    ``shown`` are the characters that stand for special tokens, with their names; ``begun``: the template writes the
    beginning of the text itself.
    """

    def __init__(self, shown: Mapping[str, str] | None = None, *, begun: bool = False) -> None:
        self.chunks: list[Chunk] = [Chunk()]
        self.images: list[Image] = []
        self.shown, self.begun = {END: "</s>", **(shown or {})}, begun

    def write(self, text: str, *, learn: bool = False) -> None:
        chunk = self.chunks[-1]
        start = len(chunk.text)
        chunk.text += text
        if not (learn and text):
            return
        if chunk.spans and chunk.spans[-1][1] == start:
            start = chunk.spans.pop()[0]  # one span, so that a token across two learnt pieces is learnt too
        chunk.spans.append((start, len(chunk.text)))

    def place(self, image: Image) -> None:
        self.images.append(image)
        self.chunks.append(Chunk())

    @property
    def learns(self) -> bool:
        return any(chunk.spans for chunk in self.chunks)

    def __str__(self) -> str:
        """The prompt as people write it, with ``<image>`` and ``</s>``."""
        text = "<image>".join(chunk.text for chunk in self.chunks)
        return text.translate(str.maketrans(self.shown))


Template = Callable[[Record, bool], Rendered]
"""(record whose texts are drawn, is it a prompt to be continued?) -> Rendered."""


@dataclass(frozen=True, slots=True)
class Turn:
    """All parts of one speaker in a row, in order: pictures, and pieces of text with their being learnt."""

    role: Role
    parts: tuple[Image | tuple[str, bool], ...] = ()

    @property
    def said(self) -> tuple[tuple[str, bool], ...]:
        return tuple(part for part in self.parts if not isinstance(part, Image))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.parts if isinstance(part, Image))

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.said)


def render(record: Record, template: str | Template, *, draw: int = 0, prompt: bool = False) -> Rendered:
    """The record in the words of a template: one of TEMPLATES by name, or one of a checkpoint's own.

    ``draw`` chooses among alternative texts. A ``prompt`` is what a model continues: the answer at the record's end
    is left out and nothing is learnt. A record of running text (no speakers) is rendered as ``document`` by every
    conversation template. Raises DataError when the record does not fit, ConfigError for an unknown template.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise ConfigError(f"unknown template {template!r}; {nearest(template, TEMPLATES)}")
    spoken = any(p.role in ("user", "assistant") for p in record.texts)
    chosen = template if spoken or template == "plain" else "document"
    chosen = TEMPLATES[chosen] if isinstance(chosen, str) else chosen
    return chosen(drawn(without_answer(record) if prompt else record, draw), prompt)


def drawn(record: Record, draw: int) -> Record:
    """The record with one alternative of each text drawn by ``draw`` (independent ones if it is large and even-
    handed). Raises DataError for text that is not valid or holds the reserved character."""
    parts = []
    for part in record.parts:
        if isinstance(part, Text):
            text = part.text
            if not isinstance(text, str):
                if not text:
                    raise DataError("empty text: a text with alternatives has none; give at least one")
                draw, choice = divmod(draw, len(text))
                text = text[choice]
            if found := RESERVED.search(text):
                raise DataError(f"bad text: it holds the character U+{ord(found[0]):X}, which is reserved; remove it")
            part = Text(text, part.role, part.learn)
        parts.append(part)
    return Record(record.id, tuple(parts), record.source, record.meta)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """How a conversation is written: ``{}`` in ``head`` is the system's text, in ``user`` the user's; the answer
    stands between ``before`` and ``after``, or ``between`` where a question follows it. The default ``system`` is said
    where the record says none; without any there is no head. A turn's only picture is put ``first``, as LLaVA's
    published code does, or stays where it stands, as several do."""

    system: str = ""
    head: str = "{} "
    user: str = "USER: {} ASSISTANT:"
    before: str = " "
    after: str = END
    between: str | None = None
    first: bool = False

    def __call__(self, record: Record, prompt: bool) -> Rendered:
        said = "".join(str(p.text) for p in record.texts if p.role == "system") or self.system
        out = Rendered()
        out.write(self.head.replace("{}", said) if said else "")
        opening, closing = self.user.split("{}")
        turns = conversation_turns(record, prompt)
        for turn in turns:
            if turn.role == "user":
                out.write(opening)
                write_user(out, turn, prompt, first=self.first)
                out.write(closing)
            else:
                after = self.after if turn is turns[-1] or self.between is None else self.between
                say(out, ((self.before, turn.said[0][1]), *turn.said, (after, turn.said[-1][1])), prompt)
        return out


def conversation_turns(record: Record, prompt: bool) -> list[Turn]:
    """Turns of user and assistant, system texts apart. Raises DataError unless they alternate, the user begins, every
    answer says something, and the last turn is the assistant's, or of a ``prompt`` the user's."""
    turns = _turns(record)
    for number, turn in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if turn.role != expected:
            raise DataError(
                f"bad conversation: turn {number + 1} is the {turn.role}'s and should be the "
                f"{expected}'s; turns alternate, the user begins"
            )
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(
                f"empty answer: turn {number + 1} of the conversation says nothing; write an answer or drop the turn"
            )
    if not turns or (prompt and turns[-1].role != "user"):
        raise DataError("bad conversation: it has no question to answer; end it with a user's turn")
    if not prompt and turns[-1].role != "assistant":
        raise DataError("empty answer: the conversation ends with a question; add the answer to be learnt")
    return turns


def write_user(out: Rendered, turn: Turn, prompt: bool, *, first: bool) -> None:
    """Pictures at the beginning are each followed by a newline, the text of a turn with pictures is stripped (the
    released code's rule). What stands after text stays there, on a new line where no white space is before it."""
    if not turn.images:
        say(out, turn.said, prompt)
        return
    parts: list[Image | tuple[str, bool]] = list(turn.parts)
    if first and len(turn.images) == 1:
        parts = [*turn.images, *turn.said]
    spoken = next((n for n, part in enumerate(parts) if not isinstance(part, Image) and part[0].strip()), len(parts))
    leading, rest = [part for part in parts[:spoken] if isinstance(part, Image)], _stripped(parts[spoken:])
    for number, image in enumerate(leading, start=1):
        out.place(image)
        if rest or number < len(leading):
            out.write("\n")
    gap = True  # whether what was written last is white space
    for part in rest:
        if isinstance(part, Image):
            out.write("" if gap else "\n")
            out.place(part)
            gap = False
        elif part[0]:
            say(out, [part], prompt)
            gap = part[0][-1].isspace()


def say(out: Rendered, said: Sequence[tuple[str, bool]], prompt: bool) -> None:
    """Write pieces of text, each with its being learnt, which in a prompt nothing is."""
    for text, learn in said:
        out.write(text, learn=learn and not prompt)


def _stripped(parts: Sequence[Image | tuple[str, bool]]) -> list[Image | tuple[str, bool]]:
    """Without white space before the first text and after the last part, where that is text."""
    pieces = list(parts)
    while pieces and not isinstance(last := pieces[-1], Image):
        if last[0].strip():
            pieces[-1] = (last[0].rstrip(), last[1])
            break
        del pieces[-1]
    if pieces and not isinstance(begin := pieces[0], Image):
        pieces[0] = (begin[0].lstrip(), begin[1])
    return pieces


def _plain(record: Record, prompt: bool) -> Rendered:
    """``<image>caption\\n``: what the user says is dropped, the newline ends it, there is no end of sequence."""
    out = Rendered()
    for image in record.images:
        out.place(image)
    if prompt:
        return out
    answers = [p for p in record.texts if p.role in ("text", "assistant")]
    if len(answers) != 1:
        raise DataError(
            f"bad caption: the template 'plain' takes one caption and the sample has {len(answers)}; "
            "use a conversation template"
        )
    caption = str(answers[0].text)
    if not caption.strip():
        raise DataError("empty answer: the caption is empty; write one or drop the sample")
    out.write(f"{caption}\n", learn=answers[0].learn)
    return out


def _document(record: Record, prompt: bool) -> Rendered:
    """Running text as it stands, pictures in their places, one end of sequence after it."""
    out = Rendered()
    learn = False
    for part in record.parts:
        if isinstance(part, Image):
            out.place(part)
            continue
        if part.role in ("user", "assistant"):
            raise DataError(
                f"bad document: the template 'document' takes running text and found a turn of the "
                f"{part.role}; use a conversation template (template=NAME, on the command line --template NAME: "
                f"{', '.join(n for n, t in TEMPLATES.items() if isinstance(t, Grammar))}, or a file in Jinja)"
            )
        learn = part.learn and not prompt
        out.write(str(part.text), learn=learn)
    if not prompt:
        if not any(chunk.text.strip() for chunk in out.chunks):
            raise DataError("empty text: the document holds no text; drop the sample")
        out.write(END, learn=learn)
    return out


TEMPLATES: dict[str, Template] = {
    "plain": _plain,
    "vicuna_v1": Grammar(system=_VICUNA),
    "llava_v1": Grammar(system=_LLAVA, first=True),
    "vicuna_bare": Grammar(),
    "llava_hf": Grammar(between=" ", first=True),
    "mistral_instruct": Grammar(head="<<SYS>>\n{}\n<</SYS>>\n\n", user="[INST] {} [/INST]", after=f" {END}"),
    "document": _document,
}
"""Written out: ``vicuna_v1`` is ``SYS USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>``, no space after ``</s>``;
``vicuna_bare`` the same without the system sentence and its space; ``llava_hf`` (transformers' own LLaVA 1.5 folders)
that with a space for every ``</s>`` but the last; ``mistral_instruct`` (LLaVA 1.6 over Mistral)
``[INST] q1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>``."""


def _turns(record: Record) -> list[Turn]:
    turns: list[Turn] = []
    for part in record.parts:
        if isinstance(part, Text) and part.role == "system":
            continue
        role: Role = "user" if part.role == "text" else part.role
        if isinstance(part, Image) and role != "user":
            raise DataError("bad conversation: a picture stands in the assistant's turn; only users show pictures")
        if not turns or turns[-1].role != role:
            turns.append(Turn(role))
        last = turns[-1]
        turns[-1] = Turn(role, (*last.parts, part if isinstance(part, Image) else (str(part.text), part.learn)))
    return turns


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels; ``marks`` are the positions in ``ids`` before which a picture stands, in order."""

    ids: list[int]
    labels: list[int]
    marks: list[int]


def encode(rendered: Rendered, tokenizer: Tokenizer) -> Encoded:
    """Tokenise chunk by chunk, or as one where the tokenizer does; what begins a text stands once at the front.

    A token is supervised iff it starts within a learnt span and ends no later than it. The dummy space some
    tokenizers put at the front of each chunk counts with the character it stands before.
    """
    ids = [] if rendered.begun else list(tokenizer.begin_ids)
    labels = [IGNORE] * len(ids)
    marks: list[int] = []
    apart = _as_one if tokenizer.whole and rendered.images else _apart
    for number, (pieces, learnt) in enumerate(apart(rendered.chunks, tokenizer)):
        if number:
            marks.append(len(ids))
        ids += pieces
        labels += learnt
    return Encoded(ids, labels, marks)


_Piece = tuple[list[int], list[int]]


def _apart(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> list[_Piece]:
    return [encode_chunk(chunk, tokenizer) if chunk.text else ([], []) for chunk in chunks]


def _as_one(chunks: Sequence[Chunk], tokenizer: Tokenizer) -> list[_Piece]:
    whole = Chunk()
    for number, chunk in enumerate(chunks):
        whole.text += PLACE if number else ""
        start = len(whole.text)
        whole.spans += [(start + first, start + last) for first, last in chunk.spans]
        whole.text += chunk.text
    found: list[_Piece] = [([], [])]
    for token, label in zip(*encode_chunk(whole, tokenizer), strict=True):
        if token == tokenizer.place_id:
            found.append(([], []))
            continue
        found[-1][0].append(token)
        found[-1][1].append(label)
    return found


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids and labels of one chunk alone, nothing added; labels by the rule of :func:`encode`."""
    ids, offsets = tokenizer.encode_with_offsets(chunk.text)
    return ids, _labels(ids, offsets, chunk.spans)


def _labels(ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Both token offsets and spans are in order of their starts: one walk over both."""
    labels: list[int] = []
    current = 0
    for token, (start, end) in zip(ids, offsets, strict=True):
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        inside = current < len(spans) and spans[current][0] <= start and end <= spans[current][1]
        labels.append(token if inside else IGNORE)
    return labels
