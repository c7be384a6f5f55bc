"""Flamingo: a Visual Language Model for Few-Shot Learning (Alayrac et al. 2022, 2204.14198).

    pixels (n, F, 3, H, W) ─ vision ─→ (n, F, P, d) ─ connector: resampler ─→ (n, R, d) ─→ media (B, N, R, d)
                             (frozen)   feature_layer, patches                                │ keys, values
    ids (B, T) with one <image> per visual ─ embed ─→ (B, T, D) ─→ [xattn] ─ layer ─→ … ─→ [xattn] ─ layer ─→ head
                                             (frozen, but the new tokens' rows)  gated; the layers are frozen

Legend: B rows, T tokens, N visuals per row, n visuals of one shape, F frames, P patches, R visual tokens per visual,
d width of the features, D width of the LM.

p(y | x) = Π p(y_l | y_<l, x_≤l): text token l attends, by gated cross-attention, to the R visual tokens of the last
image before it and at no other; earlier images reach it through the LM's own attention. A visual costs R tokens of
cross-attention whatever its size and length, and one token of the LM's context.

Differs from the paper: ``<image>`` is a token with a row of its own, like ``<|endofchunk|>`` (OpenFlamingo); the vision
encoder is a ViT, and Chinchilla's place is taken by any causal LM. Differs from OpenFlamingo: only the new tokens' rows
train, not the full table under a mask; a row with other than as many tags as images is refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Batch, Term, Visuals
from isthmus.errors import ConfigError
from isthmus.interleave import InterleavedLanguageModel, MediaContext, media_of
from isthmus.language import Decoding, LibraryConfig, Prompt, Read
from isthmus.models.published import tiny_llama
from isthmus.net import Net
from isthmus.nn.connectors.resampler import Resampler, ResamplerConfig
from isthmus.nn.gated import GatedBlock, GatedConfig, media_index
from isthmus.nn.tap import Tap
from isthmus.nn.vit import VisionConfig, build_vision

STREAM = "lm"


@dataclass(frozen=True, kw_only=True)
class FlamingoConfig:
    """Vision encoder, resampler, gated blocks and language model.

    A gated block stands before LM layer i when ``i % every == offset``: offset 0 is the paper's, ``every - 1``
    OpenFlamingo's. ``end_id`` and ``image_id`` are the ids of ``<|endofchunk|>`` and ``<image>``. ``media`` is what a
    token sees: the ``previous`` image, or ``all`` up to it (the paper's ablation). With ``class_token`` the resampler
    reads the encoder's class token beside the patches (IDEFICS). ``turn_id`` is the id of a third new token, which ends
    every turn (IDEFICS-instruct). ``feature_layer`` counts over the encoder's L+1 hidden states: -1, the last before
    the final norm, is the paper's; a class token's encoder teaches its last patches least (LLaVA reads -2).
    ``patch_positions`` adds position embeddings to what the resampler reads; in the paper only the encoder has them.
    """

    vision: VisionConfig
    language: LibraryConfig
    end_id: int
    image_id: int
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    xattn: GatedConfig = field(default_factory=GatedConfig)
    every: int = 1
    offset: int = 0
    media: Literal["previous", "all"] = "previous"
    feature_layer: int = -1
    patch_positions: bool = False
    class_token: bool = False
    turn_id: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.offset < self.every:
            raise ConfigError(
                f"gated blocks before every {self.every}th layer with offset {self.offset}: give every >= 1 and an "
                "offset from 0 to every - 1."
            )
        _ = self.tap  # refuses a hidden state that is not there

    @property
    def tap(self) -> Tap:
        """What is read of the encoder; pictures of other sizes than its own get its position table interpolated."""
        return Tap(
            vision=self.vision,
            layers=(self.feature_layer,),
            class_token=self.class_token,
            patch_positions=self.patch_positions,
            interpolate="hf",
        )

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The ids with rows of their own beside the language model's table."""
        return (self.end_id, self.image_id, *(() if self.turn_id is None else (self.turn_id,)))

    @classmethod
    def flamingo_3b(cls) -> "FlamingoConfig":
        return _paper(width=2048, layers=24, heads=16, every=1)

    @classmethod
    def flamingo_9b(cls) -> "FlamingoConfig":
        """By the paper's table: 40 layers, 10 blocks. (Its 7.1B language model has room for 32, see docs.)"""
        return _paper(width=4096, layers=40, heads=32, every=4)

    @classmethod
    def flamingo_80b(cls) -> "FlamingoConfig":
        return _paper(width=8192, layers=80, heads=64, every=7)

    @classmethod
    def open_flamingo_3b(cls) -> "FlamingoConfig":
        """On MPT-1B's sizes; its released weights also norm queries and keys, which the library's MPT does not."""
        return _open(_mpt(width=2048, layers=24, heads=16), every=1)

    @classmethod
    def open_flamingo_4b(cls) -> "FlamingoConfig":
        """On RedPajama-INCITE-3B."""
        sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
        neox = {"model_type": "gpt_neox", "vocab_size": 50432, **sizes, "use_parallel_residual": False}
        return _open({**neox, "rotary_pct": 1.0}, every=2)

    @classmethod
    def open_flamingo_9b(cls) -> "FlamingoConfig":
        """On MPT-7B."""
        return _open(_mpt(width=4096, layers=32, heads=32), every=4)

    @classmethod
    def tiny(cls, vocab_size: int = 1024) -> "FlamingoConfig":
        """What two CPU cores train in minutes on the scenes: 9 patches to 9 latents, a block before every layer."""
        return cls(
            vision=VisionConfig(image_size=63, patch_size=21, width=160, layers=5, heads=5, mlp_width=640),
            language=tiny_llama(vocab_size, layers=4, heads=4),
            end_id=vocab_size,
            image_id=vocab_size + 1,
            resampler=ResamplerConfig(layers=2, latents=9, heads=5, head_width=32, frames=8),
            xattn=GatedConfig(heads=6, head_width=32),
        )


def _paper(*, width: int, layers: int, heads: int, every: int) -> FlamingoConfig:
    """Table 5. A ViT of the same width and nearly the same size stands in for NFNet-F6, whose last stage gives a tenth
    of the side in cells of 1536 channels; a GPT-NeoX of the same sizes stands in for Chinchilla."""
    return FlamingoConfig(
        vision=VisionConfig(image_size=320, patch_size=32, width=1536, layers=15, heads=24, mlp_width=6144),
        language={
            "model_type": "gpt_neox",
            "vocab_size": 32000,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 2048,
        },
        end_id=32000,
        image_id=32001,
        resampler=ResamplerConfig.paper(),
        xattn=GatedConfig.paper(heads),
        every=every,
    )


def _open(language: LibraryConfig, *, every: int) -> FlamingoConfig:
    """OpenFlamingo: CLIP ViT-L/14, 8 heads of 64 everywhere, blocks before the last of each group of layers."""
    return FlamingoConfig(
        vision=VisionConfig.vit_l_14(),
        language=language,
        end_id=50277,
        image_id=50278,
        resampler=ResamplerConfig.open_flamingo(),
        xattn=GatedConfig.open_flamingo(),
        every=every,
        offset=every - 1,
    )


def _mpt(*, width: int, layers: int, heads: int) -> dict[str, object]:
    return {"model_type": "mpt", "vocab_size": 50432, "d_model": width, "n_layers": layers, "n_heads": heads}


class Flamingo(Net):
    """A vision encoder, a resampler, gated blocks and a language model. See the drawing above."""

    KIND = "flamingo"
    CONFIG = FlamingoConfig
    config: FlamingoConfig
    tap: Tap
    language: InterleavedLanguageModel

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        self.config, self.tap = config, config.tap
        self.reads_clips = config.resampler.frames > 0
        language = InterleavedLanguageModel.build(config.language, config.new_ids)
        layers = [i for i in range(len(language.decoder_layers())) if i % config.every == config.offset]
        if not layers:
            raise ConfigError(
                f"no gated block fits: every {config.every}, offset {config.offset}, and the language model has "
                f"{len(language.decoder_layers())} layers. Make `every` smaller."
            )
        width = language.lm.config.get_text_config().hidden_size
        self.vision = build_vision(config.vision)
        self.connector = Resampler(config.vision.width, config.resampler)
        self.xattn = nn.ModuleList(GatedBlock(width, config.vision.width, config.xattn) for _ in layers)
        self.language = language
        language.insert(dict(zip(layers, self.xattn, strict=True)))  # type: ignore[arg-type]

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """R: what a visual of that many pixels costs in cross-attention; of the LM's context it takes one token."""
        return self.connector.num_tokens(frames, self.vision.grid(height, width))

    def unreachable(self) -> tuple[str, ...]:
        """Parameters that the objective cannot reach: the encoder above the tapped hidden state."""
        return self.tap.unreachable(name for name, _ in self.named_parameters())

    def pooled_features(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n D"]:
        """(n, 3, H, W) -> (n, d): one vector per picture, by which similar examples are found (RICES)."""
        pooled = self.vision(pixels, interpolate="hf").pooled
        return self.visual_features(pixels[:, None])[:, 0].mean(1) if pooled is None else pooled

    def visual_tokens(self, batch: Batch) -> list[Float[Tensor, "R d"]]:
        """One (R, d) per visual, in the batch's order of visuals, whatever their sizes and lengths."""
        return batch.per_visual(lambda group: self.connector(self.tap.read(self.vision, group)).unbind(0))

    def media(self, batch: Batch) -> Float[Tensor, "B N R d"]:
        """(B, N, R, d): each row's visuals in the order of their tags, zeros after the last; N is at least 1.

        A batch without visuals gets one made of zeros that nobody sees, so that every open parameter is touched.
        """
        tokens, rows = self.visual_tokens(batch), _order(batch)
        if not tokens:
            nothing = next(self.connector.parameters()).new_zeros(1, 1, 1, self.config.vision.width)
            return self.connector(nothing)[None].expand(len(batch), -1, -1, -1)
        absent = torch.zeros_like(tokens[0])
        longest = max(map(len, rows))
        return torch.stack([torch.stack([*(tokens[n] for n in row), *[absent] * (longest - len(row))]) for row in rows])

    def media_context(self, batch: Batch, past: Read | None = None) -> MediaContext:
        """What the gated blocks attend to in this batch; after ``past``, one row that was read, its images too. Raises
        DataError for a row with more tags than images, or fewer."""
        stream, counts = batch.text[STREAM], [len(row) for row in _order(batch)]
        tags, media = stream.ids == self.config.image_id, self.media(batch)
        before, base = None if past is None else media_of(past.attended), None
        if before is not None and (known := int(before.media_index[0, -1])):
            # The beginning has `known` images: those of the batch's own rows are numbered, and stand, after them.
            counts = [known + own for own in counts]
            base = torch.full((len(batch),), known, device=tags.device)
            media = torch.cat([before.media.expand(len(batch), -1, -1, -1), media], dim=1)
        checked = media_index(tags & stream.mask, counts=counts, base=base, names=batch.ids)
        # A training row may bring an index of its own: its processor drew whether a token looks back or ahead (p_next).
        index = checked if stream.media_index is None else stream.media_index
        start = 0 if past is None else past.lengths[0]
        return MediaContext(
            media=media, media_index=index, start=start, mode=self.config.media, before=None if base is None else before
        )

    def embed_prompt(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The ``lm`` stream embedded, (B, T, D)."""
        return self.language.embed(batch.text[STREAM].ids)

    def logits(self, batch: Batch) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits; values on padding mean nothing."""
        with self.language.attending_to(self.media_context(batch)):
            return self.language.logits(self.embed_prompt(batch), batch.text[STREAM].lengths)

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Next-token cross-entropy over the labelled tokens: ``lm``, or one weighted term ``lm/source`` per source.

        The step's loss is Σ_m λ_m · mean over the labelled tokens of source m (sec. 3.3, eq. 2).
        """
        with self.language.attending_to(self.media_context(batch)):
            nll, row = self.language.label_nll(self.embed_prompt(batch), batch.text[STREAM])
        if not batch.loss_weights:
            return {STREAM: Term(nll.sum(), len(nll))}
        terms = {}
        for source in dict.fromkeys(batch.sources):
            own = torch.tensor([s == source for s in batch.sources], device=row.device)[row]
            terms[f"{STREAM}/{source}"] = Term(nll[own].sum(), int(own.sum()), weight=batch.loss_weights[source])
        return terms

    def score(self, batch: Batch) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of the labelled tokens."""
        with self.language.attending_to(self.media_context(batch)):
            return self.language.score(self.embed_prompt(batch), batch.text[STREAM])

    def prompt(self, batch: Batch, past: Read | None = None) -> Prompt:
        """What a decoder continues, with what it attends to: the images of ``past`` too, where rows begin so."""
        return Prompt(self.embed_prompt(batch), batch.text[STREAM].lengths, self.media_context(batch, past), past)

    @torch.no_grad()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """Continues every row up to ``<|endofchunk|>``: the new tokens only. Pictures are encoded, and their keys and
        values computed, once; ``<image>`` is never generated."""
        return self.language.continued(self.prompt(batch), decoding)

    @torch.no_grad()
    def attention(self, batch: Batch) -> list[list[Float[Tensor, "layers _ _ _"]]]:
        """Per row and per its visual a map (layers, T, F, P): how much each token attended to each patch.

        The gated block's attention to the visual tokens (mean over heads) times what each visual token was made of, by
        the resampler's last layer. A token that does not see the visual has zeros, else its map sums to 1.
        """

        def shares(group: Visuals) -> Iterable[Tensor]:
            weights = self.connector.patch_weights(self.tap.read(self.vision, group))[..., int(self.tap.class_token) :]
            return (weights / weights.sum((-2, -1), keepdim=True).clamp(min=1e-12)).unbind(0)

        patches = batch.per_visual(shares)
        context = self.media_context(batch)
        context.recorded = []
        with self.language.attending_to(context):
            self.language.hidden(self.embed_prompt(batch))
        heat = torch.stack([weights for _, weights in context.recorded], dim=1)  # (B, layers, T, N·R)
        heat = heat.unflatten(-1, context.media.shape[1:3])
        lengths = batch.text[STREAM].lengths.tolist()
        return [
            [
                torch.einsum("ltr,rfp->ltfp", heat[row, :, : lengths[row], place].float(), patches[number].float())
                for place, number in enumerate(numbers)
            ]
            for row, numbers in enumerate(_order(batch))
        ]


def _order(batch: Batch) -> list[list[int]]:
    """For each row its visuals' numbers in the order of their places, else of the batch."""
    rows: list[list[int]] = [[] for _ in range(len(batch))]
    if STREAM in batch.places:
        p = batch.places[STREAM]
        for row, _, visual in sorted(zip(p.row.tolist(), p.start.tolist(), p.visual.tolist(), strict=True)):
            rows[row].append(visual)
    else:
        for visual, row in enumerate(batch.owner.tolist()):
            rows[row].append(visual)
    return rows
