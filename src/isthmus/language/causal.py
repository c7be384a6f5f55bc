"""LanguageModel: the one thin edge between isthmus and the causal LMs of transformers.

Shapes: B rows, T tokens, D width of the input embeddings, V vocabulary, M labelled positions.

The library's class stays unmodified and keeps its own state-dict keys below ``lm.``. Rows are right-padded here and
carry their lengths. Attention is causal, so no real token sees padding on its right: the training path needs no
attention mask and no position ids, whichever way the LM makes its positions. Only generation, where all rows must
end together, moves the padding to the left, inside, and hands the library the mask.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import ConfigError, DataError
from isthmus.language.decoding import Decoding, generation_config, logits_processors, until_stop
from isthmus.language.library import SDPA, LibraryLM, known_fields, library_config

LOGITS_AT_ONCE = 2**25
"""Most logits (positions x vocabulary) that a loss holds at a time: 128 MiB in fp32, 1,048 positions of 32,000."""


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


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """(M,) negative log-likelihoods in fp32 from logits (M, V)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")
