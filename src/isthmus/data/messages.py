"""The messages form of a conversation (as chat APIs write it) to the parts of a Record."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from isthmus.data.images import AnyImage, as_image
from isthmus.data.record import Image, Part, Record, Role, Text
from isthmus.data.video import PICTURES, VIDEOS, as_video, as_visual
from isthmus.errors import DataError

NO_ANSWER = "(no answer)"
"""What an empty answer of the model's becomes in its own history: templates cannot write an empty turn."""

Message = Mapping[str, object]
"""``{"role": "user", "content": "text"}``, or content as a list of ``{"type": "text"|"image"|"video", ...}`` parts."""

_ROLES: tuple[Role, ...] = ("system", "user", "assistant")


def parts_of(messages: Sequence[Message]) -> list[Part]:
    """Parts in order; raises DataError naming the message for an unknown role or content, a part without it, and
    for two messages that would become one text."""
    parts: list[Part] = []
    turns: list[tuple[Role, bool]] = []
    for number, message in enumerate(messages):
        said, content = message.get("role"), message.get("content")
        role: Role | None = next((known for known in _ROLES if known == said), None)
        if role is None:
            raise DataError(f"message {number}: role {said!r} is not one of {', '.join(_ROLES)}.")
        first = len(parts)
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(pieces, Sequence):
            raise DataError(f"message {number}: content must be a text or a list of parts, got {content!r}.")
        for piece in pieces:
            part_type = piece.get("type") if isinstance(piece, Mapping) else None
            if part_type in ("text", "image", "video") and piece.get(part_type) is None:
                raise DataError(f"message {number}: a part of type {part_type!r} lacks its field {part_type!r}.")
            if part_type == "text":
                parts.append(Text(str(piece["text"]), role=role))
            elif part_type == "image" and role == "user":
                parts.append(as_image(piece["image"]))
            elif part_type == "video" and role == "user":
                parts.append(as_video(piece["video"]))
            else:
                raise DataError(
                    f"message {number}: a {role} part must be text, or an image or video of the user's; got {piece!r}."
                )
        turns.append((role, any(isinstance(part, Text) for part in parts[first:])))
    if problem := misplaced(turns):
        raise DataError(problem)
    return parts


def misplaced(turns: Sequence[tuple[Role, bool]]) -> str:
    """What is wrong with the order of messages, each a role and whether it holds text; empty where nothing is.

    A record has one system text, before all turns, and what one speaker says in a row is one turn: two messages of text
    would run into each other without a space.
    """
    for number, (role, spoken) in enumerate(turns):
        if role == "system" and number:
            return f"message {number}: the system's text stands in one message before all others; join or move it."
        if number and role == turns[number - 1][0] and spoken and turns[number - 1][1]:
            return f"messages {number - 1} and {number} are both the {role}'s; turns alternate: join them into one."
    return ""


def conversation(messages: Sequence[Message]) -> Record:
    """Messages to be answered, as a record. Raises DataError unless the last one is the user's."""
    if not messages or messages[-1].get("role") != "user":
        raise DataError(
            "a conversation must end with a question of the user's; the last message is "
            + (f"the {messages[-1].get('role')}'s." if messages else "missing.")
        )
    return Record(id="chat", parts=tuple(parts_of(messages)))


def part_of(thing: Part | AnyImage | str) -> Part:
    """A part as it is, a picture or clip, or what the user says.

    A str is a path where something is there and it is one word or ends like a picture or video; else it is text.
    Raises DataError for one word that ends so and is none.
    """
    if isinstance(thing, Text | Image):
        return thing
    if not isinstance(thing, str):
        return as_visual(thing)
    word, named = len(thing.split()) == 1, Path(thing).suffix.lower() in PICTURES | VIDEOS
    if (word or named) and os.path.exists(thing):
        return as_visual(thing)
    if word and named:
        raise DataError(f"no such file: {thing}; check the path, or give Text({thing!r}, role='user') to say it")
    return Text(thing, role="user")
