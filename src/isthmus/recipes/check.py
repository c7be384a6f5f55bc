"""Preflight of a recipe: what a run would read, teach and train, tried on real samples before hours are spent.

    check(recipe) -> for each stage: sources, samples token by token, lengths, bad samples, the table of open parts,
                     two steps in a folder of their own, the same two interrupted and resumed, compared bit by bit;
                     then: the model saved, loaded and compared, the contracts of its answers tried (no look ahead,
                     batch = single, ...), and the data of every evaluation opened

Nothing remains: runs live in a temporary folder and the net has its first weights back after each stage.
"""

import json
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus.batch import IGNORE, Batch
from isthmus.data.collate import load_pixels
from isthmus.data.joint import JointLoader
from isthmus.data.loader import Loader
from isthmus.data.mix import Mix, key
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Example, Video
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import CapabilityError, ConfigError, DataError, StageError
from isthmus.net import Net
from isthmus.opening import load
from isthmus.recipes.build import Built, build
from isthmus.recipes.facts import steps_of
from isthmus.recipes.features import demand_frozen
from isthmus.recipes.run import Data, foreseen, make_loader, open_data
from isthmus.recipes.saving import save_model
from isthmus.recipes.schema import EvalSpec, Recipe, StageSpec
from isthmus.recipes.scoring import check_tasks, make_task
from isthmus.recipes.validating import validation_of
from isthmus.stage import StageTable, apply_stage, canonical, named_state
from isthmus.testing.contracts import STATELESS, moved_outputs, verify
from isthmus.training import Loader as Steps
from isthmus.training import Position, TrainResult
from isthmus.training import train as train_stage
from isthmus.training.log import read_metrics
from isthmus.training.protocols import ending
from isthmus.weights import state_tensors

SAMPLES_READ = 64
"""Samples of each source that are processed and decoded, evenly spread."""
UNTRAINED = (
    "again = before",
    "batch = single",
    "left = right padding",
    "cached = uncached",
    "nothing looks ahead",
    "loss = logits",
)
"""Contracts that a sound model holds before it has learnt anything."""
SEES = "picture matters"
"""A contract that one with closed gates fails before it has learnt to open them, and so no problem here."""


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind in a stream: ``learnt``, ``read`` (context) or ``picture``."""

    kind: str
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """One sample as the net will see it: stream -> its pieces in order."""

    id: str
    source: str
    streams: Mapping[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class SourceSummary:
    """What evenly spread samples of a source are like. ``lengths`` are in tokens; ``learnt`` is the share of learnt
    ones, ``cut`` how many samples lost tokens to the stage's ``limit`` of them."""

    name: str
    samples: int
    tried: int
    lengths: tuple[int, ...]
    learnt: float | None
    bad: Mapping[str, int]
    example: str
    cut: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class StageCheck:
    """What was found for one stage. ``seconds`` is the time of one step here, ``total`` of the full stage at it."""

    name: str
    sources: tuple[SourceSummary, ...]
    shown: tuple[Shown, ...]
    table: StageTable
    losses: Mapping[str, float]
    seconds: float
    total: float
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "sources": [
                {
                    "name": s.name,
                    "samples": s.samples,
                    "looked": s.tried,
                    "longest": max(s.lengths, default=0),
                    "learnt": s.learnt,
                    "bad": dict(s.bad),
                    "cut": s.cut,
                }
                for s in self.sources
            ],
            "table": self.table.to_dict(),
            "losses": dict(self.losses),
            "seconds_per_step": self.seconds,
            "seconds": self.total,
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class Checked:
    """A preflight. ``problems`` are those of all stages and of the model and evaluations; empty means go. ``contracts``
    has the verdict on each of UNTRAINED and on SEES."""

    stages: tuple[StageCheck, ...]
    evaluations: Mapping[str, int]
    problems: tuple[str, ...]
    memory: int
    contracts: Mapping[str, str]

    def to_dict(self) -> dict[str, object]:
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "evaluations": dict(self.evaluations),
            "problems": list(self.problems),
            "peak_memory_bytes": self.memory,
            "contracts": dict(self.contracts),
        }


def check(
    recipe: Recipe, *, samples: int = 2, steps: int = 2, on_stage: Callable[[StageCheck], None] | None = None
) -> Checked:
    """Try a recipe; ``on_stage`` is called with each stage as soon as it is known, ``samples`` are shown of each
    source.

    Raises what building the net or opening the data raises, and ConfigError for an evaluation's task or option that is
    none; what only shows when tried is in ``problems``.
    """
    check_tasks(recipe.evaluate, recipe.prompts)
    built = build(recipe)
    for spec, ahead in foreseen(built):  # what needs no step shows before the first one
        ahead.processor(spec)
    stages = []
    with tempfile.TemporaryDirectory(prefix="isthmus-check-") as folder:
        for spec in recipe.stages:
            built = built.enter(spec)
            stages.append(_check_stage(built, spec, Path(folder) / spec.name, samples, steps))
            if on_stage is not None:
                on_stage(stages[-1])
        problems = _saves(built, Path(folder) / "model")
    contracts = verify(built.model(), only=(*UNTRAINED, SEES))
    failed = [row for row in contracts if row.verdict == "FAIL" and row.name != SEES]
    if any(row.name == UNTRAINED[0] for row in failed):  # then whatever is compared differs
        failed, problems = failed[:1], []
    told = [problem for stage in stages for problem in stage.problems]
    # An error of the net's stopped the stages already, and would be told once more by every contract.
    problems += [f"The model fails the contract {row}." for row in failed if row.difference is not None or not told]
    evaluations = {}
    for spec in recipe.evaluate:
        try:
            evaluations[spec.name] = _items(spec, recipe.seed)
        except DataError as error:
            problems.append(f"Evaluation {spec.name}: {error}")
    return Checked(
        stages=tuple(stages),
        evaluations=evaluations,
        problems=(*told, *problems),
        memory=_peak_memory(),
        contracts={row.name: row.verdict for row in contracts},
    )


def _items(spec: EvalSpec, seed: int) -> int:
    """How many items an evaluation has, without the bad samples that it may leave out."""
    return len(make_task(spec, seed=seed, quarantine=Quarantine(threshold=spec.bad_samples)).ids)


def _check_stage(built: Built, spec: StageSpec, folder: Path, samples: int, steps: int) -> StageCheck:
    data = open_data(spec)
    loader = make_loader(built, spec, data=data)
    sources, shown = [], []
    kinds: set[str] = set()
    for number in range(len(loader.sources)):
        found, examples = _summarise(built, spec, loader, number)
        sources.append(found)
        shown += [
            show(example, built.tokenizer, built.tokenizers.others) for example in _varied_first(examples)[:samples]
        ]
        kinds |= {kind for example in examples for kind in _modalities(example)}
    problems = _too_many_bad(spec, sources, _shares(data))
    if spec.feature_cache is not None:
        demand_frozen(built.net, built.processor(spec).image, spec)
    table = apply_stage(built.net, spec.stage.train)
    losses: Mapping[str, float] = {}
    seconds = 0.0
    try:
        losses, seconds = _two_runs(built, spec, data, folder, max(steps, len(kinds)), kinds)
        _validates(built, spec, folder)
    except (StageError, DataError, ConfigError, CapabilityError) as error:
        problems.append(f"Stage {spec.name}: {error}")
    return StageCheck(
        name=spec.name,
        sources=tuple(sources),
        shown=tuple(shown),
        table=table,
        losses=losses,
        seconds=seconds,
        total=seconds * steps_of(spec),
        problems=tuple(problems),
    )


def _shares(data: Data) -> list[float]:
    """How large a part of what the stage reads each of its sources is."""
    if isinstance(data, Mix):
        read = [weight * len(source) for source, weight in zip(data.sources, data.weights, strict=True)]
    else:
        read = [float(rows) for _, rows, _ in data]
    return [part / sum(read) for part in read]


def _too_many_bad(spec: StageSpec, sources: Sequence[SourceSummary], shares: Sequence[float]) -> list[str]:
    """The problem of a stage that would be stopped for its bad samples, which are counted over all its sources."""
    bad = sum(share * sum(s.bad.values()) / s.tried for s, share in zip(sources, shares, strict=True))
    if bad <= spec.bad_samples:
        return []
    told = "; ".join(
        f"source {s.name}: {sum(s.bad.values())} of {s.tried} samples tried are bad, for example: {s.example}"
        for s in sources
        if s.bad
    )
    return [
        f"Stage {spec.name}: {bad:.1%} of what it reads is bad, more than the allowed {spec.bad_samples:.1%}; {told}."
    ]


def _validates(built: Built, spec: StageSpec, folder: Path) -> None:
    """The stage's validation on a few rows: whether its tasks fit the model and give the metric."""
    if spec.validate_ is not None:
        few = spec.validate_.model_copy(update={"rows": min(spec.validate_.rows, 4)})
        validation = validation_of(built, spec.model_copy(update={"validate_": few}), folder)
        if validation is not None:
            validation.validate(0)


def _summarise(
    built: Built, spec: StageSpec, loader: Loader | JointLoader, number: int
) -> tuple[SourceSummary, list[Example]]:
    """Process and decode evenly spread samples of one source; what failed is counted by reason."""
    source, processor = loader.sources[number], built.processor(spec)
    places = range(0, len(source), max(1, -(-len(source) // SAMPLES_READ)))
    whole, cut = processor.uncut(), 0
    examples: list[Example] = []
    bad: Counter[str] = Counter()
    worst = ""
    for index in places:
        try:
            record = source[index]
            draw = key(built.recipe.seed, "draw", number, 0, record.id)
            example = processor.example(record, draw)
            load_pixels(example)
            cut += bool(processor.limits) and _tokens_of(example) < _tokens_of(whole.example(record, draw))
        except DataError as error:
            worst = worst or str(error)
            bad[str(error).split(":", 1)[0]] += 1
            continue
        examples.append(example)
    labels = [label for e in examples for s in e.streams.values() if s.labels is not None for label in s.labels]
    learnt = sum(label != IGNORE for label in labels) / len(labels) if labels else None
    lengths = tuple(example.length for example in examples)
    limit = getattr(processor, processor.limits[0]) if processor.limits else None
    return SourceSummary(
        source.name, len(source), len(places), lengths, learnt, dict(bad), worst, cut=cut, limit=limit
    ), examples


def _tokens_of(example: Example) -> int:
    """Tokens of all its streams."""
    return sum(len(span.ids) for span in example.streams.values())


def show(example: Example, tokenizer: Tokenizer, others: Mapping[str, Tokenizer]) -> Shown:
    """The sample as runs of tokens: what is learnt, what is only read, where its pictures stand.

    ``others`` are the tokenizers of streams that have one of their own (BLIP-2's ``qformer``).
    """
    streams = {}
    for name, span in example.streams.items():
        kinds = ["read" if label == IGNORE else "learnt" for label in span.labels or [IGNORE] * len(span.ids)]
        starts: set[int] = set()
        for place in example.places:
            if place.stream == name:
                kinds[place.start : place.start + place.length] = ["picture"] * place.length
                starts.add(place.start)
        streams[name] = tuple(_pieces(kinds, others.get(name, tokenizer).tokens(span.ids), starts))
    return Shown(example.id, example.source, streams)


def _pieces(kinds: list[str], tokens: list[str], starts: set[int]) -> Iterator[Piece]:
    """Neighbours of one kind together; a picture begins a piece of its own."""
    begin = 0
    for end in range(1, len(kinds) + 1):
        if end == len(kinds) or kinds[end] != kinds[begin] or end in starts:
            yield Piece(kinds[begin], tuple(tokens[begin:end]))
            begin = end


class _Stopped(Exception):
    """Raised in the middle of the run that is to be resumed."""


class _Varied:
    """A loader that passes over steps without anything new until each of ``kinds`` was in one: two steps of mostly
    text would say nothing of the parts that read pictures.

    ``kinds_so_far`` remembers, over several loaders of one stage, what had been in the steps up to a position. As many
    steps as there are samples are passed over at most.
    """

    def __init__(self, loader: Loader | JointLoader, kinds: Set[str], kinds_so_far: dict[str, frozenset[str]]) -> None:
        self.loader: Steps = loader
        self.samples, self.kinds, self.kinds_so_far = sum(map(len, loader.sources)), kinds, kinds_so_far
        self.position = loader.position

    def steps(self, start: Position) -> Iterator[tuple[Position, list[Batch]]]:
        found, left = self.kinds_so_far.get(str(start.to_dict()), frozenset()), self.samples
        with ending(self.loader.steps(start)) as stream:
            for after, batches in stream:
                new = frozenset(kind for batch in batches for kind in _modalities_of(batch))
                if left > 0 and not self.kinds <= found and new <= found:
                    left -= 1
                    continue
                found = self.kinds_so_far[str(after.to_dict())] = found | new
                yield after, batches


def _modalities(example: Example) -> set[str]:
    """What a sample is read with: ``clip``, ``picture``, or neither: ``text``."""
    return {"clip" if isinstance(v, Video) else "picture" for v in example.visuals} or {"text"}


def _modalities_of(batch: Batch) -> set[str]:
    """The same of all rows. Frames with known sizes are views of one picture."""
    alone = len(set(batch.owner.tolist())) < len(batch)
    values = [(v, v.pixels if v.pixels is not None else v.features) for v in batch.visuals]
    clips = {x is not None and x.shape[1] > 1 and v.sizes is None for v, x in values}
    return ({"text"} if alone else set()) | {"clip" if clip else "picture" for clip in clips}


def _varied_first(examples: Sequence[Example]) -> list[Example]:
    """The first sample of each kind, then the others."""
    firsts = {min(_modalities(example)): example for example in reversed(examples)}
    shown = sorted(firsts.values(), key=examples.index)
    return [*shown, *(example for example in examples if all(example is not first for first in shown))]


class _OneStep:
    """A loader that breaks off after its first step."""

    def __init__(self, loader: Steps) -> None:
        self.loader, self.position = loader, loader.position

    def steps(self, start: Position) -> Iterator[tuple[Position, list[Batch]]]:
        with ending(self.loader.steps(start)) as stream:
            yield next(stream)
        raise _Stopped


def _two_runs(
    built: Built, spec: StageSpec, data: Data, folder: Path, steps: int, kinds: Set[str]
) -> tuple[Mapping[str, float], float]:
    """Losses of ``steps`` steps and the seconds of the last; raises StageError when a resumed run ends otherwise.

    The weights are as before afterwards: each run begins with a copy of what the stage trains.
    """
    stage = replace(spec.stage, steps=steps, samples=None, warmup=0.0, save_every=1, log_every=1)
    net, seed = built.net, built.recipe.seed
    kinds_so_far: dict[str, frozenset[str]] = {}
    before = _trained(net, spec)

    def once(name: str, *, stops: bool = False) -> TrainResult:
        _restore(net, before)
        loader = _Varied(make_loader(built, spec, data=data), kinds, kinds_so_far)
        return train_stage(net, _OneStep(loader) if stops else loader, stage, folder / name, seed=seed, progress=False)

    try:
        uninterrupted = once("whole")
        after = _trained(net, spec)
        try:
            once("parts", stops=True)
        except _Stopped:
            resumed = once("parts")
        again = _trained(net, spec)
    finally:
        _restore(net, before)
    differing = [name for name in after if not torch.equal(after[name], again[name])]
    if differing or dict(uninterrupted.losses) != dict(resumed.losses):
        raise StageError(
            "a run that was interrupted after one step and resumed ended with other bits than one that was not (first "
            f"in {differing[0] if differing else 'the loss'}). Something in the net or the data draws its own numbers."
        )
    lines = read_metrics(folder / "whole" / "metrics.jsonl")
    return uninterrupted.losses, (lines[-1]["seconds"] - lines[0]["seconds"]) / max(1, len(lines) - 1)


def _trained(net: Net, spec: StageSpec) -> dict[str, Tensor]:
    """Copies of everything that the stage may move: open tensors and buffers."""
    table = apply_stage(net, spec.stage.train)
    buffers = {canonical(name) for name, _ in net.named_buffers()}
    return {n: t.detach().clone() for n, t in named_state(net).items() if n in table.assigned or n in buffers}


def _restore(net: Net, tensors: Mapping[str, Tensor]) -> None:
    state = named_state(net)
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def _saves(built: Built, folder: Path) -> list[str]:
    """The finished model as a folder: written, loaded, compared."""
    model = built.model()
    save_model(built, folder, extra={"recipe.yaml": json.dumps(built.recipe.model_dump(mode="json"))})
    again = load(folder, device=model.device)
    saved = state_tensors(model.net)
    other = state_tensors(again.net)
    if saved.keys() != other.keys() or any(not torch.equal(t, other[n]) for n, t in saved.items()):
        return ["The model, saved and loaded, has other weights than before."]
    if again.processor.to_dict() != model.processor.to_dict():
        return ["The model, saved and loaded, processes samples otherwise than before."]
    with suppress(Exception):  # a net that fails at once is the stages' and the contracts' to tell
        if (moved := moved_outputs(model, again)) is not None:
            return [f"The model, saved and loaded, has other outputs than before, by {moved:.2g}: {STATELESS}."]
    return []


def _peak_memory() -> int:
    """The most bytes this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
