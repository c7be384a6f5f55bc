"""JointLoader: every step reads a batch of every source, and the sources' mean losses are weighted.

Flamingo's rule (2204.14198, sec. 3.3): gradients of all data sets are accumulated over one step, each with its weight
λ; taking the sets in turns instead costs 7.8 points there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from isthmus.batch import Batch
from isthmus.data.augment import Augment
from isthmus.data.cache import FeatureCache
from isthmus.data.loader import Loader, Position
from isthmus.data.mix import Source
from isthmus.data.processor import Processor
from isthmus.data.quarantine import Quarantine
from isthmus.errors import ConfigError


@dataclass(frozen=True, slots=True)
class JointPosition:
    """A place between two steps: ``index`` steps are done, and where each source stands."""

    index: int
    sources: tuple[Position, ...]

    def to_dict(self) -> dict[str, Any]:
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
        part: of every source's rows, as for a Loader.

    Raises ConfigError for no source, for weights that are not positive, or differ under one name.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, int, float]],
        processor: Processor,
        *,
        accumulate: int = 1,
        seed: int = 0,
        quarantine: Quarantine | None = None,
        augment: Augment | None = None,
        cache: FeatureCache | None = None,
        part: tuple[int, int] = (0, 1),
        prefetch: int = 2,
    ) -> None:
        if not sources:
            raise ConfigError("a joint loader needs at least one source")
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
        self.quarantine = quarantine = quarantine if quarantine is not None else Quarantine(None)
        self.loaders = [
            Loader(
                source,
                processor,
                batch_size=size,
                accumulate=accumulate,
                augment=augment,
                cache=cache,
                part=part,
                seed=seed * 1009 + number,
                quarantine=quarantine,
                prefetch=prefetch,
            )
            for number, (source, size, _) in enumerate(sources)
        ]

    def position(self, saved: Mapping[str, Any]) -> JointPosition:
        """The position that ``to_dict`` gave; without ``sources`` the beginning."""
        given = saved.get("sources") or [{"epoch": 0, "index": 0}] * len(self.loaders)
        return JointPosition(int(saved["index"]), tuple(Position.from_dict(p) for p in given))

    def steps(self, start: JointPosition | None = None) -> Iterator[tuple[JointPosition, list[Batch]]]:
        """(position after the step, the micro-batches of all sources in order) from ``start`` on, without end."""
        start = start or self.position({"index": 0})
        streams = [loader.steps(p) for loader, p in zip(self.loaders, start.sources, strict=True)]
        try:
            index = start.index
            while True:
                parts = [next(stream) for stream in streams]
                index += 1
                batches = [replace(b, loss_weights=self.weights) for _, found in parts for b in found]
                yield JointPosition(index, tuple(position for position, _ in parts)), batches
        finally:
            for stream in streams:
                getattr(stream, "close", lambda: None)()
