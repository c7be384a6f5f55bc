"""Seq2SeqLM: the edge to transformers' T5-like encoder-decoders, beside the causal LMs of causal.py.

Shapes: B rows, S encoder tokens, T decoder tokens, D width of the embeddings, V vocabulary, M labelled positions.

The encoder reads embeddings (visual tokens and text), right-padded with their lengths. The decoder's stream holds
the start token, then the text: position 0 is never a target, so labels mean the same as in a causal stream.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import DataError
from isthmus.language.causal import LanguageModel, nll
from isthmus.language.decoder import Attended, Prompt, Read, write_all
from isthmus.language.decoding import Decoding, check_ids
from isthmus.language.library import LibraryConfig, LibraryLM, library_config
from isthmus.language.scoring import score_endings
from isthmus.language.window import Layers, Window, repeated_cache, tensors_of

T5_LIKE = ("t5", "mt5", "umt5")
"""Model types read here: one family, in which the start token is the pad token."""


class Seq2SeqLM(LibraryLM):
    """A T5-like LM.

    ``tie_word_embeddings: false`` in the configuration gives the head its own table, as FlanT5's checkpoints have
    it; the library by itself ties it always and reads the flag as "do not scale the decoder's output". That alone is
    ``scale_decoder_outputs: false``.
    """

    writable = True
    """A Decoder writes with every LM of this family."""

    @classmethod
    def build(cls, config: LibraryConfig) -> "Seq2SeqLM":
        """A freshly initialised LM from ``{"model_type": "t5", ...}``. Raises ConfigError as LanguageModel does."""
        # The activation stands in T5's files though it is no field of its configuration class.
        extra = ("dense_act_fn", "tie_word_embeddings", "scale_decoder_outputs")
        own = {name: value for name, value in config.items() if name not in extra}
        config_class = type(library_config(own, T5_LIKE))
        more = {name: config[name] for name in extra if name in config}
        settings = config_class(**{name: value for name, value in own.items() if name != "model_type"}, **more)
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

    def logits(
        self, embeds: Float[Tensor, "B S D"], lengths: Int[Tensor, " B"], decoder: Tokens
    ) -> Float[Tensor, "B T V"]:
        """(B, T, V): at each decoder position the logits of the token after it."""
        return self.lm(
            inputs_embeds=embeds,
            attention_mask=_mask(embeds, lengths),
            decoder_input_ids=decoder.ids,
            use_cache=False,
            return_dict=True,
        ).logits

    def loss(
        self, embeds: Float[Tensor, "B S D"], lengths: Int[Tensor, " B"], decoder: Tokens
    ) -> tuple[Float[Tensor, ""], int]:
        """Cross-entropy in fp32 over the labelled decoder targets: (sum, count)."""
        losses, _ = self._label_nll(embeds, lengths, decoder)
        return losses.sum(), len(losses)

    def score(self, embeds: Float[Tensor, "B S D"], lengths: Int[Tensor, " B"], decoder: Tokens) -> Float[Tensor, " B"]:
        """(B,) sums of log-probabilities of the labelled decoder tokens."""
        losses, row = self._label_nll(embeds, lengths, decoder)
        return torch.zeros(len(embeds), device=losses.device).index_add(0, row, -losses)

    @torch.no_grad()
    def generate(
        self, embeds: Float[Tensor, "B S D"], lengths: Int[Tensor, " B"], decoding: Decoding
    ) -> list[list[int]]:
        """What the decoder writes for every row of ``embeds`` (B, S, D): new tokens only, without the stop token."""
        return self.continued(Prompt(embeds, lengths), decoding)

    @torch.no_grad()
    def continued(self, prompt: Prompt, decoding: Decoding) -> list[list[int]]:
        """As :meth:`generate`."""
        return write_all(self, prompt, decoding)

    # Step by step, as a Decoder needs it

    def window(self) -> Window:
        """An empty one for the decoder's own texts; positions are relative, so that it holds those of any age."""
        masked = "sdpa" in self.lm.config._attn_implementation
        return Window([None] * self.lm.config.num_decoder_layers, masked=masked)

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        """``decoding``, checked. Raises DataError for an empty row, ConfigError for ids outside the vocabulary."""
        empty = torch.nonzero(prompt.lengths == 0).flatten().tolist()
        if empty:
            raise DataError(f"row {empty[0]} of the batch has an empty prompt; generation needs at least one token.")
        check_ids(decoding, self.vocab_size)
        return decoding

    def read(self, prompt: Prompt) -> Read:
        """The encoder's pass, and the decoder's over the start token."""
        embeds = prompt.embeds[:, : int(prompt.lengths.max())]
        mask = _mask(embeds, prompt.lengths)
        encoded = self.lm.get_encoder()(inputs_embeds=embeds, attention_mask=mask, return_dict=True)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self.lm(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=torch.full((len(embeds), 1), self.start_id, device=embeds.device),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        ).logits[:, -1]
        own, across = tensors_of(cache.self_attention_cache), tensors_of(cache.cross_attention_cache)
        return Read(logits, own, [1] * len(embeds), Source(across, mask.bool()))

    def next(
        self, ids: Int[Tensor, " B"], positions: Int[Tensor, " B"], window: Window, attended: Attended | None
    ) -> Float[Tensor, "B V"]:
        """(B, V) logits after one more token (B,) of each running row of the window."""
        assert isinstance(attended, Source)
        return self.lm(
            encoder_outputs=BaseModelOutput(last_hidden_state=attended.nothing),  # its keys and values are known
            attention_mask=attended.mask[:, None, None] if window.masked else attended.mask.long(),
            decoder_input_ids=ids[:, None],
            decoder_attention_mask=window.mask(),
            past_key_values=EncoderDecoderCache(window.cache, attended.cache),
            use_cache=True,
            return_dict=True,
        ).logits[:, -1]

    def after(self, ids: Int[Tensor, "B T"], read: Read) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits after each of the tokens (B, T) that follow the start token of the one row of ``read``."""
        assert isinstance(read.attended, Source)
        source = read.attended.take(torch.zeros(len(ids), dtype=torch.long, device=ids.device))
        return self.lm(
            encoder_outputs=BaseModelOutput(last_hidden_state=source.nothing),
            attention_mask=source.mask.long(),
            decoder_input_ids=ids,
            past_key_values=EncoderDecoderCache(repeated_cache(read.layers, len(ids)), source.cache),
            use_cache=True,
            return_dict=True,
        ).logits

    def score_endings(
        self, prompt: Prompt, endings: Sequence[Int[Tensor, " _"]], labels: Sequence[Int[Tensor, " _"]]
    ) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of B texts after the start token; see :func:`.scoring.score_endings`."""
        return score_endings(self, prompt, endings, labels)

    def _label_nll(self, embeds: Tensor, lengths: Tensor, decoder: Tokens) -> tuple[Tensor, Tensor]:
        if decoder.labels is None:
            raise DataError("the decoder's stream has no labels, so there is no loss; use a processor for training.")
        row, column = torch.nonzero(decoder.labels[:, 1:] != IGNORE, as_tuple=True)
        logits = self.logits(embeds, lengths, decoder)[row, column]
        return nll(logits, decoder.labels[row, column + 1]), row


class Source:
    """What the encoder made of the rows' prompts: keys and values (n, H, S, head_width) of each layer of the decoder,
    and which of the S are real, ``mask`` (n, S)."""

    def __init__(self, layers: Layers, mask: Tensor) -> None:
        self.layers, self.mask = layers, mask
        self.cache = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            self.cache.update(keys, values, number)

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.mask.nbytes + sum(keys.nbytes + values.nbytes for keys, values in self.layers)

    @property
    def nothing(self) -> Tensor:
        """(n, S, 1) in place of hidden states that nobody reads."""
        return self.layers[0][0].new_zeros(1).expand(*self.mask.shape, 1)

    def join(self, other: "Source") -> "Source":
        width = max(self.mask.shape[1], other.mask.shape[1])
        layers = [
            (torch.cat([_wider(k, width), _wider(ok, width)]), torch.cat([_wider(v, width), _wider(ov, width)]))
            for (k, v), (ok, ov) in zip(self.layers, other.layers, strict=True)
        ]
        masks = [F.pad(m, (0, width - m.shape[1])) for m in (self.mask, other.mask)]
        return Source(layers, torch.cat(masks))

    def take(self, rows: Int[Tensor, " _"]) -> "Source":
        return Source([(keys[rows], values[rows]) for keys, values in self.layers], self.mask[rows])


def _wider(x: Tensor, width: int) -> Tensor:
    """(n, H, S, head_width) with zeros up to ``width`` positions."""
    return F.pad(x, (0, 0, 0, width - x.shape[2]))


Language = LanguageModel | Seq2SeqLM
"""What a net may have as its ``language``."""


def build_language(config: LibraryConfig) -> Language:
    """The LM of a configuration: an encoder-decoder for T5's family, else a causal LM."""
    return Seq2SeqLM.build(config) if config.get("model_type") in T5_LIKE else LanguageModel.build(config)


def safe_dtype(config: LibraryConfig, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, but bf16 where an fp16 T5 was requested: its activations overflow fp16 (BLIP-2, sec. 4.1)."""
    return torch.bfloat16 if config.get("model_type") in T5_LIKE and dtype == torch.float16 else dtype


def _mask(embeds: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]).long()
