"""Rows to Records: the one place where the fields of other people's files become parts of a Record.

A row is a dict of plain values with its pictures. The first of these fields it holds decides its form:
``conversations`` or ``messages``, ``questions`` (a list), ``question`` and ``answer``, ``caption``, ``label``,
``text``.
``fields`` maps these names to the file's own, ``{questions: qa}``. Beside questions and turns, ``system`` is the
system's text, and ``context``, if it is mapped, stands on lines of its own before the question.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, Protocol

from isthmus.data.mix import Source
from isthmus.data.record import Part, Record, Role, Text
from isthmus.data.sources.cells import string, unpacked
from isthmus.data.sources.turns import (
    MARK,
    PICTURE_PARTS,
    Shown,
    after_system,
    conversation,
    marked_parts,
    picture_first,
    same_number,
    visual,
)
from isthmus.errors import ConfigError, DataError, IsthmusWarning, nearest

FIELDS = ("conversations", "messages", "questions", "question", "caption", "label", "text")
KNOWN = (*FIELDS, "answer", "choices", "image", "video", "id", "kind", "system", "context")
UNREAD = ("tools", "rejected", "prefix", "context", "hint", "ocr")
"""Fields of others that carry text and are read only where ``fields`` maps one of ours to them."""
_FOR = {
    "suffix": ("questions", "question"),
    "instruction": ("caption", "label"),
    "classes": ("label",),
    "templates": ("label",),
}
"""Options that are for some forms alone."""
LOOKED_AT = 64
"""Samples whose form is looked at when a source is opened."""
_NAMES = ("path", "image", "url", "image_url", "file_name")
"""Where a picture that is an object has its name."""
_DIGITS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: ``key`` is what side files call it, ``id`` is unique in the source. ``meta`` goes into the
    record's as it is: what scoring reads and the texts do not say."""

    id: str
    values: Mapping[str, object]
    images: tuple[Shown, ...] = ()
    key: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)


class Rows(Protocol):
    """Rows by number; reading one may touch the disk, so it is done once per visit."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row: ...
    def listing(self) -> Iterator[object]:
        """All that is held in memory of the rows and their pictures, without a disk's places: see fingerprint.py."""
        ...


@dataclass(frozen=True, kw_only=True)
class Form:
    """How rows become records.

    Args:
        fields: our field name -> the file's (for ``caption`` also several).
        turns: of a list of questions make one conversation (``all``) or one record each (``single``).
        max_turns: longest conversation; a longer list makes several. A row that is a conversation stays one.
        matching: of a list of questions keep those in which this regular expression finds something.
        suffix: put on a line of its own after each question.
        instruction: a question before a caption or label, which then becomes an answer.
        classes: class names by label number.
        templates: texts with ``{}`` for the class name, drawn as alternatives.
        captions: further captions by row key, from a side file.
        pictures: where a turn's only picture stands: where its mark is (``placed``), or before the turn's text
            (``first``), as LLaVA's published code puts it.
    """

    fields: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    turns: Literal["all", "single"] = "all"
    max_turns: int | None = None
    matching: str = ""
    suffix: str = ""
    instruction: str = ""
    classes: Sequence[str] = ()
    templates: Sequence[str] = ()
    captions: Mapping[str, tuple[str, ...]] | None = None
    pictures: Literal["placed", "first"] = field(default="placed", repr=False)

    def __post_init__(self) -> None:
        for name in self.fields:
            if name not in KNOWN:
                raise ConfigError(f"source: unknown field {name!r}; {nearest(name, KNOWN)}")
        if self.turns not in ("all", "single"):
            raise ConfigError(f"source: turns must be 'all' or 'single', not {self.turns!r}")
        if self.max_turns is not None and self.max_turns < 1:
            raise ConfigError(f"source: max_turns must be at least 1, not {self.max_turns}")
        if self.max_turns is not None and self.turns == "single":
            raise ConfigError("source: with turns: single each question is a sample of its own; take max_turns out")
        try:
            re.compile(self.matching)
        except re.error as error:
            raise ConfigError(f"source: matching {self.matching!r} is no regular expression: {error}") from None
        for template in self.templates:
            if "{}" not in template:
                raise ConfigError(f"source: the template {template!r} has no {{}} for the class name")

    @property
    def theirs(self) -> list[str]:
        """The file's own names that ``fields`` gives."""
        return [t for value in self.fields.values() for t in ([value] if isinstance(value, str) else value)]

    @property
    def step(self) -> int | None:
        """Questions per record where a list of questions may make several records, else none."""
        return 1 if self.turns == "single" else self.max_turns

    def value(self, row: Row, name: str) -> object:
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
        questions = self._listed(row)
        if not questions:
            return 1
        kept = len(self._kept(questions))
        return min(kept, 1) if self.step is None else -(-kept // self.step)

    def _listed(self, row: Row) -> list[object]:
        """The list of questions that the row is, else nothing."""
        questions = unpacked(self.value(row, "questions"), "questions") if self.form_of(row) == "questions" else None
        return questions if isinstance(questions, list) else []

    def undivided(self, row: Row) -> bool | None:
        """Of a list of questions False, of a conversation of more questions than records should have True: it stays one
        record. None of any other row."""
        form = self.form_of(row)
        if form == "questions":
            return False
        if self.step is None or form not in ("conversations", "messages"):
            return None
        parts = conversation(unpacked(self.value(row, form), form), row.images)
        return True if sum(p.role == "assistant" for p in parts) > self.step else None

    @property
    def divides(self) -> str:
        """The option that makes several records of a list of questions, as a user writes it."""
        return "turns: single" if self.turns == "single" else f"max_turns: {self.max_turns}"

    def _kept(self, questions: Sequence[object]) -> list[object]:
        if not self.matching:
            return list(questions)
        return [pair for pair in questions if re.search(self.matching, str(_pair(pair)[0]))]

    def form_of(self, row: Row) -> str | None:
        """The first of FIELDS that the row has, which decides what becomes of it."""
        return next((n for n in FIELDS if self.value(row, n) is not None), "caption" if self.captions else None)

    def record(self, row: Row, number: int, source: str) -> Record:
        """The ``number``-th record of the row. Raises DataError when the row does not fit."""
        if self.captions is not None and row.key not in self.captions:
            raise DataError(f"missing caption: the side file has none for {row.key!r}; check its key field")
        form = self.form_of(row)
        if form is None:
            raise DataError(
                f"no text: of the fields {', '.join(FIELDS)} the sample has none (it has "
                f"{', '.join(map(str, row.values)) or 'nothing'}); {_instead(row.values)}"
            )
        if self.matching and form != "questions":
            raise DataError(f"matching chooses among the questions of a list, and the sample has {form!r}; take it out")
        meta: dict[str, object] = {}
        kind = self.value(row, "kind")
        if kind is not None:
            meta["kind"] = str(kind)
        choices = self.value(row, "choices")
        if choices is not None:
            if isinstance(choices := unpacked(choices, "choices"), str):
                raise DataError(f"bad field: the choices should be a list of texts and are one text: {choices[:80]!r}")
            meta["choices"] = flat(choices, "choice")
        if form in ("conversations", "messages"):
            parts = conversation(unpacked(self.value(row, form), form), row.images)
        elif form == "questions":
            parts = self._questions(row, number, meta)
        elif form == "question":
            parts = self._turns(row, [(self._question(row), self.value(row, "answer"))], meta)
        elif form == "text":
            parts = [*_pictures(row, "text"), Text(string(self.value(row, "text"), "text"), learn=True)]
        else:
            parts = self._caption(row, form, meta)
        if any(p.role == "user" for p in parts):
            parts = after_system(self.value(row, "system"), parts)
        if self.pictures == "first":
            parts = [part for _, turn in groupby(parts, lambda p: p.role) for part in picture_first(list(turn))]
        several = self.step is not None and form == "questions"
        return Record(f"{row.id}#{number}" if several else row.id, tuple(parts), source, {**meta, **row.meta})

    def _question(self, row: Row) -> str:
        """The question, after the mapped context where there is one."""
        question = string(self.value(row, "question"), "question").strip()
        context = flat(self.value(row, "context"), "context") if "context" in self.fields else ()
        return "\n".join((*context, question))

    def unread(self, values: Mapping[str, object]) -> list[str]:
        """Fields of a row that carry text and that this form does not read."""
        row = Row("", values)
        spoken = self.instruction or any(self.value(row, name) is not None for name in FIELDS[:4])
        names = UNREAD if spoken else (*UNREAD, "system")
        return [name for name in names if name not in self.theirs and values.get(name) not in (None, "", [], {})]

    def name_unread(self, rows: Iterable[Mapping[str, object]], where: str) -> None:
        """One warning with the number of rows for each field of theirs that carries text and is not read."""
        counts = Counter(name for values in rows for name in self.unread(values))
        for name, count in counts.items():
            first = (
                ""
                if name in ("tools", "rejected", "system")
                else (f", where it belongs before a `question`, map it: `fields: {{context: {name}}}`")
            )
            warnings.warn(
                f"{where}: the field `{name}` of {count} samples holds text that is not read{first}.",
                IsthmusWarning,
                stacklevel=2,
            )

    def _questions(self, row: Row, number: int, meta: dict[str, object]) -> list[Part]:
        pairs = unpacked(self.value(row, "questions"), "questions")
        if not isinstance(pairs, list) or not pairs:
            raise DataError("empty answer: the list of questions is empty; drop the sample")
        pairs = self._kept(pairs)
        if self.step is not None:
            pairs = pairs[number * self.step : (number + 1) * self.step]
        return self._turns(row, [_pair(p) for p in pairs], meta)

    def _turns(self, row: Row, pairs: Sequence[tuple[object, object]], meta: dict[str, object]) -> list[Part]:
        marked = any(MARK in string(question, "question") for question, _ in pairs)
        parts: list[Part] = [] if marked else _pictures(row, "user")
        waiting = list(row.images)
        for question, answer in pairs:
            prompt = string(question, "question").strip() + (f"\n{self.suffix}" if self.suffix else "")
            answers = _answers(answer)
            parts += marked_parts(prompt, "user", waiting) if marked else [Text(prompt, role="user")]
            learnt = max(answers, key=answers.count)  # the commonest, the first of equals
            parts.append(Text(learnt, role="assistant", learn=True))
            meta["answers"] = answers  # of the last turn, which is the one that is scored
        if marked:
            same_number(sum(str(question).count(MARK) for question, _ in pairs), row.images)
        return parts

    def _caption(self, row: Row, form: str, meta: dict[str, object]) -> list[Part]:
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

    def _class_texts(self, label: object, meta: dict[str, object]) -> tuple[str, ...]:
        if isinstance(label := unpacked(label, "label"), list):
            if len(label) != 1:
                raise DataError(f"bad label: a picture has one class here, and this one has {len(label)}: {label}")
            label = label[0]
        name = str(label).strip()
        if self.classes:
            label = number = self._class_number(label)
            name = self.classes[number]
        meta |= {"class": name, "label": label}
        return tuple(t.replace("{}", name) for t in self.templates) or (name,)

    def _class_number(self, label: object) -> int:
        """A number, also as a table writes it, in digits; digits that are themselves a class name are that name."""
        number = label
        if isinstance(label, str) and _DIGITS.fullmatch(label.strip()):
            text = label.strip()
            number = list(self.classes).index(text) if text in self.classes else int(text)
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            raise DataError(f"bad label: {label!r} is not one of the {len(self.classes)} class numbers")
        return number


def _instead(values: Mapping[str, object]) -> str:
    """What to do about a row without a text: it may be an entire file rather than a sample."""
    if {"images", "annotations"} <= values.keys():
        return "captions in COCO's form are read by `kind: coco`"
    lists = [name for name, value in values.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists:
        return f"its {lists[0]!r} is a list of objects: if those are the samples, write that list alone into a file"
    return "name yours under 'fields'"


class RowSource(Source):
    """A source over rows. Where a list of questions makes several records, all rows are read once to count them."""

    def __init__(self, name: str, rows: Rows, form: Form, *, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ConfigError(f"source {name!r}: limit must be at least 1, not {limit}")
        self.name, self.rows, self.form = name, rows, form
        count = len(rows) if limit is None else min(limit, len(rows))
        if form.captions is not None:
            self._name_shared_keys(count)
        self._name_idle(count)
        self._places = list(self._count(count)) if form.counts else range(count)
        if not self._places:
            raise ConfigError(f"source {name!r}: no question matches {form.matching!r}")

    def _name_shared_keys(self, rows: int) -> None:
        """Says how many samples share the side file's captions with another: one thing drawn in several styles, or
        two things under one name."""
        counts = Counter(self._keys(rows))
        shared = [key for key, count in counts.items() if count > 1]
        if shared:
            warnings.warn(
                f"source {self.name!r}: {len(shared):,} keys ({shared[0]!r} the first) name {max(counts.values())} or "
                "fewer samples each, and the side file's captions of a key go to all of them.",
                IsthmusWarning,
                stacklevel=2,
            )

    def _name_idle(self, rows: int) -> None:
        """One warning for each option that is for samples of another form than those, at most LOOKED_AT evenly spread
        ones, that were looked at."""
        given = [name for name in _FOR if getattr(self.form, name)]
        found: set[str] = set()
        for index in sorted({number * rows // LOOKED_AT for number in range(LOOKED_AT)}) if given else ():
            try:
                found |= {form for form in (self.form.form_of(self.rows[index]),) if form is not None}
            except DataError:
                continue  # met, and counted as bad, when it is visited
        for name in given:
            if found and not found & {*_FOR[name]}:
                warnings.warn(
                    f"source {self.name!r}: the option `{name}` changes nothing: it is for samples with "
                    f"`{'` or `'.join(_FOR[name])}`, and these have `{'`, `'.join(sorted(found))}`.",
                    IsthmusWarning,
                    stacklevel=2,
                )

    def _keys(self, rows: int) -> Iterator[str]:
        for index in range(rows):
            try:
                yield self.rows[index].key
            except DataError:
                continue  # met, and counted as bad, when it is visited

    def _count(self, rows: int) -> Iterator[tuple[int, int]]:
        lists, whole = 0, list[str]()
        for index in range(rows):
            try:
                row = self.rows[index]
                count, undivided = self.form.count(row), self.form.undivided(row)
            except DataError:
                count, undivided = 1, None  # met, and counted as bad, when it is visited
            else:
                lists += undivided is False
                whole += [row.id] if undivided else []
            yield from ((index, number) for number in range(count))
        if whole:
            self._name_undivided(whole, lists)

    def _name_undivided(self, whole: Sequence[str], lists: int) -> None:
        """Say which conversations stay one record. Raises ConfigError where no list of questions stands beside them, so
        that the option does nothing."""
        said = (
            f"source {self.name!r}: {self.form.divides} makes several records of a list of `questions`, and "
            f"{len(whole):,} samples ({whole[0]!r} the first) are conversations of more, which stay one record each"
        )
        if not lists:
            raise ConfigError(
                f"{said}. Take the option out: tasks score the last question, with the turns before it in the prompt, "
                "and the task `conversation` scores every one. Where a trained model's own recipe has it, leave that "
                "recipe's tasks aside: `isthmus eval MODEL --task vqa --data FILE`."
            )
        warnings.warn(f"{said}.", IsthmusWarning, stacklevel=2)

    def __len__(self) -> int:
        return len(self._places)

    def listing(self) -> Iterator[object]:
        """What a fingerprint reads beside complete samples."""
        yield self.form
        yield from self.rows.listing()

    def __getitem__(self, index: int) -> Record:
        place = self._places[index]
        row, number = place if isinstance(place, tuple) else (place, 0)
        return self.form.record(self.rows[row], number, self.name)


def _answers(given: object) -> tuple[str, ...]:
    """The accepted answers: one text, several, or VizWiz's and VQA's objects with an ``answer``. Raises DataError for
    none."""
    if isinstance(listed := unpacked(given, "answer"), list) and isinstance(given, str):
        warnings.warn(
            f"An answer is a list written into one field ({given[:60]}): its texts are read as answers that are all "
            "right, the first of the commonest is learnt.",
            IsthmusWarning,
            stacklevel=2,
        )
    items = listed if isinstance(listed, list) else [listed]
    answers = tuple(string(a.get("answer") if isinstance(a, Mapping) else a, "answer").strip() for a in items)
    if not answers:
        raise DataError("empty answer: a question has no answer; drop it")
    return answers


def picture_names(form: "Form", row: Row) -> tuple[str, ...]:
    """The pictures a row names: in its ``image`` field (or ``images``), else in the image parts of its messages."""
    given = form.value(row, "image")
    if given is None:
        given = row.values.get("images")
    if given is None and isinstance(turns := unpacked(form.value(row, "messages"), "messages"), list):
        parts = [
            p for t in turns if isinstance(t, Mapping) and isinstance(t.get("content"), list) for p in t["content"]
        ]
        given = [p for p in parts if isinstance(p, Mapping) and p.get("type") in PICTURE_PARTS]
    given = unpacked(given, "image")
    return flat([_name(item) for item in (given if isinstance(given, list) else [given])], "picture's name")


def _name(item: object) -> object:
    """A picture's name; others also write ``{"path": name}``, ``{"type": "image", "image": name}`` or OpenAI's
    ``{"type": "image_url", "image_url": {"url": name}}``. A part of a turn may have none: the row's field has it."""
    if not isinstance(item, Mapping):
        return item
    if isinstance(within := item.get("image_url"), Mapping):
        item = within
    name = next((item[key] for key in _NAMES if isinstance(item.get(key), str)), None)
    if name is None and item.get("type") not in PICTURE_PARTS:
        raise DataError(f"bad field: a picture is {dict(item)!r:.200}; its name is expected under {', '.join(_NAMES)}")
    return name


def flat(value: object, what: str = "caption") -> tuple[str, ...]:
    """All non-empty strings of a value, nested and serialised lists included, stripped. ``what`` they are is for the
    error."""
    if value is None:
        return ()
    if isinstance(value := unpacked(value), list | tuple):
        return tuple(text for item in value for text in flat(item, what))
    text = string(value, what).strip()
    return (text,) if text else ()


def _pair(item: object) -> tuple[object, object]:
    if isinstance(item, Mapping):
        return item.get("question"), item.get("answer")
    if isinstance(item, list) and len(item) == 2:
        return item[0], item[1]
    raise DataError("bad question: each item of the list must be [question, answer] or have these two fields")


def _pictures(row: Row, role: Role) -> list[Part]:
    return [visual(source, role) for source in row.images]
