"""One tower of a CLIP or SigLIP as a system. They are opened, not trained."""

from typing import Any

from torch import Tensor

from isthmus.batch import Batch
from isthmus.data.images import ImageTransform
from isthmus.data.processor import ImagesProcessor, Processor, TextsProcessor
from isthmus.data.record import Example
from isthmus.models.towers import ImageEncoder, TextEncoder
from isthmus.systems import peers
from isthmus.systems.base import HasNet, StageOptions, System, Tokenizers


class ImageEncoderSystem(System[ImageEncoder]):
    """A vision tower alone."""

    kind = "image_encoder"
    title = "Image encoder"
    pipeline = "image-feature-extraction"
    net = ImageEncoder
    parts = ()

    def capabilities(self, net: ImageEncoder) -> tuple[str, ...]:
        """Embeddings only where the tower reaches the space that texts share; nothing at all where it pools nothing and
        serves as a part of other models only."""
        pool = net.config.vision.pool
        if pool == "none":
            return ()
        joint = net.config.embed_dim is not None or pool == "attention"
        return ("embed_images", "vision_features") if joint else ("vision_features",)

    def processor(
        self, net: ImageEncoder, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        self.no_options(stage)
        assert image is not None
        return ImagesProcessor(image)

    def prompt_limit(self, net: ImageEncoder) -> int | None:
        return None

    def outputs(self, net: ImageEncoder, batch: Batch) -> list[Tensor]:
        """The embedding, or of a tower that pools nothing its last hidden state."""
        pixels = peers.pictures(batch)
        if net.config.vision.pool == "none":
            return list(net.vision(pixels, layers=(-1,), pooled=False).layers[0].flatten(1).float())
        return list(net.embed_images(pixels).float())

    def peer_outputs(self, model: HasNet[ImageEncoder], peer: Any, example: Example, token: int | None) -> Tensor:
        pixels = peers.pixels_of(example)
        if model.net.config.vision.pool == "none":
            return peers.before_norm(peer, pixels).flatten().float()
        return peers.vector(peer(pixel_values=pixels))


class TextEncoderSystem(System[TextEncoder]):
    """A text tower alone."""

    kind = "text_encoder"
    title = "Text encoder"
    pipeline = "feature-extraction"
    net = TextEncoder
    parts = ()

    def capabilities(self, net: TextEncoder) -> tuple[str, ...]:
        return ("embed_texts",)

    def processor(
        self, net: TextEncoder, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        self.no_options(stage)
        return TextsProcessor(tokenizers.main, context=stage.max_length or net.config.text.context)

    def prompt_limit(self, net: TextEncoder) -> int | None:
        return None

    def outputs(self, net: TextEncoder, batch: Batch) -> list[Tensor]:
        return list(net.embed_texts(batch.text["text"]).float())

    def peer_outputs(self, model: HasNet[TextEncoder], peer: Any, example: Example, token: int | None) -> Tensor:
        return peers.vector(peer(input_ids=peers.text_ids(model.net.config.text, peer.config, example)))
