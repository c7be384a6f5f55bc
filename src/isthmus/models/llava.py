"""LLaVA: Visual Instruction Tuning (Liu et al. 2023, 2304.08485), its version 1.5 (2310.03744), and 1.6's AnyRes.

    pixels (n, F, 3, H, W) ─ vision ─→ hidden state (n, F, P, Dv) ─ connector ─→ (n, R, D) ┐
                              (frozen)   feature_layer, patches only                        │ splice
    ids (B, T) with R places per picture ─ embed ─→ (B, T, D) ──────────────────────────────┴─→ (B, T, D)
                                                         language: causal over the merged rows ─→ next token

Legend: B rows, T tokens, n visuals of one shape, F frames, P patches, R visual tokens per visual, D width of the LM,
Dv of the features.

Version 1 projects each patch with one linear layer, version 1.5 with a two-layer MLP, from a larger picture. Visual
tokens are ordinary positions: plain causal attention, positions 0..T-1 over the merged row, no type embedding.
Version 1.6 (LLaVA-NeXT) reads a large picture as an overview and tiles, which stand in F's place; their tokens
are stitched to one map with a learnt newline after each row (nn/tiles.py).

Differs from the papers: any number of pictures per row and places anywhere in the text, from one code path; several
hidden states may be joined on channels; the vision encoder may be opened by a stage.
Differs from the original code: visual places are widened before the net sees a row, so truncation happens once and
never inside a picture; padding is known from lengths, so an unknown-word token is not masked out; blocks above the
tapped hidden state are kept but not computed; a row without pictures adds an empty slice of one dummy visual.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Batch, Places, Term, Visuals
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.language import Decoding, LanguageModel, LibraryConfig, Prompt, Read
from isthmus.models.published import tiny_llama, vicuna
from isthmus.net import Net
from isthmus.nn.attention_maps import patch_maps, self_attention
from isthmus.nn.connectors import Connector, build_connector
from isthmus.nn.splice import at_places, splice
from isthmus.nn.tap import Tap, trains
from isthmus.nn.tiles import PINPOINTS, arrange, check_pinpoints
from isthmus.nn.vit import VisionConfig, build_vision

STREAM = "lm"


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Vision encoder, projector and language model.

    ``feature_layer`` counts over the L+1 hidden states of the encoder (-2: the input of the last block); several are
    joined on channels. ``feature_select`` keeps the ``patch`` features or also the class token (``cls_patch``).
    ``projector`` names a connector, alone or as ``kind`` with options beside it; ``language`` is the configuration of
    a causal LM of transformers. ``pinpoints`` are the canvases (height, width) of AnyRes; without them a picture is one
    view.
    """

    vision: VisionConfig
    language: LibraryConfig
    projector: str | Mapping[str, object] = "mlp2x_gelu"
    feature_layer: int | tuple[int, ...] = -2
    feature_select: Literal["patch", "cls_patch"] = "patch"
    pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check_pinpoints(self.pinpoints, self.vision.image_size)
        if self.pinpoints and self.feature_select != "patch":
            raise ConfigError("pinpoints: tiles are stitched patch by patch, so feature_select must be 'patch'.")
        _ = self.tap  # refuses a hidden state that is not there

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.feature_layer if isinstance(self.feature_layer, tuple) else (self.feature_layer,)

    @property
    def tap(self) -> Tap:
        """What is read of the encoder."""
        cls_patch = self.feature_select == "cls_patch"
        return Tap(vision=self.vision, layers=self.feature_layers, class_token=cls_patch)

    @property
    def feature_width(self) -> int:
        """Dv: what the connector receives per patch."""
        return self.tap.width

    @classmethod
    def v1_7b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        return cls(vision=VisionConfig.vit_l_14(), projector="linear", language=vicuna("7b", vocab_size, version=1))

    @classmethod
    def v1_13b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        return cls(vision=VisionConfig.vit_l_14(), projector="linear", language=vicuna("13b", vocab_size, version=1))

    @classmethod
    def v1_5_7b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        """``vocab_size`` 32064 is the padded vocabulary of the transformers conversion."""
        return cls(vision=VisionConfig.vit_l_14_336(), language=vicuna("7b", vocab_size, version=1.5))

    @classmethod
    def v1_5_13b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        return cls(vision=VisionConfig.vit_l_14_336(), language=vicuna("13b", vocab_size, version=1.5))

    @classmethod
    def v1_6_7b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        """Vicuna's variant of LLaVA-NeXT."""
        return replace(cls.v1_5_7b(vocab_size), pinpoints=PINPOINTS)

    @classmethod
    def v1_6_13b(cls, vocab_size: int = 32000) -> "LlavaConfig":
        return replace(cls.v1_5_13b(vocab_size), pinpoints=PINPOINTS)

    @classmethod
    def tiny(cls, vocab_size: int = 2048, image_size: int = 64) -> "LlavaConfig":
        """What two CPU cores train in minutes on the scenes: 16 visual tokens for a 64x64 picture."""
        return cls(
            vision=VisionConfig(image_size=image_size, patch_size=16, width=160, layers=5, heads=5, mlp_width=640),
            language=tiny_llama(vocab_size),
        )


class Llava(Net):
    """A vision encoder, a projector and a language model. See the drawing above."""

    KIND = "llava"
    CONFIG = LlavaConfig
    config: LlavaConfig
    tap: Tap
    language: LanguageModel

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config, self.tap, self.pinpoints = config, config.tap, config.pinpoints
        language = LanguageModel.build(config.language)
        self.vision = build_vision(config.vision)
        self.connector = build_connector(config.projector, config.feature_width, language.width)
        self.language = language
        if config.pinpoints:
            self.image_newline = nn.Parameter(torch.randn(language.width) / math.sqrt(language.width))

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """R: the places that a visual of that many pixels needs in a row; with ``pinpoints`` that of one view."""
        grid = self.vision.grid(height, width)
        if self.tap.class_token:
            return self.connector.num_tokens(frames, (1, self.tap.tokens(grid)))
        return self.connector.num_tokens(frames, grid)

    def unreachable(self) -> tuple[str, ...]:
        """Parameters that the objective cannot reach: the encoder above the tapped hidden state."""
        return self.tap.unreachable(name for name, _ in self.named_parameters())

    def visual_tokens(self, batch: Batch) -> list[Float[Tensor, "_ D"]]:
        """One (R, D) per visual, in the batch's order of visuals."""

        def tokens(group: Visuals) -> Iterable[Tensor]:
            features = self.tap.read(self.vision, group)
            found = self.connector(features)
            return self._arranged(found, group, features.shape[1]) if self.pinpoints else found.unbind(0)

        return batch.per_visual(tokens)

    def _arranged(self, tokens: Tensor, group: Visuals, views: int, newline: Tensor | None = None) -> list[Tensor]:
        """(n, F·P, D) -> one (R, D) per picture, its tiles stitched by its size."""
        if group.sizes is None:
            raise DataError("an AnyRes model needs the size of each picture; its processor has image mode anyres.")
        newline = self.image_newline if newline is None else newline
        return [
            arrange(
                views_of_one.unflatten(0, (views, -1)),
                (int(size[0]), int(size[1])),
                self.config.pinpoints,
                tile=self.config.vision.image_size,
                newline=newline,
            )
            for views_of_one, size in zip(tokens, group.sizes, strict=True)
        ]

    def embed_prompt(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """(B, T, D): the ``lm`` stream embedded, with the visual tokens in their places.

        Raises DataError when a place and its visual disagree about the number of tokens.
        """
        tokens = batch.text[STREAM]
        places = batch.places.get(STREAM, Places.none())
        text_ids = tokens.ids.masked_fill(at_places(places, tokens.ids), 0)
        embeds = splice(self.language.embed(text_ids), self.visual_tokens(batch), places, names=batch.ids)
        if batch.visuals or not torch.is_grad_enabled():
            return embeds
        return embeds + self._nothing().to(embeds.dtype)

    def logits(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits; values on padding mean nothing."""
        return self.language.logits(self.embed_prompt(batch))

    def loss(self, batch: Batch) -> dict[str, Term]:
        """``{"lm": next-token cross-entropy}`` over the labelled tokens; places of visuals carry no label."""
        total, count = self.language.loss(self.embed_prompt(batch), batch.text[STREAM])
        return {STREAM: Term(total, count)}

    def score(self, batch: Batch) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of the labelled tokens."""
        return self.language.score(self.embed_prompt(batch), batch.text[STREAM])

    def prompt(self, batch: Batch, past: Read | None = None) -> Prompt:
        """What a decoder continues, after ``past`` where rows begin with what was read already."""
        return Prompt(self.embed_prompt(batch), batch.text[STREAM].lengths, past=past)

    @torch.no_grad()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """Continues every row; new tokens only, without the stop token. Pictures are encoded once."""
        return self.language.continued(self.prompt(batch), decoding)

    @torch.no_grad()
    def attention(self, batch: Batch) -> list[list[Float[Tensor, "layers _ _ _"]]]:
        """Per row and per its visual a map (layers, T, F, P): how the language model's attention to the visual, mean
        over heads, was shared among its patches. Raises CapabilityError for a connector that does not say which
        patches its tokens are made of."""
        made_of = batch.per_visual(self._made_of)
        weights = self_attention(self.language.lm, self.embed_prompt(batch))
        places = batch.places.get(STREAM, Places.none())
        return patch_maps(weights, places, batch.text[STREAM].lengths.tolist(), made_of)

    def _made_of(self, group: Visuals) -> list[Tensor]:
        """Per visual (R, F, P): which patches each of its tokens is made of."""
        if not isinstance(self.connector, Connector):
            raise CapabilityError(
                f"The connector {type(self.connector).__name__} does not say which patches its tokens are made "
                "of: derive it from isthmus.nn.connectors.Connector and give it patch_weights."
            )
        features = self.tap.read(self.vision, group)
        frames, own = features.shape[1:3]
        tokens = self.connector.patch_weights(features)
        if self.tap.class_token:
            tokens = tokens[..., 1:]
        if not self.pinpoints:
            return list(tokens)
        flat = tokens.flatten(2)
        arranged = self._arranged(flat, group, frames, flat.new_zeros(flat.shape[-1]))
        return [each.unflatten(-1, (frames, own)) for each in arranged]

    def _nothing(self) -> Tensor:
        """A zero that touches what pictures would touch, for batches without any.

        A step of text only is then a step for the connector too (its moments decay, as they do where one row of many
        has a picture), and parameters that are sharded over processes are gathered by all of them alike. The original
        code feeds a dummy picture.
        """
        size, parameter = self.config.vision.image_size, next(self.parameters())
        if trains(self.vision):
            features = self.visual_features(parameter.new_zeros(1, 1, 3, size, size))
        else:
            patches = self.tap.tokens(self.vision.grid(size, size))
            features = parameter.new_zeros(1, 1, patches, self.tap.width)
        nothing = self.connector(features)[:0].sum()
        return nothing + self.image_newline[:0].sum() if self.pinpoints else nothing
