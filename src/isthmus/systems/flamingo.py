"""Flamingo as a system: an encoder and a frozen language model from parts, two tokens more in the vocabulary."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from isthmus.data.chat import default_template
from isthmus.data.images import ImageTransform
from isthmus.data.interleave import NEW_TOKENS, InterleaveProcessor
from isthmus.data.processor import Processor
from isthmus.data.record import Example
from isthmus.models.flamingo import Flamingo
from isthmus.systems import peers
from isthmus.systems.base import HasNet, Parts, StageOptions, System, Tokenizers, model_of


class FlamingoSystem(System[Flamingo]):
    """2204.14198."""

    kind = "flamingo"
    title = "Flamingo"
    net = Flamingo
    new_tokens = NEW_TOKENS
    clips = True

    def capabilities(self, net: Flamingo) -> tuple[str, ...]:
        return (*super().capabilities(net), "attend", "vision_features")

    def configuration(self, own: dict[str, object], parts: Parts, tokenizers: Tokenizers) -> dict[str, object]:
        ids = (tokenizers.main.id_of(token) for token in self.new_tokens)
        return super().configuration(own, parts, tokenizers) | dict(zip(("end_id", "image_id"), ids, strict=True))

    def take(self, net: Flamingo, parts: Parts) -> Mapping[str, Tensor]:
        """The language model's own table stays as it is; rows of the new tokens are drawn around it."""
        if "language" not in parts:
            return super().take(net, parts)
        rest = {name: part for name, part in parts.items() if name != "language"}
        super().take(net, rest)
        net.language.lm.load_state_dict(model_of(parts, "language").net.language.lm.state_dict())
        net.language.start_new_rows()
        return {}

    def processor(
        self, net: Flamingo, tokenizers: Tokenizers, image: ImageTransform | None, stage: StageOptions
    ) -> Processor:
        assert image is not None
        if image.mode == "aspect":
            image = replace(image, patch=net.config.vision.patch_size)
        options = {
            "kind": InterleaveProcessor.kind,
            "image": image.to_dict(),
            "max_length": stage.max_length or net.language.context or 2048,
            "template": stage.template or default_template(tokenizers.main, "paper"),
            **stage.processor,
        }
        return self.open_processor(options, tokenizers.main, {})

    def never(self, net: Flamingo) -> tuple[int, ...]:
        """``<image>``, and what ends a turn."""
        return net.language.new_ids[1:]

    def peer_inputs(self, model: HasNet[Flamingo], example: Example, token: int | None) -> dict[str, Tensor]:
        """A tag stands for its picture already; beside it which picture a token sees, one column per picture."""
        (stream,) = example.streams.values()
        media_index = torch.tensor([stream.media_index])
        return {
            **peers.of_text(list(stream.ids)),
            "image_attention_mask": torch.stack([media_index == n + 1 for n in range(len(example.pixels))], -1).long(),
            "pixel_values": peers.pixels_of(example)[None],
        }
