"""From an evaluation as a recipe (or the command line) names it to a task, and from a model to its scores."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Protocol, TypeVar

from isthmus import checkpoint, pretrained
from isthmus.config import check_options
from isthmus.data.mix import Source
from isthmus.data.quarantine import Quarantine
from isthmus.data.record import Record, Text
from isthmus.data.sources import open_source
from isthmus.errors import ConfigError, IsthmusWarning, nearest
from isthmus.evaluation import zero_shot
from isthmus.evaluation.answer_tasks import BinaryTask, ConversationTask, LikelihoodTask
from isthmus.evaluation.caption_task import CaptionTask, typical_caption
from isthmus.evaluation.embedding_tasks import LinearProbeTask, RetrievalTask, ZeroShotTask
from isthmus.evaluation.few_shot import FewShotTask
from isthmus.evaluation.grouped import CircularTask, MmeTask
from isthmus.evaluation.judged import JudgedTask
from isthmus.evaluation.matching import MatchingHeadTask, MatchingTask
from isthmus.evaluation.protocols import Answers, Records
from isthmus.evaluation.rerank import RerankTask
from isthmus.evaluation.run import Result, evaluate
from isthmus.evaluation.scorers import users_task
from isthmus.evaluation.sound import Check, Demand, Sound, all_answered, answered
from isthmus.evaluation.tasks import Task, VqaTask
from isthmus.evaluation.vqa import AnswerPrior
from isthmus.evaluation.window import Undecodable
from isthmus.interop.hub import model_hash
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.opening import load
from isthmus.processes import first, of_first, world_size
from isthmus.recipes.schema import EvalSpec, Recipe, parse_recipe, read_recipe
from isthmus.user_code import is_user_code, label, vetted

Progress = Callable[[str, int, int], None]
"""Called with (task, items done, items in all)."""

T = TypeVar("T")


class Scorable(Protocol):
    """A model of ours or of transformers, or anything that has what its tasks need."""

    @property
    def capabilities(self) -> Sequence[str]: ...
    @property
    def prompts(self) -> Mapping[str, str]: ...


class First(Source):
    """The first ``limit`` records of a source."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit, self.name = source, min(limit, len(source)), source.name

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, index: int) -> Record:
        return self.source[index]


def make_task(
    spec: EvalSpec,
    *,
    seed: int = 0,
    limit: int | None = None,
    quarantine: Quarantine | None = None,
    pictures: Check = "decode",
) -> Task:
    """The task that ``spec`` names, on its data; with a ``quarantine`` on what can be read of it, its ``pictures``
    checked beforehand as :class:`.Sound` says.

    Training data has a quarantine of its own with the same threshold (``quarantine-train.jsonl`` beside the other's
    file); its pictures are opened only where the task reads them.

    Raises ConfigError for an unknown task or option, DataError when too much is bad.
    """
    _check_task(spec.task)
    data = open_source(spec.data)
    records: Records = data if limit is None else First(data, limit)
    if quarantine is not None:
        records = Sound(records, quarantine, demand=_demand(spec), pictures=pictures)
    train: Records | None = open_source(spec.train) if spec.train is not None else None
    if train is not None and quarantine is not None and spec.task not in UNTRAINED:
        path = quarantine.path and quarantine.path.with_name("quarantine-train.jsonl")
        shown = "shots" in spec.options
        own = Quarantine(path, threshold=quarantine.threshold, after=quarantine.after)
        demand = answered if shown else _demand(spec)
        needed = shown or spec.task == "linear-probe"
        train = Sound(train, own, demand=demand, pictures=pictures if needed else "none")
    return _on(spec, records, train, seed)


def _on(spec: EvalSpec, records: Records, train: Records | None, seed: int) -> Task:
    """The task on data that are open."""
    options = dict(spec.options)
    if is_user_code(spec.task):
        cls, given = _users(spec, records, train, seed)
        return _made(cls, spec.options, **given)
    try:
        return TASKS[spec.task](spec, records, train, seed, options)
    except TypeError as error:
        unknown = [name for name in options if repr(name) in str(error)]
        if not unknown:
            raise
        raise ConfigError(f"Task {spec.name!r} ({spec.task}) has no option {unknown[0]!r}.") from None


_ANY = (Record(id="any", parts=(Text("what?", role="user"), Text("word", role="assistant", learn=True))),)
"""Stands for training data that are not read."""


def check_tasks(specs: Sequence[EvalSpec], prompts: Mapping[str, str]) -> None:
    """Raises ConfigError for an evaluation whose task is none, that has an option which is none of its task's or does
    not fit, or lacks training data that it needs: all that is known without model and data. ``prompts`` are the
    model's."""
    for spec in specs:
        _check(spec, prompts)
        if isinstance(decoding := spec.options.get("decoding"), Mapping) and not is_user_code(spec.task):
            Decoding.of(decoding)


def _check(spec: EvalSpec, prompts: Mapping[str, str]) -> None:
    """The task made without its data. Raises as :func:`check_tasks` does, but for decoding, which a model reads."""
    _check_task(spec.task)
    train = _ANY if spec.train is not None else None
    if is_user_code(spec.task):
        _users(spec, (), train, 0)  # not made: its class may read its records then
    else:
        _on(_prompted(spec, prompts), (), train, 0)


def open_evaluations(specs: Sequence[EvalSpec]) -> None:
    """The data of every evaluation opened, each once: raises what :func:`open_source` raises."""
    sources = [source for spec in specs for source in (spec.data, spec.train) if source is not None]
    for source in {json.dumps(source, sort_keys=True, default=str): source for source in sources}.values():
        open_source(source)


def _prompted(spec: EvalSpec, prompts: Mapping[str, str]) -> EvalSpec:
    """Captions are asked for as the model was trained to be, unless the evaluation says how."""
    if spec.task != "caption" or "caption" not in prompts:
        return spec
    return spec.model_copy(update={"options": {"prompt": prompts["caption"], **spec.options}})


def _check_task(name: str) -> None:
    if is_user_code(name):
        users_task(name)
    elif name not in TASKS:
        raise ConfigError(
            f"There is no task {name!r}; {nearest(name, TASKS)} A class of your own is named my_file.py:MyTask."
        )


def _made(kind: Callable[..., T], options: Mapping[str, object], **given: object) -> T:
    """``kind`` with what is given, and with options as the user wrote them, which are its own to check."""
    return kind(**given, **options)


def _users(spec: EvalSpec, records: Records, train: Records | None, seed: int) -> tuple[type[Task], dict[str, object]]:
    """A user's class, and what it is made with beside its options, which are checked: name, records, seed, and
    ``train`` where it takes that."""
    cls, shown = users_task(spec.task), label(spec.task)
    given: dict[str, object] = {"name": spec.name, "records": records, "seed": seed}
    if train is not None:
        if "train" not in signature(cls).parameters:
            raise ConfigError(f"Task {shown!r} takes no training data; leave `train` (--train) out.")
        given["train"] = train
    elif "train" in signature(cls).parameters and signature(cls).parameters["train"].default is Parameter.empty:
        raise ConfigError(f"Task {shown!r} needs training data: give `train` (--train).")
    check_options(cls, spec.options, f"task {shown!r}", given=(*given, "train"))
    return cls, given


_BY_SIMILARITY = ("retrieval", "zero-shot", "matching")
"""Tasks that rank by the similarity a CLIP was trained with."""

_QUESTIONS = (
    *("vqa", "vqav2", "ok-vqa", "gqa", "scienceqa", "choice", "pope", "nlvr"),
    *("a-okvqa", "a-okvqa-direct", "docvqa", "mmbench", "mme", "mmmu", "seed-bench", "vsr"),
)

SHOWABLE = (*_QUESTIONS, "caption")
"""Tasks whose questions, or pictures to caption, may stand after examples."""

UNTRAINED = ("llava-bench", "matching", "matching-head", "retrieval", "zero-shot")
"""Tasks that take nothing from training data."""


def _demand(spec: EvalSpec) -> Demand | None:
    """What the task needs of a record beside its pictures."""
    if spec.task == "conversation":
        return all_answered
    return answered if spec.task in (*_QUESTIONS, "choice-likelihood", "llava-bench") else None


Maker = Callable[[EvalSpec, Records, Records | None, int, dict[str, object]], Task]
"""From an evaluation, its records, its training records, seed and options to the task."""


def _answers(kind: Callable[..., Task], **defaults: object) -> Maker:
    """Tasks whose prior is the training answers' most frequent one per question text."""

    def make(spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]) -> Task:
        prior = AnswerPrior.fit(train[i] for i in range(len(train))) if train is not None else None
        shots = _taken(options, spec.task)
        task = _made(kind, {**defaults, **options}, name=spec.name, records=records, prior=prior, seed=seed)
        return _behind_shots(task, train, shots)

    return make


def _taken(options: dict[str, object], task: str) -> dict[str, object]:
    """The options that are about shots, taken out; none unless there is a number of them."""
    if "shots" not in options or task not in SHOWABLE:
        return {}
    names = [f.name for f in fields(FewShotTask) if f.name not in ("task", "support")]
    return {name: options.pop(name) for name in names if name in options}


def _behind_shots(task: Task, train: Records | None, shots: Mapping[str, object]) -> Task:
    """The task, a SHOWABLE one, with its examples; as it is without any."""
    if not shots:
        return task
    if train is None:
        raise ConfigError(f"Task {task.name!r}: shots come from training data; give `train` (--train).")
    return _made(FewShotTask, shots, task=task, support=train)


def _caption(spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]) -> Task:
    prior = typical_caption([train[i] for i in range(len(train))]) if train is not None else None
    if not options.get("prompt"):
        options.setdefault("controls", ["shuffled"])
    shots = _taken(options, spec.task)
    task = _made(CaptionTask, options, name=spec.name, records=records, prior=prior, seed=seed)
    return _behind_shots(task, train, shots)


def _untrained(kind: Callable[..., Task]) -> Maker:
    """Tasks that take nothing from training data."""

    def make(spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]) -> Task:
        del train
        return _made(kind, options, name=spec.name, records=records, seed=seed)

    return make


def _retrieval(spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]) -> Task:
    make = _untrained(RerankTask if "rerank" in options else RetrievalTask)
    return make(spec, records, train, seed, options)


def _zero_shot(spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]) -> Task:
    if isinstance(name := options.get("templates"), str):
        options["templates"] = zero_shot.templates(name)
    return _untrained(ZeroShotTask)(spec, records, train, seed, options)


def _linear_probe(
    spec: EvalSpec, records: Records, train: Records | None, seed: int, options: dict[str, object]
) -> Task:
    if train is None:
        raise ConfigError(f"Task {spec.name!r}: a linear probe needs `train`, the data to fit it on.")
    return _made(LinearProbeTask, options, name=spec.name, records=records, train=train, seed=seed)


TASKS: dict[str, Maker] = {
    "vqa": _answers(VqaTask),
    "vqav2": _answers(VqaTask, rule="vqa"),
    "ok-vqa": _answers(VqaTask, rule="ok-vqa"),
    "gqa": _answers(VqaTask, rule="gqa"),
    "scienceqa": _answers(VqaTask, rule="choice", mixed=True),
    "choice": _answers(VqaTask, rule="choice"),
    "choice-likelihood": _answers(LikelihoodTask),
    "a-okvqa": _answers(VqaTask, rule="choice"),
    "a-okvqa-direct": _answers(VqaTask, rule="a-okvqa"),
    "docvqa": _answers(VqaTask, rule="anls"),
    "mmbench": _answers(CircularTask),
    "mme": _answers(MmeTask),
    "mmmu": _answers(VqaTask, rule="mmmu", mixed=True),
    "seed-bench": _answers(VqaTask, rule="choice"),
    "vsr": _answers(BinaryTask),
    "pope": _answers(BinaryTask),
    "nlvr": _answers(BinaryTask),
    "conversation": _answers(ConversationTask),
    "caption": _caption,
    "llava-bench": _untrained(JudgedTask),
    "matching": _untrained(MatchingTask),
    "matching-head": _untrained(MatchingHeadTask),
    "retrieval": _retrieval,
    "zero-shot": _zero_shot,
    "linear-probe": _linear_probe,
}


def needs(spec: EvalSpec) -> type:
    """The protocol of a model that can do the task."""
    if spec.task == "retrieval":
        return RerankTask.needs if "rerank" in spec.options else RetrievalTask.needs
    own: dict[str, type[Task]] = {
        "choice-likelihood": LikelihoodTask,
        "matching": MatchingTask,
        "matching-head": MatchingHeadTask,
        "zero-shot": ZeroShotTask,
        "linear-probe": LinearProbeTask,
    }
    if is_user_code(spec.task):
        return users_task(spec.task).needs
    return own[spec.task].needs if spec.task in own else Answers


def score_model(
    model: Scorable,
    specs: Sequence[EvalSpec],
    folder: Path,
    *,
    model_hash: str,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
    done: Callable[[Result], None] | None = None,
    run: Path | None = None,
    code: Sequence[str | Path] = (),
) -> list[Result]:
    """Every task in a folder of its own below ``folder``, going on where an earlier call stopped. ``done`` gets each
    result as it comes, so that none is lost on a user when a later task fails.

    A task of an earlier stage is done by that stage's model, from the run folder ``run`` (the one ``folder`` is in),
    opened with the user's files ``code``. A task or option that is none is refused before the first one.
    """
    for spec in specs:
        _check(spec, model.prompts)
    found = []
    final, final_hash = model, model_hash
    for spec in specs:
        name = spec.name
        model, model_hash = final, final_hash
        if spec.stage is not None:
            model, model_hash = _of_stage(run or folder.parent, spec.stage, final, final_hash, code)
        report = (lambda done, total, name=name: progress(name, done, total)) if progress else None
        if spec.task in _BY_SIMILARITY and isinstance(model, Model) and "similarity" in model.capabilities:
            own = model.net.compared_by()
            spec = spec.model_copy(update={"options": {"similarity": own, **spec.options}})
        found.append(
            _scored(
                model,
                _prompted(spec, model.prompts),
                folder / name,
                seed=seed,
                limit=limit,
                model_hash=model_hash,
                progress=report,
            )
        )
        if done is not None:
            done(found[-1])
    return found


def _scored(
    model: Scorable,
    spec: EvalSpec,
    folder: Path,
    *,
    seed: int,
    limit: int | None,
    model_hash: str,
    progress: Callable[[int, int], None] | None,
) -> Result:
    """One task. Pictures are decoded when their question comes. Where one cannot be, now or at an earlier call, the
    task begins anew with all of them decoded beforehand."""
    if spec.task == "llava-bench" and world_size() > 1:
        raise ConfigError(f"Task {spec.name!r} uses a judge, within one budget: run it in one process.")

    def attempt(pictures: Check) -> Result:
        quarantine = Quarantine(folder / "quarantine.jsonl" if first() else None, threshold=spec.bad_samples)
        task = make_task(spec, seed=seed, limit=limit, quarantine=quarantine, pictures=pictures)
        facts = {"pictures": "decoded first"} if pictures == "decode" else {}
        left_out = quarantine.failures
        return evaluate(model, task, folder, model_hash=model_hash, left_out=left_out, facts=facts, progress=progress)

    manifest = folder / "manifest.json"
    if first() and not manifest.is_file():  # what an attempt found that scored nothing may be mended
        for name in ("quarantine.jsonl", "quarantine-train.jsonl"):
            (folder / name).unlink(missing_ok=True)
    if of_first(lambda: manifest.is_file() and "pictures" in checkpoint.read_json(manifest)):
        return attempt("decode")
    try:
        return attempt("read")
    except Undecodable as error:
        if first():
            message = f"{error}. The task {spec.name!r} begins anew, each picture decoded before the first question."
            warnings.warn(message, IsthmusWarning, stacklevel=3)
            (folder / "outputs.jsonl").unlink(missing_ok=True)
        return attempt("decode")


def _of_stage(
    run: Path, stage: str, final: Scorable, final_hash: str, code: Sequence[str | Path]
) -> tuple[Scorable, str]:
    """The model that ``stage`` ended with and its hash; the final one where that is the last stage's."""
    place = run / "stages" / stage
    if (place / "model").is_dir():
        device = str(final.device) if isinstance(final, Model) else "auto"
        return load(place, device=device, code=code), model_hash(place)
    facts = checkpoint.read_json(run / "run.json") if (run / "run.json").is_file() else {"recipe": {"stages": []}}
    last = [s["stage"]["name"] for s in facts["recipe"]["stages"]][-1:]
    if last != [stage]:
        raise ConfigError(
            f"{run} has no model as the stage {stage!r} left it: a run keeps one where its recipe has an evaluation "
            "with that `stage`. Leave `stage` out to score the finished model."
        )
    return final, final_hash


def with_shots(specs: Sequence[EvalSpec], counts: Sequence[int], select: str = "random") -> list[EvalSpec]:
    """Each task that takes shots once per number of them."""
    return [
        spec.model_copy(
            update={"name": f"{spec.name}-{count}-shots", "options": {**spec.options, "shots": count, "select": select}}
        )
        if count is not None
        else spec
        for spec in specs
        for count in (counts if counts and spec.task in SHOWABLE else [None])
    ]


def own_tasks(folder: Path, code: Sequence[str | Path] = ()) -> list[EvalSpec]:
    """The tasks of the recipe that a model folder (or run folder) was trained with; empty without one. ``code`` as
    :func:`isthmus.load` takes it."""
    recipe = recipe_of(folder, code)
    return list(recipe.evaluate) if recipe is not None else []


def recipe_of(folder: Path, code: Sequence[str | Path] = ()) -> Recipe | None:
    """The recipe that a model folder (or run folder) was trained with, if it holds one; of a model that came with the
    package the recipe of the demo."""
    if folder.parent == pretrained.FOLDER:
        return read_recipe(f"{folder.name}-tiny")
    for place in (folder / "model" / "recipe.yaml", folder / "recipe.yaml"):
        if place.is_file():
            import yaml

            tree: Mapping[str, object] = yaml.safe_load(place.read_text(encoding="utf-8"))
            return parse_recipe(vetted(tree, folder, code), where=str(place))
    return None
