"""From a request to what a model reads: parts, pictures, prompts, settings. Everything is checked here, before the
scheduler computes anything."""

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image as PilImage

from isthmus.data.collate import load_pixels
from isthmus.data.images import BytesImage, ImageLimits, image_size, open_image
from isthmus.data.messages import NO_ANSWER, misplaced
from isthmus.data.record import Example, Image, Part, Record, Role, Text, Video
from isthmus.data.tokenizer import END
from isthmus.errors import DataError
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.serving import schema
from isthmus.serving.errors import ApiError, bad_request
from isthmus.serving.fetch import RefusedError, Remote, fetch
from isthmus.serving.limits import Limits

DEFAULT_TOKENS = 512
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp|gif|bmp);base64,", re.IGNORECASE)
_CLIP_URL = re.compile(r"data:video/(?:jpeg|jpg|png|webp);base64,", re.IGNORECASE)
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a request's clip, undecoded."""

    pictures: tuple[BytesImage, ...]
    limits: ImageLimits

    def describe(self) -> str:
        return "clip"

    def read(self) -> list[PilImage.Image]:
        return [open_image(picture, self.limits) for picture in self.pictures]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads pictures and texts of requests within ``limits``; ``remote`` is none where nothing may be fetched."""

    limits: Limits
    remote: Remote | None = None

    def count(self, pictures: int) -> None:
        """Raises ApiError for more pictures than a request may have."""
        if pictures > self.limits.pictures:
            raise bad_request("too_many_pictures", f"A request may have at most {self.limits.pictures} pictures.")

    def picture(self, url: str, role: Role = "user") -> Image:
        """The picture at a URL, checked by its header. Raises ApiError."""
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            data = self._inline(url)
        elif scheme.startswith(("http:", "https:")):
            data = self._fetched(url)
        else:
            raise bad_request("invalid_image_url", "A picture's URL begins with data:, http: or https:.", "image_url")
        source = BytesImage(data, "picture")
        self._size(source)
        return Image(source, role)

    def _size(self, source: BytesImage) -> tuple[int, int]:
        try:
            return image_size(source, self.limits.images)
        except DataError:
            raise self._unreadable() from None

    def _inline(self, url: str) -> bytes:
        head = _DATA_URL.match(url)
        if head is None:
            raise bad_request(
                "invalid_image_url",
                "A data: URL of a picture begins with data:image/TYPE;base64, and TYPE is png, jpeg, webp, gif or bmp.",
                "image_url",
            )
        return _decoded(url[head.end() :])

    def clip(self, url: str, role: Role = "user") -> Video:
        """The clip whose frames a URL holds, checked by their headers. Raises ApiError."""
        head = _CLIP_URL.match(url)
        if head is None:
            raise bad_request(
                "invalid_video_url",
                "A clip's URL is data:video/TYPE;base64, and then its frames with commas between; TYPE is jpeg, png or "
                "webp.",
                "video_url",
            )
        frames = tuple(BytesImage(_decoded(each), "frame") for each in url[head.end() :].split(","))
        if len({self._size(frame) for frame in frames}) > 1:
            raise bad_request("invalid_video", "The frames of a clip are equal in size.", "video_url")
        key = hashlib.sha256(b"".join(hashlib.sha256(frame.data).digest() for frame in frames)).hexdigest()
        return Video(Frames(frames, self.limits.images), role, key)

    def _fetched(self, url: str) -> bytes:
        if self.remote is None:
            raise bad_request(
                "remote_images_off", "This server fetches no pictures; send them as data: URLs.", "image_url"
            )
        try:
            return fetch(url, self.remote)
        except RefusedError:
            raise bad_request(
                "image_not_fetched",
                "The picture was not fetched: its host is not allowed or not public, or it gave no picture in time.",
                "image_url",
            ) from None

    def _unreadable(self) -> ApiError:
        bounds = self.limits.images
        return bad_request(
            "invalid_image",
            "A picture cannot be read. It must be a sound JPEG, PNG, WebP, GIF or BMP of at most "
            f"{self.limits.picture:,} bytes and {self.limits.pixels:,} pixels, no side over "
            f"{bounds.side:,} or {bounds.aspect:g} times the other.",
            "image_url",
        )

    def parts(self, content: str | Sequence[schema.Part | schema.VideoPart | str], role: Role) -> list[Part]:
        """Text, pictures and clips of one turn, in order."""
        pieces = [content] if isinstance(content, str) else content
        self.count(sum(_pictures(piece) for piece in pieces))
        found: list[Part] = []
        for piece in pieces:
            if isinstance(piece, schema.ImagePart | schema.VideoPart):
                if role != "user":
                    raise bad_request("picture_of_another_role", "Only the user's turns may show pictures.", "messages")
                image = isinstance(piece, schema.ImagePart)
                found.append(self.picture(piece.image_url.url) if image else self.clip(piece.video_url.url))
            else:
                found.append(Text(checked(piece if isinstance(piece, str) else piece.text), role))
        return found

    def conversation(self, messages: Sequence[schema.Message]) -> Record:
        """A conversation that the model is to continue. Raises ApiError."""
        turns = [m for m in messages if _ROLES[m.role] != "system"]
        if not turns or turns[0].role != "user" or turns[-1].role != "user":
            raise bad_request(
                "invalid_conversation", "A conversation begins and ends with a turn of the user's.", "messages"
            )
        shown = [m.content for m in messages if not isinstance(m.content, str)]
        self.count(sum(_pictures(piece) for pieces in shown for piece in pieces))
        parts: list[Part] = []
        order: list[tuple[Role, bool]] = []
        for message in messages:
            role = _ROLES[message.role]
            turn = self.parts(message.content, role)
            order.append((role, any(isinstance(part, Text) for part in turn)))
            if role == "assistant" and not "".join(str(p.text) for p in turn if isinstance(p, Text)).strip():
                turn = [Text(NO_ANSWER, role)]
            parts += turn
        if problem := misplaced(order):
            raise bad_request("invalid_conversation", problem[0].upper() + problem[1:], "messages")
        return Record(id="request", parts=tuple(parts))

    def prompt(self, model: Model, record: Record) -> Example:
        """What the model reads of a record, its pictures decoded. Raises ApiError."""
        if record.images and model.processor.image is None:
            raise bad_request("no_vision", "This model reads only text; send no picture.", "messages")
        if any(isinstance(image, Video) for image in record.images) and not model.net.reads_clips:
            raise bad_request("no_clips", "This model reads single pictures; send no clip.", "messages")
        try:
            example = model.processor.prompt(record)
        except DataError:
            raise self._unfit(model, record) from None
        try:
            return load_pixels(example)
        except DataError:
            raise self._unreadable() from None

    def _unfit(self, model: Model, record: Record) -> ApiError:
        try:
            model.processor.uncut().prompt(record)
        except DataError:
            return bad_request(
                "invalid_prompt",
                "The model cannot read this: turns of user and assistant alternate, and none may be empty; some models "
                "read exactly one picture, or no question.",
                "messages",
            )
        return too_long()


def _pictures(piece: schema.Part | schema.VideoPart | str) -> int:
    """As how many pictures it counts: each frame of a clip is one."""
    if isinstance(piece, schema.VideoPart):
        return piece.video_url.url.count(",")
    return int(isinstance(piece, schema.ImagePart))


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("invalid_base64", "The picture is not valid base64.", "image_url") from None


def too_long() -> ApiError:
    return bad_request(
        "context_length_exceeded",
        "The prompt, with its pictures and the requested tokens, is longer than the model reads.",
        "messages",
    )


def checked(text: str) -> str:
    """The text itself. Raises ApiError for the one character that templates reserve."""
    if END in text:
        raise bad_request("reserved_character", "The character U+10FFFD is reserved; send none.")
    return text


def decoding(request: schema.Writing, tokens: int | None, choice: int, room: int | None) -> Decoding:
    """How one choice is written; without a seed each time otherwise, where it is drawn. ``room``: new tokens that fit
    after the prompt. Raises ApiError when none does, or fewer than were requested."""
    if room is not None and room < (tokens or 1):
        raise too_long()
    most = tokens or (DEFAULT_TOKENS if room is None else min(DEFAULT_TOKENS, room))
    first = secrets.randbelow(2**63) if request.seed is None else request.seed
    return Decoding(
        max_new_tokens=most,
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k,
        seed=(first + choice) % 2**63,
    )


def stops(request: schema.Writing) -> tuple[str, ...]:
    given = request.stop
    return () if given is None else (given,) if isinstance(given, str) else tuple(given)
