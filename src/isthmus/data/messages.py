"""The messages form of a conversation (as chat APIs write it) to the parts of a Record."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.data.images import AnyImage, as_image
from isthmus.data.record import Image, Part, Text
from isthmus.data.video import PICTURES, VIDEOS, as_video, as_visual
from isthmus.errors import DataError

Message = Mapping[str, Any]
"""``{"role": "user", "content": "text"}``, or content as a list of ``{"type": "text"|"image"|"video", ...}`` parts."""

_ROLES = ("system", "user", "assistant")


def parts_of(messages: Sequence[Message]) -> list[Part]:
    """Parts in order; raises DataError naming the message for an unknown role or content, or a part without it."""
    parts: list[Part] = []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise DataError(f"message {number}: role {role!r} is not one of {', '.join(_ROLES)}.")
        pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(pieces, Sequence):
            raise DataError(f"message {number}: content must be a text or a list of parts, got {content!r}.")
        for piece in pieces:
            kind = piece.get("type") if isinstance(piece, Mapping) else None
            if kind in ("text", "image", "video") and piece.get(kind) is None:
                raise DataError(f"message {number}: a part of type {kind!r} lacks its field {kind!r}.")
            if kind == "text":
                parts.append(Text(str(piece["text"]), role=role))
            elif kind == "image" and role == "user":
                parts.append(as_image(piece["image"]))
            elif kind == "video" and role == "user":
                parts.append(as_video(piece["video"]))
            else:
                raise DataError(
                    f"message {number}: a {role} part must be text, or an image or video of the user's; got {piece!r}."
                )
    return parts


def part_of(thing: Part | AnyImage | str) -> Part:
    """A part as it is, a picture or clip, or what the user says.

    A str names a file or folder where one exists, but with white space in it is always text: a sentence may not change
    its meaning with the folder it is said in. Raises DataError for one that ends like a picture or video and is none.
    """
    if isinstance(thing, Text | Image):
        return thing
    if not isinstance(thing, str) or (len(thing.split()) == 1 and os.path.exists(thing)):
        return as_visual(thing)
    if len(thing.split()) == 1 and Path(thing).suffix.lower() in PICTURES | VIDEOS:
        raise DataError(f"no such file: {thing}; check the path, or give Text({thing!r}, role='user') to say it")
    return Text(thing, role="user")
