"""Models side by side on the same work: who takes part, the tasks, scores and costs.

A contestant is a model with its folder; every contestant does every task that it can. The demo ends with the
same comparison of the models it has just trained. What comes out is put on a page by :mod:`.side_by_side`.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Protocol, cast

from isthmus.checkpoint import read_json
from isthmus.comparison.attention_pictures import attention_pictures
from isthmus.comparison.cost import Cost, cost_of
from isthmus.config import fit
from isthmus.data.record import Record, Video
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation import rules, vqa
from isthmus.evaluation.outputs import Manifest, QuestionRow, ScoredRow
from isthmus.evaluation.protocols import Answers, Embeds, HasVisionFeatures, Matches, MatchesPairs, Weighs
from isthmus.evaluation.results import write_json
from isthmus.evaluation.run import Result, fits
from isthmus.evaluation.sound import first_sound
from isthmus.evaluation.tasks import Scores, seed_of
from isthmus.evaluation.turns import turns
from isthmus.evaluation.vqa import HasAnswers, VqaScores
from isthmus.interop.hub import located, model_hash
from isthmus.model import Model
from isthmus.recipes.schema import EvalSpec, Recipe
from isthmus.recipes.scoring import needs, recipe_of, score_model
from isthmus.user_code import files_of

SAMPLES = 12
"""Pictures shown in the report."""
OWN = ("retrieval", "readings", "vqa")
"""Tasks whose scores stand under the model's bare name; others add theirs (``flamingo-clips``)."""


@dataclass(kw_only=True)
class Contestant:
    """A model's name in the comparison, its folder, the recipe it was trained with (where known), the tasks it was
    given and what it scored.

    ``attention_pictures`` shows its attention in the task ``attention_task``, as PNG by sample id. Of a model trained
    with several seeds, ``results`` are the means over them (with the first one's rows) and ``by_seed`` has each seed's;
    folder, cost and these pictures are those of the first.
    """

    name: str
    folder: Path
    recipe: Recipe | None = None
    specs: Sequence[EvalSpec] = ()
    results: list[Result[ScoredRow]] = field(default_factory=list)
    cost: Cost | None = None
    attention_pictures: Mapping[str, bytes] = field(default_factory=dict)
    attention_task: str = ""
    by_seed: Mapping[int, Sequence[Result[ScoredRow]]] = field(default_factory=dict)
    dtype: str = ""

    @property
    def identity(self) -> str:
        """Of the model that is scored: its weights, and the numbers they were cast to (``dtype``)."""
        own = model_hash(self.folder)
        return f"{own} dtype={self.dtype}" if self.dtype else own

    def label(self, task: str) -> str:
        """The name of a task's scores."""
        return self.name if task in OWN else f"{self.name}-{task}"

    def code(self, task: str) -> list[Path]:
        """The file that a task of the user's own is in."""
        return files_of(spec.task for spec in self.specs if spec.name == task)

    def folders(self, task: str, beside: "Contestant") -> list[Path]:
        """The score folders of a task, one per seed that ``beside`` has too: only those are compared."""
        runs = [run for seed, run in self.by_seed.items() if not beside.by_seed or seed in beside.by_seed]
        runs = runs if self.by_seed else [self.results]
        return [result.folder for results in runs for result in results if result.task == task]


def contestants(folders: Sequence[str | Path], code: Sequence[str | Path] = ()) -> list[Contestant]:
    """One for each folder, called by the folder's name; ``code`` as :func:`isthmus.load` takes it.

    Raises ConfigError for a folder that is not there, and when two have the same name.
    """
    found: dict[str, Contestant] = {}
    for folder in (located(folder, None) for folder in folders):
        if not folder.exists():
            raise ConfigError(f"There is no model at {folder}, so the others were not scored either.")
        name = folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
        if name in found:
            raise ConfigError(
                f"{folder} and {found[name].folder} are both called {name!r} in the comparison; rename one folder."
            )
        found[name] = Contestant(name=name, folder=folder, recipe=recipe_of(folder, code))
    return list(found.values())


def shared_tasks(rivals: Sequence[Contestant]) -> list[EvalSpec]:
    """The tasks of the contestants' own recipes, each once. One of a stage is its own recipe's alone. Raises
    ConfigError for two different tasks of one name, and when there are none."""
    found: dict[str, EvalSpec] = {}
    of_stages: list[EvalSpec] = []
    for rival in rivals:
        for spec in rival.recipe.evaluate if rival.recipe is not None else ():
            if spec.stage is not None:
                of_stages.append(spec)
            elif found.setdefault(spec.name, spec) != spec:
                raise ConfigError(
                    f"{rival.name} and another model have different tasks called {spec.name!r}, so their scores cannot "
                    "stand side by side: give --task and --data."
                )
    if not found and not of_stages:
        raise ConfigError("None of these models names a task of its own: give --task and --data.")
    return [*found.values(), *of_stages]


def score_contestant(
    rival: Contestant,
    model: Model,
    specs: Sequence[EvalSpec],
    out: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    code: Sequence[str | Path] = (),
) -> None:
    """Score the contestant on every task it can do, into ``out/<task>``; a task of a stage only by its own recipe,
    where it takes the place of another of its name."""
    own = [spec for spec in (rival.recipe.evaluate if rival.recipe is not None else ()) if spec.stage is not None]
    taken = {spec.name for spec in own if spec in specs}
    rival.specs = [
        spec
        for spec in specs
        if (spec in own if spec.stage is not None else spec.name not in taken and _can(model, spec))
    ]
    rival.results = score_model(
        model,
        rival.specs,
        out,
        model_hash=rival.identity,
        seed=seed,
        limit=limit,
        progress=progress,
        run=rival.folder,
        code=code,
    )


_CAPABILITY = {
    Answers: "answer",
    Weighs: "score",
    Embeds: "embed_images",
    MatchesPairs: "match",
    Matches: "match",
    HasVisionFeatures: "vision_features",
}


def _can(model: Model, spec: EvalSpec) -> bool:
    """Has the model the capability that the task needs? A model without an image transform reads no pictures. What a
    user's task needs may be a protocol of its own, which the model's methods fit or not."""
    needed = needs(spec)
    if needed in _CAPABILITY and _CAPABILITY[needed] not in model.capabilities:
        return False
    if needed not in _CAPABILITY and not fits(model, needed):
        return False
    images = [image for record in first_sound(open_source(spec.data), 1) for image in record.images]
    if any(isinstance(image, Video) for image in images):
        return model.system.clips
    return model.processor.image is not None or not images


def measure(rival: Contestant, model: Model, out: Path) -> None:
    """The contestant's cost, on its first questions, and its attention for its first answers about pictures.

    Both are kept in ``out`` (``cost.json``, ``looks.json``) and taken from there for the same model.
    """
    if recall(rival, out):
        return
    answered = {r.task for r in rival.results if answers_of(r.scores) is not None}
    specs = [s for s in rival.specs if s.name in answered and s.stage is None]
    rival.cost = cost_of(model, rival.folder, rival.recipe, questions_of(specs[0], 16) if specs else [])
    seeing = next((s for s in specs if pictured(s)), None)
    if seeing is not None:
        written = needs(seeing) is Answers and "shots" not in seeing.options  # else the map would be of another prompt
        rival.attention_task = seeing.name
        decoding = seeing.options.get("decoding")
        decoding = decoding if isinstance(decoding, Mapping) else {}
        rival.attention_pictures = attention_pictures(model, pictured(seeing), decoding) if written else {}
    own = rival.identity
    write_json(out / "cost.json", {"model": own, "found": rival.cost.to_dict()})
    pictures = {name: base64.b64encode(raw).decode("ascii") for name, raw in rival.attention_pictures.items()}
    write_json(out / "looks.json", {"model": own, "task": rival.attention_task, "found": pictures})


def recall(rival: Contestant, out: Path) -> bool:
    """Cost and maps from where :func:`measure` left them; False when they are not there, or of another model."""
    own = rival.identity
    cost, pictures = (_kept(out / name, own) for name in ("cost.json", "looks.json"))
    if cost is None or pictures is None:
        return False
    rival.cost = Cost.from_dict(cost["found"])
    rival.attention_task = str(pictures.get("task", "vqa"))  # folders of earlier versions have maps of this task only
    found = fit(dict[str, str], pictures["found"], str(out / "looks.json"))
    rival.attention_pictures = {name: base64.b64decode(text) for name, text in found.items()}
    return True


def _kept(file: Path, model: str) -> Mapping[str, object] | None:
    facts = read_json(file) if file.is_file() else {}
    return facts if facts.get("model") == model else None


def answer_rows(result: Result[ScoredRow]) -> Sequence[QuestionRow]:
    """The rows of a task whose scores are those of answers (:func:`answers_of`)."""
    return cast(Sequence[QuestionRow], result.rows)


def answers_of(scores: object) -> VqaScores | None:
    """Scores of answers: what they are, or what stands among other scores (yes or no, conversations)."""
    if isinstance(scores, VqaScores):
        return scores
    return scores.answers if isinstance(scores, HasAnswers) else None


def questions_of(spec: EvalSpec, most: int) -> list[Record]:
    """The first questions of a task that can be read, under the ids of its rows; of a conversation its first one."""
    records = first_sound(open_source(spec.data), most)
    if spec.task != "conversation":
        return records
    return [replace(r, id=f"{r.id}/1", parts=r.parts[: turns(r)[0].at]) for r in records]


def pictured(spec: EvalSpec) -> list[Record]:
    """Those of the task's first questions that are about pictures; clips are none."""
    records = questions_of(spec, SAMPLES)
    return [r for r in records if r.images and not any(isinstance(image, Video) for image in r.images)]


def pooled(runs: Mapping[int, Contestant]) -> Contestant:
    """One contestant out of those of several training seeds. Scores are means over the seeds, of answers with intervals
    over the questions; of other scores the intervals' ends are means too, which makes them rather too wide.

    Raises DataError when the seeds did not answer the same items.
    """
    first = next(iter(runs.values()))
    by_seed = {seed: rival.results for seed, rival in runs.items()}
    means = first.results if len(runs) == 1 else [_mean(result, by_seed) for result in first.results]
    return replace(first, results=means, by_seed=by_seed)


class _AmongOthers(Scores, HasAnswers, Protocol):
    """A dataclass of scores with those of answers among them."""

    __dataclass_fields__: ClassVar[dict[str, Field[object]]]


def _mean(result: Result[ScoredRow], by_seed: Mapping[int, Sequence[Result[ScoredRow]]]) -> Result[ScoredRow]:
    """Over the seeds with which the task was scored."""
    runs = [r for results in by_seed.values() for r in results if r.task == result.task]
    if any([row["id"] for row in r.rows] != [row["id"] for row in result.rows] for r in runs):
        raise DataError(f"The seeds' outputs below {result.folder.parents[1]} are not of the same {result.task} items.")
    scores = cast(Scores, _average([r.scores for r in runs]))
    if answers_of(scores) is None:
        return replace(result, scores=scores)
    manifest = cast(Manifest, read_json(result.folder / "manifest.json"))
    rule = rules.rule("yes-no" if result.kind == "binary" else manifest.get("rule", "exact"))
    answers = vqa.pooled([answer_rows(r) for r in runs], rule=rule, seed=seed_of(manifest))
    if isinstance(scores, VqaScores):
        return replace(result, scores=answers)
    return replace(result, scores=replace(cast(_AmongOthers, scores), answers=answers))


def _average(values: Sequence[object], name: str = "") -> object:
    """The mean of every number in several scores of one kind; what is alike in all of them, such as numbers of items,
    stays. Empty and unparsable answers are counted over all, as :func:`vqa.pooled` does. Of scores of a user's own
    class the mean is of what they write."""
    first = values[0]
    if is_dataclass(first) and not isinstance(first, type):
        return replace(first, **{f.name: _average([getattr(v, f.name) for v in values], f.name) for f in fields(first)})
    if isinstance(first, Mapping):
        named = cast(Sequence[Mapping[object, object]], values)
        return {key: _average([v[key] for v in named], str(key)) for key in first}
    if isinstance(first, tuple | list):
        columns = zip(*cast(Sequence[Sequence[object]], values), strict=True)
        return type(first)(_average(column) for column in columns)
    if all(isinstance(value, int | float) for value in values):
        numbers = cast(Sequence[float], values)
        alike = all(number == first for number in numbers)
        return sum(numbers) if name in ("empty", "unparsable") else first if alike else fmean(numbers)
    written = [value.to_dict() for value in values if isinstance(value, Scores)]
    if len(written) == len(values):
        return _Written(cast("dict[str, object]", _average(written)))
    known = [value for value in values if value is not None]  # a measure that some seeds have not
    return _average(known, name) if 0 < len(known) < len(values) else first


class _Written:
    """Scores of a class of the user's own, as means over what they write."""

    def __init__(self, facts: dict[str, object]) -> None:
        self.facts = facts

    def to_dict(self) -> dict[str, object]:
        return self.facts
