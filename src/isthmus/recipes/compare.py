"""Models side by side on the same work: who takes part, what each is asked, scores and costs.

A contestant is a model with its folder; every task is asked of every contestant that can do it. The demo ends with the
same comparison of the models it has just trained. What comes out is put on a page by :mod:`.side_by_side`.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isthmus.checkpoint import read_json
from isthmus.data.record import Video
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError
from isthmus.evaluation import rules, vqa
from isthmus.evaluation.protocols import Answers, Embeds, Matches, Reranks, Sees, Weighs
from isthmus.evaluation.results import write_json
from isthmus.evaluation.run import Result
from isthmus.evaluation.sound import first_sound
from isthmus.evaluation.vqa import VqaScores
from isthmus.model import Model
from isthmus.recipes.cost import Cost, cost_of
from isthmus.recipes.looks import looks
from isthmus.recipes.schema import EvalSpec, Recipe
from isthmus.recipes.scoring import model_hash, needs, recipe_of, score_model

SAMPLES = 12
"""Pictures shown in the report."""
OWN = ("retrieval", "readings", "vqa")
"""Tasks whose scores stand under the model's bare name; others add theirs (``flamingo-clips``)."""


@dataclass(kw_only=True)
class Contestant:
    """A model's name in the comparison, its folder, the recipe it was trained with (where known), the tasks it was
    given and what it scored.

    ``looks`` shows where it looked, as PNG by sample id. Of a model trained with several seeds, ``results`` are the
    means over them and ``by_seed`` has each seed's; folder, cost and looks are those of the first.
    """

    name: str
    folder: Path
    recipe: Recipe | None = None
    specs: Sequence[EvalSpec] = ()
    results: list[Result] = field(default_factory=list)
    cost: Cost | None = None
    looks: Mapping[str, bytes] = field(default_factory=dict)
    by_seed: Mapping[int, Sequence[Result]] = field(default_factory=dict)

    def label(self, task: str) -> str:
        """The name of a task's scores."""
        return self.name if task in OWN else f"{self.name}-{task}"

    def folders(self, task: str, beside: "Contestant") -> list[Path]:
        """The score folders of a task, one per seed that ``beside`` has too: only those are compared."""
        runs = [run for seed, run in self.by_seed.items() if not beside.by_seed or seed in beside.by_seed]
        runs = runs if self.by_seed else [self.results]
        return [result.folder for results in runs for result in results if result.task == task]


def contestants(folders: Sequence[str | Path]) -> list[Contestant]:
    """One for each folder, called by the folder's name. Raises ConfigError for one that is not there, and when two have
    the same name."""
    found: dict[str, Contestant] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise ConfigError(f"There is no model at {folder}, so nothing was asked of the others either.")
        name = folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
        if name in found:
            raise ConfigError(
                f"{folder} and {found[name].folder} are both called {name!r} in the comparison; rename one folder."
            )
        found[name] = Contestant(name=name, folder=folder, recipe=recipe_of(folder))
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


def ask(
    rival: Contestant,
    model: Model,
    specs: Sequence[EvalSpec],
    out: Path,
    *,
    seed: int = 0,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
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
        model_hash=model_hash(rival.folder),
        seed=seed,
        limit=limit,
        progress=progress,
        run=rival.folder,
    )


_CAPABILITY = {
    Answers: "answer",
    Weighs: "score",
    Embeds: "embed_images",
    Reranks: "match",
    Matches: "match",
    Sees: "vision_features",
}


def _can(model: Model, spec: EvalSpec) -> bool:
    """Has the model the abilities behind the task's methods? A bare LM has no eyes, and only Flamingo reads clips."""
    if _CAPABILITY[needs(spec)] not in model.capabilities:
        return False
    images = [image for record in first_sound(open_source(spec.data), 1) for image in record.images]
    if any(isinstance(image, Video) for image in images):
        return model.kind == "flamingo"
    return model.kind != "lm" or not images


def measure(rival: Contestant, model: Model, out: Path) -> None:
    """The contestant's cost, on the first questions it was asked, and where it looked for the first answers.

    Both are kept in ``out`` (``cost.json``, ``looks.json``) and taken from there for the same model.
    """
    if recall(rival, out):
        return
    answered = {r.task for r in rival.results if isinstance(r.scores, VqaScores)}
    spec = next((s for s in rival.specs if s.name in answered and s.stage is None), None)
    questions = first_sound(open_source(spec.data), 16) if spec is not None else []
    rival.cost = cost_of(model, rival.folder, rival.recipe, questions)
    shown = [q for q in questions[:SAMPLES] if any(r.task == "vqa" for r in rival.results)]
    rival.looks = looks(model, shown, spec.options.get("decoding", {})) if spec is not None else {}
    own = model_hash(rival.folder)
    write_json(out / "cost.json", {"model": own, "found": rival.cost.to_dict()})
    pictures = {name: base64.b64encode(raw).decode("ascii") for name, raw in rival.looks.items()}
    write_json(out / "looks.json", {"model": own, "found": pictures})


def recall(rival: Contestant, out: Path) -> bool:
    """Cost and maps from where :func:`measure` left them; False when they are not there, or of another model."""
    own = model_hash(rival.folder)
    cost, pictures = (_kept(out / name, own) for name in ("cost.json", "looks.json"))
    if cost is None or pictures is None:
        return False
    rival.cost = Cost.from_dict(cost)
    rival.looks = {name: base64.b64decode(text) for name, text in pictures.items()}
    return True


def _kept(file: Path, model: str) -> dict[str, Any] | None:
    facts = read_json(file) if file.is_file() else {}
    return facts["found"] if facts.get("model") == model else None


def pooled(runs: Mapping[int, Contestant]) -> Contestant:
    """One contestant out of those of several training seeds. Scores of answers are means over the seeds, with
    intervals over the questions; other scores are the first seed's."""
    first = next(iter(runs.values()))
    by_seed = {seed: rival.results for seed, rival in runs.items()}
    means = first.results if len(runs) == 1 else [_mean(result, by_seed) for result in first.results]
    return replace(first, results=means, by_seed=by_seed)


def _mean(result: Result, by_seed: Mapping[int, Sequence[Result]]) -> Result:
    """Over the seeds with which the task was asked."""
    if not isinstance(result.scores, VqaScores):
        return result
    rows = [r.rows for results in by_seed.values() for r in results if r.task == result.task]
    manifest = read_json(result.folder / "manifest.json")
    scores = vqa.pooled(rows, rule=rules.rule(manifest.get("rule", "exact")), seed=manifest["seed"])
    return replace(result, scores=scores)
