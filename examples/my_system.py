"""A system of one's own: a perceiver resampler whose tokens stand among the words, as in Idefics2 (2405.02246).

    pixels (n, F, 3, H, W) ─ vision ─→ (n, F, P, Dv) ─ resampler ─→ (n, R, Dv) ─ projection ─→ (n, R, D) ┐ splice
    ids (B, T) with R places per picture ─ embed ─→ (B, T, D) ────────────────────────────────────────────┴─→ language

Legend: B rows, T tokens, n visuals, F frames, P patches, R visual tokens of a visual, Dv and D widths of the encoder
and of the language model. A picture takes R places whatever its size, a clip too.

    isthmus train examples/my_system.yaml        # a language model and an encoder from nothing, about a minute
    isthmus chat runs/my_system --image picture.png "what colour is the cube?"
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batch import Batch, Places, Term
from isthmus.language import Decoding, LanguageModel, Prompt, Read
from isthmus.net import Net
from isthmus.nn.connectors.resampler import Resampler, ResamplerConfig
from isthmus.nn.splice import at_places, splice
from isthmus.nn.tap import Tap
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.systems.base import System

STREAM = "lm"


@dataclass(frozen=True, kw_only=True)
class MyConfig:
    """``language`` is the configuration of a causal LM of transformers; ``feature_layer`` counts over the encoder's
    hidden states."""

    vision: VisionConfig
    language: Mapping[str, Any]
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    feature_layer: int = -1


class MyConnector(nn.Module):
    """Features to the same few tokens for every picture, as wide as the language model's embeddings."""

    def __init__(self, vision_width: int, width: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.resampler = Resampler(vision_width, config)
        self.projection = nn.Linear(vision_width, width)

    def forward(self, features: Tensor) -> Tensor:
        """(n, F, P, Dv) -> (n, R, D)"""
        return self.projection(self.resampler(features))

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        return self.resampler.num_tokens(frames, grid)


class MyNet(Net):
    """See the drawing above."""

    KIND = "my-system"
    CONFIG = MyConfig

    def __init__(self, config: MyConfig) -> None:
        super().__init__()
        self.config = config
        self.tap = Tap(vision=config.vision, layers=(config.feature_layer,), patch_positions=True)
        self.language = LanguageModel.build(config.language)
        self.vision = VisionTransformer(config.vision)
        self.connector = MyConnector(config.vision.width, self.language.width, config.resampler)

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        return self.connector.num_tokens(frames, self.vision.grid(height, width))

    def unreachable(self) -> tuple[str, ...]:
        return self.tap.unreachable(name for name, _ in self.named_parameters())

    def embed_prompt(self, batch: Batch) -> Tensor:
        """(B, T, D): the ``lm`` stream with the visual tokens in their places."""
        tokens, places = batch.text[STREAM], batch.places.get(STREAM, Places.none())
        visuals = batch.per_visual(lambda group: self.connector(self.tap.read(self.vision, group)).unbind(0))
        words = self.language.embed(tokens.ids.masked_fill(at_places(places, tokens.ids), 0))
        return splice(words, visuals, places, names=batch.ids)

    def logits(self, batch: Batch) -> Tensor:
        return self.language.logits(self.embed_prompt(batch))

    def loss(self, batch: Batch) -> dict[str, Term]:
        total, count = self.language.loss(self.embed_prompt(batch), batch.text[STREAM])
        return {STREAM: Term(total, count)}

    def score(self, batch: Batch) -> Tensor:
        return self.language.score(self.embed_prompt(batch), batch.text[STREAM])

    def prompt(self, batch: Batch, past: Read | None = None) -> Prompt:
        """With this, prompts that begin alike share what is read, and answers stream and are served together."""
        return Prompt(self.embed_prompt(batch), batch.text[STREAM].lengths, past=past)

    @torch.no_grad()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        return self.language.continued(self.prompt(batch), decoding)


class MySystem(System):
    """What a recipe names: ``model: my_system.py:MySystem``. The defaults take a vision encoder and a language model
    from parts, or make them from ``config``, and lay records out for visual tokens among the words."""

    kind = "my-system"
    title = "Resampled visual tokens"
    net = MyNet
