"""A language model's own chat template, cut into spans: what stands before, between and after the turns.

A template in Jinja says nothing of what is to be learnt. So known contents are rendered through it once, the pieces
around them are cut out, and a record is then put together from pieces and contents as by any other template: labels
are spans, no rendered record is ever searched. What was cut is held against the template's own output, id by id, on
one to four turns, with a system's text and without. A template that does more than stand around its contents (it
counts, dates, or writes a prompt otherwise than the turn) is refused for training, with the reason, and still gives
prompts: one has no labels and is rendered by the template itself. So is one sample where a template searches a text for
a word, as those that leave the thoughts out of earlier answers search for ``</think>``.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from isthmus.data.record import Image, Record
from isthmus.data.text import Rendered, Template, Turn, conversation_turns, encode, say, write_user
from isthmus.data.tokenizer import PLACE, Tokenizer
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.language.chat_template import TemplateTimeoutError, render_chat

OWN = "chat"
"""The name, among templates, of the one that came with the language model."""

_ROLES = ("system", "user", "assistant")
FIRST, LAST = "first question", "last answer"
"""Beside the roles: the turns at a conversation's ends, whose white space some templates treat in a way of its own."""
_ENDS = {"user": FIRST, "assistant": LAST}

_LOOKS_FOR = re.compile(
    r"""(?P<q>['"])(?P<word>(?:(?!(?P=q)).)+)(?P=q)\s+(?:not\s+)?in\b"""
    r"""|(?:\.(?:r?split|r?partition|r?find|r?index|count|startswith|endswith|remove(?:pre|suf)fix|replace)"""
    r"""|\|\s*replace)\(\s*(?P<p>['"])(?P<other>(?:(?!(?P=p)).)+)(?P=p)"""
)
"""Where a template's source tests whether a word is in a text, or takes a text apart there."""

_TRIMS = {
    "as it is": str,
    "stripped": str.strip,
    "stripped on the left": str.lstrip,
    "stripped on the right": str.rstrip,
    "without line breaks around it": lambda text: text.strip("\n"),
    "without line breaks before it": lambda text: text.lstrip("\n"),
}
"""What templates do to a content's ends, by what is said of it."""

_LEARNT = {"system": "Qxsystem7", "user": "Qxasked{}7", "assistant": "Qxsaid{}7"}
_CHECKED = {"system": "Be brief: 3 words.", "user": "What is no. {}?\n\n(of é, 東)", "assistant": "It's {}, a cube."}
"""Contents that are cut out, and others that what was cut is held against; ``{}`` is the turn's number."""

SWITCHES = r"""(?:{% set \w+ = (?:true|false|none|\d+|"[^"%]*") %})*"""
"""The lines of switches at a template's beginning, as :func:`chosen` writes them."""

_TODAY = "Qxtoday7"
_DATED = f"{{% macro strftime_now(form) %}}{_TODAY}{{% endmacro %}}"
"""A date that is known again, in Jinja."""

MARK = "<image>"
"""What templates that know of pictures write for one."""
_SHOWN: Mapping[str, object] = {"type": "image"}

_LIKE_A_TOKEN = re.compile(r"</?[^<>\s]+>|\[/?[A-Z_]+\]")
"""What people write special tokens like."""

Spoken = Sequence[tuple[str, str]]


class _NoCutError(Exception):
    """Why a template cannot be cut."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a template writes around contents: ``head`` before the system's text and ``open`` before the first question;
    ``before_answer`` before an answer that a question follows, ``before_last_answer`` before the last one, ``prompt``
    where the answer is to be written; ``next`` between an answer and a question, ``end`` at last. ``trims``: what
    becomes of each role's text, of FIRST and of LAST. Special tokens are in them as people write them."""

    head: str
    open: str
    before_answer: str
    before_last_answer: str
    prompt: str
    next: str
    end: str
    trims: Mapping[str, str] = field(default_factory=dict)

    def written(self, said: Spoken, *, prompt: bool) -> str:
        """A full conversation, to be compared with the template's."""
        out, system = self.head, said[0][0] == "system"
        if system:
            out += self.content(*said[0])
        out += self.open
        turns = said[1:] if system else said
        for number, (role, text) in enumerate(turns):
            left = len(turns) - number
            if role == "user":
                around = self.prompt if left == 1 else self.before_answer if left > 2 else self.before_last_answer
                out += self.content(role if number else FIRST, text) + (
                    self.before_answer if prompt and left > 1 else around
                )
            else:
                out += self.content(LAST if left == 1 else role, text) + (self.end if left == 1 else self.next)
        return out

    def content(self, role: str, text: str) -> str:
        """What the template makes of a role's text, ``role`` one of the three, FIRST or LAST."""
        return _TRIMS[self.trims.get(role, "as it is")](text)


class ChatForm:
    """The template that a tokenizer carries, as a template of :func:`isthmus.data.text.render`.

    ``bare`` and ``headed`` are its pieces without and with a system's text, or the reason why there are none; ``stop``
    is the token that ends a turn, if it could be learnt.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError for a tokenizer that carries none."""
        if tokenizer.chat_template is None:
            raise ConfigError(
                "This model's tokenizer carries no chat template of its own; name another one by template=NAME (on the "
                "command line --template NAME) or a file in Jinja (--template FILE.jinja)."
            )
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template
        self._names = {name: token for name, token in tokenizer.specials.items() if token is not None}
        added = tokenizer.added_tokens()
        self._special = re.compile(_any_of([text for text, token in added.items() if token.special]))
        words = {(w["word"] or w["other"]).replace("\\n", "\n") for w in _LOOKS_FOR.finditer(self.template)}
        self._looked_for = re.compile(_any_of([word for word in words - {*_ROLES} if word.strip()]))
        self._shown: dict[str, str] = {}
        self.stop: str | None = None
        self._in_parts = self._reads_parts()
        self.bare = self._learn(system=False)
        self.headed = self.bare if isinstance(self.bare, str) else self._learn(system=True)

    # Learning

    def _learn(self, *, system: bool) -> Pieces | str:
        try:
            pieces = self._trimmed(self._cut(system), system)
            self._check(pieces, system)
            stop = self._stop_of(pieces)
        except (_NoCutError, DataError) as error:
            return str(error)
        self.stop = stop
        return pieces

    def _reads_parts(self) -> bool:
        """Does the template leave out what is said as a text, and write what is said in parts?"""
        text = _LEARNT["user"]
        forms: tuple[object, ...] = (text, [{"type": "text", "text": text}])
        try:
            as_text, in_parts = (
                render_chat(self.template, [{"role": "user", "content": form}], self._names, prompt=True)
                for form in forms
            )
        except DataError:  # which of the two it takes is tried again for each conversation
            return False
        return text not in as_text and text in in_parts

    def _said(self, said: Spoken, *, prompt: bool, before: str = "") -> str:
        """What the template makes of a conversation, its source with ``before`` in front."""
        messages: list[dict[str, object]] = [{"role": role, "content": text} for role, text in said]
        parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
        template = before + self.template
        try:
            return render_chat(template, parts if self._in_parts else messages, self._names, prompt=prompt)
        except TemplateTimeoutError:
            raise
        except DataError:
            try:
                return render_chat(template, parts, self._names, prompt=prompt)
            except DataError:
                pass
            raise

    def takes_parts(self) -> bool:
        """Does the template refuse a content that is a text, or leave it out, and take a list of parts?"""
        if self._in_parts:
            return True
        try:
            render_chat(self.template, [{"role": "user", "content": _LEARNT["user"]}], self._names, prompt=True)
        except TemplateTimeoutError:
            raise
        except DataError:
            return True
        return False

    def _cut(self, system: bool) -> Pieces:
        conversation = _conversation(_LEARNT, 2, system)
        if "strftime_now" in self.template and _TODAY in self._said(conversation, prompt=False, before=_DATED):
            raise _NoCutError("it writes today's date, so what was learnt would be asked otherwise tomorrow")
        complete = self._between(self._said(conversation, prompt=False), conversation)
        prompted = self._between(self._said(conversation[:-1], prompt=True), conversation[:-1])
        head = complete.pop(0) if system else ""
        open_, before_answer, next_, before_last_answer, end = complete
        return Pieces(head, open_, before_answer, before_last_answer, prompted[-1], next_, end)

    def _between(self, text: str, said: Spoken) -> list[str]:
        pieces = []
        for role, content in said:
            if text.count(content) != 1:
                often = "leaves out" if content not in text else "writes more than once, or not in their order,"
                raise _NoCutError(f"it {often} what the {role} says")
            before, text = text.split(content)
            pieces.append(before)
        return [*pieces, text]

    def _trimmed(self, pieces: Pieces, system: bool) -> Pieces:
        """With what the template makes of each role's white space."""
        for role in _ROLES[not system :]:
            edged = {**_LEARNT, role: f"\n  {_LEARNT[role]}  \n"}
            said = _conversation(edged, 2, system)
            written = self._said(said, prompt=False)
            for how, at_end in itertools.product(_TRIMS, _TRIMS):
                found = replace(pieces, trims={**pieces.trims, role: how, _ENDS.get(role, role): at_end})
                if found.written(said, prompt=False) == written:
                    pieces = found
                    break
            else:
                raise _NoCutError(f"it changes the white space in what the {role} says by no rule that is known here")
        return pieces

    def _check(self, pieces: Pieces, system: bool) -> None:
        """Raises _NoCutError where the pieces and the template differ, in letters or in ids."""
        for pairs, prompt in itertools.product((1, 2, 3, 4), (False, True)):
            said = _conversation(_CHECKED, pairs, system)[: -1 if prompt else None]
            theirs = self._said(said, prompt=prompt)
            ours = pieces.written(said, prompt=prompt)
            where = f"{pairs} turn{'s' * (pairs > 1)}{' and a system text' * system}"
            if ours != theirs:
                raise _NoCutError(f"it writes {where} otherwise than fewer: {_difference(ours, theirs)}")
            marked = encode(self._bare(self._marks(ours)), self.tokenizer).ids
            if marked != self.tokenizer.backend.encode(theirs, add_special_tokens=False).ids:
                raise _NoCutError(f"the tokenizer reads {where} otherwise when special tokens are only the template's")
        prompted = _conversation(_CHECKED, 1, system)
        begin, full = (
            encode(self._bare(self._marks(pieces.written(s, prompt=p))), self.tokenizer).ids
            for s, p in ((prompted[:-1], True), (prompted, False))
        )
        if full[: len(begin)] != begin:
            raise _NoCutError(
                f"it asks for an answer by {pieces.prompt!r} and writes answers after {pieces.before_last_answer!r}, "
                "so the model would be asked otherwise than it learnt"
            )

    def _stop_of(self, pieces: Pieces) -> str:
        """The token that ends a turn."""
        found = self._special.search(pieces.end)
        if found is None and (meant := _LIKE_A_TOKEN.search(pieces.end)):
            raise _NoCutError(
                f"it ends an answer with {meant[0]!r}, which is no special token of this tokenizer, so a model could "
                "not learn where to stop; is it another model's template, or does the tokenizer lack the token?"
            )
        if found is None:
            raise _NoCutError("it writes no special token after an answer, so a model could not learn where to stop")
        return found[0]

    # Rendering

    def __call__(self, record: Record, prompt: bool) -> Rendered:
        """Raises DataError for a conversation that is none, or that the template refuses; ConfigError where something
        is to be learnt and the template cannot be cut."""
        turns = conversation_turns(record, prompt)
        system = "".join(str(part.text) for part in record.texts if part.role == "system")
        pieces = self.headed if system else self.bare
        if isinstance(pieces, Pieces) and not self._treated(pieces, system, turns, prompt):
            return self._put_together(pieces, system, turns, prompt)
        if prompt:
            return self._rendered(system, turns)
        if isinstance(self.bare, Pieces):
            raise DataError(
                f"bad system text: the model's own chat template cannot be cut with one: {pieces}; "
                "put it into the first question"
            )
        raise ConfigError(
            f"The model's own chat template cannot be trained with: {pieces}. It still serves for asking; "
            "give the stage a `template:` of another name."
        )

    def _treated(self, pieces: Pieces, system: str, turns: Sequence[Turn], prompt: bool) -> bool:
        """Does the template make something else of these texts than it stands around: for a word that it looks for in
        them, their length, their first letter? Raises DataError where that is so and they are to be learnt."""
        said = [*([("system", system)] if system else []), *((turn.role, turn.text) for turn in turns)]
        ours, theirs = pieces.written(said, prompt=prompt), self._said(said, prompt=prompt)
        if ours != theirs and not prompt:
            word = next((found[0] for _, text in said if (found := self._looked_for.search(text))), None)
            holds = "it is a text" if word is None else f"it holds {word!r}"
            raise DataError(
                f"bad text: {holds}, of which the model's own chat template makes something of its own "
                f"({_difference(ours, theirs)}); take it out, or train with a `template:` of another name"
            )
        return ours != theirs

    def _put_together(self, pieces: Pieces, system: str, turns: Sequence[Turn], prompt: bool) -> Rendered:
        out = self._bare("")
        marks = self._marks
        out.write(marks(pieces.head) + pieces.content("system", system) + marks(pieces.open))
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            at_end = number == 0 if turn.role == "user" else last
            said = _sliced(turn.said, pieces.content(_ENDS[turn.role] if at_end else turn.role, turn.text))
            if turn.role == "user":
                if turn.images and self.marks_pictures and not any(learn for _, learn in turn.said):
                    self._show(out, turn)
                elif turn.images:
                    write_user(out, turn, prompt, first=False)
                else:
                    say(out, said, prompt)
                if last:
                    out.write(marks(pieces.prompt))
                continue
            before_answer = pieces.before_last_answer if last and not prompt else pieces.before_answer
            given, own = (pieces.prompt, before_answer.removeprefix(pieces.prompt))
            if not before_answer.startswith(pieces.prompt):
                given, own = before_answer, ""
            out.write(marks(given))
            closing, rest = self._closed(pieces, pieces.end if last else pieces.next)
            say(out, ((marks(own), said[0][1]), *said, (marks(closing), said[-1][1])), prompt)
            out.write(marks(rest))
        return out

    @cached_property
    def marks_pictures(self) -> bool:
        """Does the template itself write ``<image>`` for a picture in a turn, as those of LLaVA folders do?"""
        try:
            return self._asked([_SHOWN, {"type": "text", "text": _LEARNT["user"]}]).count(MARK) == 1
        except DataError:
            return False

    def _asked(self, content: Sequence[Mapping[str, object]]) -> str:
        """What the template makes of one question's parts, by itself. Raises DataError for what it refuses, and where
        it writes something else around them than around a text."""
        text = render_chat(self.template, [{"role": "user", "content": content}], self._names, prompt=True)
        before, after = ("", "") if isinstance(self.bare, str) else (self.bare.open, self.bare.prompt)
        if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
            raise DataError("bad conversation: the chat template writes otherwise around a turn with pictures")
        return text[len(before) : len(text) - len(after)]

    def _show(self, out: Rendered, turn: Turn) -> None:
        """A turn with pictures where the template puts them, its text without white space at the turn's ends."""
        spoken = [n for n, part in enumerate(turn.parts) if not isinstance(part, Image) and part[0].strip()]
        content: list[Mapping[str, object]] = []
        for number, part in enumerate(turn.parts):
            if isinstance(part, Image):
                content.append(_SHOWN)
            elif spoken and spoken[0] <= number <= spoken[-1]:
                text = part[0].lstrip() if number == spoken[0] else part[0]
                at_end = number == spoken[-1] and not any(isinstance(later, Image) for later in turn.parts[number:])
                content.append({"type": "text", "text": text.rstrip() if at_end else text})
        chunks = self._asked(content).split(MARK)
        if len(chunks) != len(turn.images) + 1:
            raise DataError(
                f"bad text: with its pictures the turn has {len(chunks) - 1} {MARK} for {len(turn.images)} pictures; "
                f"take {MARK} out of the text"
            )
        # Special tokens that the template writes are tokens, those in the user's text letters.
        plain = self._special.search(turn.text) is not None
        for number, chunk in enumerate(chunks):
            if number:
                out.place(turn.images[number - 1])
            out.write(chunk if plain else self._marks(chunk))

    def _closed(self, pieces: Pieces, after: str) -> tuple[str, str]:
        """What of ``after`` the model writes itself, the end of its turn, and the rest; white space that the token
        takes in is the token's."""
        assert self.stop is not None  # pieces without an end are none
        place = pieces.end.index(self.stop) + len(self.stop)
        if after[:place] != pieces.end[:place]:
            return "", after
        if self.tokenizer.added_tokens()[self.stop].rstrip:
            place = len(after) - len(after[place:].lstrip())
        return after[:place], after[place:]

    def _rendered(self, system: str, turns: Sequence[Turn]) -> Rendered:
        """A prompt by the template itself. Raises DataError for a text with a special token, which would not be told
        from the template's own."""
        said: list[tuple[str, str]] = [("system", system)] if system else []
        images: list[Image] = []
        for turn in turns:
            plain = Rendered()
            if turn.images:
                write_user(plain, turn, True, first=False)
            text = PLACE.join(chunk.text for chunk in plain.chunks) if turn.images else turn.text
            said.append((turn.role, text))
            images += plain.images
        for role, text in said:
            if found := self._special.search(text):
                raise DataError(
                    f"bad text: the {role}'s text holds {found[0]!r}, a special token, and this model's chat template "
                    f"is rendered in one piece ({self.bare if isinstance(self.bare, str) else self.headed}); remove it"
                )
        chunks = self._marks(self._said(said, prompt=True)).split(PLACE)
        if len(chunks) != len(images) + 1:
            raise DataError(f"the chat template keeps {len(chunks) - 1} of {len(images)} pictures; show fewer")
        out = self._bare(chunks[0])
        for image, chunk in zip(images, chunks[1:], strict=True):
            out.place(image)
            out.write(chunk)
        return out

    def _bare(self, text: str) -> Rendered:
        out = Rendered(self._shown, begun=True)
        out.write(text)
        return out

    def _marks(self, text: str) -> str:
        """``text`` with a stand-in for each special token."""

        def mark(found: re.Match[str]) -> str:
            char = self.tokenizer.stand_in(found[0])
            self._shown[char] = found[0]
            return char

        return self._special.sub(mark, text)


_FORMS: WeakKeyDictionary[Tokenizer, ChatForm] = WeakKeyDictionary()


def chosen(template: str, tokenizer: Tokenizer) -> tuple[str, Tokenizer]:
    """The template's name, and the tokenizer with the switches set that stand after it: ``chat:enable_thinking=false``,
    several with commas. A switch that is set is a line of the template that the tokenizer carries from then on, so
    that it goes wherever the model goes. Raises ConfigError for a switch that the template does not know."""
    name, _, switches = template.partition(":")
    if name != OWN or not switches:
        return template, tokenizer
    text = tokenizer.chat_template or ""
    known = re.findall(r"\b([A-Za-z_]\w*) is (?:not )?defined", text) or ["none"]
    for switch in switches.split(","):
        key, equal, value = (part.strip() for part in switch.partition("="))
        if not equal or not re.search(rf"\b{re.escape(key)}\b", text) or not re.fullmatch(r"[\w .:/-]+", value):
            raise ConfigError(
                f"template: {switch!r} sets no switch of this model's chat template; {nearest(key, known)} Write "
                "chat:NAME=VALUE, several with commas."
            )
        plain = value.lower() in ("true", "false", "none") or value.isdecimal()
        line = f"{{% set {key} = {value.lower() if plain else json.dumps(value)} %}}"
        before = rf"^((?:{{% set \w+ = [^%]* %}})*?){{% set {re.escape(key)} = [^%]* %}}"
        text = line + ("\n" if text[:1] == "\n" else "") + re.sub(before, r"\1", text)
    return name, tokenizer.with_chat_template(text)


def form_of(template: str, tokenizer: Tokenizer) -> str | Template:
    """What :func:`isthmus.data.text.render` takes for the template of a processor: its name, or for OWN the form, which
    is learnt once per tokenizer. Raises ConfigError for OWN where the tokenizer carries none."""
    if template != OWN:
        return template
    if tokenizer not in _FORMS:
        _FORMS[tokenizer] = ChatForm(tokenizer)
    return _FORMS[tokenizer]


def default_template(tokenizer: Tokenizer, otherwise: str) -> str:
    """The template of a stage that names none: the language model's own, where it carries one."""
    return otherwise if tokenizer.chat_template is None else OWN


def with_stop(form: str | Template, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """``stop_ids`` and the token that ends a turn in the model's own template."""
    own = {tokenizer.id_of(form.stop)} if isinstance(form, ChatForm) and form.stop is not None else set()
    return tuple(sorted({*stop_ids, *(own - {tokenizer.eos_id})}))


def _conversation(texts: Mapping[str, str], pairs: int, system: bool) -> list[tuple[str, str]]:
    said = [("system", texts["system"])] if system else []
    for number in range(1, pairs + 1):
        said += [(role, texts[role].replace("{}", str(number))) for role in ("user", "assistant")]
    return said


def _sliced(said: Sequence[tuple[str, bool]], kept: str) -> list[tuple[str, bool]]:
    """The pieces of a text of which ``kept`` is left, white space at its ends gone."""
    text = "".join(piece for piece, _ in said)
    start = text.index(kept)
    end, place, found = start + len(kept), 0, []
    for piece, learn in said:
        found.append((piece[max(0, start - place) : max(0, end - place)], learn))
        place += len(piece)
    return found


def _difference(ours: str, theirs: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"{theirs[max(0, at - 10) : at + 30]!r} instead of {ours[max(0, at - 10) : at + 30]!r}"


def _any_of(tokens: Sequence[str]) -> str:
    """The leftmost token, of several there the longest, as the tokenizers library splits."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)"
