"""``isthmus eval``: score a model on its recipe's tasks or on data of the user's."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID, TimeRemainingColumn

from isthmus import pretrained
from isthmus.cli.options import Loading
from isthmus.errors import ConfigError
from isthmus.user_code import is_user_code, label, pin, pinned_in

if TYPE_CHECKING:
    from isthmus.evaluation.run import Result
    from isthmus.interop.hf_peer import Peer
    from isthmus.model import Model
    from isthmus.recipes.schema import EvalSpec


def run(
    model: str,
    *,
    json_file: Path | None,
    given: Loading,
    task: str | None = None,
    data: str | None = None,
    options: Sequence[str] = (),
    train: str | None = None,
    shots: str | None = None,
    more_shots: Sequence[int] = (),
    select: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    judge: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print a table per task; outputs, manifest and scores go into ``out``. Processes that torchrun or ``--processes``
    started share the items, and the first one writes and prints. ``given``: further arguments of
    :func:`isthmus.load`, which belong to the model's identity. ``judge``: who scores open answers, by the fields of
    :class:`isthmus.evaluation.judge.Judge`."""
    from isthmus.interop.hub import located, model_hash
    from isthmus.processes import first, join
    from isthmus.recipes.scoring import score_model
    from isthmus.recipes.tables import score_table

    join()
    counts = counted(shots, more_shots)
    check_used(counts, data=data, options=options, train=train, select=select)
    if judge:
        task = task or "llava-bench"
        if data is None or task != "llava-bench":
            raise ConfigError("A judge scores questions with references: give --task llava-bench and --data.")
    folder = located(model.removeprefix(_PEER), None)
    loaded = _load(model, given)
    own = {name: value for name, value in given.items() if name != "device"}
    identity = " ".join([model_hash(folder) or model, *(f"{name}={value}" for name, value in own.items())])
    specs = _specs(model, loaded, task=task, data=data, train=train, options=options, code=given.get("code", ()))
    if judge:
        asked = dict(specs[0].options)
        asked["judge"] = _judge(asked, judge)
        specs[0] = specs[0].model_copy(update={"options": asked})
    specs = shown_examples(specs, counts, select)
    name = f"hf-{Path(data).stem}" if data and model.startswith(_PEER) else Path(data).stem if data else "own"
    place = out if out is not None else _home(folder) / name
    console = Console(emoji=False, quiet=not first())

    def print_result(result: "Result") -> None:
        console.print(score_table(result.task, result.scores.to_dict()))
        if result.left_out:
            left = f"{result.left_out} bad samples were left out: {result.folder / 'quarantine.jsonl'}"
            console.print(left, markup=False)

    with bars(console) as progress:
        results = score_model(
            loaded,
            specs,
            place,
            model_hash=identity,
            seed=seed,
            limit=limit,
            progress=progress,
            done=print_result,
            run=folder,
            code=given.get("code", ()),
        )
    if not first():
        return
    console.print(f"Raw outputs, manifest and scores: [bold]{escape(str(place))}[/]")
    if (curve := _over_shots(place, results)) is not None:
        console.print(f"Score over shots: [bold]{escape(str(curve))}[/]")
    if json_file is not None:
        facts = {r.task: r.scores.to_dict() for r in results}
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _judge(options: dict[str, object], named: Mapping[str, str]) -> dict[str, object]:
    """The judge that is ``named``, and what ``--set task.judge.NAME=VALUE`` says of it besides, taken out of the task's
    options."""
    own = {name: options.pop(name) for name in list(options) if name.startswith("judge.")}
    return {name.removeprefix("judge."): value for name, value in own.items()} | dict(named)


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per evaluation while inside: to be called with its name, how many items are done and of how many."""
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, transient=True, console=console) as bar:
        shown: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bar.add_task(escape(name), total=total)
            bar.update(shown[name], completed=done)

        yield progress


def _specs(
    model: str,
    loaded: "Model | Peer",
    *,
    task: str | None,
    data: str | None,
    train: str | None,
    options: Sequence[str],
    code: Sequence[str | Path],
) -> "list[EvalSpec]":
    """The task on ``data``; without data those of the model's own recipe. Raises ConfigError when it has none."""
    from isthmus.interop.hub import located
    from isthmus.recipes.scoring import own_tasks

    if data is not None:
        return [spec_of(task or _task_for(loaded), data, train, options)]
    if model.startswith(_PEER):
        raise ConfigError(f"{model} has no tasks of its own: give --task and --data.")
    specs = [s for s in own_tasks(located(model, None), code) if task in (None, s.task, s.name)]
    if not specs:
        raise ConfigError(
            f"{model} has no {'tasks' if task is None else f'task {task!r}'} of its own: give --task and --data, such "
            "as --task vqa --data questions.yaml."
        )
    return specs


def _task_for(model: "Model | Peer") -> str:
    """The tasks of a model when none is named."""
    return "vqa" if "answer" in model.capabilities else "retrieval"


def counted(shots: str | None, more: Sequence[int]) -> list[int]:
    """The numbers after ``--shots``: ``0 4 8`` or ``0,4,8``. Raises ConfigError for anything else."""
    if shots is None:
        if more:
            raise ConfigError(f"{more[0]} is not expected here; numbers of examples stand after --shots.")
        return []
    words = [*shots.replace(",", " ").split(), *map(str, more)]
    if not words or not all(word.isdigit() for word in words):
        raise ConfigError(f"--shots takes numbers such as 0 4 8, not {shots!r}.")
    return [int(word) for word in words]


def check_used(
    counts: Sequence[int], *, data: str | None, options: Sequence[str], train: str | None, select: str | None
) -> None:
    """Raises ConfigError for options that would change nothing."""
    if data is None and (options or train):
        raise ConfigError("--set and --train go with --data; without it the recipe's own tasks are taken as they are.")
    if select is not None and not counts:
        raise ConfigError("--select chooses the examples before each question: say how many, as --shots 4.")


def shown_examples(specs: "Sequence[EvalSpec]", counts: Sequence[int], select: str | None) -> "list[EvalSpec]":
    """The tasks with each number of examples. Raises ConfigError where none of them takes any."""
    from isthmus.recipes.scoring import SHOWABLE, with_shots

    if counts and not any(spec.task in SHOWABLE for spec in specs):
        names = ", ".join(spec.task for spec in specs)
        raise ConfigError(f"--shots go before questions and captions ({', '.join(SHOWABLE)}); {names} takes none.")
    return with_shots(specs, counts, select or "random")


def _over_shots(place: Path, results: "Sequence[Result]") -> Path | None:
    """``shots.html`` in ``place``: each task's score over the number of shots, what is reached without looking, and the
    same task spoilt on purpose (``lessons-8-shots-permuted``). None unless a task was scored with several numbers."""
    from isthmus.comparison.compare import answers_of
    from isthmus.comparison.report import Chart, Report, write_report
    from isthmus.evaluation.caption_task import MAIN

    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    measures: dict[str, str] = {}
    for result in results:
        named = re.fullmatch(r"(.+)-(\d+)-shots(?:-(.+))?", result.task)
        if named is None:
            continue
        series, shots, facts = curves.setdefault(named[1], {}), float(named[2]), result.scores.to_dict()
        measure = measures[named[1]] = "accuracy" if "accuracy" in facts else MAIN
        series.setdefault(named[3] or "correct", []).append((shots, cast(float, facts[measure])))
        if best := cast(float | None, facts["best_without_looking"]):
            series.setdefault("best without looking", []).append((shots, best))
    charts = [
        Chart(title=f"{base}: score over shots", series=series, x_label="shots", y_label=measures[base])
        for base, series in curves.items()
        if len(series.get("correct", ())) > 1
    ]
    if not charts:
        return None
    # The page's table is of answers; captions have their curve.
    scores = {r.task: a for r in results if "-shots" in r.task and (a := answers_of(r.scores)) is not None}
    return write_report(place / "shots.html", Report(title="Score over shots", scores=scores, charts=charts))


_PEER = "hf:"


def _home(model: Path) -> Path:
    """Where a model's scores stand: in its folder, beside its file, never within the installed package."""
    if model.parent == pretrained.FOLDER:
        return Path("runs/eval") / model.name
    return model.parent / "eval" / model.stem if model.is_file() else model / "eval"


def _load(model: str, given: Loading) -> "Model | Peer":
    """Any model we open, or with ``hf:`` transformers' own classes for the same folder."""
    if model.startswith(_PEER):
        from isthmus.interop.hf_peer import load_peer

        if given:
            raise ConfigError(
                f"--{next(iter(given)).replace('_', '-')} is not for {_PEER}: transformers reads a folder."
            )
        return load_peer(Path(model.removeprefix(_PEER)))
    from isthmus.opening import load

    return load(model, **given)


def run_rescore(
    folder: Path | None,
    against: Path | None,
    *,
    model: str | None,
    options: Sequence[str],
    given: Sequence[str],
    code: Sequence[str | Path],
    seed: int,
    json_file: Path | None,
) -> None:
    """Score a folder again, or two of them in pairs; no model is loaded. ``given``: other options that the user set;
    ``code``: the files of the user's own tasks."""
    from isthmus.evaluation.rescore import compare, rescore
    from isthmus.recipes.tables import difference_table, score_table

    if folder is None or model is not None:
        raise ConfigError(
            "isthmus eval needs either a MODEL to ask, or --rescore FOLDER (with --against FOLDER to compare two)."
        )
    if given:
        raise ConfigError(
            f"{given[0]} is for asking a model; with --rescore the folder's outputs are scored as they are."
        )
    source, own = split_options(options)
    rule = None if (value := own.get("rule")) is None else str(value)
    unknown = [*source, *(f"task.{name}" for name in own if name != "rule")]
    if unknown:
        raise ConfigError(f"Only task.rule can be set when outputs are scored again, not {unknown[0]}.")
    console = Console(emoji=False)
    if against is None:
        result = rescore(folder, rule=rule, code=code)
        facts = result.scores.to_dict()
        console.print(score_table(result.task, facts))
        facts = {result.task: facts}
    else:
        differences = compare(folder, against, rule=rule, seed=seed, code=code)
        console.print(difference_table(str(folder), str(against), differences))
        facts = {d.name: d.to_dict() for d in differences}
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def spec_of(task: str, data: str, train: str | None, options: Sequence[str]) -> "EvalSpec":
    """The evaluation that ``--task``, ``--data``, ``--train`` and ``--set`` describe."""
    from isthmus.recipes.schema import EvalSpec

    source, own = split_options(options)
    apart = {key.removeprefix("train."): source.pop(key) for key in list(source) if key.startswith("train.")}
    if apart and train is None:
        raise ConfigError(f"--set train.{next(iter(apart))} is about --train, which is not given.")
    spec = {
        "name": label(task).rpartition(":")[2],  # of a user's class its name
        "task": pinned_in(task, key="task"),
        "data": source_of(data) | source,
        "train": source_of(train) | source | apart if train else None,
    }
    if "bad_samples" in own:
        spec["bad_samples"] = own.pop("bad_samples")
    return EvalSpec.model_validate(spec | {"options": own})


def source_of(data: str) -> dict[str, object]:
    """A YAML file describes a source; anything else is data whose kind follows from its content."""
    path = Path(data)
    if path.suffix in {".yaml", ".yml"}:
        from isthmus.recipes.schema import read_yaml

        tree = read_yaml(path)
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} should describe a source by keys, such as `kind: llava`.")
        if "data" in tree and "kind" not in tree:
            raise ConfigError(
                f"{path} holds a recipe's list `data:`; give one source's keys alone, such as `kind: llava`."
            )
        return pinned_in(tree, path.parent)
    if is_user_code(data):
        return {"kind": pin(data)}
    from isthmus.data.sources.guess import guess

    return guess(path)


def split_options(options: Sequence[str]) -> tuple[dict[str, object], dict[str, object]]:
    """``key=value`` of the sources (``train.key=value`` of --train's alone), and ``task.key=value`` of the task."""
    source: dict[str, object] = {}
    task: dict[str, object] = {}
    from isthmus.recipes.schema import option_value

    for option in options:
        key, sep, value = option.partition("=")
        if not sep:
            raise ConfigError(f"--set {option!r} is not key=value.")
        target, name = (task, key.removeprefix("task.")) if key.startswith("task.") else (source, key)
        target[name] = option_value(value, f"--set {option!r}")
    return source, task
