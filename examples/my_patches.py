"""A system without a vision encoder: patches go straight into the language model, as in Fuyu. A picture of any shape
takes as many places as it has patches, and one more per row; maps say what an answer attended to.

    pixels (n, 1, 3, H, W) ─ cut ─→ (n, h, w, 3p²) ─ connector ─→ (n, h, w, D) ─ newlines ─→ (n, R, D) ┐ splice
    ids (B, T) with R = h·(w+1) places per picture ─ embed ─→ (B, T, D) ──────────────────────────────┴─→ language

Legend: B rows, T tokens, n pictures of one shape, p pixels along a patch, h and w patches down and across, D width.

    isthmus train examples/my_patches.yaml
    isthmus look runs/my_patches --image picture.png "what colour is the cube?" --out seen
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batch import Batch, Places, Term, Visuals
from isthmus.language import Decoding, LanguageModel, Prompt, Read
from isthmus.net import Net
from isthmus.nn.attention_maps import patch_maps, self_attention
from isthmus.nn.splice import at_places, splice
from isthmus.systems.base import System

STREAM = "lm"


@dataclass(frozen=True, kw_only=True)
class PatchesConfig:
    """``language`` is the configuration of a causal LM of transformers; ``patch`` is p."""

    language: Mapping[str, Any]
    patch: int = 16


class PatchesNet(Net):
    """See the drawing above."""

    KIND = "my-patches"
    CONFIG = PatchesConfig

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__()
        self.config, self.patch = config, config.patch
        self.language = LanguageModel.build(config.language)
        self.connector = nn.Linear(3 * config.patch**2, self.language.width)
        self.newline = nn.Parameter(torch.randn(self.language.width) * 0.02)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """h and w: what the maps of attention are laid out by."""
        return height // self.patch, width // self.patch

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """What the processor keeps as places for a picture of that many pixels."""
        rows, columns = self.grid(height, width)
        return frames * rows * (columns + 1)

    def visual_tokens(self, group: Visuals) -> Tensor:
        """(n, R, D) of pictures of one shape."""
        assert group.pixels is not None  # without an encoder there are no features that could be cached
        p = self.patch
        cut = group.pixels[:, 0].unfold(2, p, p).unfold(3, p, p)  # (n, 3, h, w, p, p)
        tokens = self.connector(cut.permute(0, 2, 3, 1, 4, 5).flatten(3))
        lines = self.newline.expand(*tokens.shape[:2], 1, -1)
        return torch.cat([tokens, lines], dim=2).flatten(1, 2)

    def embed_prompt(self, batch: Batch) -> Tensor:
        """(B, T, D): the ``lm`` stream with the visual tokens in their places."""
        tokens, places = batch.text[STREAM], batch.places.get(STREAM, Places.none())
        visuals = batch.per_visual(lambda group: self.visual_tokens(group).unbind(0))
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

    @torch.no_grad()
    def attention(self, batch: Batch) -> list[list[Tensor]]:
        """Per row and picture (layers, T, 1, h·w): how the attention to a picture is shared among its patches."""
        weights = self_attention(self.language.lm, self.embed_prompt(batch))
        places = batch.places.get(STREAM, Places.none())
        return patch_maps(weights, places, batch.text[STREAM].lengths.tolist(), batch.per_visual(self._made_of))

    def _made_of(self, group: Visuals) -> list[Tensor]:
        """Per picture (R, 1, h·w): each token is one patch, and a newline none."""
        assert group.pixels is not None
        rows, columns = self.grid(*group.pixels.shape[-2:])
        patches = torch.eye(rows * columns).unflatten(0, (rows, columns))
        made = torch.cat([patches, patches.new_zeros(rows, 1, rows * columns)], dim=1)
        return [made.flatten(0, 1)[:, None]] * len(group.index)


class Patches(System):
    """Nothing but a language model, so its parts name no encoder; maps are one thing more that it can do."""

    kind = "my-patches"
    title = "Patches in the language model"
    net = PatchesNet
    parts = ("language", "init")

    def capabilities(self, net: Net) -> tuple[str, ...]:
        return (*super().capabilities(net), "attend")
