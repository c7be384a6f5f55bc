"""Run a recipe: every stage in order into one run folder, resumable at any point.

    runs/demo/llava/
      run.json            the resolved recipe and the sha256 of every part it started from
      stages/<name>/      metrics.jsonl, table.json, quarantine.jsonl, checkpoints/, and at the end trained/
      stages/<name>/best  the best model of its validations, where the stage keeps it
      stages/<name>/model the model after a stage that an evaluation names
      model/              the finished model: what `isthmus.load` opens

A stage hands over through ``trained/`` (the tensors it trained); the frozen rest is the same by proof.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from isthmus import adapters, checkpoint, mapped
from isthmus.config import fit
from isthmus.data.cache import FeatureCache
from isthmus.data.fingerprint import fingerprint
from isthmus.data.joint import JointLoader
from isthmus.data.loader import Loader
from isthmus.data.mix import Mix, Source
from isthmus.data.processor import Processor
from isthmus.data.quarantine import Quarantine
from isthmus.data.sources import named_apart, open_mix, open_source
from isthmus.errors import CheckpointError, ConfigError, DataError
from isthmus.interop.hub import model_hash
from isthmus.model import Model
from isthmus.opening import load
from isthmus.processes import doing, first, join, of_first, rank, wait, world_size
from isthmus.recipes.build import Built, build, check_parts
from isthmus.recipes.features import FeatureLoader, demand_frozen, open_cache
from isthmus.recipes.saving import recipe_file, save_model
from isthmus.recipes.schema import Recipe, StageSpec, parse_recipe, read_recipe
from isthmus.recipes.scoring import check_tasks, open_evaluations
from isthmus.recipes.validating import BEST, kept_step, validation_of
from isthmus.stage import apply_stage, canonical, defining_keys, named_state, opens
from isthmus.training import train as train_stage
from isthmus.training.engines import move, shards
from isthmus.training.lock import RunLock
from isthmus.user_code import pinned_in, placeless
from isthmus.version import __version__

Data = Mix | list[tuple[Source, int, float]]
"""What a stage reads: one mixture, or for a joint stage each source with its rows per step and its weight."""


def train(
    recipe: Recipe | str | Path | Mapping[str, object],
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    progress: bool = True,
    tensorboard: bool = False,
    stop_at: int | None = None,
) -> Model:
    """Every stage of a recipe, going on where an earlier call stopped; the finished model.

    ``recipe`` is a shipped name, a YAML file, plain mappings or a Recipe; ``overrides`` go with the former two. Raises
    ConfigError when the folder holds a run of another recipe, RunBusyError when another process is writing there, and
    what the stages raise.
    """
    name = recipe if isinstance(recipe, str | Path) else "recipe"
    if overrides and not isinstance(recipe, str | Path):
        raise ConfigError("overrides are for a recipe read by name or file; change the mapping or Recipe itself.")
    if isinstance(recipe, Mapping):
        recipe = parse_recipe(pinned_in(recipe))
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    folder = Path(out) if out is not None else Path("runs") / Path(name).stem
    join(recipe.parallel.timeout)
    with RunLock(folder) if first() else nullcontext():
        of_first(lambda: _claim(folder, recipe))
        if not (folder / "model" / checkpoint.MANIFEST).is_file():
            trackers: list[str] = [*recipe.report_to, *(["tensorboard"] if tensorboard else [])]
            reported = tuple(dict.fromkeys(trackers))
            _train(recipe, folder, progress=progress and first(), report_to=reported, stop_at=stop_at)
        wait()
        return load(folder)


def _train(recipe: Recipe, folder: Path, *, progress: bool, report_to: tuple[str, ...], stop_at: int | None) -> None:
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    doing("making the net")
    built = build(recipe, folder if shards(recipe.parallel) else None)
    # All data is opened before the first step: a wrong path of the last stage shows now and not after hours.
    opened = _open_all(recipe, folder)
    _foresee(built, opened)
    for stage in recipe.stages:
        place = folder / "stages" / stage.name
        built = built.enter(stage)
        move(built.net, recipe.parallel)
        _run_stage(
            built, stage, place, opened.pop(stage.name, None), progress=progress, report_to=report_to, stop_at=stop_at
        )
        built = _remembered(built, place / "trained")
        kept = stage is not recipe.stages[-1] and any(spec.stage == stage.name for spec in recipe.evaluate)
        if first() and kept and not (place / "model").is_dir():
            save_model(built, place / "model", stage=stage)
    doing("writing the model")
    if first():
        save_model(built, folder / "model", extra=recipe_file(recipe))


def foresee(recipe: Recipe, folder: Path) -> None:
    """Raise what :func:`train` would raise of this recipe in this folder before its first step; nothing is written."""
    _new(folder, recipe)
    if not (folder / "model" / checkpoint.MANIFEST).is_file():
        _foresee(build(recipe), _open_all(recipe, folder))


def _open_all(recipe: Recipe, folder: Path) -> dict[str, Data]:
    """The data of every stage that is not done, by its name; that of their validations is opened too."""
    todo = [stage for stage in recipe.stages if not (folder / "stages" / stage.name / "trained").is_dir()]
    opened = {stage.name: open_data(stage) for stage in todo}
    for validate in (stage.validate_ for stage in todo):
        if validate is not None:
            open_evaluations([spec for spec in recipe.evaluate if spec.name in validate.tasks])
            if validate.data:
                open_mix(validate.data)
    return opened


def foreseen(built: Built) -> Iterator[tuple[StageSpec, Built]]:
    """Each stage, with what it will begin with. Raises ConfigError for a configuration that the net cannot change to,
    StageError for patterns that do not fit; behind a stage with adapters, which give parameters other names, these are
    left to the stage."""
    adapted = False
    for stage in built.recipe.stages:
        built = built.foresee(stage)
        if not adapted:
            opens(built.net, stage.stage.train)
        if stage.feature_cache is not None and not adapted:
            demand_frozen(built.net, built.processor(stage).image, stage)
        adapted = adapted or any(group.lora is not None for group in stage.stage.train)
        yield stage, built


def _foresee(built: Built, opened: Mapping[str, Data]) -> None:
    """What can be known of the stages, those in ``opened`` tried on one sample of each of their sources."""
    for stage, begun in foreseen(built):
        if stage.name in opened:
            _try_a_sample(begun.processor(stage), opened[stage.name])


def _try_a_sample(processor: Processor, data: Data) -> None:
    """Raises ConfigError for a processor that would refuse every sample of a source, as one does whose chat template
    cannot be trained with: before the first step too. What is wrong with one sample alone is reported when it is
    met."""
    for source in data.sources if isinstance(data, Mix) else [source for source, _, _ in data]:
        with suppress(DataError):
            processor.example(source[0], 0)


def _remembered(built: Built, trained: Path) -> Built:
    """The same, with what the stage that left ``trained`` opened beside its adapters."""
    if not first():
        return built  # which writes nothing
    names = checkpoint.check_header(trained / "trained.safetensors")
    return replace(built, opened=built.opened | {name for name in names if adapters.MARK not in name})


def _run_stage(
    built: Built,
    stage: StageSpec,
    folder: Path,
    data: Data | None,
    *,
    progress: bool,
    report_to: tuple[str, ...],
    stop_at: int | None,
) -> None:
    """Train one stage on its data, or take what it trained when it is already done (no data)."""
    trained = folder / "trained"
    if data is None:
        files = checkpoint.read_folder(trained)
        _lay_over(built, checkpoint.load_tensors(files["trained.safetensors"]), trained)
        return
    with _features(built, stage, folder.parent.parent / "features") as cache:
        loader = make_loader(built, stage, folder, data, cache)
        _train_stage(built, stage, folder, loader, cache, progress=progress, report_to=report_to, stop_at=stop_at)
    if not first():
        return
    table = apply_stage(built.net, stage.stage.train)
    state = named_state(built.net)
    checkpoint.write_folder(
        trained,
        {
            "trained.safetensors": {name: state[name] for name in table.assigned},
            "stage.json": {"stage": stage.stage.to_dict(), "table": table.to_dict(), "isthmus": __version__},
        },
    )


@contextmanager
def _features(built: Built, stage: StageSpec, folder: Path) -> Iterator[FeatureCache | None]:
    """The stage's feature cache, if it has one, held against other processes."""
    if stage.feature_cache is None:
        yield None
        return
    if world_size() > 1:
        raise ConfigError(
            f"Stage {stage.name!r}: a feature cache is written by one process, and here are {world_size()}; take "
            "`feature_cache` out, or train in one process."
        )
    cache = open_cache(built.net, built.processor(stage).image, stage, folder)
    with RunLock(cache.folder):
        yield cache


def _train_stage(
    built: Built,
    stage: StageSpec,
    folder: Path,
    loader: Loader | JointLoader,
    cache: FeatureCache | None,
    *,
    progress: bool,
    report_to: tuple[str, ...],
    stop_at: int | None,
) -> None:
    train_stage(
        built.net,
        loader if cache is None else FeatureLoader(loader, built.net, cache, stage),
        stage.stage,
        folder,
        seed=built.recipe.seed,
        identity=_identity(built, loader),
        progress=progress,
        report_to=report_to,
        stop_at=stop_at,
        products=_products(built.recipe, folder.parent),
        validation=validation_of(built, stage, folder),
        parallel=built.recipe.parallel,
    )
    if progress and len(loader.quarantine):
        _tell(stage, loader.quarantine.summary())
    if progress and (best := kept_step(folder)) is not None:
        message = f"the best step was {best}, kept in {folder / BEST}; the model goes on as the last left it"
        _tell(stage, message)
    if progress and cache is not None:
        message = f"features of {len(cache):,} pictures, {cache.size / 2**20:,.1f} MiB, in {cache.folder}"
        _tell(stage, message)


def _tell(stage: StageSpec, message: str) -> None:
    Console(stderr=True, emoji=False).print(f"Stage {stage.name}: {message}.", highlight=False, markup=False)


def _products(recipe: Recipe, stages: Path) -> str | None:
    """By whom the fp32 products of the run's first stage are; none where none has begun."""
    for stage in recipe.stages:
        file = stages / stage.name / "stage.json"
        if file.is_file() and isinstance(found := checkpoint.read_json(file).get("products"), Mapping):
            return str(found.get("by"))
    return None


def _identity(built: Built, loader: Loader | JointLoader) -> dict[str, str]:
    """What a resumed stage must find unchanged beside its recipe and its parts: its data and its vocabulary."""
    vocabulary = hashlib.sha256(built.tokenizer.files()["tokenizer.json"].encode()).hexdigest()[:16]
    sources = {f"data {n} ({s.name})": fingerprint(s) for n, s in enumerate(loader.sources)}
    return sources | {"the tokenizer": f"sha256 {vocabulary}"}


def open_data(stage: StageSpec) -> Data:
    """The stage's sources, opened."""
    if stage.joint:
        return [(open_source(own), size, weight) for own, size, weight in map(_joint_entry, named_apart(stage.data))]
    return open_mix(stage.data)


def make_loader(
    built: Built,
    stage: StageSpec,
    folder: Path | None = None,
    data: Data | None = None,
    cache: FeatureCache | None = None,
) -> Loader | JointLoader:
    """The stage's stream of batches; bad samples are counted in ``folder/quarantine.jsonl``.

    Pictures that ``cache`` holds come as features, for nets that take them. Of several processes each fills its part,
    with a quarantine file of its own.
    """
    processor = built.processor(stage)
    file = f"quarantine-{rank()}.jsonl" if rank() else "quarantine.jsonl"
    if folder and not any(folder.glob("checkpoints/step-*")):  # what an attempt found that saved nothing may be mended
        (folder / file).unlink(missing_ok=True)
    quarantine = Quarantine(folder / file if folder else None, threshold=stage.bad_samples)
    data = data if data is not None else open_data(stage)
    if not isinstance(data, Mix):
        return JointLoader(
            data,
            processor,
            accumulate=stage.accumulate,
            pass_tokens=stage.pass_tokens,
            seed=built.recipe.seed,
            quarantine=quarantine,
            augment=stage.augment,
            cache=cache,
            part=(rank(), world_size()),
        )
    contrasts = processor.contrasts
    return Loader(
        data,
        processor,
        batch_size=stage.batch_size,
        batch_tokens=stage.batch_tokens,
        accumulate=stage.accumulate,
        seed=built.recipe.seed,
        group=not contrasts,
        drop_last=processor.full_batches,
        quarantine=quarantine,
        augment=stage.augment,
        cache=cache,
        part=(rank(), world_size()),
    )


def _joint_entry(entry: Mapping[str, object]) -> tuple[dict[str, object], int, float]:
    """A source's description, its rows per step, the weight of its mean loss. Raises ConfigError for a weight that is
    no number."""
    own = {k: v for k, v in entry.items() if k not in ("batch_size", "loss_weight")}
    weight = fit(float, entry.get("loss_weight", 1.0), "source: loss_weight")
    return own, fit(int, entry["batch_size"], "source: batch_size"), weight


def _lay_over(built: Built, tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    """Put a finished stage's trained tensors into the net; each must exist there with its shape."""
    state = {canonical(name): tensor for name, tensor in built.net.state_dict(keep_vars=True).items()}
    for name, tensor in tensors.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(f"{where} holds {name} of shape {tuple(tensor.shape)}, which this net does not have.")
        if built.aside is not None and tensor.dtype == state[name].dtype:
            mapped.given(state[name], tensor)
        else:
            state[name].data.copy_(tensor)


def _claim(folder: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's own, or refuse it: a run resumes only what it began.

    A folder in which an earlier attempt saved nothing (a wrong path, say) is taken over.
    """
    now, file = _new(folder, recipe), folder / "run.json"
    if now is None:
        return
    if file.is_file():
        shutil.rmtree(folder / "stages", ignore_errors=True)
    aside = file.with_suffix(".json.tmp")
    aside.write_text(json.dumps(now, indent=1), encoding="utf-8")
    aside.replace(file)


def _new(folder: Path, recipe: Recipe) -> dict[str, object] | None:
    """What ``run.json`` has to say; none where it says so. Raises ConfigError where something was saved of another run,
    and for parts and evaluations that do not fit."""
    check_parts(recipe)
    now = {"recipe": recipe.model_dump(mode="json"), "parts": {n: _fingerprint(p) for n, p in recipe.parts.items()}}
    file = folder / "run.json"
    if file.is_file():
        changed = _difference(_defining(checkpoint.read_json(file)), _defining(json.loads(json.dumps(now))))
        if not changed:
            return None
        if any(folder.glob("stages/*/checkpoints/step-*")) or any(folder.glob("stages/*/trained")):
            raise ConfigError(
                f"{folder} holds a run of another recipe or of other parts: {changed}. Give another --out, or remove "
                "the folder to start over."
            )
    check_tasks(recipe.evaluate, recipe.prompts)
    return now


def _defining(run: dict[str, object]) -> dict[str, object]:
    """What is in ``run.json`` without what may change between two calls: its words, how processes share it, how
    often is logged and saved."""
    recipe = run.get("recipe")
    if isinstance(recipe, dict):
        for key in ("about", "report_to", "parallel"):
            recipe.pop(key, None)
        for stage in recipe.get("stages", ()):
            stage.pop("bad_samples", None)
            if "stage" in stage:
                stage["stage"] = defining_keys(stage["stage"])
    return placeless(run)


def _fingerprint(part: str) -> str:
    """The sha256 of a part's files, so that a resumed run starts from the same parts."""
    found = model_hash(part)
    if not found:
        raise CheckpointError(
            f"The part {part} is not a model folder or file: it holds neither a manifest nor weights. "
            "Train it first, or name another with parts.<name>=FOLDER."
        )
    return found


def _difference(then: object, now: object, where: str = "") -> str:
    """The first place where two JSON trees differ, in words; empty when they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(k for k in now if k not in then)]:
            found = _difference(then.get(key), now.get(key), f"{where}.{key}" if where else key)
            if found:
                return found
        return ""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return next(
            (d for i, (a, b) in enumerate(zip(then, now, strict=True)) if (d := _difference(a, b, f"{where}.{i}"))), ""
        )
    return "" if then == now else f"{where} was {_short(then)}, now {_short(now)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
