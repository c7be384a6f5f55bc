"""LanguageModel: the one thin edge between isthmus and the causal LMs of transformers.

Shapes: B rows, T tokens, D width of the input embeddings, V vocabulary, M labelled positions.

The library's class stays unmodified and keeps its own state-dict keys below ``lm.``. Rows are right-padded here and
carry their lengths. Attention is causal, so no real token sees padding on its right: the training path needs no
attention mask and no position ids, whichever way the LM makes its positions. Only generation, where all rows must
end together, moves the padding to the left, inside, and hands the library the mask.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import ConfigError, DataError, nearest
from isthmus.nn.attention import full_precision
from isthmus.nn.beam import Step, beam_search

LOGITS_AT_ONCE = 2**25
"""Most logits (positions x vocabulary) that a loss holds at a time: 128 MiB in fp32, 1,048 positions of 32,000."""

SDPA = "isthmus_sdpa"
"""The library's SDPA with its half precision on a CPU computed in float32, as :func:`isthmus.nn.attention.attend`."""

LEGACY_FIELDS = frozenset({"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"})
"""Older spellings of the rotary settings that the library still translates."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How new tokens are chosen.

    ``temperature`` 0 is greedy (or beam search with ``num_beams`` > 1); above 0 tokens are drawn, ``top_k`` 0 and
    ``top_p`` 1 meaning no cut. ``stop_ids`` end an answer and are not part of it; without any, an answer ends only at
    ``max_new_tokens``, and none before ``min_new_tokens``. With beams a text of n new tokens scores
    Σ log p / n^``length_penalty``, so a negative penalty favours short answers. ``repetition_penalty`` looks at the
    new tokens only. One ``seed`` serves every row alike, so that a row's answer does not depend on its neighbours; a
    tuple gives each row its own.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()
    seed: int | tuple[int, ...] = 0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Decoding":
        """From options by name, as users write them. Raises ConfigError naming the nearest field for an unknown one."""
        fields = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in fields:
                raise ConfigError(f"decoding has no field {name!r}; {nearest(name, fields)}")
        return cls(**options)

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (no cut) or above"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "0 (off) or above"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise ConfigError(f"decoding.{name} is {getattr(self, name)}; it must be {allowed}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise ConfigError(
                f"decoding asks for {self.num_beams} beams and temperature {self.temperature}; beam "
                "search does not draw. Set temperature: 0 or num_beams: 1."
            )
        if both := set(self.stop_ids) & set(self.forbidden_ids):
            raise ConfigError(f"decoding both stops at and forbids the token ids {sorted(both)}; keep one of the two.")


class _Draw(LogitsProcessor):
    """Turns the greedy choice into a draw: Gumbel noise from generators of this call, one per row.

    The largest of ``score + Gumbel`` is distributed as softmax(score), so the library's greedy loop samples without
    touching PyTorch's global random state.
    """

    def __init__(self, seeds: tuple[int, ...]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        noise = torch.stack([torch.empty(width).exponential_(generator=g) for g in self.generators])
        return scores.float() - noise.log().to(scores.device)


class LibraryLM(nn.Module):
    """A language model of transformers as ``.lm``, its class and keys untouched: what both families share."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm: Any = lm
        # A folder's own decoding defaults (stop ids, temperature) must not slip under an explicit Decoding.
        self.lm.generation_config = GenerationConfig()

    @property
    def width(self) -> int:
        """D: width of the input embeddings, and so of visual tokens (OPT-350m's blocks are wider)."""
        return self.lm.get_input_embeddings().weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.lm.get_input_embeddings().weight.shape[0]

    def embed(self, ids: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, D). Raises DataError for an id outside the vocabulary."""
        low, high = (int(v) for v in ids.aminmax()) if ids.numel() else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"token id {low if low < 0 else high} is outside the LM's vocabulary of "
                f"{self.vocab_size}: the tokenizer does not belong to this LM."
            )
        return self.lm.get_input_embeddings()(ids)


class LanguageModel(LibraryLM):
    """Any causal LM: embeddings in, loss, logits, scores or new tokens out.

    Weights are made in fp32; a caller that wants bf16 wraps the calls in autocast. Nothing is frozen or switched to
    eval mode here: that is the stage's business.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm)
        self._plain_head: bool | None = None
        if lm.config._attn_implementation == "sdpa":
            lm.set_attn_implementation(SDPA)

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> "LanguageModel":
        """A freshly initialised LM from ``{"model_type": "llama", ...}``; touches neither disk nor network.

        Raises ConfigError for an unknown model type, an unknown field or a value the library refuses.
        """
        lm = AutoModelForCausalLM.from_config(library_config(config), dtype=torch.float32)
        lm.tie_weights()  # the library leaves it out inside :func:`unfilled`
        return cls(lm)

    @property
    def config(self) -> dict[str, Any]:
        """The library's full configuration, as :meth:`build` takes it back."""
        return known_fields(self.lm.config.to_dict())

    @property
    def context(self) -> int | None:
        """Most positions a row may have, or none where the configuration names no limit."""
        return getattr(self.lm.config, "max_position_embeddings", None)

    def plain_head(self) -> bool:
        """Whether the logits are the output table applied to the last hidden state, and nothing more."""
        return self._has_plain_head(self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.lm.device)))

    def hidden(self, embeds: Tensor) -> Tensor:
        """(B, T, D) -> the last hidden states (B, T, D'), ready for the head."""
        self._check_context(embeds.shape[1])
        return self.lm.base_model(inputs_embeds=embeds, use_cache=False, return_dict=True).last_hidden_state

    def logits(self, embeds: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) right-padded -> (B, T, V) by the library's own forward. Values on padding mean nothing.

        With ``lengths`` (B,) the library also gets the padding mask; real positions come out the same either way.
        """
        self._check_context(embeds.shape[1])
        mask = None if lengths is None else (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None])
        return self.lm(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.long(),
            use_cache=False,
            return_dict=True,
        ).logits

    def loss(self, embeds: Tensor, tokens: Tokens) -> tuple[Tensor, int]:
        """Next-token cross-entropy in fp32 over labelled targets: (sum, count). Position 0 is never a target.

        Logits exist only where the next token carries a label, and only LOGITS_AT_ONCE of them at a time. Without
        any label the sum is a zero that still reaches every parameter.
        """
        losses, _ = self._label_nll(embeds, tokens)
        return losses.sum(), len(losses)

    def score(self, embeds: Tensor, tokens: Tokens) -> Tensor:
        """(B,) sums of log-probabilities of the labelled tokens, for choosing among given answers."""
        losses, row = self._label_nll(embeds, tokens)
        return torch.zeros(len(embeds), device=losses.device).index_add(0, row, -losses)

    @torch.no_grad()
    def generate(self, embeds: Tensor, lengths: Tensor, decoding: Decoding) -> list[list[int]]:
        """Continues every row of right-padded ``embeds`` (B, T, D): the new tokens only, without the stop token.

        The padding moves to the left inside, so that a row's answer is the same alone and among others. Raises
        DataError for an empty row and ConfigError when prompt and answer together pass the LM's context.
        """
        empty = torch.nonzero(lengths == 0).flatten().tolist()
        if empty:
            raise DataError(f"row {empty[0]} of the batch has an empty prompt; generation needs at least one token.")
        longest = int(lengths.max())
        self._check_context(
            longest + decoding.max_new_tokens, f"a prompt of {longest} tokens and {decoding.max_new_tokens} new ones"
        )
        source = torch.arange(longest, device=embeds.device) - (longest - lengths)[:, None]
        mask = source >= 0
        left = embeds.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, embeds.shape[2]))
        found = self.lm.generate(
            inputs_embeds=left,
            attention_mask=mask.long(),
            generation_config=generation_config(decoding, self.vocab_size),
            logits_processor=logits_processors(decoding, rows=len(embeds)),
        )
        return [until_stop(row, decoding.stop_ids) for row in found.tolist()]

    def _label_nll(self, embeds: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood (M,) of every labelled target, and the row (M,) it belongs to."""
        if tokens.labels is None:
            raise DataError("the token stream has no labels, so there is no loss; use a processor made for training.")
        row, column = torch.nonzero(tokens.labels[:, 1:] != IGNORE, as_tuple=True)
        targets = tokens.labels[row, column + 1]
        if not self._has_plain_head(embeds):
            return nll(self.logits(embeds)[row, column], targets), row
        hidden = self.hidden(embeds)[row, column]
        head = self.lm.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // self.vocab_size)
        if len(targets) <= step:
            return nll(head(hidden), targets), row
        # Each chunk's logits are made again in the backward pass rather than kept.
        chunks = [
            checkpoint(lambda h, t: nll(head(h), t), h, t, use_reentrant=False)
            for h, t in zip(hidden.split(step), targets.split(step), strict=True)
        ]
        return torch.cat([c for c in chunks if isinstance(c, Tensor)]), row

    def _has_plain_head(self, embeds: Tensor) -> bool:
        """Whether this LM's logits are exactly ``head(last hidden state)``.

        Some LMs scale the hidden state before the head or cap or scale the logits after it. Rather than trust a list
        of names, the first loss tries it: the head is made to answer with known numbers for one position, and these
        must come out unchanged, while what went into the head must be the body's output. Otherwise every logit is
        taken from the library's own forward. The random state is left as it was.
        """
        if self._plain_head is None:
            self._plain_head = self.lm.get_output_embeddings() is not None and self._try_head(embeds)
        return self._plain_head

    def _try_head(self, embeds: Tensor) -> bool:
        seen: dict[str, Tensor] = {}

        def answer(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["input"] = inputs[0]
            seen["output"] = torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output)
            return seen["output"].clone()

        one = torch.linspace(-1, 1, embeds.shape[-1]).to(embeds)[None, None]
        devices = [embeds.device] if embeds.device.type == "cuda" else []
        hook = self.lm.get_output_embeddings().register_forward_hook(answer)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)  # equal dropout in both passes
                logits = self.logits(one)
                torch.manual_seed(0)
                hidden = self.hidden(one)
        finally:
            hook.remove()
        return torch.equal(seen["input"], hidden) and torch.equal(logits, seen["output"].to(logits.dtype))

    def _check_context(self, tokens: int, what: str | None = None) -> None:
        if self.context is not None and tokens > self.context:
            raise ConfigError(
                f"{what or f'a row of {tokens} tokens'} passes the LM's context of {self.context} "
                "positions. Shorten the rows (the processor's max_length) or max_new_tokens."
            )


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
    with full_precision(query) as cast:
        mask = cast(mask) if mask is not None and mask.is_floating_point() else mask
        y, weights = sdpa_attention_forward(module, cast(query), cast(key), cast(value), mask, **rest)
    return y.to(query.dtype), weights


AttentionInterface.register(SDPA, _attend)
AttentionMaskInterface.register(SDPA, sdpa_mask)


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, nets are built without drawing weights, whose memory nobody touches: for nets that are filled next."""
    with no_init_weights():
        yield


def vocabulary_tables(language: Any) -> tuple[str, ...]:
    """Names in the state dict of an LM of ours of the tensors with one row per token: embedding and head."""
    ends = (language.lm.get_input_embeddings(), language.lm.get_output_embeddings())
    rows = len(ends[0].weight)
    tables = {id(p) for end in ends if end is not None for p in end.parameters() if len(p) == rows}
    return tuple(name for name, value in language.state_dict(keep_vars=True).items() if id(value) in tables)


def library_config(config: Mapping[str, Any], known: Sequence[str] = ()) -> PreTrainedConfig:
    """The transformers configuration that ``config`` describes, checked field by field. Raises ConfigError.

    ``known`` are the model types that will do, all causal LMs by default.
    """
    model_type = str(config.get("model_type", ""))
    known = known or [name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING]
    if model_type not in known:
        raise ConfigError(
            f"language.model_type {model_type!r} is not an LM of transformers that can stand here; "
            + nearest(model_type, known)
        )
    kind = CONFIG_MAPPING[model_type]
    fields = _fields(kind)
    for name in config:
        if name not in fields:
            raise ConfigError(f"language.{name} is not a field of a {model_type} LM; {nearest(name, fields)}")
    try:
        return kind(**{name: value for name, value in config.items() if name != "model_type"})
    except Exception as error:  # the library validates with exception classes of its own
        raise ConfigError(
            f"transformers refuses this {model_type} configuration: " + " ".join(str(error).split())
        ) from error


def known_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json reduced to what :func:`library_config` takes: the library's own fields, nothing that runs code.

    Dropped are book-keeping (versions, class names, dtype), private fields and names the library itself ignores.
    """
    model_type = str(config.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        return dict(config)
    drop = {
        "transformers_version",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "chunk_size_feed_forward",
    }
    keep = _fields(CONFIG_MAPPING[model_type]) - drop
    return {name: value for name, value in config.items() if name in keep and not name.startswith("_")} | {
        "model_type": model_type
    }


def _fields(kind: type[PreTrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)} | set(kind.attribute_map) | LEGACY_FIELDS | {"model_type"}


def generation_config(decoding: Decoding, vocab_size: int, **more: Any) -> GenerationConfig:
    """The library's settings for ``decoding``. Raises ConfigError for ids outside the vocabulary."""
    outside = [i for i in (*decoding.stop_ids, *decoding.forbidden_ids) if not 0 <= i < vocab_size]
    if outside:
        raise ConfigError(f"decoding names the token ids {outside}, outside the LM's vocabulary of {vocab_size}.")
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        use_cache=True,
        num_beams=decoding.num_beams,
        length_penalty=decoding.length_penalty,
        suppress_tokens=list(decoding.forbidden_ids) or None,
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=decoding.stop_ids[0] if decoding.stop_ids else 0,
        **more,
    )


def logits_processors(decoding: Decoding, rows: int, *, started: int = 0) -> LogitsProcessorList:
    """What is done to the scores of every step: repetition first, then the cuts of a random draw and the draw.

    The repetition rules are handed over ready-made: asked for by its configuration, the library would spare as many
    *new* tokens as the row has padding, so that an answer would depend on the neighbours. ``started`` tokens of what
    is written were given (an encoder-decoder's start token).
    """
    steps = LogitsProcessorList()
    if decoding.min_new_tokens and decoding.stop_ids:
        stops = list(decoding.stop_ids)
        steps.append(MinNewTokensLengthLogitsProcessor(started, decoding.min_new_tokens, stops))
    if decoding.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.no_repeat_ngram:
        steps.append(NoRepeatNGramLogitsProcessor(decoding.no_repeat_ngram))
    if decoding.temperature == 0:
        return steps
    seeds = decoding.seed if isinstance(decoding.seed, tuple) else (decoding.seed,) * rows
    if len(seeds) != rows:
        raise ConfigError(f"decoding.seed holds {len(seeds)} seeds for {rows} rows; give one number or one per row.")
    if decoding.temperature != 1:
        steps.append(TemperatureLogitsWarper(float(decoding.temperature)))
    if decoding.top_k:
        steps.append(TopKLogitsWarper(top_k=decoding.top_k))
    if decoding.top_p < 1:
        steps.append(TopPLogitsWarper(top_p=decoding.top_p))
    steps.append(_Draw(seeds))
    return steps


def write(step: Step, start: Tensor, decoding: Decoding) -> list[list[int]]:
    """What ``decoding`` writes by a next-token function that the library does not know, behind one token per row,
    ``start`` (B,): the new tokens only, without the stop token. ``step`` hands out logits; see :func:`beam_search`."""
    change = logits_processors(decoding, rows=len(start))

    def scores(ids: Tensor) -> Tensor:
        # The library's order: beams are scored by log-probabilities, so there the rules meet those.
        logits, new = step(ids).float(), ids[:, 1:]
        if decoding.num_beams > 1:
            return change(new, logits.log_softmax(-1))  # type: ignore[arg-type]
        return change(new, logits).log_softmax(-1)  # type: ignore[arg-type]

    return beam_search(
        scores,
        start,
        beams=decoding.num_beams,
        max_new=decoding.max_new_tokens,
        min_new=decoding.min_new_tokens,
        stop_ids=decoding.stop_ids,
        forbidden_ids=decoding.forbidden_ids,
        length_penalty=decoding.length_penalty,
    )


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(M,) negative log-likelihoods in fp32 from logits (M, V)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    """``ids`` up to the first stop token."""
    stops = [i for i, token in enumerate(ids) if token in stop_ids]
    return ids[: stops[0]] if stops else ids
