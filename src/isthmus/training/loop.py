"""The one training loop: stage in, trained net out, exact resume at any step.

    result = train(net, loader, Stage(name="align", train=(Group("connector.*", lr=1e-3),), steps=500), "runs/x/align")

Each step: rates, gradient of the step (gradient.py), finiteness, clipping, AdamW, ``net.after_step()``, one
line of ``metrics.jsonl``, now and then a checkpoint (state.py). The freezing proof (proof.py) runs along. The same
call on the same folder goes on where the last one stopped, bit for bit on CPU with the same thread count.

Several processes (processes.py) call it together, each with its share of the rows: the engine (parallel.py) sums their
gradients, and all make the same update; the first writes the files and shows the progress.
"""

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from isthmus import mapped
from isthmus.allocator import keep_freed_memory, relieve
from isthmus.batch import Batch
from isthmus.errors import DataError, StageError
from isthmus.net import Net
from isthmus.processes import all_gather, doing, first, of_first, rank, talking, wait, world_size
from isthmus.products import held
from isthmus.stage import Stage, StageTable, apply_stage, set_modes
from isthmus.training import averaging, multiplying, optim, precision, proof
from isthmus.training.engines import engine, shards, where
from isthmus.training.finite import NonFiniteError, first_bad_gradient, first_bad_value
from isthmus.training.gradient import NonFiniteLoss, Traffic, backward
from isthmus.training.lock import RunLock
from isthmus.training.log import Bar, MetricLog, StepFacts, progress_bar, read_metrics
from isthmus.training.parallel import DDP, Parallel
from isthmus.training.protocols import Loader, ending
from isthmus.training.restoring import restore
from isthmus.training.state import RunState, check_same, checkpoints, newest_state, rng_state, seed_generators
from isthmus.training.stops import Interrupted, Preempted, signalled, stop_flag
from isthmus.training.validation import KEY, Validation

Skipped = Callable[[tuple[str, ...], str], None]
"""Told of the sample ids and the reason when ``nan_policy`` lets a step pass without an update."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came out. ``losses`` are the last step's; ``resumed`` the step this call went on from (0: the beginning)."""

    folder: Path
    step: int
    samples: int
    losses: Mapping[str, float]
    seconds: float
    resumed: int
    table: StageTable
    warnings: tuple[str, ...]


def train(
    net: Net,
    loader: Loader,
    stage: Stage,
    folder: str | Path,
    *,
    seed: int = 0,
    identity: Mapping[str, object] | None = None,
    progress: Progress | bool = True,
    report_to: Sequence[str] = (),
    validation: Validation | None = None,
    on_quarantine: Skipped | None = None,
    parallel: Parallel = DDP,
    stop_at: int | None = None,
    products: str | None = None,
) -> TrainResult:
    """Train ``net`` in place through one stage, on the device it is on; write into ``folder``.

    Args:
        seed: for dropout and whatever else draws at random in the net; the loader has its own.
        identity: JSON-able facts that must be the same on resume, for example a fingerprint of the data.
        progress: a running display to add a bar to, or whether to show one (and the stage's table).
        report_to: names of trackers that get the numbers too (:mod:`isthmus.training.trackers`).
        validation: what is measured on the way, which step is kept and when the stage ends early.
        on_quarantine: called with sample ids and reason for each step that ``nan_policy`` skips.
        parallel: how several processes share the net.
        stop_at: leave after this step, saved, as a signal would make it: nothing else of the stage changes.
        products: by whom the fp32 products of the run's earlier stages are (:mod:`isthmus.training.multiplying`).

    Raises:
        RunBusyError: another run trains in this folder.
        StageError: the stage does not fit the net, a trained tensor never had a gradient, a frozen one moved, or the
            folder was begun with another stage, seed or identity. NonFiniteError: NaN or infinity, before the update.
        CheckpointError: a checkpoint is damaged, or cannot be written. Interrupted: after Ctrl-C.
        Preempted: after SIGTERM, SIGUSR1, or at ``stop_at``.
    """
    keep_freed_memory()
    folder = Path(folder)
    progress = progress if first() else False
    with RunLock(folder) if first() else nullcontext(), talking(), held():
        wait()  # no process reads the folder before the first one has it
        table = apply_stage(net, stage.train, seed=seed)
        if progress is True:
            Console(stderr=True).print(table.render(f"stage {stage.name}"))
        run = _Run(net, loader, stage, folder, table, seed, identity or {}, on_quarantine, parallel, products)
        run.stop_at = stop_at
        if progress is True:
            note = f"stage {stage.name}: precision {run.precision.precision}, {run.precision.why}"
            if run.device.type == "cpu":
                note += f"; fp32 products by {run.products.by}, {run.products.why}"
            Console(stderr=True, emoji=False).print(note, highlight=False, markup=False)
        if first():
            _describe(folder, stage, table, run.precision, run.products)
        with (
            stop_flag() as stopped,
            closing(MetricLog(folder, run.state.step, report_to=report_to, writes=first())) as log,
            progress_bar(progress, stage.name, stage.budget, run.done) as bar,
        ):
            try:
                run.go(log, bar, stopped, validation)
                run.end()
            finally:
                run.writer.close()
                run.widen()
        result = run.result()
    del run
    if shards(parallel):
        gc.collect()  # modules, hooks and shards hold each other
    return result


class _Run:
    """One call of :func:`train`: the parts that the steps share, and the state that a checkpoint holds."""

    def __init__(
        self,
        net: Net,
        loader: Loader,
        stage: Stage,
        folder: Path,
        table: StageTable,
        seed: int,
        identity: Mapping[str, object],
        on_quarantine: Skipped | None,
        how: Parallel,
        products: str | None,
    ) -> None:
        self.net, self.loader = net, loader
        self.stop_at: int | None = None
        self.stage, self.folder, self.table, self.on_quarantine = stage, folder, table, on_quarantine
        widened = optim.to_master_weights(optim.open_parameters(net, table))
        self.device = where(net, how)
        before = newest_state(folder)
        self.products = multiplying.settle(self.device, (before and before[0].products) or products, stage.name)
        kept = before and precision.Choice(before[0].precision, "so the run was begun")
        self.precision = kept or precision.choose(stage, net, self.device)
        self.autocast = precision.context(self.precision.precision, self.device)
        note = (f"step 0: {len(widened)} half-precision tensors train as fp32 master weights",) if widened else ()
        # Shards are copies: the net behind them, which may lie in a file, goes back to what it was at once.
        stored = [(p, p.data) for p in net.parameters()] if shards(how) else []
        self.narrowed, note = self._narrow(note, apart=shards(how))
        frozen = proof.frozen_tensors(net, alike=shards(how))
        self.engine = engine(net, how)
        for parameter, value in stored:
            parameter.data = value
        self.net = self.engine.net
        self.writer = self.engine.state_writer()
        self.parameters = optim.open_parameters(self.net, table)
        self.optimizer = optim.build_optimizer(self.parameters, table, stage)
        optim.check_holds_exactly(self.optimizer, self.net)
        self.gradients = proof.GradientProof(self.parameters)
        self.state = RunState(
            step=0,
            samples=0,
            position={"epoch": 0, "index": 0},
            seconds=0.0,
            losses={},
            unproven=tuple(self.parameters),
            skipped=0,
            frozen=frozen,
            stage=stage.fingerprint(),
            identity=json.loads(json.dumps(dict(identity))),
            seed=seed,
            processes=world_size(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            precision=self.precision.precision,
            device=self.device.type,
            warnings=note,
            products=self.products.by,
        )
        self.resumed = self.saved = self._resume(before)

    def _narrow(self, note: tuple[str, ...], *, apart: bool) -> tuple[list[torch.nn.Parameter], tuple[str, ...]]:
        """Frozen matrices to bf16, where the stage asks for it: those that are to be widened again, and the notes. With
        ``apart`` their values lie in a file. Raises StageError without bf16 autocast."""
        if self.stage.frozen_dtype != "bf16":
            return [], note
        if self.precision.precision != "bf16":
            raise StageError(
                f"Stage {self.stage.name!r}: frozen_dtype bf16 needs bf16 autocast, and this run computes in fp32 "
                f"({self.precision.why}). Set precision: bf16, or take frozen_dtype out."
            )
        narrowed, others = optim.narrow_frozen(self.net, partial(mapped.shared, folder=self.folder) if apart else None)
        if others:
            note += (f"step 0: {others} frozen matrices stay fp32, for their values are not of bf16",)
        return ([] if apart else narrowed), note

    def widen(self) -> None:
        """Frozen matrices as they were before this call, to the bit."""
        for weight in self.narrowed:
            weight.data = weight.data.float()

    def _resume(self, found: tuple[RunState, Mapping[str, Path]] | None) -> int:
        """Go back to the newest checkpoint, or seed a new run. The step to go on from."""
        seed_generators(self.state.seed + rank())  # each process draws dropout of its own
        if found is None:
            return 0
        saved, files = found
        warnings = check_same(saved, self.state, self.folder)
        proof.demand_unchanged(saved.frozen, self.state.frozen, "is not the one this run was begun with")
        restore(files, self.net, self.optimizer, self.parameters)
        self.gradients = proof.GradientProof(saved.unproven)
        now = self.state
        self.state = replace(
            saved,
            processes=now.processes,
            threads=now.threads,
            torch=now.torch,
            device=now.device,
            products=now.products,
            warnings=(*saved.warnings, *warnings),
        )
        return saved.step

    @property
    def done(self) -> int:
        """How much of the budget is used."""
        return self.state.step if self.stage.steps is not None else self.state.samples

    def go(self, log: MetricLog, bar: Bar, stopped: Mapping[str, str], validation: Validation | None) -> None:
        """Steps until the budget is used or validation ends the stage, then the last proofs and the last checkpoint."""
        if validation is not None:
            self._begin_validation(log, validation)
        if self.done >= self.stage.budget:
            return
        with ending(self.loader.steps(self.loader.position(self.state.position))) as stream:
            before = self.state.seconds - time.perf_counter()
            while self.done < self.stage.budget and not (validation is not None and validation.over):
                started, note = time.perf_counter(), dict(stopped)
                doing(f"{self._next()}, reading its rows")
                try:
                    position, batches = next(stream)
                except StopIteration:
                    raise StageError(
                        f"The data ended after step {self.state.step}, before the stage's budget: the "
                        "loader must go on with the next epoch. Is the source empty?"
                    ) from None
                waited = time.perf_counter() - started
                signals, traffic, order = self._meet(note, batches)
                self._stop_if(signals)
                if not traffic.samples:
                    continue
                line = self._step(batches, traffic)
                line["order"] = order
                now = time.perf_counter()
                self.state = replace(self.state, position=dict(position.to_dict()), seconds=before + now)
                if validation is not None and validation.due(self.state.step, last=self.done >= self.stage.budget):
                    line[KEY] = self._look(validation)
                    before -= time.perf_counter() - now  # which is no time of a step's
                self._log(log, line, traffic, seconds=now - started, waited=waited)
                if validation is not None:
                    self._keep(validation)
                bar.show(self.done, self.state.losses)
                relieve()
                if self.state.step == proof.WINDOW:
                    self.gradients.demand(self.state.step)
                if self.done < self.stage.budget and self.state.step % self.stage.save_every == 0:
                    self._save()
                if self.state.step == self.stop_at and self.done < self.stage.budget:
                    self._stop_if({"signal": f"stop_at {self.stop_at}"})
        self.gradients.demand(self.state.step)
        proof.demand_unchanged(self.state.frozen, proof.frozen_tensors(self.net), "changed during the stage")
        self._save()
        self.writer.wait()
        # A signal during the last step must not be lost: the caller may have further stages.
        self._stop_if(signalled(all_gather(dict(stopped))))

    def _begin_validation(self, log: MetricLog, validation: Validation) -> None:
        """What an earlier call found, or the numbers of the net that the stage begins with."""
        validation.begin(of_first(lambda: read_metrics(log.path)), self.state.step)
        if self.state.step == 0 and validation.due(0, last=False):
            found = self._look(validation)
            log.write({"step": 0, "loss": None, "samples": 0, "seconds": 0.0, KEY: found})
        self._keep(validation)

    @contextmanager
    def _as_stored(self) -> Iterator[None]:
        """While inside, the net is what the stage would hand over now: whole in every process, frozen matrices as they
        are stored, for a model that answers without autocast, and weights averaged where the stage averages them."""
        self.widen()
        try:
            with averaging.averaged(self.optimizer), self.engine.gathered(self.folder):
                yield
        finally:
            set_modes(self.net)
            for weight in self.narrowed:
                weight.data = weight.data.bfloat16()

    def _look(self, validation: Validation) -> Mapping[str, float]:
        with self._as_stored():
            return validation.validate(self.state.step)

    def _keep(self, validation: Validation) -> None:
        """The net that was the best so far; a checkpoint first, so that no resumed run is behind what is kept."""
        if of_first(lambda: validation.best == self.state.step and validation.kept() != self.state.step):
            if self.state.step:
                self._save()
            with self._as_stored():
                of_first(lambda: validation.keep(self.state.step, validation.found[self.state.step]))

    def _next(self) -> str:
        return f"step {self.state.step + 1} of stage {self.stage.name!r}"

    def _meet(self, note: Mapping[str, str], batches: list[Batch]) -> tuple[Mapping[str, str], Traffic, str]:
        """What all processes know before a step: a signal that came, what the step carries, its samples in order."""
        ids = [i for batch in batches for i in batch.ids]
        shown = ", ".join(ids[:3]) + (" and others" if len(ids) > 3 else "")
        doing(f"{self._next()}, with {len(ids)} rows in batches of {[len(b) for b in batches]} ({shown})")
        met = all_gather((note, Traffic.of(batches), ids))
        if self.net.contrasts and (empty := [n for n, (_, t, _) in enumerate(met) if not t.samples]):
            raise DataError(
                f"Process {empty[0]} of {world_size()} has no sample in the step after {self.state.step}, and stage "
                f"{self.stage.name!r} contrasts the rows of all: raise batch_size, or start fewer processes."
            )
        rows = chain.from_iterable(zip_longest(*(names for _, _, names in met)))
        order = hashlib.sha256("\n".join(i for i in rows if i is not None).encode()).hexdigest()[:16]
        return signalled([s for s, _, _ in met]), Traffic.sum(t for _, t, _ in met), order

    def _step(self, batches: list[Batch], traffic: Traffic) -> StepFacts:
        """One update, or none when it is not finite and the stage lets that pass. Its part of the log line."""
        size = 1 if self.stage.steps is not None else traffic.samples
        rates = optim.set_rates(self.optimizer, optim.lr_at(self.stage, self.done, size))
        generator = torch.get_rng_state()
        moved = [batch.to(self.device) for batch in batches]
        self.optimizer.zero_grad(set_to_none=True)
        line: StepFacts = {"loss": None, "lr": rates}
        losses, skipped = self.state.losses, 0
        try:
            losses = backward(self.engine, moved, self.autocast, traffic=traffic)
            total, norms = optim.gradient_norms(self.parameters)
            if not torch.isfinite(total):
                raise NonFiniteLoss("gradient norm", float(total), None)
            self._update(total)
            line["loss"], line["grad_norm"] = losses, {"all": float(total), **norms}
        except NonFiniteLoss as problem:
            skipped = self.state.skipped + 1
            self._pass_over(problem, moved, generator, skipped)
            line["skipped"] = True
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            samples=self.state.samples + traffic.samples,
            losses=losses,
            skipped=skipped,
            unproven=tuple(self.gradients.pending),
        )
        return line

    def _update(self, total: torch.Tensor) -> None:
        self.gradients.observe(self.parameters)
        optim.clip_gradients(self.parameters, total, self.stage.clip_norm)
        self.optimizer.step()
        self.net.after_step()
        if self.stage.ema is not None:
            averaging.update(self.optimizer, self.stage.ema)

    def _pass_over(self, problem: NonFiniteLoss, batches: list[Batch], generator: torch.Tensor, skipped: int) -> None:
        """Raise NonFiniteError with all that is known, or report a step that may be skipped."""
        gradient = first_bad_gradient(self.net) if problem.micro is None else None
        self.optimizer.zero_grad(set_to_none=True)
        where, micro = None, None
        if self.engine.replays:  # else, alone in a forward pass, it would wait for ever
            where, micro = first_bad_value(self.net, batches, self.autocast, generator)
        micro = problem.micro if problem.micro is not None else micro
        ids = tuple(i for n, batch in enumerate(batches) if micro in (None, n) for i in batch.ids)
        shown = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        first = where or gradient or "the loss itself"
        reason = (
            f"step {self.state.step + 1}: {problem}; first non-finite value: {first}; precision {self.state.precision}"
        )
        if self.stage.nan_policy == "skip" and skipped <= self.stage.nan_limit:
            self.state = replace(self.state, warnings=(*self.state.warnings, f"{reason}; skipped samples {shown}"))
            if self.on_quarantine is not None:
                self.on_quarantine(ids, reason)
            return
        saved = checkpoints(self.folder)
        last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        in_a_row = f" ({skipped} in a row)" if self.stage.nan_policy == "skip" else ""
        raise NonFiniteError(
            f"Stage {self.stage.name!r}, {reason}{in_a_row}. Samples: {shown}. The update was not made; {last}. Look "
            "at these samples, lower the rate, or try precision fp32; nan_policy skip passes over a few such steps."
        )

    def _log(self, log: MetricLog, line: StepFacts, traffic: Traffic, *, seconds: float, waited: float) -> None:
        step = self.state.step
        if step % self.stage.log_every and self.done < self.stage.budget and KEY not in line:
            return
        log.write(
            {
                "step": step,
                "epoch": self.state.position.get("epoch"),
                **line,
                "samples": self.state.samples,
                "tokens_per_second": round(traffic.tokens / seconds, 1),
                "supervised": round(traffic.supervised / max(1, traffic.tokens), 4),
                "data_wait": round(waited / seconds, 4),
                "seconds": round(self.state.seconds, 3),
            }
        )

    def _stop_if(self, stopped: Mapping[str, str]) -> None:
        """At a step boundary: save and raise Interrupted when a signal came."""
        if stopped:
            self._save()
            self.writer.wait()
            raise (Interrupted if stopped["signal"] == "SIGINT" else Preempted)(
                f"Stopped by {stopped['signal']} after step {self.state.step} of stage "
                f"{self.stage.name!r}; it is saved in {self.folder}. The same command goes on there."
            )

    def _save(self) -> None:
        if self.state.step == self.saved:
            return
        doing(f"saving step {self.state.step}")
        generators = all_gather(rng_state())
        self.writer.save(self.folder, self.state, self.net, self.optimizer, self.parameters, generators, self.stage)
        self.saved = self.state.step

    def end(self) -> None:
        """What the stage hands over goes into the net that was given."""
        self.optimizer.zero_grad(set_to_none=True)
        averaging.take(self.optimizer)
        self.engine.close(self.folder)

    def result(self) -> TrainResult:
        return TrainResult(
            folder=self.folder,
            step=self.state.step,
            samples=self.state.samples,
            losses=self.state.losses,
            seconds=self.state.seconds,
            resumed=self.resumed,
            table=self.table,
            warnings=self.state.warnings,
        )


def _describe(
    folder: Path, stage: Stage, table: StageTable, chosen: precision.Choice, products: multiplying.Multiplying
) -> None:
    """``stage.json``: the definition, the table, precision and products, for people, the report and later stages."""
    own = {"precision": dataclasses.asdict(chosen), "products": dataclasses.asdict(products)}
    text = json.dumps({"stage": stage.to_dict(), "table": table.to_dict(), **own}, indent=1)
    aside = folder / "stage.json.tmp"  # later stages read it: a full disk leaves the one before
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(folder / "stage.json")
