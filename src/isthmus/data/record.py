"""Record and Example: the only two shapes of a sample.

A Record is what a source yields, nothing decoded yet: an ordered, interleaved list of parts. Caption pair, VQA
item, conversation, few-shot prompt and web document are all Records. An Example is a Record after the processor
of one system and one stage: token ids and labels built together, and the places of its visuals.
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from PIL import Image as PilImage

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["text", "system", "user", "assistant"]
"""``text`` is running text without speakers (captions, documents); the rest are the turns of a conversation."""

Raw = bytes | PilImage.Image | Sequence[PilImage.Image]
"""What a source gives: a picture's encoded bytes, a picture that is made rather than read, or a clip's frames."""


@runtime_checkable
class ImageSource(Protocol):
    """Anything that can hand over an encoded or raw picture on demand: a path, a tar member, a scene."""

    def describe(self) -> str:
        """Where it comes from, for error messages: ``cats.tar :: 0001.png``."""
        ...

    def read(self) -> bytes | PilImage.Image:
        """Encoded bytes, or a PIL image when the picture is made rather than read. Raises DataError."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text. ``text`` may hold alternatives (five captions): one is drawn by (seed, epoch, id)."""

    text: str | tuple[str, ...]
    role: Role = "text"
    learn: bool = False


@dataclass(frozen=True, slots=True)
class Image:
    """A picture's place in the record. ``key`` is its identity: a given id, or the sha256 of its bytes."""

    source: ImageSource
    role: Role = "user"
    key: str = ""

    def content_key(self) -> str:
        """The given key, else :meth:`key_of` what the source reads: this may open a file."""
        return self.key or self.key_of(self.source.read())

    @staticmethod
    def key_of(raw: Raw) -> str:
        """sha256 of encoded bytes, of mode, size and pixels of a made picture, or of those of a clip's frames."""
        if isinstance(raw, bytes):
            return hashlib.sha256(raw).hexdigest()
        digest = hashlib.sha256()
        for frame in [raw] if isinstance(raw, PilImage.Image) else raw:
            digest.update(f"{frame.mode}{frame.size}".encode() + frame.tobytes())
        return digest.hexdigest()

    def identity(self) -> Hashable:
        """What distinguishes the picture from others without opening it: its key, else its source. Equal identities are
        one picture; unlike ones may still have the same content."""
        if self.key:
            return self.key
        try:
            hash(self.source)
        except TypeError:  # a source of a user's own need not be hashable
            return id(self.source)
        return self.source


@runtime_checkable
class FrameSource(Protocol):
    """Anything that can hand over the frames of a clip on demand: a video file, a folder of pictures, a scene."""

    def describe(self) -> str:
        """Where it comes from, for error messages."""
        ...

    def read(self) -> Sequence[PilImage.Image]:
        """The frames in order, as a list of PIL images. Raises DataError."""
        ...


@dataclass(frozen=True, slots=True)
class Video(Image):
    """A clip's place in the record: a visual of several frames."""

    source: FrameSource


Part = Text | Image


@dataclass(frozen=True, slots=True)
class Record:
    """One sample of a source. ``meta`` carries what scoring needs: question kind, answers, class, keywords."""

    id: str
    parts: tuple[Part, ...]
    source: str = ""
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(p for p in self.parts if isinstance(p, Image))

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(p for p in self.parts if isinstance(p, Text))


@dataclass(frozen=True, slots=True)
class Span:
    """One token stream of an example; ``labels`` has the length of ``ids`` (IGNORE where nothing is learnt).

    ``media_index``: for each token the number from 1 of the example's visual that it may attend to, 0 for none
    (Flamingo's φ).
    """

    ids: list[int]
    labels: list[int] | None = None
    media_index: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """The ``visual``-th visual of the example stands at ``start`` in stream ``stream``, ``length`` tokens long."""

    visual: int
    stream: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Features:
    """(F, P, D) of a visual, standing where its pixels would."""

    values: "Tensor"


@dataclass(frozen=True, slots=True)
class Example:
    """A processed sample: streams of ids and labels, places of visuals, and pixels still undecoded.

    ``pixels`` are callables so that planning (lengths) costs no decoding: collate calls each with its visual.
    ``sizes``: height and width of each visual as it came, where the net must know them (AnyRes), else empty. ``keyed``:
    the loss or a cache distinguishes pictures by content, so a batch must carry their keys; False spares the hashing.
    """

    id: str
    source: str
    streams: Mapping[str, Span]
    visuals: tuple[Image, ...] = ()
    pixels: tuple[Callable[[Image], "Tensor | Features"], ...] = ()
    places: tuple[Place, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    keyed: bool = True

    @property
    def length(self) -> int:
        """Length of the longest stream in tokens: what batches are planned with."""
        return max((len(s.ids) for s in self.streams.values()), default=0)


def without_answer(record: Record) -> Record:
    """The record up to its last question: a trailing assistant turn, or running text to be learnt, is cut off."""
    parts = list(record.parts)
    while parts and (parts[-1].role == "assistant" or (isinstance(parts[-1], Text) and parts[-1].learn)):
        parts.pop()
    return replace(record, parts=tuple(parts))


def answer_of(record: Record) -> str:
    """The text of the trailing assistant turn: the truth an answer is held against; empty when there is none."""
    tail: list[str] = []
    for part in reversed(record.parts):
        if not isinstance(part, Text) or part.role != "assistant":
            break
        tail.append(part.text if isinstance(part.text, str) else part.text[0])
    return "".join(reversed(tail))
