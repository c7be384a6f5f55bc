"""A stage's ``validate``: the loss on held-out rows, tasks' scores, the best model beside the last.

stages/<name>/best/     a model folder, with the step and its numbers in validation.json
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path

from isthmus import adapters, checkpoint
from isthmus.batch import Batch
from isthmus.data.loader import Loader
from isthmus.data.quarantine import Quarantine
from isthmus.data.sources import open_mix
from isthmus.net import Net
from isthmus.processes import all_of, apart, rank, world_size
from isthmus.recipes.build import Built
from isthmus.recipes.saving import recipe_file, save_model
from isthmus.recipes.schema import StageSpec, ValidateSpec
from isthmus.recipes.scoring import score_model
from isthmus.stage import apply_stage
from isthmus.training.validation import Validation

BEST, NUMBERS = "best", "validation.json"


def validation_of(built: Built, stage: StageSpec, folder: Path) -> Validation | None:
    """What the stage measures on the way, several processes together; none where it says nothing. Raises what opening
    the held-out data raises."""
    wanted = stage.validate_
    if wanted is None:
        return None
    held_out = _held_out(built, stage, wanted)
    opened = {n for n in apply_stage(built.net, stage.stage.train).assigned if adapters.MARK not in n}
    whole = replace(built, opened=built.opened | opened)

    def measure() -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=folder, prefix="validation-") as aside:
            return _measured(built, stage, wanted, held_out, Path(aside))

    def keep(step: int, numbers: Mapping[str, float]) -> None:
        extra = {NUMBERS: {"step": step, **numbers}, **recipe_file(built.recipe)}
        save_model(whole, folder / BEST, stage=stage, extra=extra, replace=True)

    best = wanted.keep_best
    return Validation(
        every=wanted.every,
        measure=measure,
        metric=best.metric if best else None,
        patience=best.patience if best else None,
        keep=keep,
        kept=lambda: kept_step(folder),
    )


def kept_step(folder: Path) -> int | None:
    """The step of the best model of a stage's folder; none where none is kept."""
    file = folder / BEST / NUMBERS
    return checkpoint.read_json(file).get("step") if file.is_file() else None


def _held_out(built: Built, stage: StageSpec, wanted: ValidateSpec) -> Loader | None:
    """The held-out rows as the stage reads its own, in an order that stays."""
    if not wanted.data:
        return None
    processor = built.processor(stage)
    return Loader(
        open_mix(wanted.data),
        processor,
        batch_size=stage.batch_size or (None if stage.batch_tokens else 8),
        batch_tokens=stage.batch_tokens,
        seed=built.recipe.seed,
        group=not processor.contrasts,
        drop_last=processor.full_batches,
        quarantine=Quarantine(threshold=stage.bad_samples),
    )


def _measured(
    built: Built, stage: StageSpec, wanted: ValidateSpec, held_out: Loader | None, aside: Path
) -> dict[str, float]:
    numbers: dict[str, float] = {}
    model = built.model(stage)
    if held_out is not None:
        numbers |= _losses(built.net, held_out, wanted.rows)
    specs = [spec.model_copy(update={"stage": None}) for spec in built.recipe.evaluate if spec.name in wanted.tasks]
    results = score_model(model, specs, aside, model_hash="", seed=built.recipe.seed, limit=wanted.rows)
    for result in results:
        numbers |= {f"{result.task}.{name}": value for name, value in _flat(result.scores.to_dict())}
    return numbers


def _losses(net: Net, held_out: Loader, rows: int) -> dict[str, float]:
    """The mean of each term over the first ``rows`` rows, and their weighted sum as ``loss``. Each process takes whole
    batches, and all add up in the order of the batches: to the bit what one process finds."""
    device, share = next(net.parameters()).device, (rank(), world_size())

    def summed(batches: Sequence[Batch]) -> dict[str, tuple[float, int, float]]:
        found = (item for batch in batches for item in net.loss(batch.to(device)).items())
        return {name: (float(term.total), term.count, term.weight) for name, term in found}

    def own() -> list[dict[str, tuple[float, int, float]]]:
        with apart():
            return [summed(batches) for batches in held_out.epoch(rows=rows, share=share)]

    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    weights: dict[str, float] = {}
    for found in chain.from_iterable(zip_longest(*all_of(own), fillvalue={})):
        for name, (total, count, weight) in found.items():
            totals[name] += total
            counts[name] += count
            weights[name] = weight
    means = {name: totals[name] / max(1, counts[name]) for name in totals}
    terms = {f"{name}_loss": mean for name, mean in means.items()} if len(means) > 1 else {}
    return {"loss": sum(weights[name] * mean for name, mean in means.items()), **terms}


def _flat(facts: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a task's scores; those by kind of question are left to its ``scores.json``."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            if name != "kinds":
                yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
