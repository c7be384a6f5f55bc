"""Window: the static key-value cache that many texts of unlike length are written into, column by column.

    column    0 ... first ........................ column ... capacity
    row 0           p  p  p  p  p  p  p  n  n  n  n  *           p prompt, n new, * the next token of every row
    row 1                    p  p  p  p  p  p  n  n  *
    row 2                                p  p  p  p  *           joined while the others were writing

Every row ends at the same column, so one step writes one column of one tensor per layer, and what a row may see is
one mask that is made when the row joins. Rows are the first of the tensors' rows, without gaps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

Layers = Sequence[tuple[Tensor, Tensor]]
"""Keys and values (G, H, T, head_width) of each layer."""


def tensors_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache that was read into."""
    layers: list[Any] = cache.layers  # the library's base class names no tensors
    return [(layer.keys, layer.values) for layer in layers]


class Window:
    """Keys and values of the rows that are being written; ``cache`` is what the library's forward pass takes.

    Args:
        sliding: for each layer the number of positions that it sees, none for all of them. Only where ``masks`` are
            handed over as they are; a library that makes its own masks cuts by itself.
        kinds: the library's names of the layers' kinds, where a mask for each of several is wanted.
    """

    def __init__(self, sliding: Sequence[int | None], *, layer_types: Sequence[str] = (), masked: bool = True) -> None:
        self.layers = [_Layer(self, own if masked else None) for own in sliding]
        self.cache = Cache(layers=list(self.layers))
        self.masked = masked  # the library takes masks that are ready, else what is padding
        self.layer_types = dict(zip(layer_types, sliding, strict=True)) if len(set(layer_types)) > 1 else {}
        self.only = sliding[0] if len(set(sliding)) == 1 else None
        self.bounded = any(size is not None for size in sliding) or not masked
        self.starts: list[int] = []
        self.running = 0  # rows that the next step writes
        self.clear()
        self.visible = torch.zeros(0, 0, dtype=torch.bool)

    @property
    def capacity(self) -> tuple[int, int]:
        """Rows and columns there is room for."""
        return self.visible.shape[0], self.visible.shape[1]

    def clear(self) -> None:
        """No rows; the memory stays."""
        self.rows = self.column = self.first = self.running = 0
        self.starts = []

    def join(self, layers: Layers, lengths: Sequence[int], *, ahead: int, waiting: bool) -> None:
        """New rows, right-padded, with room for ``ahead`` more columns. ``waiting``: one column of the rows that are
        here is still to be written, so that the new ones end after it."""
        count, longest, waiting_columns = len(lengths), max(lengths), int(waiting)
        self._reserve(self.rows + count, longest - waiting_columns, ahead + waiting_columns, waiting_columns, layers)
        end, device = self.column + waiting_columns, layers[0][0].device
        rows = slice(self.rows, self.rows + count)
        own = torch.tensor(lengths, device=device)
        source = (torch.arange(longest, device=device) - (longest - own)[:, None]).clamp(min=0)
        numbers = torch.arange(count, device=device)[:, None]
        ragged = min(lengths) < longest
        for layer, pair in zip(self.layers, layers, strict=True):
            for kept, new in zip(layer.pair, pair, strict=True):
                new = new[:, :, :longest]
                new = new.transpose(1, 2)[numbers, source].transpose(1, 2) if ragged else new
                kept[rows, :, end - longest : end] = new
        self.visible[rows] = torch.arange(self.capacity[1], device=device) >= (end - own)[:, None]
        self.starts += [end - n for n in lengths]
        self.rows += count
        self.first = min(self.starts)

    def _reserve(self, rows: int, back: int, ahead: int, waiting_columns: int, layers: Layers) -> None:
        """Room for that many rows, for ``back`` columns before the present one and for ``ahead`` from it on; rows that
        joined since the last step reach ``waiting_columns`` into the latter."""
        height, width = self.capacity
        column = self.column if self.rows else back
        if rows <= height and column >= back and column + ahead <= width:
            self.column = column
            return
        held = self.column - self.first if self.rows else 0
        column = max(held, back)
        need = column + ahead
        size = (
            rows if rows <= height or not height else max(rows, 2 * height),
            need + need // 2 if self.rows else need,
        )
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            for name, like in (("keys", keys), ("values", values)):
                # Zeros, since a masked column weighs nothing only while it is finite.
                new = torch.zeros(size[0], like.shape[1], size[1], like.shape[3], dtype=like.dtype, device=like.device)
                if held:
                    kept = getattr(layer, name)[: self.rows, :, self.first : self.column + waiting_columns]
                    new[: self.rows, :, column - held : column + waiting_columns] = kept
                setattr(layer, name, new)
            layer.is_initialized = True
        self.starts = [start + column - self.column for start in self.starts]
        self.visible = torch.zeros(size, dtype=torch.bool, device=layers[0][0].device)
        for row, start in enumerate(self.starts):
            self.visible[row, start:] = True
        self.column = column

    def leave(self, rows: Sequence[int]) -> list[tuple[int, int]]:
        """These rows go; the last ones move into their places: (from, to) of every move."""
        gone = set(rows)
        left = self.rows - len(gone)
        last = [row for row in range(left, self.rows) if row not in gone]
        moves = list(zip(last, sorted(row for row in gone if row < left), strict=True))
        for source, target in moves:
            self.starts[target] = self.starts[source]
        if moves:
            sources, targets = (torch.tensor(side, device=self.visible.device) for side in zip(*moves, strict=True))
            self.copy(targets, sources, self.column - self.first)
            self.visible[targets] = self.visible[sources]
        self.rows, self.starts = left, self.starts[:left]
        self.first = min(self.starts, default=0)
        return moves

    def copy(self, targets: Int[Tensor, " B"], sources: Int[Tensor, " B"], columns: int) -> None:
        """The last ``columns`` columns of some rows from those of others."""
        for layer in self.layers:
            for kept in layer.pair:
                part = kept[:, :, self.column - columns : self.column]
                part[targets] = part[sources]

    def mask(self) -> Tensor | dict[str, Tensor] | None:
        """What the running rows' next tokens may see: (n, 1, 1, columns), one for each kind of layer where there are
        several, (n, columns) where the library makes its masks by itself; none where all rows see all."""
        stop = self.column + 1
        if all(start == self.first for start in self.starts[: self.running]) and not self.bounded:
            return None
        if not self.masked:
            return self.visible[: self.running, self.first : stop].long()
        if self.layer_types:
            return {layer_type: self._mask(size, stop) for layer_type, size in self.layer_types.items()}
        return self._mask(self.only, stop)

    def _mask(self, size: int | None, stop: int) -> Tensor:
        first = self.first if size is None else max(self.first, stop - size)
        return self.visible[: self.running, None, None, first:stop]


class _Layer(StaticLayer):
    """The library's static layer with the window's columns: all rows write one column; what no row sees is left out."""

    is_compileable = False

    def __init__(self, window: Window, sliding: int | None) -> None:
        super().__init__(max_cache_len=0)
        self.window, self.sliding = window, sliding

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, once room was made for them."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows, stop = len(key_states), self.window.column + key_states.shape[2]
        first = self.window.first if self.sliding is None else max(self.window.first, stop - self.sliding)
        keys, values = self.pair
        keys[:rows, :, self.window.column : stop] = key_states
        values[:rows, :, self.window.column : stop] = value_states
        return keys[:rows, :, first:stop], values[:rows, :, first:stop]

    def get_seq_length(self) -> int:
        return self.window.column - self.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


def repeated_cache(layers: Layers, rows: int) -> Cache:
    """The library's growing cache that holds one row ``rows`` times, without copies until it grows."""
    found = []
    for keys, values in layers:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
        found.append(layer)
    return Cache(layers=found)
