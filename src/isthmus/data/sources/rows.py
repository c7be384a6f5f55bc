"""Rows to Records: the one place where the fields of other people's files become parts of a Record.

A row is a dict of plain values with its pictures. The first of these fields it holds decides its form:
``conversations`` or ``messages``, ``questions`` (a list), ``question`` and ``answer``, ``caption``, ``label``,
``text``.
``fields`` maps these names to the file's own, ``{questions: qa}``.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from isthmus.data.record import FrameSource, Image, ImageSource, Part, Record, Role, Text, Video
from isthmus.data.video import FileFrames, FolderFrames
from isthmus.errors import ConfigError, DataError, nearest

FIELDS = ("conversations", "messages", "questions", "question", "caption", "label", "text")
KNOWN = (*FIELDS, "answer", "choices", "image", "video", "id", "kind")
MARK = "<image>"
"""Where a picture stands in a user's turn; a question without one has its pictures before it."""
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PICTURE_PARTS = ("image", "image_url")
"""The types of a turn's part that is a picture."""
_NAMES = ("path", "image", "url", "image_url", "file_name")
"""Where a picture that is an object has its name."""
_DIGITS = re.compile(r"[0-9]{1,9}")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: ``key`` is what side files call it, ``id`` is unique in the source. ``meta`` goes into the
    record's as it is: what scoring reads and the texts do not say."""

    id: str
    values: Mapping[str, Any]
    images: tuple[ImageSource | FrameSource, ...] = ()
    key: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


class Rows(Protocol):
    """Rows by number; reading one may touch the disk, so it is done once per visit."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...
    def listing(self) -> Iterator[Any]:
        """All that is held in memory of the rows and their pictures, without a disk's places: see fingerprint.py."""
        ...


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows become records.

    Args:
        fields: our field name -> the file's (for ``caption`` also several).
        turns: of a list of questions make one conversation (``all``) or one record each (``single``).
        max_turns: longest conversation; a longer list makes several.
        matching: of a list of questions keep those in which this regular expression finds something.
        suffix: put on a line of its own behind each question.
        instruction: asked before a caption or label, which then becomes an answer.
        classes: class names by label number.
        templates: texts with ``{}`` for the class name, drawn as alternatives.
        captions: further captions by row key, from a side file.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    turns: Literal["all", "single"] = "all"
    max_turns: int | None = None
    matching: str = ""
    suffix: str = ""
    instruction: str = ""
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    captions: Mapping[str, tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in KNOWN:
                raise ConfigError(f"source: unknown field {name!r}; {nearest(name, KNOWN)}")
        if self.turns not in ("all", "single"):
            raise ConfigError(f"source: turns must be 'all' or 'single', not {self.turns!r}")
        if self.max_turns is not None and self.max_turns < 1:
            raise ConfigError(f"source: max_turns must be at least 1, not {self.max_turns}")
        try:
            re.compile(self.matching)
        except re.error as error:
            raise ConfigError(f"source: matching {self.matching!r} is no regular expression: {error}") from None
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(f"source: the template {template!r} has no {{}} for the class name")

    @property
    def step(self) -> int | None:
        """Questions per record where a list of questions may make several records, else none."""
        return 1 if self.turns == "single" else self.max_turns

    def value(self, row: Row, name: str) -> Any:
        theirs = self.fields.get(name, name)
        if isinstance(theirs, str):
            return row.values.get(theirs)
        return [row.values.get(t) for t in theirs]

    @property
    def counts(self) -> bool:
        """Whether rows make other numbers of records than one each."""
        return self.step is not None or bool(self.matching)

    def count(self, row: Row) -> int:
        """Number of records the row makes; one that will be found bad counts."""
        questions = self.value(row, "questions")
        if not isinstance(questions, list) or not questions:
            return 1
        kept = len(self._kept(questions))
        return min(kept, 1) if self.step is None else -(-kept // self.step)

    def _kept(self, questions: Sequence[Any]) -> list[Any]:
        if not self.matching:
            return list(questions)
        return [pair for pair in questions if re.search(self.matching, str(_pair(pair)[0]))]

    def record(self, row: Row, number: int, source: str) -> Record:
        """The ``number``-th record of the row. Raises DataError when the row does not fit."""
        if self.captions is not None and row.key not in self.captions:
            raise DataError(f"missing caption: the side file has none for {row.key!r}; check its key field")
        form = next((n for n in FIELDS if self.value(row, n) is not None), "caption" if self.captions else None)
        if form is None:
            raise DataError(
                f"no text: of the fields {', '.join(FIELDS)} the sample has none (it has "
                f"{', '.join(map(str, row.values)) or 'nothing'}); name yours under 'fields'"
            )
        if self.matching and form != "questions":
            raise DataError(f"matching chooses among the questions of a list, and the sample has {form!r}; take it out")
        meta: dict[str, Any] = {}
        kind = self.value(row, "kind")
        if kind is not None:
            meta["kind"] = str(kind)
        choices = self.value(row, "choices")
        if choices is not None:
            meta["choices"] = flat(choices)
        if form in ("conversations", "messages"):
            parts = conversation(self.value(row, form), row.images)
        elif form == "questions":
            parts = self._questions(row, number, meta)
        elif form == "question":
            parts = self._turns(row, [(self.value(row, "question"), self.value(row, "answer"))], meta)
        elif form == "text":
            parts = [*_pictures(row, "text"), Text(_string(self.value(row, "text"), "text"), learn=True)]
        else:
            parts = self._caption(row, form, meta)
        several = self.step is not None and form == "questions"
        return Record(f"{row.id}#{number}" if several else row.id, tuple(parts), source, {**meta, **row.meta})

    def _questions(self, row: Row, number: int, meta: dict[str, Any]) -> list[Part]:
        pairs = self.value(row, "questions")
        if not isinstance(pairs, list) or not pairs:
            raise DataError("empty answer: the list of questions is empty; drop the sample")
        pairs = self._kept(pairs)
        if self.step is not None:
            pairs = pairs[number * self.step : (number + 1) * self.step]
        return self._turns(row, [_pair(p) for p in pairs], meta)

    def _turns(self, row: Row, pairs: Sequence[tuple[Any, Any]], meta: dict[str, Any]) -> list[Part]:
        marked = any(MARK in _string(question, "question") for question, _ in pairs)
        parts: list[Part] = [] if marked else _pictures(row, "user")
        waiting = list(row.images)
        for question, answer in pairs:
            asked = _string(question, "question") + (f"\n{self.suffix}" if self.suffix else "")
            answers = tuple(_string(a, "answer") for a in (answer if isinstance(answer, list) else [answer]))
            if not answers:
                raise DataError("empty answer: a question has no answer; drop it")
            parts += _marked(asked, "user", waiting) if marked else [Text(asked, role="user")]
            parts.append(Text(answers[0], role="assistant", learn=True))
            meta["answers"] = answers  # of the last turn, which is the one that is scored
        if marked:
            _same_number(sum(str(question).count(MARK) for question, _ in pairs), row.images)
        return parts

    def _caption(self, row: Row, form: str, meta: dict[str, Any]) -> list[Part]:
        if form == "label":
            texts = self._class_texts(self.value(row, "label"), meta)
        else:
            texts = flat(self.value(row, "caption"))  # two people may have written the same: both count
            texts += tuple(dict.fromkeys(c for c in (self.captions or {}).get(row.key, ()) if c not in texts))
        if not texts:
            raise DataError("empty text: the caption is empty; write one or drop the sample")
        text = texts[0] if len(texts) == 1 else texts
        if not self.instruction:
            return [*_pictures(row, "text"), Text(text, learn=True)]
        if "class" in meta:
            meta["answers"] = (meta["class"],)
        return [*_pictures(row, "user"), Text(self.instruction, role="user"), Text(text, role="assistant", learn=True)]

    def _class_texts(self, label: Any, meta: dict[str, Any]) -> tuple[str, ...]:
        name = str(label)
        if self.classes:
            label = number = self._class_number(label)
            name = self.classes[number]
        meta |= {"class": name, "label": label}
        return tuple(t.replace("{}", name) for t in self.templates) or (name,)

    def _class_number(self, label: Any) -> int:
        """A number, also as a table writes it, in digits; digits that are themselves a class name are that name."""
        number = label
        if isinstance(label, str) and _DIGITS.fullmatch(label.strip()):
            text = label.strip()
            number = list(self.classes).index(text) if text in self.classes else int(text)
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            raise DataError(f"bad label: {label!r} is not one of the {len(self.classes)} class numbers")
        return number


class RowSource:
    """A source over rows. Where a list of questions makes several records, all rows are read once to count them."""

    def __init__(self, name: str, rows: Rows, form: Form, *, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ConfigError(f"source {name!r}: limit must be at least 1, not {limit}")
        self.name, self.rows, self.form = name, rows, form
        count = len(rows) if limit is None else min(limit, len(rows))
        self._places = list(self._count(count)) if form.counts else range(count)
        if not self._places:
            raise ConfigError(f"source {name!r}: no question matches {form.matching!r}")

    def _count(self, rows: int) -> Iterator[tuple[int, int]]:
        for index in range(rows):
            try:
                count = self.form.count(self.rows[index])
            except DataError:
                count = 1  # met, and counted as bad, when it is visited
            yield from ((index, number) for number in range(count))

    def __len__(self) -> int:
        return len(self._places)

    def listing(self) -> Iterator[Any]:
        """What a fingerprint looks at beside whole samples."""
        yield self.form
        yield from self.rows.listing()

    def __getitem__(self, index: int) -> Record:
        place = self._places[index]
        row, number = place if isinstance(place, tuple) else (place, 0)
        return self.form.record(self.rows[row], number, self.name)


def conversation(turns: Any, images: Sequence[ImageSource | FrameSource]) -> list[Part]:
    """LLaVA's ``from``/``value`` or chat ``role``/``content`` turns, ``<image>`` marking the pictures in order.

    A leading assistant turn is dropped. Raises DataError for unknown speakers, two turns of one in a row, or another
    number of marks than pictures.
    """
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise DataError("bad conversation: it must be a list of turns, each with 'from' and 'value'")
    parts: list[Part] = []
    waiting = list(images)
    marks, before = 0, None
    for number, turn in enumerate(turns):
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker not in _ROLES:
            raise DataError(f"bad conversation: turn {number + 1} is from {speaker!r}; {nearest(str(speaker), _ROLES)}")
        role = _ROLES[speaker]
        if role == "assistant" and not parts:
            continue
        if role == before:
            raise DataError(f"bad conversation: turns {number} and {number + 1} are both from {speaker!r}; join them")
        before = role
        text = _string(_joined(value), "answer" if role == "assistant" else f"turn {number + 1}")
        if role == "user":
            marks += text.count(MARK)
            parts += _marked(text, role, waiting)
        else:
            parts.append(Text(text, role=role, learn=role == "assistant"))
    _same_number(marks, images)
    return parts


def _marked(text: str, role: Role, waiting: list[ImageSource | FrameSource]) -> list[Part]:
    """The text in pieces, at each mark the next of the pictures that are ``waiting``, as long as there are some."""
    parts: list[Part] = []
    pieces = _trim(text.split(MARK))
    for place, piece in enumerate(pieces):
        if place and waiting:
            parts.append(_visual(waiting.pop(0), role))
        if piece or len(pieces) == 1:
            parts.append(Text(piece, role=role))
    return parts


def _same_number(marks: int, images: Sequence[Any]) -> None:
    if marks != len(images):
        raise DataError(
            f"placeholder mismatch: the text has {marks} <image> and the sample {len(images)} pictures; make them equal"
        )


def _joined(content: Any) -> Any:
    """Content as a list of parts (``{"type": "text" | "image" | "image_url", ...}``) as one text with its marks."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    pieces = []
    for part in content:
        kind = part.get("type")
        if kind != "text" and kind not in _PICTURE_PARTS:
            raise DataError(
                f"bad conversation: a part of a turn is of type {kind!r}; it must be text, image or image_url"
            )
        pieces.append(_string(part.get("text"), "text") if kind == "text" else MARK)
    return "".join(pieces)


def picture_names(form: "Form", row: Row) -> tuple[str, ...]:
    """The pictures a row names: in its ``image`` field (or ``images``), else in the image parts of its messages."""
    given = form.value(row, "image")
    if given is None:
        given = row.values.get("images")
    if given is None and isinstance(turns := form.value(row, "messages"), list):
        parts = [
            p for t in turns if isinstance(t, Mapping) and isinstance(t.get("content"), list) for p in t["content"]
        ]
        given = [p for p in parts if isinstance(p, Mapping) and p.get("type") in _PICTURE_PARTS]
    return flat([_name(item) for item in (given if isinstance(given, list) else [given])])


def _name(item: Any) -> Any:
    """A picture's name; others also write ``{"path": name}``, ``{"type": "image", "image": name}`` or OpenAI's
    ``{"type": "image_url", "image_url": {"url": name}}``. A part of a turn may have none: the row's field has it."""
    if not isinstance(item, Mapping):
        return item
    if isinstance(within := item.get("image_url"), Mapping):
        item = within
    name = next((item[key] for key in _NAMES if isinstance(item.get(key), str)), None)
    if name is None and item.get("type") not in _PICTURE_PARTS:
        raise DataError(
            f"bad field: a picture is {dict(item)!r:.200}; its name is looked for under {', '.join(_NAMES)}"
        )
    return name


def _trim(pieces: list[str]) -> list[str]:
    """Texts around pictures, without the white space at the two ends of the turn: there the marks have stood."""
    if len(pieces) > 1:
        for order, strip in ((range(len(pieces)), str.lstrip), (range(len(pieces) - 1, -1, -1), str.rstrip)):
            for place in order:
                pieces[place] = strip(pieces[place])
                if pieces[place]:
                    break
    return pieces


def flat(value: Any) -> tuple[str, ...]:
    """All non-empty strings of a value, nested lists included, stripped."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in flat(item))
    text = _string(value, "caption").strip()
    return (text,) if text else ()


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        return item.get("question"), item.get("answer")
    if isinstance(item, list) and len(item) == 2:
        return item[0], item[1]
    raise DataError("bad question: each item of the list must be [question, answer] or have these two fields")


def _string(value: Any, what: str) -> str:
    """A text, number or truth value as text. Raises DataError for anything else, and for half a surrogate pair, which
    no tokenizer takes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and _HALF_PAIR.search(value):
        raise DataError(f"bad text: the {what} holds half a surrogate pair, as of an emoji cut in two: {value[:80]!a}")
    if isinstance(value, float) and math.isnan(value):
        value = None  # a hole of a table, as pandas writes it
    if isinstance(value, str | int | float):
        return str(value)
    if value is None and what == "answer":
        raise DataError("empty answer: there is none; write one or drop the sample")
    found = "missing" if value is None else type(value).__name__
    raise DataError(f"bad field: the {what} should be a text and is {found}")


def _pictures(row: Row, role: Role) -> list[Part]:
    return [_visual(source, role) for source in row.images]


def _visual(source: ImageSource | FrameSource, role: Role) -> Image:
    return Video(source, role=role) if isinstance(source, FolderFrames | FileFrames) else Image(source, role=role)
