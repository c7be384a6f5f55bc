"""BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language Models (Li et al.
2023, 2301.12597), and InstructBLIP (Dai et al. 2023, 2305.06500).

    represent   pixels ─ vision ─→ (B, P, Dv) ─ connector: norm ─┬─ image use ─→ (B, Q, D) ─ image_proj ─┐
                (frozen)                                         │                                        ├ ITC
                ids (B, T), [CLS] first ─────────────────────────│─ text use ──→ (B, D) ──── text_proj ──┘
                                                                 ├─ joint use, all see all ─→ itm ─────── ITM
                ids (B, T), [DEC] first ── text on cached image rows, causal ───────────────── LM head ── ITG

    generate    pixels ─ vision ─→ features ─ connector: norm, Q-Former, projection ─→ (n, R, D_lm) ┐ splice, in front
                (frozen)                      [instruction beside the queries: InstructBLIP]         │
                ids (B, T) ─ embed ─→ (B, T, D_lm) ─────────────────────────────────────────────────┴→ language (frozen)

Legend: B rows, T tokens, n visuals, P vision tokens with the class token, Dv and D widths of encoder and Q-Former, Q
queries, R = F·Q visual tokens per visual of F frames, D_lm width of the LM.

The two phases are two configurations of one class. In ``represent`` there is no LM; in ``generate`` the heads and
the Q-Former's text half are gone (``instruct`` keeps the latter). Where their parts are the same, so are their names.

Differs from the paper: the prefix LM's split point is uniform over the caption's tokens (the paper names no rule);
decay is on tensors of two and more dimensions only (the code decays the temperature too); a frozen LM's dropout is
off. Differs from the code: the contrast's gradient is that of all processes' rows together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import IGNORE, Batch, Places, Term, Tokens, Visuals
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.language import (
    Decoding,
    Language,
    LibraryConfig,
    Prompt,
    Read,
    Seq2SeqLM,
    build_language,
    safe_dtype,
    write,
)
from isthmus.models.published import flan_t5, opt, vicuna
from isthmus.net import Net
from isthmus.nn.attention_maps import patch_maps, self_attention
from isthmus.nn.connectors.qformer import Past, QFormerConfig, QFormerConnector
from isthmus.nn.lengths import blocks_by_length
from isthmus.nn.losses import Similarity, gather, widen
from isthmus.nn.matching import gather_tokens, hard_negatives, query_contrast
from isthmus.nn.precision import KeptFloat32, cast_weights
from isthmus.nn.splice import at_places, splice
from isthmus.nn.tap import Tap, trains
from isthmus.nn.vit import VisionConfig, build_vision
from isthmus.stage import Group

Index = EllipsisType | tuple[Tensor | slice | int, ...]
"""What picks among positions (B, T)."""

TEXT, DECODER = "qformer", "decoder"
OBJECTIVES = ("itc", "itm", "itg")


@dataclass(frozen=True, kw_only=True)
class Blip2Config:
    """Encoder, Q-Former and (for ``generate``) the LM.

    ``feature_layer`` counts over the encoder's L+1 hidden states: -1 for the published encoders, which come without
    their last block; -2 for a full CLIP tower. ``patch_positions`` adds position embeddings to what it reads; in the
    paper only the encoder does. ``instruct`` keeps the text half in ``generate``: the question or
    instruction stands beside the queries (InstructBLIP, and BLIP-2's fine-tuning on VQA). ``embed_dim`` is the
    contrast's width. ``norm_eps`` is that of the LayerNorm after the encoder: 1e-5 in the original code, 1e-6 in
    transformers. ``objectives`` are those of ``represent``.
    """

    vision: VisionConfig
    qformer: QFormerConfig
    language: LibraryConfig | None = None
    phase: Literal["represent", "generate"] = "generate"
    instruct: bool = False
    feature_layer: int = -1
    patch_positions: bool = False
    embed_dim: int = 256
    norm_eps: float = 1e-5
    label_smoothing: float = 0.1
    objectives: tuple[str, ...] = OBJECTIVES

    def __post_init__(self) -> None:
        if self.qformer.vision_width != self.vision.width:
            raise ConfigError(
                f"the Q-Former reads features of width {self.qformer.vision_width}, the encoder makes "
                f"{self.vision.width}; set qformer.vision_width to the latter."
            )
        if not (self.vision.class_token or self.vision.kind):
            raise ConfigError("BLIP-2's Q-Former reads the class token too; this vision encoder has none.")
        if self.phase == "generate" and self.language is None:
            raise ConfigError("the phase `generate` needs a language model; name one as the part `language`.")
        _ = self.tap  # refuses a hidden state that is not there
        unknown = set(self.objectives) - set(OBJECTIVES)
        if unknown or not self.objectives:
            raise ConfigError(f"objectives {list(self.objectives)}: choose among {', '.join(OBJECTIVES)}.")

    @property
    def tap(self) -> Tap:
        """What is read of the encoder: the class token too, where it has one, before the connector's norm."""
        return Tap(
            vision=self.vision,
            layers=(self.feature_layer,),
            class_token=self.vision.class_token,
            patch_positions=self.patch_positions,
        )

    @property
    def similarity(self) -> Similarity:
        """How embeddings are compared: by the cosine, best query first."""
        return "cosine"

    @classmethod
    def vit_l_opt_2_7b(cls) -> "Blip2Config":
        return _published(_vit_l(), opt("2.7b"))

    @classmethod
    def vit_g_opt_2_7b(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), opt("2.7b"))

    @classmethod
    def vit_g_opt_6_7b(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), opt("6.7b"))

    @classmethod
    def vit_l_flan_t5_xl(cls) -> "Blip2Config":
        return _published(_vit_l(), flan_t5("xl"))

    @classmethod
    def vit_g_flan_t5_xl(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), flan_t5("xl"))

    @classmethod
    def vit_g_flan_t5_xxl(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), flan_t5("xxl"))

    @classmethod
    def instruct_vicuna_7b(cls) -> "Blip2Config":
        """InstructBLIP; the vocabulary has one token more than Vicuna's, for padding."""
        return _published(VisionConfig.eva_g_14(), vicuna("7b", 32001, version=1.1), instruct=True)

    @classmethod
    def instruct_vicuna_13b(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), vicuna("13b", 32001, version=1.1), instruct=True)

    @classmethod
    def instruct_flan_t5_xl(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), flan_t5("xl"), instruct=True)

    @classmethod
    def instruct_flan_t5_xxl(cls) -> "Blip2Config":
        return _published(VisionConfig.eva_g_14(), flan_t5("xxl"), instruct=True)


def _vit_l() -> VisionConfig:
    """CLIP's ViT-L/14 without its last block and final norm."""
    return replace(VisionConfig.vit_l_14(), layers=23, post_norm="none", pool="none")


def _published(vision: VisionConfig, language: LibraryConfig, *, instruct: bool = False) -> Blip2Config:
    return Blip2Config(
        vision=vision, qformer=QFormerConfig(vision_width=vision.width), language=language, instruct=instruct
    )


class Heads(KeptFloat32):
    """What only ``represent`` has: both projections, the matching head, the temperature and BERT's LM head.

    The LM head's decoder is the Q-Former's word table; only its bias is here.
    """

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        width = config.qformer.width
        self.image_proj = nn.Linear(width, config.embed_dim)
        self.text_proj = nn.Linear(width, config.embed_dim)
        self.itm = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.lm_dense = nn.Linear(width, width)
        self.lm_ln = nn.LayerNorm(width, eps=config.qformer.eps)
        self.lm_bias = nn.Parameter(torch.zeros(config.qformer.vocab_size))
        nn.init.normal_(self.lm_dense.weight, std=0.02)

    def write(self, hidden: Tensor, words: nn.Embedding) -> Tensor:
        """(…, D) -> (…, V) logits of the next token."""
        return F.linear(self.lm_ln(F.gelu(self.lm_dense(hidden))), words.weight, self.lm_bias)


class Blip2(Net):
    """A vision encoder, a Q-Former and, by phase, heads or a language model. See the drawings above."""

    KIND = "blip2"
    CONFIG = Blip2Config
    config: Blip2Config
    tap: Tap
    language: Language | None

    def __init__(self, config: Blip2Config) -> None:
        super().__init__()
        self.config, self.tap = config, config.tap
        generates = config.phase == "generate"
        self.contrasts = not generates
        self.language = build_language(config.language) if generates and config.language is not None else None
        self.prompt_stream = "encoder" if isinstance(self.language, Seq2SeqLM) else "lm"
        self.vision = build_vision(config.vision)
        self.connector = QFormerConnector(
            config.qformer,
            self.language.width if self.language is not None else None,
            text=config.instruct or not generates,
            norm_eps=config.norm_eps,
        )
        self.heads = None if generates else Heads(config)

    def cast(self, dtype: torch.dtype) -> "Blip2":
        """Encoder and LM to ``dtype`` (a T5 in bf16 where fp16 was requested); connector and heads stay float32."""
        cast_weights(self.vision, dtype)
        if self.language is not None and self.config.language is not None:
            cast_weights(self.language, safe_dtype(self.config.language, dtype))
        return self

    def num_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """R: places of a visual in the LM's sequence, whatever its size."""
        return self.connector.num_tokens(frames, self.vision.grid(height, width))

    def unreachable(self) -> tuple[str, ...]:
        """Parameters that the objective cannot reach: the encoder above the tapped hidden state; what only an
        objective that is left out reads; the last text FFN where nothing reads the text's own output."""
        names = [name for name, _ in self.named_parameters()]
        own = {
            "itc": ("heads.image_proj.", "heads.text_proj.", "heads.temperature"),
            "itm": ("heads.itm.",),
            "itg": ("heads.lm_",),
        }
        dead = [prefix for name, held in own.items() if name not in self.config.objectives for prefix in held]
        if self.config.phase == "generate" or self.config.objectives == ("itm",):
            dead.append(f"connector.qformer.layers.{self.config.qformer.layers - 1}.ffn_text.")
        return (*self.tap.unreachable(names), *(name for name in names if name.startswith(tuple(dead))))

    # Phase represent

    def loss(self, batch: Batch) -> dict[str, Term]:
        """Phase represent: the terms ``itc`` and ``itm`` of the whole batch and ``itg`` over text tokens, each of
        weight 1. Phase generate: ``lm``, next-token cross-entropy over the labelled tokens.

        Raises DataError for a row without exactly one picture, and for a batch without a negative for ITM.
        """
        if self.heads is None:
            return {"lm": Term(*self._answer_loss(batch))}
        vision, keys = self._vision_of_rows(batch, "BLIP-2's first stage")
        return self._represent(vision, batch.text[TEXT], keys, batch.ids)

    def _vision_of_rows(self, batch: Batch, what: str) -> tuple[Tensor, list[str]]:
        """Normed vision tokens (B, P, Dv) in order of rows, and the content key of each row's picture; no clips."""
        order = batch.visual_of_rows(what)
        groups = batch.per_visual(lambda group: self.tap.read(self.vision, group).unbind(0))
        if (frames := max(len(group) for group in groups)) > 1:
            raise DataError(f"{what} reads single pictures and this is a clip of {frames} frames; choose one of them.")
        vision = self.connector.vision_tokens(torch.stack([groups[n][0] for n in order.tolist()]))
        return vision, [batch.keys[n] for n in order.tolist()]

    def _represent(self, vision: Tensor, text: Tokens, keys: Sequence[str], names: Sequence[str]) -> dict[str, Term]:
        assert self.heads is not None
        rows, wanted = len(vision), self.config.objectives
        image = self.connector.encode_image(vision)
        terms: dict[str, Term] = {}
        if "itc" in wanted or "itm" in wanted:
            contrast = query_contrast(
                F.normalize(widen(self.heads.image_proj(image.hidden)), dim=-1),
                F.normalize(widen(self.embed_texts(text)), dim=-1),
                self.heads.temperature,
                smoothing=self.config.label_smoothing,
            )
            if "itc" in wanted:
                terms["itc"] = Term(contrast.loss * rows, rows, scope="batch")
            if "itm" in wanted:
                loss = self._matching_loss(vision, text, *hard_negatives(contrast, keys, names))
                terms["itm"] = Term(loss, 3 * rows, scope="batch")
        if "itg" in wanted:
            terms["itg"] = Term(*self._writing_loss(image.past, text))
        return terms

    def _matching_loss(self, vision: Tensor, text: Tokens, wrong_image: Tensor, wrong_text: Tensor) -> Tensor:
        """Sum of two-way cross-entropies over B right pairs, B wrong images, B wrong texts (numbers among G rows)."""
        all_text = gather_tokens(text)
        ids = F.pad(text.ids, (0, all_text.ids.shape[1] - text.ids.shape[1]))
        joint = Tokens(
            ids=torch.cat([ids, ids, all_text.ids[wrong_text]]),
            lengths=torch.cat([text.lengths, text.lengths, all_text.lengths[wrong_text]]),
        )
        logits = self.match_logits(torch.cat([vision, gather(vision)[wrong_image], vision]), joint)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(vision)] = 1
        return F.cross_entropy(widen(logits), labels, reduction="sum")

    def _writing_loss(self, past: Sequence[Past], text: Tokens) -> tuple[Tensor, int]:
        """Label-smoothed next-token cross-entropy of the text after its image: (sum, count)."""
        losses, count = [], 0
        for rows in blocks_by_length(text.lengths):
            own = text.rows(rows)
            labels = own.ids.masked_fill(~own.mask, IGNORE) if own.labels is None else own.labels
            row, column = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)
            logits = self.writing_logits([(k[rows], v[rows]) for k, v in past], own, at=(row, column))
            targets, smoothing = labels[row, column + 1], self.config.label_smoothing
            losses.append(F.cross_entropy(widen(logits), targets, reduction="sum", label_smoothing=smoothing))
            count += len(row)
        return torch.stack(losses).sum(), count

    def writing_logits(self, past: Sequence[Past], text: Tokens, *, at: Index = ...) -> Tensor:
        """(B, T, V): logits of the token after each, [DEC] in place of the first, on a cached image pass. ``at``
        picks positions before the vocabulary is reached."""
        assert self.heads is not None
        assert self.connector.qformer.words is not None
        ids = text.ids.clone()
        ids[:, 0] = self.config.qformer.dec_id
        hidden = self.connector.qformer(None, ids, text_mask=text.mask, past=past).hidden
        return self.heads.write(hidden[at], self.connector.qformer.words)

    def match_logits(self, vision: Float[Tensor, "B P Dv"], text: Tokens) -> Float[Tensor, "B 2"]:
        """(B, 2) for no and yes, the mean over the queries, of normed ``vision`` (B, P, Dv) with the texts beside."""
        assert self.heads is not None
        return self.heads.itm(self.connector.encode_pair(vision, text)).mean(1)

    def embed_images(self, pixels: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n Q E"]:
        """(n, Q, E), one vector per query, not normalised, from (n, 3, H, W)."""
        assert self.heads is not None
        return self.heads.image_proj(self.connector.encode_image(self.normed(pixels)).hidden)

    def normed(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, P, Dv), what the Q-Former attends to."""
        return self.connector.vision_tokens(self.visual_features(pixels[:, None])[:, 0])

    def embed_texts(self, text: Tokens) -> Float[Tensor, "B E"]:
        """(B, E), not normalised: the text alone, read at [CLS]."""
        assert self.heads is not None
        return self.heads.text_proj(self.connector.encode_text(text))

    # Phase generate

    def visual_tokens(self, batch: Batch) -> list[Float[Tensor, "_ D"]]:
        """One (R, D_lm) per visual, in the batch's order; with ``instruct`` the row's ``qformer`` stream is read."""

        def tokens(group: Visuals) -> Iterable[Tensor]:
            return self.connector(self.tap.read(self.vision, group), text=self._beside(batch, group)).unbind(0)

        return batch.per_visual(tokens)

    def _beside(self, batch: Batch, group: Visuals) -> Tokens | None:
        """The text that the Q-Former reads beside a group's visuals."""
        return batch.text[TEXT].rows(batch.owner[group.index]) if self.config.instruct else None

    def embed_prompt(self, batch: Batch) -> Tensor:
        """(B, T, D_lm): the ``lm`` or ``encoder`` stream embedded, the soft prompts in their places.

        Raises DataError when a place and its visual disagree about the number of tokens.
        """
        assert self.language is not None
        tokens = batch.text[self.prompt_stream]
        places = batch.places.get(self.prompt_stream, Places.none())
        embeds = self.language.embed(tokens.ids.masked_fill(at_places(places, tokens.ids), 0))
        embeds = splice(embeds, self.visual_tokens(batch), places, names=batch.ids)
        if batch.visuals or not torch.is_grad_enabled():
            return embeds
        return embeds + self._nothing(batch).to(embeds.dtype)

    def _nothing(self, batch: Batch) -> Tensor:
        """A zero that touches what pictures would touch, for batches without any: processes that share a step then
        reach the same parameters."""
        size, parameter = self.config.vision.image_size, next(self.connector.parameters())
        if trains(self.vision):
            features = self.visual_features(parameter.new_zeros(1, 1, 3, size, size))
        else:
            patches = self.tap.tokens(self.vision.grid(size, size))
            features = parameter.new_zeros(1, 1, patches, self.tap.width)
        beside = batch.text[TEXT].rows(slice(0, 1)) if self.config.instruct else None
        return self.connector(features, text=beside)[:0].sum()

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, V) logits of the ``lm`` or ``decoder`` stream; values on padding mean nothing."""
        assert self.language is not None
        embeds = self.embed_prompt(batch)
        if isinstance(self.language, Seq2SeqLM):
            return self.language.logits(embeds, batch.text[self.prompt_stream].lengths, batch.text[DECODER])
        return self.language.logits(embeds)

    def _answer_loss(self, batch: Batch) -> tuple[Tensor, int]:
        assert self.language is not None
        embeds = self.embed_prompt(batch)
        if isinstance(self.language, Seq2SeqLM):
            return self.language.loss(embeds, batch.text[self.prompt_stream].lengths, batch.text[DECODER])
        return self.language.loss(embeds, batch.text[self.prompt_stream])

    def score(self, batch: Batch) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of the labelled tokens."""
        assert self.language is not None
        embeds = self.embed_prompt(batch)
        if isinstance(self.language, Seq2SeqLM):
            return self.language.score(embeds, batch.text[self.prompt_stream].lengths, batch.text[DECODER])
        return self.language.score(embeds, batch.text[self.prompt_stream])

    def prompt(self, batch: Batch, past: Read | None = None) -> Prompt:
        """What a decoder continues, or what the encoder of one reads. Raises CapabilityError without an LM."""
        if self.language is None:
            raise CapabilityError("BLIP-2's first stage has no language model to continue a prompt with.")
        return Prompt(self.embed_prompt(batch), batch.text[self.prompt_stream].lengths, past=past)

    @torch.no_grad()
    def generate(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """New tokens of every row, without the stop token: by the LM, or in phase represent by the Q-Former itself."""
        if self.language is None:
            return self._write(batch, decoding)
        return self.language.continued(self.prompt(batch), decoding)

    @torch.no_grad()
    def attention(self, batch: Batch) -> list[list[Tensor]]:
        """Per row and per its visual a map (layers, T, F, P): the LM's attention to the visual tokens, mean over heads,
        times what each was made of, by the last cross-attention of the Q-Former. Raises CapabilityError with a T5."""
        if self.language is None or isinstance(self.language, Seq2SeqLM):
            raise CapabilityError("Attention maps of BLIP-2 need a causal language model, and this is a T5.")

        def made_of(group: Visuals) -> Iterable[Tensor]:
            shares = self.connector.patch_weights(self.tap.read(self.vision, group), self._beside(batch, group))[
                ..., 1:
            ]
            return shares / shares.sum((-2, -1), keepdim=True).clamp(min=1e-12)  # the class token is no place

        weights = self_attention(self.language.lm, self.embed_prompt(batch))
        places, lengths = batch.places.get("lm", Places.none()), batch.text["lm"].lengths.tolist()
        return patch_maps(weights, places, lengths, batch.per_visual(made_of))

    def _write(self, batch: Batch, decoding: Decoding) -> list[list[int]]:
        """Captions without any LM: the ITG use, from [DEC]."""
        if decoding.max_new_tokens > self.config.qformer.positions:
            raise ConfigError(
                f"max_new_tokens {decoding.max_new_tokens} passes the Q-Former's {self.config.qformer.positions} "
                "positions; ask for fewer."
            )
        vision, _ = self._vision_of_rows(batch, "captioning without a language model")
        image = self.connector.encode_image(vision.repeat_interleave(decoding.num_beams, dim=0))

        def step(ids: Tensor) -> Tensor:
            lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
            return self.writing_logits(image.past, Tokens(ids=ids, lengths=lengths), at=(slice(None), -1))

        start = torch.full((len(batch),), self.config.qformer.dec_id, device=vision.device)
        return write(step, start, decoding)


def layer_decay(vision: VisionConfig, lr: float, factor: float, weight_decay: float = 0.05) -> tuple[Group, ...]:
    """The encoder opened with a rate that falls by ``factor`` from block to block downwards (fine-tuning, table 10)."""
    blocks = [
        Group(f"vision.blocks.{n}.*", lr * factor ** (vision.layers - 1 - n), weight_decay)
        for n in reversed(range(vision.layers))
    ]
    return (*blocks, Group("vision.*", lr * factor**vision.layers, weight_decay))
