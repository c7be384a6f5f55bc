"""Seq2SeqLM: the edge to transformers' T5-like encoder-decoders, beside the causal LMs of causal.py.

Shapes: B rows, S encoder tokens, T decoder tokens, D width of the embeddings, V vocabulary, M labelled positions.

The encoder reads embeddings (visual tokens and text), right-padded with their lengths. The decoder's stream holds
the start token, then the text: position 0 is never a target, so labels mean the same as in a causal stream.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import DataError
from isthmus.language.causal import LanguageModel, nll
from isthmus.language.decoding import Decoding, generation_config, logits_processors, until_stop
from isthmus.language.library import LibraryLM, library_config

T5_LIKE = ("t5", "mt5", "umt5")
"""Model types read here: one family, in which the start token is the pad token."""


class Seq2SeqLM(LibraryLM):
    """A T5-like LM.

    ``tie_word_embeddings: false`` in the configuration gives the head its own table, as FlanT5's checkpoints have
    it; the library by itself ties it always and reads the flag as "do not scale the decoder's output".
    """

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> "Seq2SeqLM":
        """A freshly initialised LM from ``{"model_type": "t5", ...}``. Raises ConfigError as LanguageModel does."""
        # The activation stands in T5's files though it is no field of its configuration class.
        own = {name: value for name, value in config.items() if name not in ("dense_act_fn", "tie_word_embeddings")}
        kind = type(library_config(own, T5_LIKE))
        more = {name: config[name] for name in ("dense_act_fn", "tie_word_embeddings") if name in config}
        settings = kind(**{name: value for name, value in own.items() if name != "model_type"}, **more)
        lm = AutoModelForSeq2SeqLM.from_config(settings, dtype=torch.float32)
        lm.tie_weights()
        if config.get("tie_word_embeddings") is False:
            lm.lm_head.weight = nn.Parameter(torch.empty_like(lm.lm_head.weight).normal_())
        return cls(lm)

    @property
    def context(self) -> int | None:
        """None: relative positions set no limit."""
        return None

    @property
    def start_id(self) -> int:
        """The token a decoder's stream begins with: T5's pad token."""
        return self.lm.config.pad_token_id

    def logits(self, embeds: Tensor, lengths: Tensor, decoder: Tokens) -> Tensor:
        """(B, T, V): at each decoder position the logits of the token behind it."""
        return self.lm(
            inputs_embeds=embeds,
            attention_mask=_mask(embeds, lengths),
            decoder_input_ids=decoder.ids,
            use_cache=False,
            return_dict=True,
        ).logits

    def loss(self, embeds: Tensor, lengths: Tensor, decoder: Tokens) -> tuple[Tensor, int]:
        """Cross-entropy in fp32 over the labelled decoder targets: (sum, count)."""
        losses, _ = self._label_nll(embeds, lengths, decoder)
        return losses.sum(), len(losses)

    def score(self, embeds: Tensor, lengths: Tensor, decoder: Tokens) -> Tensor:
        """(B,) sums of log-probabilities of the labelled decoder tokens."""
        losses, row = self._label_nll(embeds, lengths, decoder)
        return torch.zeros(len(embeds), device=losses.device).index_add(0, row, -losses)

    @torch.no_grad()
    def generate(self, embeds: Tensor, lengths: Tensor, decoding: Decoding) -> list[list[int]]:
        """What the decoder writes for every row of ``embeds`` (B, S, D): new tokens only, without the stop token."""
        empty = torch.nonzero(lengths == 0).flatten().tolist()
        if empty:
            raise DataError(f"row {empty[0]} of the batch has an empty prompt; generation needs at least one token.")
        found = self.lm.generate(
            inputs_embeds=embeds,
            attention_mask=_mask(embeds, lengths),
            generation_config=generation_config(decoding, self.vocab_size, decoder_start_token_id=self.start_id),
            logits_processor=logits_processors(decoding, rows=len(embeds), started=1),
        )
        return [until_stop(row[1:], decoding.stop_ids) for row in found.tolist()]

    def _label_nll(self, embeds: Tensor, lengths: Tensor, decoder: Tokens) -> tuple[Tensor, Tensor]:
        if decoder.labels is None:
            raise DataError("the decoder's stream has no labels, so there is no loss; use a processor for training.")
        row, column = torch.nonzero(decoder.labels[:, 1:] != IGNORE, as_tuple=True)
        logits = self.logits(embeds, lengths, decoder)[row, column]
        return nll(logits, decoder.labels[row, column + 1]), row


def build_language(config: Mapping[str, Any]) -> LanguageModel | Seq2SeqLM:
    """The LM of a configuration: an encoder-decoder for T5's family, else a causal LM."""
    return Seq2SeqLM.build(config) if config.get("model_type") in T5_LIKE else LanguageModel.build(config)


def safe_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
    """``dtype``, but bf16 where an fp16 T5 was asked for: its activations overflow fp16 (BLIP-2, sec. 4.1)."""
    return torch.bfloat16 if config.get("model_type") in T5_LIKE and dtype == torch.float16 else dtype


def _mask(embeds: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]).long()
