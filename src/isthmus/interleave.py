"""InterleavedLanguageModel: gated cross-attention and new tokens in an unmodified causal LM of transformers.

    ids ─ embed ─→ h ─→ [gated block] ─ frozen layer 0 ─→ frozen layer 1 ─→ [gated block] ─ frozen layer 2 ─→ … ─ head
                             ↑ MediaContext: media, and which image each position may see

Shapes: B rows, T tokens, N visual inputs per row, R visual tokens each, d width of the media, D of the LM.

The blocks belong to whoever inserts them. A forward pre-hook on a chosen decoder layer sends its input through the
block first, so the LM's class, its ``generate`` and its state-dict keys stay the library's own. The hooks take no
arguments, so what the blocks attend to is one object that is set for one call
(:meth:`InterleavedLanguageModel.attending_to`). A block that runs without it raises.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.batch import Tokens
from isthmus.errors import ConfigError
from isthmus.language import Attended, Decoding, LanguageModel, Layers, LibraryConfig, Prompt, Read, Window
from isthmus.nn.gated import GatedBlock, Media, media_mask

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


class NewRows(nn.Module):
    """Input and output rows of the new tokens, (n, D) each; a tied LM has one set of rows for both."""

    def __init__(self, count: int, input_width: int, output_width: int | None) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(count, input_width) * 0.02)
        self.output = None if output_width is None else nn.Parameter(torch.randn(count, output_width) * 0.02)


@dataclass(eq=False, kw_only=True)
class MediaContext:
    """What the blocks of one call attend to.

    ``media`` (B, N, R, d). ``media_index`` (B, T) is the number from 1 of the image that each position of the rows may
    attend to, 0 for none, from position ``start`` of the rows on; later positions attend to what the last one does.
    Keys and values are made once per block and kept.
    ``recorded`` collects (block number, attention (B, T, N·R)) where a list is given. ``before`` is the
    context of one row that was read and that all these continue: the first of ``media`` are its own, and their keys
    and values are made.
    """

    media: Tensor
    media_index: Tensor
    mode: Media = "previous"
    recorded: list[tuple[int, Tensor]] | None = None
    past: int = 0
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    start: int = 0
    before: "MediaContext | None" = None

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.media.nbytes + self.media_index.nbytes + sum(k.nbytes + v.nbytes for k, v in self.kept.values())

    def apart(self) -> "MediaContext":
        """The same without the keys and values that were made of it."""
        return MediaContext(media=self.media, media_index=self.media_index, mode=self.mode)

    def in_common(self, other: "MediaContext") -> int:
        """How many positions of one row, from its beginning, see what those of ``other``'s one row see."""
        images = min(self.media.shape[1], other.media.shape[1])
        same = (self.media[0, :images] == other.media[0, :images]).flatten(1).all(1)
        known = int(same.cumprod(0).sum())  # so many images are the same from the first on
        width = min(self.media_index.shape[1], other.media_index.shape[1])
        index, others = self.media_index[0, :width], other.media_index[0, :width]
        unlike = ((index != others) | (index > known)).nonzero()
        return int(unlike[0]) if len(unlike) else width

    def left_padded(self, lengths: Tensor) -> "MediaContext":
        """The same for rows (B, T) whose right padding moves to the left; padding sees nothing."""
        longest = int(lengths.max())
        source = torch.arange(longest, device=self.media_index.device) - (longest - lengths)[:, None]
        media_index = self.media_index.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
        return MediaContext(media=self.media, media_index=media_index, mode=self.mode)

    def last(self, lengths: Tensor) -> "MediaContext":
        """The same for what comes after rows of these ``lengths``: keys and values are made already."""
        rows = torch.arange(len(lengths), device=self.media_index.device)
        return replace(
            self,
            media_index=self.media_index[rows, lengths - 1][:, None],
            recorded=None,
            masks={},
            start=0,
            before=None,
        )

    def join(self, other: "MediaContext") -> "MediaContext":
        """These rows, then those of ``other``; both from :meth:`last`."""
        images, tokens = max(self.media.shape[1], other.media.shape[1]), self.media.shape[2]

        def more(x: Tensor, y: Tensor, size: int) -> Tensor:
            """Zeros after the images of the rows that have fewer."""
            return torch.cat([F.pad(part, (0, 0, 0, size - part.shape[2])) for part in (x, y)])

        kept = {
            block: (more(k, other.kept[block][0], images * tokens), more(v, other.kept[block][1], images * tokens))
            for block, (k, v) in self.kept.items()
        }
        media = torch.cat(
            [F.pad(context.media, (0, 0, 0, 0, 0, images - context.media.shape[1])) for context in (self, other)]
        )
        return MediaContext(
            media=media, media_index=torch.cat([self.media_index, other.media_index]), mode=self.mode, kept=kept
        )

    def take(self, rows: Tensor) -> "MediaContext":
        """These rows of it, in this order."""
        kept = {block: (keys[rows], values[rows]) for block, (keys, values) in self.kept.items()}
        return MediaContext(media=self.media[rows], media_index=self.media_index[rows], mode=self.mode, kept=kept)

    def through(self, block: GatedBlock, number: int, hidden: Tensor, *, spare_memory: bool) -> Tensor:
        """``hidden`` (B·k, T, D) through a block; k > 1 when beams or samples repeat each row."""
        times = len(hidden) // len(self.media)
        if times * len(self.media) != len(hidden):
            raise ConfigError(
                f"the language model runs {len(hidden)} rows, the media set for this call are of {len(self.media)}; "
                "set them again with `attending_to` for every call."
            )
        # The block may be kept in another precision than the LM; its output goes back in the LM's.
        y = hidden.to(block.attn_gate.dtype)
        keys, values = self._keys_values(block, number, times)
        mask = self._mask(hidden.shape[1]).repeat_interleave(times, dim=0)
        if self.recorded is not None:
            self.recorded.append((number, block.weights(y, keys, mask)))
        if spare_memory and torch.is_grad_enabled():
            # The library checkpoints its layers alone; the block is recomputed in the backward pass by itself.
            out = checkpoint(block, y, keys, values, mask, use_reentrant=False)
        else:
            out = block(y, keys, values, mask)
        return out.to(hidden.dtype)

    def _keys_values(self, block: GatedBlock, number: int, times: int) -> tuple[Tensor, Tensor]:
        if (number, times) not in self.kept:
            # The first images belong to the row that was read before, and so do their keys and values: only the new
            # images are projected, and the known ones are shared by all rows.
            before = 0 if self.before is None else self.before.media.shape[1]
            keys, values = block.keys_values(self.media[:, before:].to(block.attn_gate.dtype))
            if self.before is not None:
                known = (x.expand(len(self.media), -1, -1, -1) for x in self.before.kept[number, 1])
                keys, values = (torch.cat(pair, dim=2) for pair in zip(known, (keys, values), strict=True))
            self.kept[number, times] = keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)
        return self.kept[number, times]

    def _mask(self, length: int) -> Tensor:
        """(B, T, N·R) for the ``length`` positions after the ``past`` ones; one for all blocks."""
        past = min(self.past, self.media_index.shape[1])
        if (past, length) not in self.masks:
            known = self.media_index[:, past : past + length]
            if known.shape[1] < length:
                # New tokens attend to what the row's last one does.
                known = torch.cat([known, self.media_index[:, -1:].expand(-1, length - known.shape[1])], dim=1)
            _, images, tokens, _ = self.media.shape
            self.masks[past, length] = media_mask(known, images, tokens, self.mode)
        return self.masks[past, length]


class InterleavedLanguageModel(LanguageModel):
    """A causal LM with gated blocks before chosen layers, and rows of its own for the tokens ``new_ids``.

    ``new_ids`` are the ids of ``<|endofchunk|>`` (ends an answer), ``<image>`` (never generated) and, if there is a
    third, of a token that ends a turn. They lie right after the LM's table, or within its unused last rows when the
    table is padded. Raises ConfigError otherwise, for an LM whose decoder layers cannot be found, and for one without
    an output head.
    """

    def __init__(self, lm: "PreTrainedModel", new_ids: Sequence[int] = ()) -> None:
        super().__init__(lm)
        table, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        if head is None:
            raise ConfigError(f"{type(lm).__name__} has no output head, so it cannot learn new tokens.")
        self.new_ids = tuple(int(i) for i in new_ids)
        rows = table.weight.shape[0]
        self._total = max(rows, *(i + 1 for i in self.new_ids)) if self.new_ids else rows
        if len(set(self.new_ids)) < len(self.new_ids) or self._total - rows > sum(i >= rows for i in self.new_ids):
            raise ConfigError(
                f"the new tokens' ids {list(self.new_ids)} must differ and follow the LM's {rows} rows without a gap; "
                "does the tokenizer belong to this LM?"
            )
        tied = head.weight is table.weight
        self.new_rows = NewRows(len(self.new_ids), table.weight.shape[1], None if tied else head.weight.shape[1])
        self._blocks: dict[int, GatedBlock] = {}
        self._hooks: list[RemovableHandle] = []
        self._context: MediaContext | None = None
        self._blind = False
        if self.new_ids:
            table.forward = _Reading(self, table)
            head.register_forward_hook(self._add_columns)

    @classmethod
    def build(cls, config: LibraryConfig, new_ids: Sequence[int] = ()) -> "InterleavedLanguageModel":
        """A freshly initialised LM as :meth:`LanguageModel.build`, with rows for ``new_ids``."""
        return cls(LanguageModel.build(config).lm, new_ids)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM's table, and what the new tokens add after them."""
        return self._total

    @torch.no_grad()
    def start_new_rows(self) -> None:
        """Draw the new rows like the LM's own: the mean row and as much spread per channel."""
        for rows, end in (
            (self.new_rows.input, self.lm.get_input_embeddings()),
            (self.new_rows.output, self.lm.get_output_embeddings()),
        ):
            if rows is not None:
                table = end.weight.float()
                rows.copy_(table.mean(0) + torch.randn_like(rows) * table.std(0))

    # Insertion

    def decoder_layers(self) -> nn.ModuleList:
        """The LM's decoder layers. Raises ConfigError when they cannot be found."""
        return self._find_layers()[1]

    def _find_layers(self) -> tuple[nn.Module, nn.ModuleList]:
        """The LM's one list of as many modules as its configuration counts hidden layers, and the module it is in."""
        depth = getattr(self.lm.config.get_text_config(), "num_hidden_layers", None)
        lists = {n: m for n, m in self.lm.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
        outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
        if depth is None or len(outermost) != 1:
            raise ConfigError(
                f"{type(self.lm).__name__} has {len(outermost)} module lists of its {depth} hidden layers, so it is "
                "unknown where its decoder layers are and gated blocks cannot be put before them; take another "
                "language model, such as Llama, OPT, GPT-NeoX, MPT, GPT-2 or Qwen."
            )
        return self.lm.get_submodule(outermost[0].rpartition(".")[0]), lists[outermost[0]]

    def insert(self, blocks: Mapping[int, GatedBlock]) -> None:
        """Send the input of layer i through ``blocks[i]`` from now on. Raises ConfigError for a layer not there."""
        decoder, layers = self._find_layers()
        if outside := [i for i in blocks if not 0 <= i < len(layers)]:
            raise ConfigError(f"a gated block cannot stand before layer {outside[0]}: the LM has {len(layers)}.")
        self.detach()
        self._blocks = dict(blocks)
        self._hooks.append(decoder.register_forward_pre_hook(self._count_past, with_kwargs=True))
        for i in blocks:
            self._hooks.append(layers[i].register_forward_pre_hook(_BeforeLayer(self, i), with_kwargs=True))

    def detach(self) -> None:
        """Take the blocks out again: the bare LM."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._blocks = [], {}

    @contextmanager
    def attending_to(self, context: MediaContext | None) -> Iterator[None]:
        """Let the blocks attend to this during the calls inside, and to nothing after them.

        A backward pass comes later and needs none of it: a block that spares memory keeps what it is recomputed from,
        and the library recomputes a layer without its hooks.
        """
        before, self._context = self._context, context
        try:
            yield
        finally:
            self._context = before

    @contextmanager
    def blind(self) -> Iterator[None]:
        """The LM as it would be without its blocks, for the calls inside."""
        before, self._blind = self._blind, True
        try:
            yield
        finally:
            self._blind = before

    def _count_past(self, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        cache = cast("Cache | None", kwargs.get("past_key_values"))
        if self._context is not None:
            self._context.past = 0 if cache is None else int(cache.get_seq_length()) - self._context.start

    def _before(self, number: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        if self._blind:
            return hidden
        if self._context is None:
            raise ConfigError(
                "a gated block was run without media: call the language model through its Flamingo, or inside "
                "`language.attending_to(...)` or `language.blind()`."
            )
        spare = any(getattr(m, "gradient_checkpointing", False) for m in (layer, self.lm.base_model))
        return self._context.through(self._blocks[number], number, hidden, spare_memory=spare)

    # New tokens

    def _which(self, ids: Tensor) -> Tensor:
        return ids[..., None] == torch.tensor(self.new_ids, device=ids.device)

    def _add_columns(self, _: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        rows = self.new_rows.input if self.new_rows.output is None else self.new_rows.output
        own = F.linear(inputs[0], rows.to(inputs[0].dtype), self._new_bias(inputs[0].dtype)).to(logits.dtype)
        columns = torch.tensor(self.new_ids, device=logits.device)
        return F.pad(logits, (0, self._total - logits.shape[-1])).index_copy(-1, columns, own)

    def _new_bias(self, dtype: torch.dtype) -> Tensor | None:
        """(n,) what an LM whose head has a bias adds to the new tokens' logits: a padded table's own entries, and after
        the table the mean of all, which the library's own enlarged tables begin with. It is not trained."""
        bias = getattr(self.lm.get_output_embeddings(), "bias", None)
        if bias is None:
            return None
        bias = bias.detach()
        mean = bias.float().mean().to(bias.dtype)
        return torch.stack([bias[i] if i < len(bias) else mean for i in self.new_ids]).to(dtype)

    # Calls

    @torch.no_grad()
    def generate(self, embeds: Tensor, lengths: Tensor, decoding: Decoding) -> list[list[int]]:
        """As :meth:`LanguageModel.generate`; ``<|endofchunk|>`` ends an answer and ``<image>`` is never generated."""
        return self.continued(Prompt(embeds, lengths, self._context), decoding)

    @torch.no_grad()
    def continued(self, prompt: Prompt, decoding: Decoding) -> list[list[int]]:
        """As :meth:`generate`, attending to what the prompt names."""
        context = media_of(prompt.attended)
        if self.writable is True or context is None:
            return super().continued(prompt, decoding)
        with self.attending_to(context.left_padded(prompt.lengths)):
            return super().continued(prompt, decoding)

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        """As :meth:`LanguageModel.settled`; ``<|endofchunk|>`` ends an answer and ``<image>`` is never generated."""
        if self.new_ids:
            end, image, *turn = self.new_ids
            decoding = replace(
                decoding,
                stop_ids=tuple(dict.fromkeys((*decoding.stop_ids, end, *turn))),
                forbidden_ids=tuple(dict.fromkeys((*decoding.forbidden_ids, image))),
            )
        return super().settled(decoding, prompt)

    def read(self, prompt: Prompt) -> Read:
        """As :meth:`LanguageModel.read`; keys and values of the media are made here, for all that is written."""
        context = media_of(prompt.attended)
        with self.attending_to(context):
            read = super().read(prompt)
        return read if context is None else replace(read, attended=context.last(prompt.lengths))

    def read_on(self, before: Layers, prompt: Prompt) -> Read:
        """As :meth:`LanguageModel.read_on`; what the prompt attends to is that of the full row."""
        context = media_of(prompt.attended)
        with self.attending_to(context):
            read = super().read_on(before, prompt)
        return read if context is None else replace(read, attended=context.last(prompt.lengths))

    def next(self, ids: Tensor, positions: Tensor, window: Window, attended: Attended | None) -> Tensor:
        """As :meth:`LanguageModel.next`, with what the rows attend to."""
        with self.attending_to(media_of(attended)):
            return super().next(ids, positions, window, attended)

    def label_nll(self, embeds: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood (M,) of every labelled target, and the row (M,) it belongs to."""
        return self._label_nll(embeds, tokens)

    def chunk(self, embeds: Tensor, cache: "Cache | None" = None) -> "tuple[Tensor, Cache]":
        """The next T tokens of conversations: logits (B, T, V) and the cache to go on from.

        ``embeds`` (B, T, D) has no padding. Inside ``attending_to``, whose ``media_index`` covers the rows from the
        start.
        """
        past = 0 if cache is None else int(cache.get_seq_length())
        self._check_context(past + embeds.shape[1])
        mask = torch.ones(len(embeds), past + embeds.shape[1], dtype=torch.long, device=embeds.device)
        out = self.lm(
            inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True
        )
        return out.logits, out.past_key_values

    def after(self, ids: Tensor, read: Read) -> Tensor:
        """As :meth:`LanguageModel.after`; what follows the row sees what its last token saw."""
        context = media_of(read.attended)
        if context is not None:
            context = context.take(torch.zeros(len(ids), dtype=torch.long, device=ids.device))
        with self.attending_to(context):
            return super().after(ids, read)

    def _try_head(self, embeds: Tensor) -> bool:
        with self.blind():
            return super()._try_head(embeds)

    def _try_steps(self) -> str | None:
        with self.blind():
            return super()._try_steps()


def media_of(attended: Attended | None) -> MediaContext | None:
    """What the rows of an InterleavedLanguageModel attend to."""
    assert attended is None or isinstance(attended, MediaContext)  # it is what such a language model gave
    return attended


_Arguments = tuple[tuple[Tensor, ...], dict[str, object]]


class _BeforeLayer:
    """The pre-hook of one layer. An object rather than a closure, so that a copied net has hooks of its own."""

    def __init__(self, language: InterleavedLanguageModel, number: int) -> None:
        self.language, self.number = language, number

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> _Arguments:
        if args:
            return (self.language._before(self.number, layer, args[0]), *args[1:]), kwargs
        hidden = cast(Tensor, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": self.language._before(self.number, layer, hidden)}


class _Reading:
    """How the LM's table is read: ids that it has no rows for get the new rows. Everything else is the table's own.

    It stands in the place of the table's ``forward``, and not as a hook before and one after, because the one after
    would have to be handed the ids that the one before has hidden. An object, as :class:`_BeforeLayer` is.
    """

    def __init__(self, language: InterleavedLanguageModel, table: nn.Module) -> None:
        self.language, self.table = language, table

    def __call__(self, ids: Tensor) -> Tensor:
        which = self.language._which(ids)
        new = which.any(-1)
        embeds = type(self.table).forward(self.table, ids.masked_fill(new, 0))
        rows = self.language.new_rows.input[which.int().argmax(-1)].to(embeds.dtype)
        return torch.where(new[..., None], rows, embeds)
