"""LanguageModel: the one thin edge between isthmus and the causal LMs of transformers.

Shapes: B rows, T tokens, D width of the input embeddings, V vocabulary, M labelled positions.

The library's class stays unmodified and keeps its own state-dict keys below ``lm.``. Rows are right-padded here and
carry their lengths. Attention is causal, so no real token sees padding on its right: training and reading prompts
need no attention mask and no position ids, whichever way the LM makes its positions. Writing is the
:class:`.decoder.Decoder`'s, whose steps this adapter takes.
"""

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from isthmus.batch import IGNORE, Tokens
from isthmus.errors import CapabilityError, ConfigError, DataError, IsthmusWarning
from isthmus.language.decoder import Attended, Prompt, Read, write_all
from isthmus.language.decoding import Decoding, check_ids, library_loop
from isthmus.language.library import SDPA, LibraryConfig, LibraryLM, known_fields, library_config
from isthmus.language.scoring import score_endings
from isthmus.language.window import Layers, Window, repeated_cache, tensors_of
from isthmus.nn.losses import widen

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
        self._writable: Literal[True] | str | None = None
        if lm.config._attn_implementation == "sdpa":
            lm.set_attn_implementation(SDPA)

    @classmethod
    def build(cls, config: LibraryConfig) -> "LanguageModel":
        """A freshly initialised LM from ``{"model_type": "llama", ...}``; touches neither disk nor network.

        Raises ConfigError for an unknown model type, an unknown field or a value the library refuses.
        """
        lm = AutoModelForCausalLM.from_config(library_config(config), dtype=torch.float32)
        lm.tie_weights()  # the library leaves it out inside :func:`unfilled`
        return cls(lm)

    @property
    def config(self) -> dict[str, object]:
        """The library's full configuration, as :meth:`build` takes it back."""
        return known_fields(self.lm.config.to_dict())

    @property
    def context(self) -> int | None:
        """Most positions a row may have, or none where the configuration names no limit."""
        return getattr(self.lm.config, "max_position_embeddings", None)

    def plain_head(self) -> bool:
        """Whether the logits are the output table applied to the last hidden state, and nothing more."""
        return self._has_plain_head(self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.lm.device)))

    def hidden(self, embeds: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """(B, T, D) -> the last hidden states (B, T, D'), ready for the head."""
        self._check_context(embeds.shape[1])
        return self.lm.base_model(inputs_embeds=embeds, use_cache=False, return_dict=True).last_hidden_state

    def logits(
        self, embeds: Float[Tensor, "B T D"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, "B T V"]:
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

    def loss(self, embeds: Float[Tensor, "B T D"], tokens: Tokens) -> tuple[Float[Tensor, ""], int]:
        """Next-token cross-entropy in fp32 over labelled targets: (sum, count). Position 0 is never a target.

        Logits exist only where the next token carries a label, and only LOGITS_AT_ONCE of them at a time. Without
        any label the sum is a zero that still reaches every parameter.
        """
        losses, _ = self._label_nll(embeds, tokens)
        return losses.sum(), len(losses)

    def score(self, embeds: Float[Tensor, "B T D"], tokens: Tokens) -> Float[Tensor, " B"]:
        """(B,) sums of log-probabilities of the labelled tokens, for choosing among given answers."""
        losses, row = self._label_nll(embeds, tokens)
        return torch.zeros(len(embeds), device=losses.device).index_add(0, row, -losses)

    @torch.no_grad()
    def generate(
        self, embeds: Float[Tensor, "B T D"], lengths: Int[Tensor, " B"], decoding: Decoding
    ) -> list[list[int]]:
        """Continues every row of right-padded ``embeds`` (B, T, D): the new tokens only, without the stop token.

        A row's answer is the same alone and among others. LMs that cannot be written step by step here (see
        :attr:`writable`) are left to the library's own loop, with a warning. Raises DataError for an empty row and
        ConfigError when prompt and answer together pass the LM's context.
        """
        return self.continued(Prompt(embeds, lengths), decoding)

    @torch.no_grad()
    def continued(self, prompt: Prompt, decoding: Decoding) -> list[list[int]]:
        """As :meth:`generate`, of rows that may attend to more than their own tokens."""
        if self.writable is True:
            return write_all(self, prompt, decoding)
        warnings.warn(f"{self.writable} The library's own loop writes instead.", IsthmusWarning, stacklevel=3)
        decoding = self.settled(decoding, prompt)
        longest = int(prompt.lengths.max())
        source = torch.arange(longest, device=prompt.embeds.device) - (longest - prompt.lengths)[:, None]
        left = prompt.embeds.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, prompt.embeds.shape[2]))
        return library_loop(
            self.lm,
            decoding,
            self.vocab_size,
            len(prompt),
            inputs_embeds=left,
            attention_mask=(source >= 0).long(),
        )

    # Step by step, as a Decoder needs it

    @property
    def writable(self) -> Literal[True] | str:
        """True where a Decoder can write with this LM, else why not.

        Needed is a cache of nothing but keys and values. Rather than trust a list of names, the first call tries it:
        two rows of unlike length must go on as they do without any cache.
        """
        if self._writable is None:
            self._writable = self._find_sliding() or self._try_steps() or True
        return self._writable

    def _find_sliding(self) -> str | None:
        """How many positions each layer sees; or why a window cannot hold what the layers keep."""
        config = self.lm.config.get_text_config()
        name = type(self.lm).__name__
        layers = DynamicCache(config=self.lm.config).layers
        scaling = getattr(config, "rope_parameters", None) or {}
        if odd := [
            type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
        ]:
            return (
                f"{name} keeps more than keys and values ({odd[0]}), so its texts cannot be written step by step here."
            )
        if getattr(config, "attention_chunk_size", None):
            return f"{name} attends in chunks, so its texts cannot be written step by step here."
        if any("dynamic" in str(value) or "longrope" in str(value) for value in scaling.values()):
            return f"{name} turns its positions by the longest row, so its texts cannot be written step by step here."
        self._sliding = [getattr(layer, "sliding_window", None) for layer in layers]
        self._layer_types = list(getattr(config, "layer_types", None) or ())
        self._positioned = "position_ids" in signature(self.lm.forward).parameters
        return None

    def _try_steps(self) -> str | None:
        table = torch.linspace(-1, 1, 7 * self.width).reshape(7, self.width).to(self.lm.get_input_embeddings().weight)
        embeds = torch.stack([table[:4], table[3:]])
        lengths, ids = torch.tensor([4, 2], device=embeds.device), torch.tensor([0, 1], device=embeds.device)
        trained = self.lm.training
        self.lm.eval()
        try:
            with torch.inference_mode():
                read, window = self.read(Prompt(embeds, lengths)), self._window()
                if len(read.layers) != len(self._sliding):
                    return f"{type(self.lm).__name__} has a state of its own kind, so its texts cannot be written here."
                window.join(read.layers, read.lengths, ahead=2, waiting=False)
                window.running = 2
                found = self.next(ids, lengths, window, None)
                new = self.lm.get_input_embeddings()(ids)
                wanted = torch.stack(
                    [
                        self.logits(torch.cat([embeds[row, :n], new[row : row + 1]])[None])[0, -1]
                        for row, n in enumerate(read.lengths)
                    ]
                )
        finally:
            self.lm.train(trained)
        near = 1e-3 if found.dtype == torch.float32 else 5e-2
        if torch.allclose(found.float(), wanted.float(), atol=near * float(wanted.float().abs().max()), rtol=0):
            return None
        return f"{type(self.lm).__name__} goes on otherwise from a cache of ours than without one."

    def window(self) -> Window:
        """An empty one for this LM. Raises CapabilityError where texts cannot be written step by step."""
        if self.writable is not True:
            raise CapabilityError(str(self.writable))
        return self._window()

    def _window(self) -> Window:
        # Alibi is computed from the padding mask (Falcon's first models take positions beside it), and only SDPA takes
        # a mask of visible positions.
        alibi = getattr(self.lm.config.get_text_config(), "alibi", False)
        masked = self._positioned and not alibi and "sdpa" in self.lm.config._attn_implementation
        return Window(self._sliding, layer_types=self._layer_types, masked=masked)

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        """``decoding``, checked against this LM and ``prompt``. Raises DataError for an empty row, ConfigError for
        tokens outside the vocabulary, and when prompt and answer together pass the context."""
        empty = torch.nonzero(prompt.lengths == 0).flatten().tolist()
        if empty:
            raise DataError(f"row {empty[0]} of the batch has an empty prompt; generation needs at least one token.")
        longest = int(prompt.lengths.max()) + _length(prompt.past)
        self._check_context(
            longest + decoding.max_new_tokens, f"a prompt of {longest} tokens and {decoding.max_new_tokens} new ones"
        )
        check_ids(decoding, self.vocab_size)
        return decoding

    def read(self, prompt: Prompt) -> Read:
        """One pass over the prompts. No row needs a mask: attention is causal, the padding lies on the right."""
        lengths = prompt.lengths.tolist()
        last, place = torch.unique(prompt.lengths - 1, return_inverse=True)
        logits, cache = self._run(
            prompt.embeds[:, : max(lengths)], None if prompt.past is None else prompt.past.layers, keep=last
        )
        rows = torch.arange(len(lengths), device=logits.device)
        before = _length(prompt.past)
        return Read(logits[rows, place], tensors_of(cache), [before + n for n in lengths])

    def read_on(self, before: Layers, prompt: Prompt) -> Read:
        """As :meth:`read`, of one row whose beginning was read before: ``before`` holds its keys and values, at least
        one token less than the row. Only what follows is computed."""
        known, length = before[0][0].shape[2], int(prompt.lengths[0])
        logits, cache = self._run(prompt.embeds[:, known:length], before, keep=1)
        return Read(logits[:, -1], tensors_of(cache), [length])

    def after(self, ids: Int[Tensor, "B T"], read: Read) -> Float[Tensor, "B T V"]:
        """(B, T, V) logits after each of the tokens (B, T) that follow the one row of ``read``."""
        self._check_context(read.lengths[0] + ids.shape[1])
        return self._run(self.embed(ids), read.layers)[0]

    def _run(self, embeds: Tensor, before: Layers | None, *, keep: Tensor | int | None = None) -> tuple[Tensor, Cache]:
        """The library's forward pass, after one row's keys and values where there are some: logits, all or those of
        the positions to ``keep``, and cache."""
        cache: Cache = DynamicCache()
        more: dict[str, object] = {} if keep is None else {"logits_to_keep": keep}
        if before is not None:
            cache = repeated_cache(before, len(embeds))
            # Rows are padded on the right, if at all, where no real token sees it.
            known = before[0][0].shape[2]
            more["attention_mask"] = torch.ones(
                len(embeds), known + embeds.shape[1], dtype=torch.long, device=embeds.device
            )
        found = self.lm(inputs_embeds=embeds, past_key_values=cache, use_cache=True, return_dict=True, **more)
        return found.logits, cache

    def score_endings(
        self, prompt: Prompt, endings: Sequence[Int[Tensor, " _"]], labels: Sequence[Int[Tensor, " _"]]
    ) -> Float[Tensor, " B"]:
        """(B,) log-probabilities of B endings of one row; see :func:`.scoring.score_endings`."""
        return score_endings(self, prompt, endings, labels)

    def next(
        self, ids: Int[Tensor, " B"], positions: Int[Tensor, " B"], window: Window, attended: Attended | None
    ) -> Float[Tensor, "B V"]:
        """(B, V) logits after one more token (B,) of each running row of the window."""
        own = {"position_ids": positions[:, None]} if self._positioned else {}
        return self.lm(
            inputs_embeds=self.lm.get_input_embeddings()(ids[:, None]),
            attention_mask=window.mask(),
            past_key_values=window.cache,
            use_cache=True,
            return_dict=True,
            **own,
        ).logits[:, -1]

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
        caught: dict[str, Tensor] = {}

        def answer(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            caught["input"] = inputs[0]
            caught["output"] = torch.linspace(-100, 100, output.shape[-1]).to(output).expand_as(output)
            return caught["output"].clone()

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
        return torch.equal(caught["input"], hidden) and torch.equal(logits, caught["output"].to(logits.dtype))

    def _check_context(self, tokens: int, what: str | None = None) -> None:
        if self.context is not None and tokens > self.context:
            raise ConfigError(
                f"{what or f'a row of {tokens} tokens'} passes the LM's context of {self.context} "
                "positions. Shorten the rows (the processor's max_length) or max_new_tokens."
            )


def _length(past: Read | None) -> int:
    return 0 if past is None else past.lengths[0]


def nll(logits: Float[Tensor, "*places V"], targets: Int[Tensor, "*places"]) -> Float[Tensor, "*places"]:
    """(M,) negative log-likelihoods in fp32 at least from logits (M, V)."""
    return F.cross_entropy(widen(logits), targets, reduction="none")
