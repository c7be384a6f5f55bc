"""Requests, replies, checks, and the files that come out.

DIR/instruct.json            the data, in LLaVA's form
DIR/manifest.json            how they were made, what they cost, what the checks found
DIR/making/replies.jsonl     every reply, by the hash of its request: what is there is not requested again
DIR/making/quarantine.jsonl  replies that are not used, with the reason
DIR/images/                  pictures, where they were drawn for it
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.data.instruct.checks import Checks
from isthmus.data.instruct.prompts import Kind, Prompt
from isthmus.data.instruct.symbols import Symbols
from isthmus.data.mix import key
from isthmus.data.quarantine import Quarantine
from isthmus.endpoint import Budget, Endpoint, Outcome, Replies, Request, send_all
from isthmus.errors import ConfigError, DataError, EndpointError

DATA, MANIFEST, MAKING = "instruct.json", "manifest.json", "making"


@dataclass(frozen=True, slots=True)
class Written:
    """One sample: questions and answers about a picture, and how it came about."""

    symbols: Symbols
    kind: Kind
    turns: tuple[tuple[str, str], ...]
    model: str
    prompt: str | None = None

    def row(self, seed: int) -> dict[str, object]:
        """In LLaVA's form; the picture stands before or after the first question, as drawn."""
        pairs = (pair for turn in self.turns for pair in zip(("human", "gpt"), turn, strict=True))
        turns = [{"from": who, "value": text} for who, text in pairs]
        first = turns[0]["value"]
        before = key(seed, "place", self.symbols.id, self.kind) % 2 == 0
        turns[0]["value"] = f"<image>\n{first}" if before else f"{first}\n<image>"
        return {
            "id": f"{self.symbols.id}-{self.kind}",
            "image": self.symbols.image,
            "conversations": turns,
            "kind": self.kind,
            "source_id": self.symbols.id,
            "model": self.model,
            "prompt_sha256": self.prompt,
        }


@dataclass(slots=True)
class Report:
    """``rows`` by kind; ``refused`` by reason; ``missing`` requests without a reply, with why; ``stopped``: why not all
    was asked, else empty."""

    rows: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)
    stopped: str = ""
    sent: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unreported: int = 0
    cost: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {
            "rows": dict(self.rows),
            "refused": dict(self.refused),
            "unanswered": len(self.missing),
            "stopped": self.stopped,
            "replies": self.replies,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_not_reported": self.unreported,
            "cost": self.cost,
        }


def instruct(
    pictures: Sequence[Symbols],
    prompts: Mapping[Kind, Prompt],
    endpoint: Endpoint,
    out: str | Path,
    *,
    checks: Checks,
    source: Mapping[str, object],
    image_folder: str | None = None,
    attempts: int = 1,
    seed: int = 0,
    concurrency: int = 8,
    budget: Budget | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Each kind of data about each picture, as far as the endpoint answers and the budget lasts.

    The same call goes on where an earlier one stopped, however it ended: replies that are there are not requested
    again. A reply that the checks refuse is requested again until ``attempts`` replies were tried. What comes out is
    written also when the work stops early.

    Raises ConfigError (prompts need boxes that the data have not; another setting in ``out``), EndpointError (the
    endpoint refuses or does not answer).
    """
    _check_boxes(pictures, prompts)
    if attempts < 1:
        raise ConfigError(f"attempts must be at least 1, not {attempts}.")
    out, budget = Path(out), budget or Budget()
    with Replies(out / MAKING / "replies.jsonl") as replies:
        manifest = _settled(out, endpoint, prompts, source, image_folder, seed)
        work = _Work(pictures, prompts, endpoint, checks, replies, seed)
        report, fatal = Report(), None
        try:
            for attempt in range(attempts):
                outcome = send_all(
                    endpoint,
                    work.open(attempt),
                    replies,
                    concurrency=concurrency,
                    budget=budget,
                    progress=None if progress is None else lambda done: progress(done, len(pictures) * len(prompts)),
                )
                _add(report, outcome)
                if report.stopped:
                    break
        except EndpointError as error:
            fatal = error
        kept = work.finish(out, attempts, report)
        report.replies = len(replies)
        report.prompt_tokens, report.completion_tokens = budget.prompt_tokens, budget.completion_tokens
        report.unreported, report.cost = budget.unreported, budget.cost
        write_rows(out, kept, manifest | {"endpoint": endpoint.place} | report.to_dict(), seed)
    if fatal is not None:
        raise fatal
    return report


def write_rows(out: Path, rows: Iterable[Written], manifest: Mapping[str, object], seed: int) -> None:
    """``instruct.json`` and the manifest, each written aside and renamed."""
    found = [row.row(seed) for row in rows]
    _write_json(out / DATA, found)
    _write_json(out / MANIFEST, manifest)


def _check_boxes(pictures: Sequence[Symbols], prompts: Mapping[Kind, Prompt]) -> None:
    wanting = [kind for kind, prompt in prompts.items() if prompt.boxes]
    if wanting and not any(s.known for s in pictures):
        raise ConfigError(
            f"{' and '.join(wanting)} are written from boxes too, and the data have none: name the file of them "
            "(COCO: instances), or take --kind conversation alone."
        )


def _add(report: Report, outcome: Outcome) -> None:
    report.sent += outcome.sent
    report.missing |= outcome.failed
    report.stopped = outcome.stopped


def _settled(
    out: Path,
    endpoint: Endpoint,
    prompts: Mapping[Kind, Prompt],
    source: Mapping[str, object],
    image_folder: str | None,
    seed: int,
) -> dict[str, object]:
    """What the data are made of and by. Raises ConfigError where ``out`` holds data of something else: one file never
    mixes two makings without a word."""
    facts: dict[str, object] = {
        "made_by": endpoint.describe(),
        "prompts": {kind: prompt.hash for kind, prompt in prompts.items()},
        "source": dict(source),
        "image_folder": image_folder,
        "seed": seed,
    }
    facts = json.loads(json.dumps(facts))
    path = out / MAKING / "settings.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ConfigError(f"{path} is damaged; delete it to go on with the replies beside it.") from None
        odd = [name for name in facts if name not in ("image_folder",) and before.get(name) != facts[name]]
        if odd:
            raise ConfigError(
                f"{out} holds data made with another {odd[0]} ({_short(before.get(odd[0]))} there, "
                f"{_short(facts[odd[0]])} now). Choose another folder for --out, or delete this one."
            )
    _write_json(path, facts)
    return facts


class _Work:
    """Which requests belong to which picture and kind, and what becomes of their replies."""

    def __init__(
        self,
        pictures: Sequence[Symbols],
        prompts: Mapping[Kind, Prompt],
        endpoint: Endpoint,
        checks: Checks,
        replies: Replies,
        seed: int,
    ) -> None:
        self.pictures, self.prompts, self.endpoint = pictures, prompts, endpoint
        self.checks, self.replies, self.seed = checks, replies, seed

    def open(self, attempt: int) -> Iterator[Request]:
        """The requests of this attempt: of all, or of those whose replies before were refused."""
        for symbols, prompt in self._pairs():
            if attempt == 0 or self._best(symbols, prompt, attempt)[0] is None:
                yield prompt.request(symbols, attempt)

    def _pairs(self) -> Iterator[tuple[Symbols, Prompt]]:
        return ((s, p) for s in self.pictures for p in self.prompts.values() if s.known or not p.boxes)

    def _best(self, symbols: Symbols, prompt: Prompt, attempts: int) -> tuple[Written | None, str]:
        """The first of the replies that passes the checks, else why the last one did not; empty where there is none."""
        reason = ""
        for attempt in range(attempts):
            reply = self.replies.get(self.endpoint.hash(prompt.request(symbols, attempt)))
            if reply is None:
                continue
            turns = prompt.turns_of(reply.text, symbols, self.seed)
            reason = self.checks.fault(reply, prompt, symbols, turns)
            if turns is not None and not reason:
                return Written(symbols, prompt.kind, tuple(turns), reply.model or self.endpoint.model, prompt.hash), ""
            reason = f"{reason or 'bad form: unreadable'} (reply {reply.request[:12]})"
        return None, reason

    def finish(self, out: Path, attempts: int, report: Report) -> list[Written]:
        """The samples that pass; the others into a quarantine file, which is made anew."""
        aside = out / MAKING / ".quarantine.jsonl.part"
        aside.unlink(missing_ok=True)
        bad = Quarantine(aside, threshold=1.0)
        kept: list[Written] = []
        for symbols, prompt in self._pairs():
            written, reason = self._best(symbols, prompt, attempts)
            if written is not None:
                kept.append(written)
                report.rows[prompt.kind] += 1
                report.missing.pop(f"{symbols.id}-{prompt.kind}", None)
            elif reason:
                bad.add(f"{symbols.id}-{prompt.kind}", prompt.kind, reason)
        report.refused = bad.reasons()
        aside.touch()
        aside.replace(out / MAKING / "quarantine.jsonl")
        return kept


def existing(pictures: Sequence[Symbols], folder: Path) -> tuple[list[Symbols], list[str]]:
    """Those whose picture is in the folder, and the names of the others. Raises DataError when none is."""
    found = [s for s in pictures if (folder / s.image).is_file()]
    if not found:
        raise DataError(f"None of the {len(pictures)} pictures is in {folder}, such as {pictures[0].image}.")
    here = {id(s) for s in found}
    return found, [s.image for s in pictures if id(s) not in here]


def categories_of(pictures: Iterable[Symbols]) -> Collection[str]:
    return {box.category for symbols in pictures for box in symbols.boxes}


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(
        json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    aside.replace(path)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
