"""The messages form of a conversation (as chat APIs write it) to the parts of a Record."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.data.images import as_image
from isthmus.data.record import Part, Text
from isthmus.data.video import as_video
from isthmus.errors import DataError

Message = Mapping[str, Any]
"""``{"role": "user", "content": "text"}``, or content as a list of ``{"type": "text"|"image"|"video", ...}`` parts."""

_ROLES = ("system", "user", "assistant")


def parts_of(messages: Sequence[Message]) -> list[Part]:
    """Parts in order; raises DataError naming the message for an unknown role or content."""
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
