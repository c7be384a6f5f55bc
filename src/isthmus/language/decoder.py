"""Decoder: the one loop that writes, for a batch as for rows that come and go.

    decoder = Decoder(language)
    (row,) = decoder.add(Prompt(embeds, lengths), Decoding(max_new_tokens=64, temperature=0.7, seed=3), logprobs=5)
    while decoder.rows:                       # more rows may be added before any step, others removed
        for new in decoder.step():
            new.row, new.ids, new.logprobs, new.finish

The contract:

- ``add`` reads the prompts (B, T, D) in one pass and answers with a number per row, never used again. Each row has its
  own Decoding; beams, temperature, stop ids, limits and seeds of the rows may differ.
- ``step`` writes one token for every row and answers with what is new: a row that writes on gives one id; a row that
  ended gives ``finish`` (``stop`` or ``length``) once, is gone after it, and its stop token is not among the ids. A row
  of beam search gives its full text with its ``finish`` and nothing before.
- ``remove`` cancels a row at any time between two calls.
- What a row writes does not depend on its neighbours, on when it joined or on who left: in float32 it is token by
  token what it writes alone. Every row draws from a generator of its own.
- Not for several threads: one owner calls add, step and remove.

The forward pass, attention and cache classes are the library's; rows stand in a :class:`.window.Window`. LMs whose
state is no cache of keys and values cannot be written so (``language.writable``): ``Decoder`` raises
CapabilityError for them, and ``language.generate`` uses the library's loop.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from isthmus.errors import ConfigError, DataError
from isthmus.language.decoding import Decoding, Rules, drawn, seeds_of
from isthmus.language.window import Layers, Window
from isthmus.nn.beam import Beams
from isthmus.products import SMALL, small_products

READ_EVERY = {"cpu": 1, "mps": 8, "cuda": 8}
"""Steps after which the host reads what a batch has written: each read waits for the device."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Rows to be continued: ``embeds`` (B, T, D), right-padded, and ``lengths`` (B,). ``attended`` is what the rows
    cross-attend to (Flamingo's media). ``past`` is what all of them begin with, one row that was read already."""

    embeds: Float[Tensor, "B T D"]
    lengths: Int[Tensor, " B"]
    attended: "Attended | None" = None
    past: "Read | None" = None

    def __len__(self) -> int:
        return len(self.embeds)


class Attended(Protocol):
    """What rows cross-attend to: one row of it per row that is written."""

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        ...

    def join(self, other: Self) -> Self:
        """These rows, then those of ``other``."""
        ...

    def take(self, rows: Tensor) -> Self:
        """These rows of it, in this order; a row may come several times."""
        ...


@dataclass(frozen=True, slots=True)
class Read:
    """Prompts that were read: logits (B, V) of each row's next token, keys and values per layer, right-padded, how
    many of them are the row's, the position of the next token, and what is cross-attended to."""

    logits: Float[Tensor, "B V"]
    layers: Layers
    lengths: list[int]
    attended: Attended | None = None  # of the language model's own class


class Steps(Protocol):
    """What a decoder needs of a language model."""

    @property
    def width(self) -> int: ...

    @property
    def writable(self) -> bool | str:
        """True, or why a decoder cannot write with it."""
        ...

    def window(self) -> Window:
        """An empty one for this model. Raises CapabilityError where its texts cannot stand in a window."""
        ...

    def settled(self, decoding: Decoding, prompt: Prompt) -> Decoding:
        """``decoding`` with what the model itself needs. Raises DataError, ConfigError for what cannot be."""
        ...

    def read(self, prompt: Prompt) -> Read: ...

    def next(
        self, ids: Int[Tensor, " B"], positions: Int[Tensor, " B"], window: Window, attended: Attended | None
    ) -> Float[Tensor, "B V"]:
        """(B, V) logits after one more token (B,) at ``positions`` (B,) of each running row of the window."""
        ...


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token that was written, by the model alone (before temperature, cuts and bars), and the
    likeliest tokens of its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """What one row has written anew; see the contract above."""

    row: int
    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    finish: Literal["stop", "length"] | None = None


@dataclass(slots=True, eq=False)
class _RowState:
    number: int
    decoding: Decoding
    places: list[int]  # of the window, one per beam
    generator: torch.Generator | None = None
    logprobs: int | None = None  # how many of the likeliest to return; none: no log-probabilities
    count: int = 0  # tokens written
    ids: list[int] = field(default_factory=list)  # those the host has read


@dataclass(slots=True, eq=False)
class _Lane:
    """Rows whose scores are changed by the same rules, in one tensor: those that write alone, or those of one beam
    search (``beams``)."""

    rows: list[_RowState]
    rules: Rules
    places: Tensor
    history: Tensor | None = None
    beams: Beams | None = None


_LikeliestRead = tuple[list[float], list[list[float]], list[list[int]]]


class _Likeliest(NamedTuple):
    """Of the rows that want them the log-probability of the token that was written, and of the likeliest their
    log-probabilities and ids."""

    own: Tensor
    values: Tensor
    ids: Tensor

    def read(self) -> _LikeliestRead:
        return self.own.tolist(), self.values.tolist(), self.ids.tolist()


class Decoder:
    """Writes any number of texts at once with one language model. See the module's contract.

    Raises CapabilityError for an LM whose state is no cache of keys and values.
    """

    def __init__(self, language: Steps) -> None:
        self.language = language
        self._window = language.window()
        self._added = 0
        self._forget()

    def _forget(self) -> None:
        """No rows."""
        self._window.clear()
        self._rows: dict[int, _RowState] = {}
        self._searches: list[_Lane] = []
        self._singles: list[_Lane] | None = None
        self._attended: Attended | None = None
        self._logits: Tensor | None = None  # of the places that were not written since they were read
        self._tokens: Tensor | None = None  # the last ones, still to be read by the model, of the first places
        self._positions: Tensor | None = None  # of each place's next token
        self._unread: list[tuple[Tensor, _Likeliest | None]] = []  # tokens of all places; log-probabilities of some

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of the rows that are being written."""
        return tuple(self._rows)

    def __len__(self) -> int:
        """How many rows are being written."""
        return len(self._rows)

    @torch.inference_mode()
    def add(self, prompt: Prompt, decoding: Decoding, *, logprobs: int | None = None) -> list[int]:
        """New rows, which write from the next step on; their numbers.

        ``decoding.seed`` is one for all of them or a tuple of one each. With ``logprobs`` every token comes with its
        log-probability and those of that many likeliest ones (not with beams). Raises DataError for an empty prompt and
        ConfigError for a decoding that does not fit.
        """
        decoding = self.language.settled(decoding, prompt)
        if logprobs is not None and (logprobs < 0 or decoding.num_beams > 1):
            raise ConfigError(f"logprobs {logprobs} with {decoding.num_beams} beams: give 0 or more, and one beam.")
        seeds = seeds_of(decoding, len(prompt))
        read = self.language.read(prompt)
        beams = decoding.num_beams
        if beams > 1:
            read = _repeated(read, beams)
        ahead = max([decoding.max_new_tokens, *(r.decoding.max_new_tokens - r.count for r in self._rows.values())])
        first = self._window.rows
        self._window.join(read.layers, read.lengths, ahead=ahead, waiting=self._tokens is not None)
        if first == 0:
            self._attended = read.attended
        elif self._attended is not None:
            assert read.attended is not None  # of one net: all rows attend to something beside the text, or none does
            self._attended = self._attended.join(read.attended)
        self._logits = read.logits.float() if self._logits is None else torch.cat([self._logits, read.logits.float()])
        positions = torch.tensor(read.lengths, device=read.logits.device)
        self._positions = positions if self._positions is None else torch.cat([self._positions, positions])
        rows = []
        for n, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed) if decoding.temperature > 0 else None
            places = list(range(first + n * beams, first + (n + 1) * beams))
            rows.append(_RowState(self._added + n, replace(decoding, seed=seed), places, generator, logprobs))
        self._added += len(rows)
        self._rows |= {row.number: row for row in rows}
        self._singles = None
        if beams > 1:
            self._searches.append(self._search(rows, decoding))
        return [row.number for row in rows]

    def _search(self, rows: list[_RowState], decoding: Decoding) -> _Lane:
        assert self._logits is not None
        state = Beams(
            len(rows),
            decoding.num_beams,
            max_new=decoding.max_new_tokens,
            stop_ids=decoding.stop_ids,
            length_penalty=decoding.length_penalty,
            device=self._logits.device,
        )
        return _Lane(rows, Rules(decoding, self._logits.device), self._places(rows), beams=state)

    def _places(self, rows: Sequence[_RowState]) -> Tensor:
        assert self._positions is not None
        return torch.tensor([p for row in rows for p in row.places], device=self._positions.device)

    @torch.inference_mode()
    def step(self) -> list[Written]:
        """One token more for every row; what the rows have written anew. Nothing without rows."""
        if not self._rows:
            return []
        self._advance()
        return self._collect()

    def write(self) -> Iterator[Written]:
        """Steps until no row is left, reading the device only now and then."""
        while self._rows:
            left = min(row.decoding.max_new_tokens - row.count for row in self._rows.values())
            device = "cpu" if self._positions is None else self._positions.device.type
            with torch.inference_mode():  # not around a yield: the caller's code runs there
                for _ in range(min(left, READ_EVERY.get(device, 1))):
                    self._advance()
                new = self._collect()
            yield from new

    @torch.inference_mode()
    def remove(self, row: int) -> None:
        """Cancels a row. Raises DataError for one that is not being written."""
        if row not in self._rows:
            raise DataError(f"row {row} is not being written; rows here: {list(self._rows)}.")
        self._drop([self._rows[row]])

    # One step

    def _advance(self) -> None:
        """Chooses a token for every place from its logits; everything stays on the device."""
        self._read_on()
        logits, wanting = self._logits, self._with_logprobs()
        assert logits is not None
        tokens = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        for lane in self._lanes_of_singles():
            tokens[lane.places] = self._choose(lane, logits)
        for lane in self._searches:
            self._continue(lane, logits, tokens)
        likeliest = None
        if wanting:
            places = self._places(wanting)
            log_probs = logits[places].log_softmax(-1)
            top = log_probs.topk(max(1, *(row.logprobs or 0 for row in wanting)), dim=-1)
            likeliest = _Likeliest(log_probs.gather(1, tokens[places][:, None])[:, 0], top.values, top.indices)
        for row in self._rows.values():
            row.count += 1
        self._tokens, self._logits = tokens, None
        self._unread.append((tokens, likeliest))

    def _with_logprobs(self) -> list[_RowState]:
        return [row for row in self._rows.values() if row.logprobs is not None]

    def _read_on(self) -> None:
        """The model reads the tokens that were chosen last, so that there are logits for every place."""
        if self._tokens is None:
            return
        window, count = self._window, len(self._tokens)
        assert self._positions is not None
        attended = self._attended
        if attended is not None and window.rows > count:
            attended = attended.take(torch.arange(count, device=self._tokens.device))
        window.running = count
        with small_products(count * self.language.width**2 < SMALL):
            logits = self.language.next(self._tokens, self._positions[:count], window, attended).float()
        window.column += 1
        self._positions[:count] += 1
        self._logits = logits if self._logits is None else torch.cat([logits, self._logits])
        self._tokens = None

    def _lanes_of_singles(self) -> list[_Lane]:
        """Rows without beams by the rules for their scores; by their lengths too where the rules depend on the text."""
        if self._singles is None:
            groups: dict[Hashable, list[_RowState]] = {}
            for row in self._rows.values():
                if row.decoding.num_beams == 1:
                    groups.setdefault(Rules.key(row.decoding, row.count), []).append(row)
            assert self._positions is not None
            device = self._positions.device
            self._singles = []
            for rows in groups.values():
                rules = Rules(rows[0].decoding, device)
                history = (
                    torch.tensor([r.ids for r in rows], dtype=torch.long, device=device) if rules.looks_back else None
                )
                self._singles.append(_Lane(rows, rules, self._places(rows), history))
        return self._singles

    def _choose(self, lane: _Lane, logits: Tensor) -> Tensor:
        scores = lane.rules(lane.history, logits[lane.places])
        if lane.rules.draws:
            scores = drawn(scores, [row.generator for row in lane.rows if row.generator is not None])
        tokens = scores.argmax(-1)
        if lane.history is not None:
            lane.history = torch.cat([lane.history, tokens[:, None]], dim=1)
        return tokens

    def _continue(self, lane: _Lane, logits: Tensor, tokens: Tensor) -> None:
        """One step of a beam search, with the caches of the beams that are continued."""
        state = lane.beams
        assert state is not None
        written = state.length
        scores = lane.rules(state.written, logits[lane.places].log_softmax(-1))
        source, chosen = state.advance(scores)
        if written:  # before, all beams of a row are the prompt
            self._window.copy(lane.places, lane.places[source], written)
        tokens[lane.places] = chosen

    # What the host reads

    def _collect(self) -> list[Written]:
        """Reads what was written since the last time; rows that ended leave."""
        ids = torch.stack([tokens for tokens, _ in self._unread]).tolist()
        likeliest = [None if step is None else step.read() for _, step in self._unread]
        self._unread = []
        wanting = {row.number: n for n, row in enumerate(self._with_logprobs())}
        found, ended = [], []
        for row in self._rows.values():
            if row.decoding.num_beams > 1:
                continue
            new = [step[row.places[0]] for step in ids]
            stop = next((n for n, token in enumerate(new) if token in row.decoding.stop_ids), None)
            finish = "stop" if stop is not None else "length" if row.count >= row.decoding.max_new_tokens else None
            new = new[:stop]
            row.ids += new
            logprobs = (
                ()
                if row.logprobs is None
                else tuple(
                    _logprob(token, likeliest[n], wanting[row.number], row.logprobs) for n, token in enumerate(new)
                )
            )
            found.append(Written(row.number, tuple(new), logprobs, finish))
            if finish is not None:
                ended.append(row)
        for lane in self._searches:
            assert lane.beams is not None
            done = lane.beams.done.tolist()
            if any(done):
                for row, over, text in zip(lane.rows, done, lane.beams.best(), strict=True):
                    if over:
                        stopped = bool(text) and text[-1] in row.decoding.stop_ids
                        found.append(
                            Written(
                                row.number, tuple(text[:-1] if stopped else text), (), "stop" if stopped else "length"
                            )
                        )
                        ended.append(row)
        if ended:
            self._drop(ended)
        return found

    def _drop(self, rows: Sequence[_RowState]) -> None:
        if len(rows) == len(self._rows):
            self._forget()
            return
        if self._tokens is not None and self._logits is not None:
            self._read_on()  # so that every place is either waiting to be read, or none is
        for row in rows:
            del self._rows[row.number]
        gone = {row.number for row in rows}
        moves = dict(self._window.leave([p for row in rows for p in row.places]))
        order = torch.arange(self._window.rows)
        for source, target in moves.items():
            order[target] = source
        assert self._positions is not None
        order = order.to(self._positions.device)
        self._positions = self._positions[order]
        self._tokens = None if self._tokens is None else self._tokens[order]
        self._logits = None if self._logits is None else self._logits[order]
        self._attended = None if self._attended is None else self._attended.take(order)
        for row in self._rows.values():
            row.places = [moves.get(p, p) for p in row.places]
        self._singles = None
        for lane in list(self._searches):
            stay = [n for n, row in enumerate(lane.rows) if row.number not in gone]
            if not stay:
                self._searches.remove(lane)
                continue
            assert lane.beams is not None
            lane.beams.keep(torch.tensor(stay, device=order.device))
            lane.rows = [lane.rows[n] for n in stay]
            lane.places = self._places(lane.rows)


def write_all(language: Steps, prompt: Prompt, decoding: Decoding) -> list[list[int]]:
    """The new tokens of every row of ``prompt``, without the stop tokens."""
    decoder = Decoder(language)
    texts: dict[int, list[int]] = {number: [] for number in decoder.add(prompt, decoding)}
    for new in decoder.write():
        texts[new.row] += new.ids
    return list(texts.values())


def _repeated(read: Read, times: int) -> Read:
    rows = torch.arange(len(read.logits), device=read.logits.device).repeat_interleave(times)
    return Read(
        logits=read.logits[rows],
        layers=[(keys[rows], values[rows]) for keys, values in read.layers],
        lengths=[n for n in read.lengths for _ in range(times)],
        attended=None if read.attended is None else read.attended.take(rows),
    )


def _logprob(token: int, likeliest: _LikeliestRead | None, row: int, top: int) -> Logprob:
    assert likeliest is not None  # of every step that such a row has written
    own, values, ids = likeliest
    return Logprob(token, own[row], tuple(zip(ids[row][:top], values[row][:top], strict=True)))
