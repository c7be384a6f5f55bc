"""Loader: sources and a processor to the batches of a run, from any position, always the same.

An epoch is planned from text alone, window by window: no picture is decoded to plan. A sample that fails leaves a
counted gap in its batch and changes nothing else. One background thread fills batches ahead of the training loop.
"""

import operator
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import NamedTuple, SupportsIndex, TypeVar

from isthmus.batch import Batch, in_parts
from isthmus.data.augment import Augment
from isthmus.data.cache import FeatureCache
from isthmus.data.collate import collate, load_pixels
from isthmus.data.mix import Mix, Source, Visit, key, permutation
from isthmus.data.processor import Processor
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Example, Record
from isthmus.errors import CheckpointError, ConfigError, DataError

_WINDOW_BATCHES = 32
_WINDOW_ROWS = 2048
"""Rows sorted by length together when batches are cut by tokens; batches of rows take 32 batches at a time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place between two steps: ``index`` steps of epoch ``epoch`` are done."""

    epoch: int = 0
    index: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "Position":
        return cls(epoch=number_in(values, "epoch"), index=number_in(values, "index"))


START = Position()


def number_in(values: Mapping[str, object], name: str) -> int:
    """A number of a saved position. Raises CheckpointError for what is none."""
    if not isinstance(number := values[name], SupportsIndex):
        raise CheckpointError(f"The saved position's {name} is {number!r} and no whole number.")
    return operator.index(number)


class _PlannedRow(NamedTuple):
    """A visit as it was planned. ``example`` is what was made of it to measure it, so that it is made once."""

    visit: Visit
    length: int = 0
    seeing: bool = False
    example: Example | None = None


class Loader:
    """Batches of a mixture, step by step.

    Args:
        sources: a source, several, or a Mix with weights.
        processor: makes Examples; only its text side is used for planning.
        batch_size: rows of one optimiser step; or
        batch_tokens: padded tokens of one step (rows x longest; a single longer sample stands alone).
        accumulate: micro-batches a step is split into.
        group: put samples of like length together, and text-only ones apart from those with pictures (only the
            last batches of an epoch mix the two, LLaVA's rule). Without it batches are cut in plain order and
            nothing is measured.
        drop_last: leave out an epoch's last batch when it is smaller than the others (needs ``group=False``): a sample
            alone has nothing to be contrasted with.
        shuffle: without it samples come in the order of the sources (needs ``group=False``).
        quarantine: where bad samples are counted.
        part: (which, of how many) for one of several processes: it fills every how-many-th row of a step, maybe none.
        augment: what is done to training pictures, drawn anew at every visit.
        cache: where features of pictures may be kept; those that are stand for the pixels.
        prefetch: steps kept ready by the background thread; 0 does everything in the caller's thread.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source] | Mix,
        processor: Processor,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        accumulate: int = 1,
        seed: int = 0,
        group: bool = True,
        drop_last: bool = False,
        shuffle: bool = True,
        quarantine: Quarantine | None = None,
        augment: Augment | None = None,
        cache: FeatureCache | None = None,
        part: tuple[int, int] = (0, 1),
        prefetch: int = 2,
    ) -> None:
        if (batch_size is None) == (batch_tokens is None):
            raise ConfigError("a loader takes exactly one of batch_size (rows) and batch_tokens (padded tokens)")
        if min(n for n in (batch_size, batch_tokens, accumulate) if n is not None) < 1:
            raise ConfigError("batch_size, batch_tokens and accumulate must be at least 1")
        if batch_tokens is not None and not group:
            raise ConfigError("batch_tokens needs group=True: batches cut by tokens must know the lengths")
        if group and drop_last:
            raise ConfigError("drop_last=True needs group=False: only plain batches of rows are left out when small")
        if group and not shuffle:
            raise ConfigError("shuffle=False needs group=False: grouping by length changes the order")
        if not isinstance(sources, Mix):
            sources = Mix(sources if isinstance(sources, list | tuple) else [sources])  # type: ignore[list-item]
        self.mix, self.processor, self.seed = sources, processor, seed
        self.batch_size, self.batch_tokens, self.accumulate = batch_size, batch_tokens, accumulate
        self.group, self.drop_last, self.shuffle, self.prefetch = group, drop_last, shuffle, prefetch
        self.quarantine = quarantine if quarantine is not None else Quarantine()
        self.augment, self.cache, self.part = augment, cache, part
        self._lengths: dict[tuple[int, int], tuple[int, bool]] = {}

    # The plan

    def plan(self, epoch: int) -> Iterator[list[Visit]]:
        """The batches of an epoch as visits: a pure function of (seed, epoch). Decodes no picture."""
        yield from ([row.visit for row in batch] for batch in self._plan(epoch))

    def _plan(self, epoch: int) -> Iterator[list["_PlannedRow"]]:
        visits = [Visit(*row) for row in self.mix.epoch(self.seed, epoch, shuffle=self.shuffle).tolist()]
        if not self.group:
            assert self.batch_size is not None  # checked when built
            if self.drop_last and len(visits) > self.batch_size:
                visits = visits[: len(visits) // self.batch_size * self.batch_size]
            batches = _chunks(visits, self.batch_size)
            # A batch that is contrasted needs a row in every process.
            yield from ([_PlannedRow(visit) for visit in batch] for batch in batches if len(batch) >= self.part[1])
            return
        # Rows of like length go together, within a window of the epoch's order so that the order stays random. Rows
        # with pictures and rows without are batched apart: a batch of text alone costs no vision encoder. What fills no
        # batch waits for the next window; at the end of the epoch both rests are mixed.
        window = _WINDOW_BATCHES * self.batch_size if self.batch_size else _WINDOW_ROWS
        waiting: dict[bool, list[_PlannedRow]] = {False: [], True: []}
        for number, some in enumerate(_chunks(visits, window)):
            for row in map(self._measure, some):
                waiting[row.seeing].append(row)
            full: list[list[_PlannedRow]] = []
            for seeing, rest in waiting.items():
                *batches, waiting[seeing] = self._cut(rest)
                full += batches
            yield from (full[i] for i in permutation(len(full), key(self.seed, "window", epoch, number)))
        mixed = waiting[True] + waiting[False]
        yield from (batch for batch in self._cut(mixed) if batch)

    def _cut(self, rows: list["_PlannedRow"]) -> list[list["_PlannedRow"]]:
        """Full batches, longest rows first, then the rest that does not fill one (maybe empty)."""
        rows = sorted(rows, key=lambda row: -row.length)  # stable: equal lengths stay in the epoch's order
        if self.batch_size is not None:
            end = len(rows) // self.batch_size * self.batch_size
            return [*_chunks(rows[:end], self.batch_size), rows[end:]]
        assert self.batch_tokens is not None  # checked when built
        batches: list[list[_PlannedRow]] = [[]]
        longest = 0
        for row in rows:
            longest = max(longest, row.length)
            if batches[-1] and longest * (len(batches[-1]) + 1) > self.batch_tokens:
                batches.append([])
                longest = row.length
            batches[-1].append(row)
        return batches

    def _measure(self, visit: Visit) -> "_PlannedRow":
        """The visit with its length; 0 and no picture for a sample that cannot be read, which counts when met.

        Lengths are kept after the first time, unless the sample's text is drawn anew at every visit.
        """
        place = (visit.source, visit.index)
        if place in self._lengths:
            return _PlannedRow(visit, *self._lengths[place])
        try:
            record = self.mix.record(visit)
            example = self._example(record, visit)
        except DataError:
            return _PlannedRow(visit, *self._lengths.setdefault(place, (0, False)))
        row = _PlannedRow(visit, example.length, bool(example.visuals), example)
        if all(isinstance(part.text, str) for part in record.texts):
            self._lengths[place] = (row.length, row.seeing)
        return row

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.mix.sources

    # Filling

    def _example(self, record: Record, visit: Visit) -> Example:
        return self.processor.example(record, self._draw(record.id, visit))

    def _draw(self, name: str, visit: Visit) -> int:
        return key(self.seed, "draw", visit.source, visit.turn, name)

    def _with_pixels(self, example: Example, visit: Visit) -> Example:
        """The example with its pictures read: augmented, or from the cache where it has them."""
        if self.augment:
            example = self.augment(example, self.processor.image, self._draw(example.id, visit))
        elif self.cache is not None:
            example = self.cache.stand_in(example)
        return load_pixels(example)

    def _fill(self, rows: Sequence["_PlannedRow"]) -> list[Example]:
        """This part's samples of one step; bad ones are left out and counted. Empty when all were bad."""
        which, parts = self.part
        rows = rows[which::parts]
        examples: list[Example] = []
        for visit, _, _, example in rows:
            source = self.mix.sources[visit.source].name
            name = f"{source}[{visit.index}]"
            try:
                if example is None:
                    record = self.mix.record(visit)
                    name = record.id
                    example = self._example(record, visit)
                name = example.id
                examples.append(self._with_pixels(example, visit))
            except DataError as error:
                self.quarantine.add(name, source, str(error))
        self.quarantine.count_read(len(rows))
        return examples

    def _micro_batches(self, examples: Sequence[Example]) -> list[Batch]:
        return [collate(part) for part in in_parts(examples, self.accumulate)]

    # Running

    def position(self, saved: Mapping[str, object]) -> Position:
        """The position that ``to_dict`` gave."""
        return Position.from_dict(saved)

    def positions(self, start: Position = START) -> Iterator[Position]:
        """The position after each step from ``start`` on, without end."""
        yield from (position for position, _ in self._planned(start))

    def _planned(self, start: Position) -> Iterator[tuple[Position, list["_PlannedRow"]]]:
        """Plans on without end. One batch is planned ahead, so that an epoch's last step ends in the next epoch."""
        epoch, done = start.epoch, start.index
        while True:
            batches = self._plan(epoch)
            ahead = next(batches, None)
            index = 0
            while ahead is not None:
                batch, ahead = ahead, next(batches, None)
                index += 1
                if index > done:
                    yield (Position(epoch, index) if ahead is not None else Position(epoch + 1, 0)), batch
            epoch, done = epoch + 1, 0

    def steps(self, start: Position = START) -> Generator[tuple[Position, list[Batch]], None, None]:
        """(position after the step, its micro-batches) from ``start`` on, without end.

        A step whose samples were all bad is passed over; one of several parts gives an empty one, since others may
        have samples. Raises DataError when a full epoch gives nothing, or when
        the quarantine is over its threshold. Close the iterator (or drop it) to end the background thread.
        """
        return in_background(
            lambda: ((after, self._micro_batches(found)) for after, found in self.samples(start)), self.prefetch
        )

    def samples(self, start: Position = START) -> Iterator[tuple[Position, list[Example]]]:
        """As :meth:`steps`, the samples of each step one by one, in the caller's thread."""
        which, parts = self.part
        barren = 0
        for position, rows in self._planned(start):
            found = self._fill(rows)
            if found or not rows[which::parts]:
                barren = 0
            else:
                barren += position.index == 0
                if barren > 1:  # from the last good step on, one full epoch at least
                    raise DataError(f"not one sample of a full epoch could be used: {self.quarantine.example()}")
            if found or parts > 1:
                yield position, found

    def epoch(
        self, number: int = 0, *, rows: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> Iterator[list[Batch]]:
        """The steps of one epoch alone, for evaluation; with ``rows`` so many as hold that many rows. A ``share``
        (which, of how many) is every how-many-th step, and then has an empty one where all samples were bad."""
        planned = islice(self._first(self._plan(number), rows), share[0], None, share[1])
        filled = (found for found in map(self._fill, planned) if found or share[1] > 1)
        return in_background(lambda: map(self._micro_batches, filled), self.prefetch)

    @staticmethod
    def _first(planned: Iterator[list["_PlannedRow"]], rows: int | None) -> Iterator[list["_PlannedRow"]]:
        left = rows
        for batch in planned:
            if left is not None and left <= 0:
                return
            left = None if left is None else left - len(batch)
            yield batch


def _chunks(rows: list[T], size: int) -> Iterator[list[T]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def in_background(make: Callable[[], Iterator[T]], depth: int) -> Generator[T, None, None]:
    """The items of ``make()``, computed up to ``depth`` ahead by a thread that ends with this iterator; with ``depth``
    0 by the caller's own.

    What the thread raises is raised here, at the item it stopped at.
    """
    if not depth:
        yield from make()
        return
    # An item in a tuple, what was raised, or none at the end.
    ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(found: tuple[T] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(found, timeout=0.05)
                return

    def work() -> None:
        try:
            for item in make():
                offer((item,))
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:  # handed over, whatever it is
            offer(error)

    thread = threading.Thread(target=work, name="isthmus-loader", daemon=True)
    thread.start()
    try:
        while True:
            found = ready.get()
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found[0]
    finally:
        stopped.set()
        thread.join()
