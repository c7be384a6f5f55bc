"""Turns of a conversation to parts of a Record: speakers, marks of pictures, the system's text."""

from collections.abc import Mapping, Sequence

from isthmus.data.record import Image, ImageSource, Part, Role, Text, Video
from isthmus.data.sources.cells import string
from isthmus.data.video import FileFrames, FolderFrames
from isthmus.errors import DataError, nearest

MARK = "<image>"
"""Where a picture stands in a user's turn; a question without one has its pictures before it."""
PICTURE_PARTS = ("image", "image_url")
"""The types of a turn's part that is a picture."""
Shown = ImageSource | FolderFrames | FileFrames
"""A picture or a clip of a row."""
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}


def conversation(turns: object, images: Sequence[Shown]) -> list[Part]:
    """LLaVA's ``from``/``value`` or chat ``role``/``content`` turns, ``<image>`` marking the pictures in order.

    A leading assistant turn is dropped. Raises DataError for unknown speakers, two turns of one in a row, or another
    number of marks than pictures.
    """
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        raise DataError("bad conversation: it must be a list of turns, each with 'from' and 'value'")
    parts: list[Part] = []
    waiting = list(images)
    marks, elsewhere, before = 0, 0, None
    for number, turn in enumerate(turns):
        speaker, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f"bad conversation: turn {number + 1} is from {speaker!r}; {nearest(str(speaker), _ROLES)}")
        role = _ROLES[speaker]
        if role == "assistant" and not parts:
            continue
        if role == "system" and parts:
            raise DataError(
                f"bad conversation: turn {number + 1} is the system's; its text stands before all turns, move it there"
            )
        if role == before:
            raise DataError(f"bad conversation: turns {number} and {number + 1} are both from {speaker!r}; join them")
        before = role
        text = string(_joined(value), "answer" if role == "assistant" else f"turn {number + 1}")
        if role == "user":
            marks += text.count(MARK)
            parts += marked_parts(text, role, waiting)
        else:
            parts.append(Text(text, role=role, learn=role == "assistant" and _trains(turn)))
            elsewhere += text.count(MARK) if role == "system" else 0
    if elsewhere and marks != len(images):
        raise DataError("bad conversation: the system's turn holds <image>; a picture stands in a user's turn, move it")
    if marks != len(images) and any("<video>" in str(part.text) for part in parts if isinstance(part, Text)):
        raise DataError("placeholder mismatch: the place of a clip is <image> here, as a picture's; replace <video>")
    same_number(marks, images)
    return parts


def _trains(turn: Mapping[str, object]) -> bool:
    """Whether an answer is learnt: not where its ``weight``, ``train`` or ``loss`` is 0 or false (OpenAI's habit)."""
    for name in ("weight", "train", "loss"):
        if (flag := turn.get(name)) is not None and flag not in (0, 1):
            raise DataError(f"bad conversation: a turn's {name} is {flag!r}; it must be 0 (only read) or 1 (learnt)")
        if flag is not None and not flag:
            return False
    return True


def after_system(system: object, parts: list[Part]) -> list[Part]:
    """The parts after the text of a row's ``system`` field. Raises DataError where a turn says another one."""
    if system is None or not (text := string(system, "system").strip()):
        return parts
    own = "".join(str(p.text) for p in parts if isinstance(p, Text) and p.role == "system").strip()
    if own and own != text:
        raise DataError(
            f"two system texts: the sample's field says {text[:60]!r} and its turn {own[:60]!r}; keep one of them"
        )
    return parts if own else [Text(text, role="system"), *parts]


def marked_parts(text: str, role: Role, waiting: list[Shown]) -> list[Part]:
    """The text in pieces, at each mark the next of the pictures that are ``waiting``, as long as there are some."""
    parts: list[Part] = []
    pieces = _trim(text.split(MARK))
    for place, piece in enumerate(pieces):
        if place and waiting:
            parts.append(visual(waiting.pop(0), role))
        if piece or len(pieces) == 1:
            parts.append(Text(piece, role=role))
    return parts


def picture_first(turn: list[Part]) -> list[Part]:
    """A turn's parts with its only picture before the text."""
    images = [part for part in turn if isinstance(part, Image)]
    if len(images) != 1 or turn[0] is images[0]:
        return turn
    text = "".join(str(part.text) for part in turn if isinstance(part, Text)).strip()
    return [*images, *([Text(text, role=images[0].role)] if text else [])]


def same_number(marks: int, images: Sequence[object]) -> None:
    if marks != len(images):
        raise DataError(
            f"placeholder mismatch: the text has {marks} <image> and the sample {len(images)} pictures; make them equal"
        )


def _joined(content: object) -> object:
    """Content as a list of parts (``{"type": "text" | "image" | "image_url", ...}``) as one text with its marks."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    pieces = []
    for part in content:
        kind = part.get("type")
        if kind != "text" and kind not in PICTURE_PARTS:
            raise DataError(
                f"bad conversation: a part of a turn is of type {kind!r}; it must be text, image or image_url"
            )
        pieces.append(string(part.get("text"), "text") if kind == "text" else MARK)
    return "".join(pieces)


def _trim(pieces: list[str]) -> list[str]:
    """Texts around pictures, without the white space at the two ends of the turn: there the marks have stood."""
    if len(pieces) > 1:
        for order, strip in ((range(len(pieces)), str.lstrip), (range(len(pieces) - 1, -1, -1), str.rstrip)):
            for place in order:
                pieces[place] = strip(pieces[place])
                if pieces[place]:
                    break
    return pieces


def visual(source: Shown, role: Role) -> Image:
    return Video(source, role=role) if isinstance(source, FolderFrames | FileFrames) else Image(source, role=role)
