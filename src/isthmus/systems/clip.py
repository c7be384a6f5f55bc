"""CLIP and SigLIP as a system: two towers trained from nothing, the text tower's vocabulary from the tokenizer."""

from typing import Any

import torch
from torch import Tensor

from isthmus.config import merged
from isthmus.data.images import ImageTransform
from isthmus.data.processor import ContrastiveProcessor, Processor
from isthmus.data.record import Example
from isthmus.errors import ConfigError
from isthmus.models.clip import Clip
from isthmus.systems import peers
from isthmus.systems.base import HasNet, Parts, StageOptions, System, Tokenizers


class ClipSystem(System[Clip]):
    """2103.00020, 2303.15343."""

    kind = "clip"
    title = "CLIP"
    pipeline = "zero-shot-image-classification"
    net = Clip
    parts = ("init",)

    def capabilities(self, net: Clip) -> tuple[str, ...]:
        return ("embed_images", "embed_texts", "similarity", "classify", "vision_features")

    def configuration(self, own: dict[str, object], parts: Parts, tokenizers: Tokenizers) -> dict[str, object]:
        tokenizer = tokenizers.main
        facts = {"vocab_size": tokenizer.vocab_size, "eot_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
        return merged(own, {"text": facts})

    def processor(
        self, net: Clip, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        self.no_options(stage)
        assert image is not None
        if stage.template is not None:
            raise ConfigError(f"Stage {stage.name!r}: a clip stage has no chat template; take `template` out.")
        return ContrastiveProcessor(tokenizers.main, image=image, context=stage.max_length or net.config.text.context)

    def prompt_limit(self, net: Clip) -> int | None:
        return None

    def peer_outputs(self, model: HasNet[Clip], peer: Any, example: Example, token: int | None) -> Tensor:
        """Both embeddings in a row."""
        ids = peers.text_ids(model.net.config.text, peer.config.text_config, example)
        images = peer.get_image_features(pixel_values=peers.pixels_of(example))
        texts = peer.get_text_features(input_ids=ids)
        # A version of transformers gives the tensor itself, a later one an output that holds it.
        rows = [part if isinstance(part, Tensor) else part.pooler_output for part in (images, texts)]
        return torch.cat([row.flatten(1) for row in rows], dim=1)[0].float()
