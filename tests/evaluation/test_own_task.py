"""A task of the user's own with a fault is told of it, and nothing is scored by less than its rows."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from isthmus.data.record import Record, Text
from isthmus.errors import CapabilityError, DataError
from isthmus.evaluation import evaluate
from isthmus.evaluation.tasks import Task


class Sings(Protocol):
    """Not checked at run time."""

    def sing(self) -> str: ...


class Bird:
    def sing(self) -> str:
        return "tweet"


@dataclass
class Facts:
    facts: Mapping[str, object]

    def to_dict(self) -> Mapping[str, object]:
        return self.facts


@dataclass(frozen=True, kw_only=True)
class Songs(Task[Any]):
    needs: ClassVar[type] = Sings

    name: str = "songs"
    records: Any = (Record(id="a", parts=(Text("a"),)), Record(id="b", parts=(Text("b"),)))
    seed: int = 0
    made: Callable[[str], list[Mapping[str, object]]] = lambda name: [{"id": name, "song": "tweet"}]
    mean: object = 0.5

    def rows(self, model: Sings, done: Collection[str], *, chunk: int) -> Iterator[list[Any]]:
        for record in self.records:
            if record.id not in done:
                yield self.made(record.id)

    def score(self, rows: Any) -> Any:
        return Facts({"n": len(rows), "mean": self.mean})


def test_a_protocol_of_ones_own_is_enough(tmp_path: Path) -> None:
    assert len(evaluate(Bird(), Songs(), tmp_path).rows) == 2
    with pytest.raises(CapabilityError, match="needs a model that can sing"):
        evaluate(object(), Songs(), tmp_path / "silent")


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        (Songs(made=lambda name: [{"id": name}] if name == "a" else []), r"no row for 1 of its 2 items, first 'b'"),
        (Songs(made=lambda name: [{"id": "c"}]), r"whose id, 'c', is none of its `ids`"),
        (Songs(made=lambda name: [{"id": "a"}]), r"whose id, 'a', has one already"),
        (Songs(made=lambda name: [{"id": name}, {"id": name}]), r"whose id, 'a', has one already"),
        (Songs(made=lambda name: [{"song": name}]), r"whose id, None, is none of its `ids`"),
        (Songs(made=lambda name: [{"id": name, "song": {1, 2}}]), r"its rows hold what JSON cannot say .*set"),
        (Songs(mean={1, 2}), r"its scores hold what JSON cannot say .*set"),
        (Songs(mean=math.nan), r"its scores hold what JSON cannot say .*finite numbers"),
    ],
)
def test_what_it_makes_must_be_its_rows(tmp_path: Path, task: Songs, fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        evaluate(Bird(), task, tmp_path)
    outputs = tmp_path / "outputs.jsonl"
    lines = outputs.read_text().splitlines() if outputs.exists() else []
    assert len(lines) == len(set(lines))
