"""Net: what training, evaluation and models see of a system's ``nn.Module``, with a default for all that it may lack.

A net of a user's own inherits from it and says ``KIND``, ``CONFIG``, ``loss`` and what else it can do.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, cast, runtime_checkable

import torch
from torch import Tensor, nn

from isthmus.batch import CAUSAL, Batch, Term, Tokens
from isthmus.errors import CapabilityError
from isthmus.nn.precision import cast_weights
from isthmus.nn.tap import Tap
from isthmus.nn.vit import VisionEncoder
from isthmus.stage import StagedNet

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from isthmus.language import Decoding, Language, Prompt, Read
    from isthmus.nn.losses import Similarity


@runtime_checkable
class _Compares(Protocol):
    """The configuration of a net that says how its embeddings are compared."""

    @property
    def similarity(self) -> "Similarity": ...


class Net(StagedNet):
    """A net of parts, called ``vision``, ``connector``, ``language``, ``heads`` and ``text`` where it has them."""

    KIND: ClassVar[str] = "net"
    """The name of its system."""
    CONFIG: "ClassVar[type[DataclassInstance]]"
    """The class of its configuration, a frozen dataclass."""
    config: "DataclassInstance"
    vision: VisionEncoder
    language: "Language"
    contrasts: bool = False
    """Whether its loss needs the rows of all processes at once."""
    gradient_cache: bool = False
    """Whether it has :meth:`cached_loss`."""
    prompt_stream: str = CAUSAL
    """The stream that its visual tokens stand in: ``encoder`` before an encoder-decoder."""
    tap: Tap | None = None
    """What it reads of its vision encoder; none: features cannot be cached."""
    pinpoints: tuple[tuple[int, int], ...] = ()
    """Canvases of AnyRes; without them a picture is one view."""
    reads_clips: bool = False
    """Whether several frames can be one visual of its prompts."""

    @property
    def continues_prompts(self) -> bool:
        """Whether a decoder can write with it step by step. A net of a user's own may only know how to generate."""
        language = cast("Language | None", self.part("language"))
        return type(self).prompt is not Net.prompt and language is not None and language.writable is True

    @property
    def shares_beginning(self) -> bool:
        """Whether several prompts, or several endings of one, can go on from a beginning that is read once."""
        return self.continues_prompts

    def prompt(self, batch: Batch, past: "Read | None" = None) -> "Prompt":
        """What a decoder continues; after ``past``, one row that was read, where all the rows begin so."""
        raise CapabilityError(f"A {self.KIND} has no language model to continue a prompt with.")

    def score_endings(self, beginning: Batch, endings: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """(n,) log-probabilities of the labelled tokens of n endings of one row, which is read once."""
        return self.language.score_endings(self.prompt(beginning), endings, labels)

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the pictures that its vision encoder was made for; 0 of a net without one."""
        return 0 if self.part("vision") is None else self.vision.config.image_size

    def compared_by(self) -> "Similarity":
        """How the embeddings of a net that makes some are compared: as its configuration says, else by the cosine."""
        return self.config.similarity if isinstance(self.config, _Compares) else "cosine"

    def part(self, name: str) -> nn.Module | None:
        """The part of this name, such as ``language``; none where the net has no such part (now)."""
        return self._modules.get(name)

    def blocks(self) -> list[nn.Module]:
        """The blocks of its language model, each of which runs once in every loss: what is sharded one by one."""
        parts = [] if (language := self._modules.get("language")) is None else list(language.modules())
        block_classes = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
        return [part for part in parts if type(part).__name__ in block_classes]

    def towers(self) -> list[nn.Module]:
        """Its encoders, which run as often as a batch has shapes of pictures."""
        return [m for m in (self._modules.get("vision"), self._modules.get("text")) if m is not None]

    @classmethod
    def from_config(cls, values: Mapping[str, object]) -> Self:
        """From plain keys and values. Raises ConfigError for an unknown one."""
        from isthmus.config import strict

        return cls(strict(cls.CONFIG, values, cls.KIND))

    def loss(self, batch: Batch) -> Mapping[str, Term]:
        """Named terms of one batch."""
        raise CapabilityError(f"A {self.KIND} has no objective to train by.")

    def cached_loss(self, batches: Sequence[Batch]) -> Mapping[str, Term]:
        """Exact loss and gradients of the joined micro-batches of a loss that cannot be split; adds to ``.grad``."""
        raise CapabilityError(f"A {self.KIND} has no exact gradient cache.")

    def after_step(self) -> None:
        """Called after each update, for what must be held within bounds."""

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """R: visual tokens of a visual of that many pixels; 0 of a net that has none."""
        del height, width, frames
        return 0

    def embedded_tokens(self, height: int, width: int) -> int:
        """What a picture of that many pixels counts as where it becomes vectors: the connector's visual tokens, or the
        rows of the encoder (patches, class token) in a net without one; 0 of a net that reads none."""
        vision = self.part("vision")
        if (made := self.num_tokens(height, width)) or not isinstance(vision, VisionEncoder):
            return made
        rows, columns = vision.grid(height, width)
        return rows * columns + vision.config.class_token

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that many pixels: what an attention map is laid out by."""
        return self.vision.grid(height, width)

    def visual_features(self, pixels: Tensor) -> Tensor:
        """(n, F, 3, H, W) normalised pixels -> (n, F, P, Dv): what the connector reads, and a feature cache holds."""
        if self.tap is None:
            raise CapabilityError(f"A {self.KIND} reads no features that could be kept.")
        return self.tap.features(self.vision, pixels)

    def pooled_features(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, D): one vector per picture by the encoder alone."""
        return self.vision(pixels).pooled

    def cast(self, dtype: torch.dtype) -> Self:
        """The weights to ``dtype``; what must not be cast stays in float32."""
        cast_weights(self, dtype)
        return self

    if TYPE_CHECKING:  # what nets have by the capabilities that their system names, so that none has all of it

        def score(self, batch: Batch) -> Tensor: ...
        def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]: ...
        def logits(self, batch: Batch) -> Tensor: ...
        def attention(self, batch: Batch) -> list[list[Tensor]]: ...
        def embed_images(self, pixels: Tensor) -> Tensor: ...
        def embed_texts(self, tokens: Tokens) -> Tensor: ...
        def normed(self, pixels: Tensor) -> Tensor: ...
        def match_logits(self, vision: Tensor, text: Tokens) -> Tensor: ...
