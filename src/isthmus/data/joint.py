"""JointLoader: every step reads a batch of every source, and the sources' mean losses are weighted.

Flamingo's rule (2204.14198, sec. 3.3): gradients of all data sets are accumulated over one step, each with its weight
λ; taking the sets in turns instead costs 7.8 points there. A mean loss does not depend on its neighbours, so rows
of several sources may share a forward pass.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from isthmus.batch import Batch, in_parts
from isthmus.data.augment import Augment
from isthmus.data.cache import FeatureCache
from isthmus.data.collate import collate
from isthmus.data.loader import START, Loader, Position, in_background, number_in
from isthmus.data.mix import Source
from isthmus.data.processor import Processor
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Example
from isthmus.errors import ConfigError


@dataclass(frozen=True, slots=True)
class JointPosition:
    """A place between two steps: ``index`` steps are done, and where each source stands."""

    index: int
    sources: tuple[Position, ...]

    def to_dict(self) -> dict[str, object]:
        """``epoch`` is the first source's, for the log."""
        return {
            "epoch": self.sources[0].epoch,
            "index": self.index,
            "sources": [position.to_dict() for position in self.sources],
        }


class JointLoader:
    """Steps of one batch per source. Each source goes through epochs of its own.

    Args:
        sources: (source, rows per step, weight λ of its mean loss). Sources of one name share their term and must have
            the same weight.
        accumulate: micro-batches that each source's rows are split into.
        pass_tokens: what a pass costs beside its padded tokens, in tokens. Rows of all sources share passes where that
            is cheaper; left out: each source has passes of its own.
        part: of every source's rows, as for a Loader.

    Raises ConfigError for no source, for weights that are not positive, or differ under one name, and for both
    ``accumulate`` and ``pass_tokens``.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, int, float]],
        processor: Processor,
        *,
        accumulate: int = 1,
        pass_tokens: int | None = None,
        seed: int = 0,
        quarantine: Quarantine | None = None,
        augment: Augment | None = None,
        cache: FeatureCache | None = None,
        part: tuple[int, int] = (0, 1),
        prefetch: int = 2,
    ) -> None:
        if not sources:
            raise ConfigError("a joint loader needs at least one source")
        if accumulate > 1 and pass_tokens is not None:
            raise ConfigError("a joint loader splits rows by accumulate or by pass_tokens, not by both")
        self.weights: dict[str, float] = {}
        for source, _, weight in sources:
            if not weight > 0:
                raise ConfigError(f"the loss_weight of {source.name!r} must be a positive number, not {weight}")
            if self.weights.setdefault(source.name, weight) != weight:
                raise ConfigError(
                    f"two sources are called {source.name!r} and weigh {self.weights[source.name]} and {weight}; give "
                    "one of them another name, or both the same loss_weight"
                )
        self.sources = tuple(source for source, _, _ in sources)
        self.accumulate, self.pass_tokens, self.prefetch = accumulate, pass_tokens, prefetch
        self.quarantine = quarantine = quarantine if quarantine is not None else Quarantine(None)
        self.loaders = [
            Loader(
                source,
                processor,
                batch_size=size,
                augment=augment,
                cache=cache,
                part=part,
                seed=seed * 1009 + number,
                quarantine=quarantine,
            )
            for number, (source, size, _) in enumerate(sources)
        ]

    def position(self, saved: Mapping[str, object]) -> JointPosition:
        """The position that ``to_dict`` gave; without ``sources`` the beginning."""
        given = saved.get("sources")
        if isinstance(given, list | tuple) and given:
            return JointPosition(number_in(saved, "index"), tuple(Position.from_dict(p) for p in given))
        return JointPosition(number_in(saved, "index"), (START,) * len(self.loaders))

    def steps(self, start: JointPosition | None = None) -> Generator[tuple[JointPosition, list[Batch]], None, None]:
        """(position after the step, its micro-batches) from ``start`` on, without end."""
        begin = start or self.position({"index": 0})
        return in_background(partial(self._filled, begin), self.prefetch)

    def _filled(self, start: JointPosition) -> Iterator[tuple[JointPosition, list[Batch]]]:
        """Each source's samples are read by a thread of its own, and put together here."""
        pairs = zip(self.loaders, start.sources, strict=True)
        streams = [in_background(partial(loader.samples, position), self.prefetch) for loader, position in pairs]
        try:
            for index, parts in enumerate(zip(*streams, strict=True), start.index + 1):
                batches = [collate(some) for some in self._passes([found for _, found in parts])]
                position = JointPosition(index, tuple(p for p, _ in parts))
                yield position, [replace(batch, loss_weights=self.weights) for batch in batches]
        finally:
            for stream in streams:
                stream.close()

    def _passes(self, sources: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
        """The samples of a step's micro-batches, none of them empty."""
        if self.pass_tokens is not None:
            return cut_passes([example for found in sources for example in found], self.pass_tokens)
        return [part for found in sources for part in in_parts(found, self.accumulate)]


def cut_passes(examples: Sequence[Example], cost: int) -> list[Sequence[Example]]:
    """The samples, longest first, cut so that padded tokens and ``cost`` tokens a pass are fewest in all."""
    rows = sorted(examples, key=lambda example: -example.length)  # stable: equal lengths stay in order
    # best[n]: the fewest tokens of the first n rows, and where their last pass begins
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(rows) + 1):
        best.append(min((best[a][0] + (end - a) * rows[a].length + cost, a) for a in range(end)))
    passes: list[Sequence[Example]] = []
    while rows:
        begin = best[len(rows)][1]
        passes.append(rows[begin:])
        rows = rows[:begin]
    return passes[::-1]
