"""``isthmus verify``: contracts on any checkpoint, each with the largest difference found and what is allowed.

A contract answers with a :class:`Check`. The same ones run on the tiny random models of the tests, and on models that
are broken on purpose, which must fail.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from isthmus import adapters
from isthmus.batch import CAUSAL, IGNORE, Tokens
from isthmus.config import plain
from isthmus.data.chat import OWN
from isthmus.data.collate import collate
from isthmus.data.record import Example, Record, Text
from isthmus.data.text import TEMPLATES, Grammar
from isthmus.errors import CapabilityError, CheckpointError, ConfigError, nearest
from isthmus.interop.convert import write_model
from isthmus.language import Decoding
from isthmus.model import Model
from isthmus.net import Net
from isthmus.opening import load
from isthmus.quantised import is_quantised, numel
from isthmus.stage import Group, Stage, apply_stage, named_parameters, set_modes
from isthmus.testing import probe
from isthmus.testing.peer import compare
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from isthmus.training.optim import build_optimizer, open_parameters
from isthmus.training.proof import frozen_tensors

Verdict = Literal["pass", "FAIL", "n/a"]

STATELESS = "the net computes with something that is neither a parameter nor a persistent buffer, so no file holds it"


@dataclass(frozen=True, slots=True)
class Check:
    """One contract's outcome. ``difference`` is the largest one found, none where nothing is compared by size."""

    name: str
    verdict: Verdict
    detail: str
    difference: float | None = None
    tolerance: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "told": self.detail}  # its name before, which readers of the JSON know

    def __str__(self) -> str:
        """``'batch = single': 3 rows (differs by 0.2, allowed 0.0001)``."""
        sizes = "" if self.difference is None else f" (differs by {self.difference:.2g}, allowed {self.tolerance:.2g})"
        return f"{self.name!r}: {self.detail}{sizes}"


def verify(model: Model, *, only: Sequence[str] = ()) -> list[Check]:
    """Every contract (or those named) on a loaded model; it is left as it was. Raises ConfigError for a name that is
    none. A contract in which the model raises an error has failed with that error, but for a CapabilityError: what the
    model cannot do is not tried."""
    for name in only:
        if name not in CONTRACTS:
            raise ConfigError(f"there is no contract {name!r}; {nearest(name, CONTRACTS)}")
    rows = []
    for name, contract in CONTRACTS.items():
        if only and name not in only:
            continue
        try:
            found = contract(model)
        except CapabilityError as error:
            found = _absent(str(error))
        except Exception as error:  # whatever a net of the user's own raises
            found = _Outcome("FAIL", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        rows.append(Check(name, found.verdict, found.detail, found.difference, found.tolerance))
    return rows


@dataclass(frozen=True, slots=True)
class _Outcome:
    verdict: Verdict
    detail: str
    difference: float | None = None
    tolerance: float | None = None


def _within(difference: float, tolerance: float, detail: str) -> _Outcome:
    # Written so that a difference that is not a number fails.
    return _Outcome("pass" if difference <= tolerance else "FAIL", detail, difference, tolerance)


def _absent(why: str) -> _Outcome:
    return _Outcome("n/a", why)


def _tolerance(model: Model, rows: Sequence[Tensor]) -> float:
    """1e-4 of the largest output (at least of 1) in float32, 5e-2 of it in half precision."""
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.net.parameters())
    return (5e-2 if half else 1e-4) * max(1.0, *(float(row.abs().max()) for row in rows))


def _apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


# The contracts.


def tensors(model: Model) -> _Outcome:
    """A net built from the configuration alone, with like adapters where the model carries some, has exactly these
    tensors, in 4 bits as many numbers; all are finite."""
    with torch.device("meta"):
        net = type(model.net).from_config(plain(model.net.config))
    adapters.carry_over(model.net, net)
    fresh = net.state_dict()
    counts = {n: numel(p) for n, p in model.net.named_parameters() if is_quantised(p)}
    scales = tuple(f"{name}." for name in counts)
    held = {n: t for n, t in model.net.state_dict().items() if not n.startswith(scales)}
    strange = sorted(n for n in held.keys() | fresh.keys() if n not in held or n not in fresh)
    both = held.keys() & fresh.keys()
    strange += sorted(n for n in both if n not in counts and held[n].shape != fresh[n].shape)
    strange += sorted(n for n in both if counts.get(n, fresh[n].numel()) != fresh[n].numel())
    bad = [n for n, t in held.items() if t.is_meta or (t.is_floating_point() and not bool(t.isfinite().all()))]
    numbers = sum(map(numel, model.net.parameters()))
    detail = f"{len(held)} tensors, {numbers:,} numbers"
    if model.report is not None:
        detail += f"; {str(model.report).splitlines()[0]}"
    if strange:
        detail = f"not of the configuration: {', '.join(strange[:3])} ({len(strange)})"
    elif bad:
        detail = f"not finite: {', '.join(bad[:3])} ({len(bad)})"
    return _within(float(len(strange) + len(bad)), 0.0, detail)


def repeated(model: Model) -> _Outcome:
    """The same batch twice: nothing is drawn, and nothing changes, while the model answers."""
    prompts = [_complete(model, example) for example in probe.prompts(model, probe.WORDS, (1, 2, 3))]
    first, again = (probe.outputs(model, collate(prompts)) for _ in range(2))
    return _within(_apart(first, again), _tolerance(model, first) / 100, "3 rows")


def batched(model: Model) -> _Outcome:
    """Rows of equal length together and alone."""
    prompts = probe.prompts(model, probe.WORDS[1:2] * 3, (1, 2, 3))
    if not probe.sees(model):
        prompts = [probe.turned(example, n) for n, example in enumerate(prompts)]
    prompts = [_complete(model, example) for example in prompts]
    alone = [probe.outputs(model, collate([example]))[0] for example in prompts]
    together = probe.outputs(model, collate(prompts))
    return _within(_apart(together, alone), _tolerance(model, alone), "3 rows")


def padded(model: Model) -> _Outcome:
    """Rows of several lengths together: right padding in one pass; in generation, where all rows end together, left."""
    if not probe.reads(model):
        return _absent("the model reads no text")
    prompts = probe.prompts(model, probe.WORDS, (1, 2, 3))
    complete = [_complete(model, example) for example in prompts]
    alone = [probe.outputs(model, collate([example]))[0] for example in complete]
    right = _apart(probe.outputs(model, collate(complete)), alone)
    allowed = _tolerance(model, alone)
    lengths = ", ".join(str(example.length) for example in complete)
    if not _writes(model):
        return _within(right, allowed, f"lengths {lengths}")
    left = max(probe.regret(model, e, a) for e, a in zip(prompts, probe.written(model, prompts), strict=True))
    return _within(max(right, left), allowed, f"lengths {lengths}: right {right:.1g}, left {left:.1g}")


def cached(model: Model) -> _Outcome:
    """Every greedy token written with the cache is what a pass without it likes best."""
    if not _writes(model):
        return _absent("nothing is written with a cache")
    prompts = probe.prompts(model, probe.WORDS, (1, 2, 3))
    answers = [probe.written(model, [example])[0] for example in prompts]
    worst = max(probe.regret(model, e, a) for e, a in zip(prompts, answers, strict=True))
    rows = [probe.outputs(model, collate([_complete(model, e)]))[0] for e in prompts]
    count = sum(map(len, answers))
    if not count:
        return _absent("every answer ends at once, so nothing is written")
    return _within(worst, _tolerance(model, rows), f"{count} tokens")


def packed(model: Model) -> _Outcome:
    """Rows that share one sequence, where batches are packed."""
    del model
    return _absent("rows are padded only" if "segments" not in Tokens.__dataclass_fields__ else "not tried")


def causal(model: Model) -> _Outcome:
    """What predicts a token that is learnt knows neither it nor what follows: with other tokens from there on the
    logits before it are the same. What a prompt's tokens see of each other is the model's own affair."""
    if probe.embeds(model):
        return _absent("the model's outputs are vectors, and predict no token")
    worst, rows = 0.0, []
    for example in probe.taught(model, probe.WORDS, (1, 2, 3)):
        places = probe.learnt_places(example)
        cut = places[len(places) // 2]
        one, other = (probe.outputs(model, collate([e]))[0] for e in (example, probe.changed_from(model, example, cut)))
        before = torch.tensor([place - 1 for place in places if place <= cut])
        worst = max(worst, float((one[before] - other[before]).abs().max()))
        rows.append(one)
    return _within(worst, _tolerance(model, rows) / 10, "the tokens from the middle of each answer on changed")


def objective(model: Model) -> _Outcome:
    """The loss that is called ``lm`` or like the stream it is of, and an answer's score, are what the logits say of the
    labelled tokens, each predicted at the place before its own."""
    if probe.embeds(model):
        return _absent("the model's outputs are vectors, and predict no token")
    examples = probe.taught(model, probe.WORDS, (1, 2, 3))
    batch = collate(examples).to(model.device)
    wanted = [probe.log_likelihood(row, e) for row, e in zip(probe.outputs(model, batch), examples, strict=True)]
    count, total = sum(len(probe.learnt_places(e)) for e in examples), sum(wanted)
    worst, compared = 0.0, []
    with torch.no_grad():
        terms = model.net.loss(batch) if model.system.parts else {}
        term = terms.get(probe.written_stream(examples[0]), terms.get(CAUSAL))
        scores = model.net.score(batch).tolist() if "score" in model.capabilities else None
    if term is not None:
        compared.append(f"loss {float(term.total) / max(1, term.count):.4g}")
        if term.count != count:
            return _Outcome("FAIL", f"the loss counts {term.count} tokens, and {count} are labelled", 1.0, 0.0)
        worst = abs(float(term.total) + total)
    if scores is not None:
        compared.append("scores")
        worst = max(worst, *(abs(own - due) for own, due in zip(scores, wanted, strict=True)))
    if not compared:
        return _absent("no loss is called like its stream, and nothing is scored")
    detail = f"{' and '.join(compared)}; by the logits {-total / count:.4g} a token over {count}"
    return _within(worst / count, _tolerance(model, [torch.tensor(wanted) / count]), detail)


def saved(model: Model) -> _Outcome:
    """Saved and opened again: every tensor to the bit, the processor word for word, and the same outputs."""
    with tempfile.TemporaryDirectory() as place:
        again = load(model.save(Path(place) / "model"), device=model.device, dtype=_dtype(model))
        ours, theirs = model.net.state_dict(), again.net.state_dict()
        differ = [n for n in ours.keys() | theirs.keys() if not _same(ours.get(n), theirs.get(n))]
        words = model.processor.to_dict() == again.processor.to_dict()
        moved = None if differ or not words else moved_outputs(model, again)
    detail = f"{len(ours)} tensors equal, processor {'equal' if words else 'another'}"
    if differ:
        detail = f"another: {', '.join(sorted(differ)[:3])} ({len(differ)})"
    if moved is not None:
        return _Outcome("FAIL", f"{detail}, and yet other outputs: {STATELESS}", moved, 0.0)
    return _within(float(len(differ) + (not words)), 0.0, detail)


def moved_outputs(model: Model, again: Model) -> float | None:
    """By how much two models of the same tensors differ in what they make of the same prompts; none: by no more than
    rounding."""
    prompts = [_complete(model, example) for example in probe.prompts(model, probe.WORDS, (1, 2, 3))]
    ours, theirs = (probe.outputs(each, collate(prompts)) for each in (model, again))
    moved = _apart(ours, theirs)
    return None if moved <= _tolerance(model, ours) else moved


def frozen(model: Model) -> _Outcome:
    """One training step of a part: the others stay to the bit, and the part moves."""
    net = model.net
    if not model.system.parts:
        return _absent("the model has no objective to train by")
    flags = [(p, p.requires_grad) for p in net.parameters()]
    pattern = _part_to_train(net)
    table = apply_stage(net, (Group(pattern, 1e-3),))
    opened = open_parameters(net, table)
    kept = {name: p.detach().clone() for name, p in opened.items()}
    before = frozen_tensors(net)
    try:
        batch = probe.lessons(model, probe.WORDS, (1, 2, 3)).to(model.device)
        optimizer = build_optimizer(opened, table, Stage(name="verify", train=(Group(pattern, 1e-3),), steps=1))
        backward(engine(net), [batch], nullcontext())
        optimizer.step()
        net.after_step()
        after = frozen_tensors(net)
        moved = sum(not torch.equal(p, kept[name]) for name, p in opened.items())
    finally:
        with torch.no_grad():
            for name, parameter in opened.items():
                parameter.copy_(kept[name])
        for parameter, flag in flags:
            parameter.grad = None
            parameter.requires_grad_(flag)
        set_modes(net)
        net.eval()
    touched = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if touched:
        return _within(float(len(touched)), 0.0, f"{pattern} trained, but touched: {', '.join(touched[:3])}")
    detail = f"{pattern} trained: {moved} of {len(opened)} tensors moved, {len(before)} frozen ones did not"
    return _Outcome("pass" if moved else "FAIL", detail, 0.0, 0.0)


def exported(model: Model) -> _Outcome:
    """Written for transformers and opened by it: the same outputs, the same greedy tokens."""
    if "hf" not in model.system.exporters:
        return _absent(f"transformers has no class for a {model.kind}")
    with tempfile.TemporaryDirectory() as place:
        try:
            done = write_model(model, Path(place) / "hf", "hf", lossy=True)
        except CheckpointError as error:
            return _absent(str(error))
        found = compare(model, done.folder)
    detail = f"{found.name}" + (f", {found.tokens} of {found.of} greedy tokens equal" if found.of else "")
    if found.tokens < found.of:
        return _Outcome("FAIL", detail, found.difference, found.tolerance)
    return _within(found.difference, found.tolerance, detail)


def looked_at(model: Model) -> _Outcome:
    """Another picture, or none to speak of, gives another output: the change must be larger than rounding."""
    if not probe.sees(model):
        return _absent("the model has no eyes")
    words = probe.WORDS[1:2] * 2
    real, blank, other = (_ends(model, probe.prompts(model, words, shown)) for shown in ((1, 2), (0, 0), (2, 1)))
    changes = {"blank": _apart(real, blank), "shuffled": _apart(real, other)}
    least = min(changes.values())
    floor = 1e-5 * max(1.0, *(float(row.abs().max()) for row in real))
    detail = ", ".join(f"{name} changes {value:.2g}" for name, value in changes.items())
    return _Outcome("pass" if least > floor else "FAIL", f"{detail}; must be above the tolerance", least, floor)


def turns_end(model: Model) -> _Outcome:
    """What is learnt of a conversation's last answer ends with a token that stops generation, and the conversation
    begins with the ids of that answer's prompt."""
    template = model.processor.template
    if template != OWN and not isinstance(TEMPLATES.get(str(template)), Grammar):
        return _absent("the model has no template of conversations")
    parts = (Text("A?", role="user"), Text("One.", role="assistant"), Text("B?", role="user"))
    prompt = model.processor.prompt(Record("turns", parts)).streams["lm"].ids
    complete = Record("turns", (*parts, Text("Two.", role="assistant", learn=True)))
    try:
        span = model.processor.scored(complete).streams["lm"]
    except ConfigError as error:
        return _absent(str(error))
    learnt = [label for label in span.labels or () if label != IGNORE]
    stops = model.ended(Decoding()).stop_ids
    if list(span.ids[: len(prompt)]) != list(prompt):
        return _Outcome("FAIL", "the prompt of an answer is not what stands before it in training", 1.0, 0.0)
    detail = f"the last token learnt is {learnt[-1]}; generation stops at {', '.join(map(str, stops))}"
    return _within(float(learnt[-1] not in stops), 0.0, detail)


CONTRACTS: dict[str, Callable[[Model], _Outcome]] = {
    "tensors accounted for": tensors,
    "again = before": repeated,
    "batch = single": batched,
    "left = right padding": padded,
    "cached = uncached": cached,
    "nothing looks ahead": causal,
    "loss = logits": objective,
    "packed = padded": packed,
    "save = load": saved,
    "frozen parts untouched": frozen,
    "export = transformers": exported,
    "picture matters": looked_at,
    "turns end": turns_end,
}


# Helpers.


def _writes(model: Model) -> bool:
    return not probe.embeds(model) and "generate" in model.capabilities


def _complete(model: Model, example: Example) -> Example:
    """A prompt as an uncached pass reads it: an encoder-decoder needs something to decode."""
    return probe.answered(model, example, [5, 6]) if "encoder" in example.streams else example


def _ends(model: Model, prompts: Sequence[Example]) -> list[Tensor]:
    """Per row the output that only what stands before it can change by: the last logits, or the vector."""
    rows = probe.outputs(model, collate([_complete(model, e) for e in prompts]))
    return [row[-1] if row.ndim > 1 else row for row in rows]


def _part_to_train(net: Net) -> str:
    """The connector, CLIP's text tower, or the first layer of a bare language model."""
    names = [name for name, _ in named_parameters(net)]
    if any(name.startswith("connector.") for name in names):
        return "connector.*"
    return "text.*" if any(name.startswith("text.") for name in names) else "*.0.*"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and torch.equal(a.cpu(), b.cpu().to(a.dtype))


def _dtype(model: Model) -> torch.dtype | None:
    found = {p.dtype for p in model.net.parameters()}
    return found.pop() if len(found) == 1 and found != {torch.float32} else None
