"""Running a comparison recipe: arm after arm, seed after seed, into one folder that shows what is finished.

    runs/compare-tiny/
      arms/<arm>/seed-<n>/        the arm's run folder: an ordinary recipe, an ordinary model
      parts/                      parts with weights drawn anew, where an arm wants them
      scores/<arm>/seed-<n>/      raw outputs and scores by task, costs, attention maps
      report.html, results.json, scores.csv, scores.md, differences.csv, costs.json

The same command goes on where an earlier one stopped: finished arms are not trained or scored again. All seeds' first
runs come before any second one, and everything on the list above is written anew when an arm is finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from isthmus.checkpoint import MANIFEST, read_json
from isthmus.comparison.compare import Contestant, measure, pooled, recall, score_contestant
from isthmus.comparison.cost import step_flops
from isthmus.comparison.recipe import Comparison, Statement
from isthmus.comparison.report import Chart, Listing, write_report
from isthmus.comparison.report.tables import percent
from isthmus.comparison.side_by_side import difference, main_score, write_comparison
from isthmus.config import plain
from isthmus.errors import CapabilityError, ConfigError, DataError, StageError
from isthmus.evaluation.rescore import rescore
from isthmus.evaluation.results import write_json
from isthmus.interop.hub import model_hash
from isthmus.model import Model
from isthmus.opening import load
from isthmus.recipes.run import foresee, train
from isthmus.recipes.schema import EvalSpec, Recipe
from isthmus.recipes.scoring import check_tasks, open_evaluations, with_shots
from isthmus.user_code import files_of, label

Progress = Callable[[str, str, int, int], None]
"""Called with (arm and seed, task, items done, items in all)."""


def run_contest(
    plan: Comparison,
    out: Path,
    *,
    name: str,
    arms: Sequence[str] = (),
    progress: Progress | None = None,
    show: bool = True,
) -> list[Contestant]:
    """Train, score and measure every arm with every seed (or only those of ``arms``); what is finished, pooled over
    seeds, in the order of the recipe.

    Raises ConfigError for an unknown arm, and what training and scoring raise; a later call goes on from there. What
    shows without a step, of any arm and any task, is raised before the first one.
    """
    chosen = [plan.arm(arm).name for arm in arms] or [arm.name for arm in plan.arms]
    _foresee(plan, chosen, out)
    found: list[Contestant] = []
    for seed in plan.seeds:
        for arm in chosen:
            try:
                _run_arm(plan, arm, seed, out, progress, show)
            except (ConfigError, DataError, StageError, CapabilityError) as error:
                error.args = (f"Arm {arm!r}, seed {seed}: {error}",)
                raise
            found = finished(plan, out)
            write_contest(plan, found, out, name=name)
    return found


def _foresee(plan: Comparison, arms: Sequence[str], out: Path) -> None:
    """Raise what can be known before a step is made: of the tasks, of the data of those that are not scored, and of
    each arm's parts, stages and data, with the first seed that it is not trained with."""
    tasks = {arm: _tasks(plan, arm) for arm in arms}
    for arm, specs in tasks.items():
        check_tasks(specs, plan.resolved(arm).prompts)
    open_evaluations([spec for arm, specs in tasks.items() for spec in specs if not _is_scored(plan, arm, spec, out)])
    for arm in arms:
        todo = [seed for seed in plan.seeds if not (_place(out, "arms", arm, seed) / "model" / MANIFEST).is_file()]
        for seed in (todo or plan.seeds)[:1]:
            foresee(recipe_of_arm(plan, arm, seed, out), _place(out, "arms", arm, seed))


def _is_scored(plan: Comparison, arm: str, spec: EvalSpec, out: Path) -> bool:
    """With every seed."""
    return all((_place(out, "scores", arm, seed) / spec.name / "scores.json").is_file() for seed in plan.seeds)


def _run_arm(plan: Comparison, arm: str, seed: int, out: Path, progress: Progress | None, show: bool) -> None:
    """Trained, scored and measured."""
    recipe = recipe_of_arm(plan, arm, seed, out)
    folder, scores = (_place(out, what, arm, seed) for what in ("arms", "scores"))
    model = train(recipe, folder, progress=show)
    rival = Contestant(name=arm, folder=folder, recipe=recipe)
    named = None if progress is None else (lambda *rest: progress(f"{arm}, seed {seed}", *rest))
    score_contestant(rival, model, _tasks(plan, arm), scores, progress=named)
    measure(rival, model, scores)


def _place(out: Path, what: str, arm: str, seed: int) -> Path:
    return out / what / arm / f"seed-{seed}"


def _tasks(plan: Comparison, arm: str) -> list[EvalSpec]:
    """The comparison's tasks, then the same after examples."""
    return [*plan.evaluate, *(s for s in with_shots(plan.evaluate, plan.resolved(arm).shots) if s not in plan.evaluate)]


def finished(plan: Comparison, out: Path) -> list[Contestant]:
    """The arms that are trained, scored and measured, pooled over the seeds for which that is so; no model is
    opened."""
    found = []
    for arm in plan.arms:
        runs = {}
        for seed in plan.seeds:
            folder, scores = (_place(out, what, arm.name, seed) for what in ("arms", "scores"))
            rival = Contestant(name=arm.name, folder=folder, specs=_tasks(plan, arm.name))
            if not (folder / "model" / MANIFEST).is_file() or not recall(rival, scores):
                continue
            rival.recipe = recipe_of_arm(plan, arm.name, seed, out)
            scored = [spec for spec in rival.specs if (scores / spec.name / "scores.json").is_file()]
            rival.results = [rescore(scores / spec.name, code=files_of([spec.task])) for spec in scored]
            runs[seed] = rival
        if runs:
            found.append(pooled(runs))
    return found


def recipe_of_arm(plan: Comparison, arm: str, seed: int, out: Path) -> Recipe:
    """The arm's recipe with its budget as steps and its redrawn parts made."""
    resolved = plan.resolved(arm)
    recipe = plan.recipe(arm, seed)
    redrawn = {}
    for part in resolved.redraw:
        if part not in recipe.parts:
            raise ConfigError(f"Arm {arm!r} redraws the part {part!r}, which it does not have.")
        redrawn[part] = str(_redrawn(Path(recipe.parts[part]), seed, out / "parts" / f"{part}-seed-{seed}"))
    recipe = recipe.model_copy(update={"parts": recipe.parts | redrawn})
    if plan.budget.flops is None:
        return recipe
    steps = _steps_of_flops(plan, arm, recipe, out / "arms" / arm / "steps.json")
    return plan.recipe(arm, seed, steps=steps).model_copy(update={"parts": recipe.parts})


def _steps_of_flops(plan: Comparison, arm: str, recipe: Recipe, file: Path) -> dict[str, int]:
    """Steps of every stage that cost its share of the budget; measured once and kept, equal for all seeds."""
    assert plan.budget.flops is not None
    basis = {"flops": plan.budget.flops, "shares": plan.shares(arm)}
    if file.is_file() and (kept := read_json(file))["asked"] == basis:
        return kept["steps"]
    one = step_flops(recipe)
    steps = {name: max(1, round(share * plan.budget.flops / one[name])) for name, share in basis["shares"].items()}
    write_json(file, {"asked": basis, "flops_of_a_step": one, "steps": steps})
    return steps


def _redrawn(part: Path, seed: int, out: Path) -> Path:
    """A model like ``part`` with weights fresh from the seed."""
    origin = model_hash(part)
    if (out / MANIFEST).is_file():
        if read_json(out / "origin.json")["model"] == origin:
            return out
        raise ConfigError(f"{out} was made of another {part}; remove the folder to start over.")
    model = load(part, device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = type(model.net).from_config(plain(model.net.config))
    Model(net, model.processor, prompts=model.prompts, kind=model.system).save(
        out, extra={"origin.json": {"model": origin}}
    )
    return out


def write_contest(plan: Comparison, rivals: Sequence[Contestant], out: Path, *, name: str) -> None:
    """All files of the comparison, of the arms that are finished."""
    seeds = max((len(r.by_seed) for r in rivals), default=0)
    done = f"{len(rivals)} of {len(plan.arms)} arms are finished"
    summary = " ".join(
        [
            plan.about.strip(),
            f"Every arm has the same parts, data and order, and the same budget: {plan.budget}. {done}, with up to "
            f"{seeds} of {len(plan.seeds)} seeds; scores are means over seeds, intervals are over questions.",
        ]
    )
    listings, plots = [], []
    by_name = {rival.name: rival for rival in rivals}
    for statement in plan.statements:
        own = [by_name[arm] for arm in statement.arms if arm in by_name]
        if len(own) > 1:
            listings.append(_tested(plan, statement, own))
            plots += _by_size(plan, statement, own)
    listings.append(_arms(plan, rivals))
    report = write_comparison(
        out,
        rivals,
        title=name,
        summary=summary.strip(),
        seed=0,
        budget=f"Budget of every arm: {plan.budget}.",
        opening=listings,
        plots=plots,
    )
    write_report(out / "report.html", report)


def _arms(plan: Comparison, rivals: Sequence[Contestant]) -> Listing:
    """What each arm is, and with how many seeds it is finished."""
    seeds = {rival.name: len(rival.by_seed) for rival in rivals}
    return Listing(
        heading="The arms",
        caption="What is an arm's own; everything else is shared.",
        head=("arm", "design", "about", "seeds"),
        rows=[
            (
                arm.name,
                label(str(plan.resolved(arm.name).model)),
                arm.about,
                f"{seeds.get(arm.name, 0)} of {len(plan.seeds)}",
            )
            for arm in plan.arms
        ],
        numeric=3,
    )


def _tested(plan: Comparison, statement: Statement, rivals: Sequence[Contestant]) -> Listing:
    """Every arm's score, and what it is above the statement's first one, over seeds and by seed."""
    task = plan.evaluate[0].name
    first, rows = rivals[0], []
    for rival in rivals:
        score = main_score(rival, task)
        if score is None:
            continue
        found = None if rival is first else next(iter(difference(first, rival, task, 0)), None)
        rows.append(
            (
                rival.name,
                f"{rival.cost.trained:,}" if rival.cost is not None and rival.cost.trained is not None else "–",
                f"{percent(score['score'])} ({percent(score['low'])} to {percent(score['high'])})",
                percent(score.get("gain"), signed=True),
                "" if found is None else percent(found["difference"], signed=True),
                ""
                if found is None
                else f"{percent(found['low'], signed=True)} to {percent(found['high'], signed=True)}",
                "" if found is None else _by_seed(first, rival, task),
            )
        )
    seeds = any(len(first.by_seed.keys() & rival.by_seed.keys()) > 1 for rival in rivals[1:])
    return Listing(
        heading=statement.text,
        caption=f"Task {task}, percent; differences from {first.name} in points, paired over the same questions, with "
        "95 % intervals over questions" + (", then those of each seed alone." if seeds else "."),
        head=("arm", "trained", "score (95 %)", "gain", "difference", "95 %", "by seed")[: 7 if seeds else 6],
        rows=[row[: 7 if seeds else 6] for row in rows],
        numeric=1,
    )


def _by_seed(first: Contestant, rival: Contestant, task: str) -> str:
    """The differences of the seeds that both have."""
    shown = []
    for seed in sorted(first.by_seed.keys() & rival.by_seed.keys()):
        one, other = (main_score(replace(side, results=list(side.by_seed[seed])), task) for side in (first, rival))
        if one is not None and other is not None:
            shown.append(percent(other["score"] - one["score"], signed=True))
    return " ".join(shown)


def _by_size(plan: Comparison, statement: Statement, rivals: Sequence[Contestant]) -> list[Chart]:
    """Score over trained parameters, a line per kind of model; none where no kind has two sizes."""
    if not statement.by_size:
        return []
    lines: dict[str, list[tuple[float, float]]] = {}
    for rival in rivals:
        score = main_score(rival, plan.evaluate[0].name)
        if rival.recipe is not None and rival.cost is not None and rival.cost.trained and score is not None:
            point = (float(rival.cost.trained), 100 * score["score"])
            lines.setdefault(label(rival.recipe.model), []).append(point)
    series = {kind: sorted(points) for kind, points in lines.items()}
    return [Chart(title=statement.text, series=series, x_label="parameters trained", y_label="score, percent")]
