"""What each process of the tests of shared encoding runs: every task that needs the vectors of all its items."""

import json
import os
import zlib
from collections import Counter
from pathlib import Path

import torch

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, DataError
from isthmus.evaluation import LinearProbeTask, RetrievalTask, VqaTask, ZeroShotTask, evaluate, rerank
from isthmus.evaluation.few_shot import FewShotTask
from isthmus.evaluation.tasks import Task
from isthmus.processes import join
from tests.evaluation.fakes import Word, question
from tests.evaluation.test_own_task import Bird, Songs

CHUNK = 4
TASKS = ("retrieval", "rerank", "zero-shot", "probe", "rices")


class Batched:
    """Each vector depends on what else was in its batch, so other batches give other ranks. Counts what it made, and
    fails at a picture of the word ``bad``."""

    def __init__(self, bad: str = "") -> None:
        self.bad = bad
        self.made: Counter[str] = Counter()

    def embed_images(self, images):
        return self._vectors([str(image.source) for image in images], "pictures")

    def embed_texts(self, texts):
        return self._vectors(list(texts), "texts")

    def vision_features(self, images):
        return self._vectors([str(image.source) for image in images], "features")

    def match_logits(self, images, texts, pairs):
        self.made["pairs"] += len(pairs)
        names = [str(image.source) for image in images]
        batches = [names[n : n + rerank._PICTURES] for n in range(0, len(names), rerank._PICTURES)]
        shown = torch.cat([self._vectors(batch, "matched") for batch in batches])
        read = [self._vectors([texts[j] for j in some], "read") for some in pairs[:, 1].split(rerank._PAIRS)]
        return (shown[pairs[:, 0]] * torch.cat(read)).sum(1)

    def answer_records(self, records, **_):
        self.made["answers"] += len(records)
        return [" ".join(str(image.source) for image in record.images) for record in records]

    def _vectors(self, names, what):
        self.made[what] += len(names)
        own = torch.stack(
            [torch.randn(8, generator=torch.Generator().manual_seed(zlib.crc32(n.encode()))) for n in names]
        )
        if what in ("pictures", "features") and any(f"{self.bad!r}" in name for name in names):
            own[:] = torch.nan
        return own + 0.7 * own.mean(0)


def records(count: int) -> list[Record]:
    """Pictures of their own with two captions each, in three classes."""
    return [
        Record(f"r{i}", (Image(Word(f"w{i}")), Text((f"text {i}", f"words {i}"))), meta={"class": f"class {i % 3}"})
        for i in range(count)
    ]


def task(name: str) -> Task:
    if name == "rices":
        asked = VqaTask(name=name, records=[question(i, f"a{i}") for i in range(7)])
        return FewShotTask(task=asked, support=[question(i, f"s{i}") for i in range(100, 118)], shots=2, select="rices")
    if name == "probe":
        return LinearProbeTask(name=name, records=records(17), train=records(18))
    if name == "rerank":
        return rerank.RerankTask(name=name, records=records(17), rerank=5)
    return (
        RetrievalTask(name=name, records=records(17))
        if name == "retrieval"
        else ZeroShotTask(name=name, records=records(17), templates=("a {}.", "the {}", "{} here"))
    )


def evaluations(folder: Path) -> dict[str, dict[str, int]]:
    """Every task scored below ``folder``, one of them going on after its first rows; what the model made for each."""
    rerank._PAIRS, rerank._PICTURES = 8, 4
    made: dict[str, dict[str, int]] = {}
    for name in TASKS:
        model = Batched()
        evaluate(model, task(name), folder / name, chunk=CHUNK)
        made[name] = dict(model.made)
    return made


def run(number: int, world: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    join()
    made = evaluations(Path(folder))
    said = {}
    for word in ("w1", "w6"):  # the first process's, the second's
        try:
            evaluate(Batched(word), task("retrieval"), Path(folder) / f"bad-{word}", chunk=CHUNK)
        except CapabilityError as error:
            said[word] = str(error)
    unwritable = {"rows": Songs(made=lambda name: [{"id": name, "song": {1}}]), "scores": Songs(mean={1})}
    for what, songs in unwritable.items():  # which the first process alone writes
        try:
            evaluate(Bird(), songs, Path(folder) / f"bad-{what}")
        except DataError as error:
            said[what] = str(error)
    Path(folder, f"{number}.json").write_text(json.dumps({"made": made, "said": said}))
