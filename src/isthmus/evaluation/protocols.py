"""What evaluation needs of models and records. It imports neither: anything of these shapes can be scored.

Shapes: N pictures, M texts, D width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor


@runtime_checkable
class TextPart(Protocol):
    """A piece of text of a record, a dataclass; ``text`` may hold alternatives, ``learn`` marks what is an answer."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def text(self) -> str | tuple[str, ...]: ...
    @property
    def role(self) -> str: ...
    @property
    def learn(self) -> bool: ...


@runtime_checkable
class Picture(Protocol):
    """A picture of a record; equal content key = equal picture."""

    def content_key(self) -> str: ...


class Sample(Protocol):
    """A record: a frozen dataclass of interleaved text and picture parts, with what scoring needs in ``meta``.

    ``meta["kind"]`` is the kind of question, ``meta["answers"]`` the accepted answers where they are more than the
    record's own answer, ``meta["class"]`` the class name for classification.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]

    @property
    def id(self) -> str: ...
    @property
    def parts(self) -> Sequence[object]: ...
    @property
    def images(self) -> Sequence[Picture]: ...
    @property
    def meta(self) -> Mapping[str, object]: ...


S = TypeVar("S", bound=Sample)
S_co = TypeVar("S_co", bound=Sample, covariant=True)


class Records(Protocol[S_co]):
    """A source of records: a list, or anything that reads the i-th one on access."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> S_co: ...


@runtime_checkable
class Answers(Protocol):
    """Writes text: what visual question answering needs."""

    def answer_records(self, records: Sequence[Sample], **decoding: object) -> list[str]:
        """One answer per record, in order. A record ends with the question; its pictures may be missing (blind)."""
        ...


@runtime_checkable
class Measures(Answers, Protocol):
    """Also gives how near another answer was."""

    def gaps(self, records: Sequence[Sample], **decoding: object) -> list[float]:
        """For each record the smallest distance of the two best tokens at any step of its answer."""
        ...


@runtime_checkable
class Weighs(Protocol):
    """Says how likely an answer is: what multiple choice by likelihood needs."""

    def score(self, parts: Sequence[object], candidates: Sequence[str]) -> list[float]:
        """Log-likelihood of each candidate as the answer to a record's parts."""
        ...


@runtime_checkable
class Matches(Protocol):
    """Says whether a text fits a picture: what image-text matching needs of a model with a head for it."""

    def match(self, image: Picture, text: str) -> float:
        """Higher is better; only the order matters."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """Puts pictures and texts into one space: what retrieval and zero-shot classification need."""

    def embed_images(self, images: Sequence[Picture]) -> Tensor:
        """(N, D); ``images`` are the picture parts of records."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(M, D)."""
        ...


@runtime_checkable
class MatchesPairs(Embeds, Protocol):
    """Reads a picture and a text together: what reranking needs."""

    def match_logits(self, images: Sequence[Picture], texts: Sequence[str], pairs: Tensor) -> Tensor:
        """(n,) logit that they belong together, for (n, 2) numbers of pictures and texts."""
        ...


@runtime_checkable
class HasVisionFeatures(Protocol):
    """Gives the features before the projection into the joint space: what a linear probe needs."""

    def vision_features(self, images: Sequence[Picture]) -> Tensor:
        """(N, D); ``images`` are the picture parts of records."""
        ...


@runtime_checkable
class HasProvenance(Protocol):
    """Says what its outputs depend on beside the weights, for an evaluation's manifest."""

    def provenance(self, records: Iterable[Sample], decoding: Mapping[str, object]) -> Mapping[str, object]:
        """Image transform, template, prompts of the ``records``, decoding in full."""
        ...
