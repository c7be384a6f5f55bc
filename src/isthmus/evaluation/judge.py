"""A language model as judge of two answers, as LLaVA-Bench has it (2304.08485, section 5.1; 2310.03744).

Each pair is judged in both orders, for judges like the one that they read first. A reply whose first line is not two
scores is requested again; what stays unreadable excludes its question, which is counted.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

from isthmus.endpoint import Endpoint, Request
from isthmus.errors import ConfigError, EndpointError, ReplyError, as_sentence, nearest
from isthmus.evaluation.outputs import ReviewFacts

Scores = tuple[float, float]

_LOWEST, _HIGHEST = 1.0, 10.0
_NUMBER = r"(\d+(?:\.\d+)?)(?:\s*/\s*10)?"
_FIRST_LINE = re.compile(rf"{_NUMBER}[\s,;]+{_NUMBER}[\s.]*")
_KEYS = ("system", "rules", "layout")
_PLACES = ("context", "question", "first", "second", "rule")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to a question of a category, and what the judge reads about the picture."""

    name: str
    category: str
    context: str
    question: str
    first: str
    second: str

    def turned(self) -> "Pair":
        return Pair(self.name, self.category, self.context, self.question, self.second, self.first)


@dataclass(frozen=True, slots=True)
class Review:
    """What came of one pair: the scores as they stood (none: no reply could be read), how often it was requested, and
    the last reply."""

    scores: Scores | None
    tries: int
    text: str

    def to_dict(self) -> ReviewFacts:
        return {"scores": list(self.scores) if self.scores else None, "tries": self.tries, "text": self.text}


class JudgePrompt(TypedDict):
    """The judge's prompt: a system message, what is to be judged by category, and how a pair is laid out."""

    system: str
    rules: dict[str, object]
    layout: str


def parse(text: str) -> Scores | None:
    """The two scores in the first line, such as ``8 7``, ``8, 7`` or ``8/10 7/10``; none for anything else."""
    lines = text.strip().splitlines()
    found = _FIRST_LINE.fullmatch(lines[0].strip()) if lines else None
    if found is None:
        return None
    first, second = float(found[1]), float(found[2])
    return (first, second) if all(_LOWEST <= s <= _HIGHEST for s in (first, second)) else None


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The judge at ``url``, called ``model`` there. ``prompt``: a file like the package's ``judge.yaml``, else that.
    ``tries``: requests of one pair until its reply can be read."""

    url: str
    model: str
    prompt: str | None = None
    tries: int = 3
    temperature: float = 0.2
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 8
    key: str = "OPENAI_API_KEY"
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tries < 1 or self.concurrency < 1:
            raise ConfigError("A judge needs tries >= 1 and concurrency >= 1.")
        _ = self._endpoint, self.template  # a URL or a file that does not fit is met before the first request

    @cached_property
    def _endpoint(self) -> Endpoint:
        return Endpoint(
            self.url,
            self.model,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            timeout=self.timeout,
            retries=self.retries,
            key=self.key,
            options=self.options,
        )

    @cached_property
    def template(self) -> JudgePrompt:
        """System message, rules by category, and the layout. Raises ConfigError for a file that has them not."""
        import yaml

        path = Path(self.prompt) if self.prompt is not None else files("isthmus.evaluation") / "judge.yaml"
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"The judge's prompt {path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"The judge's prompt {path} should hold {', '.join(_KEYS)}.")
        for name in content:
            if name not in _KEYS:
                raise ConfigError(f"The judge's prompt {path}: unknown key {name!r}; {nearest(str(name), _KEYS)}")
        system, rules, layout = (content.get(name) for name in _KEYS)
        if not isinstance(system, str) or not isinstance(rules, dict) or "other" not in rules:
            raise ConfigError(f"The judge's prompt {path} needs `system` (a text) and `rules` with one called `other`.")
        missing = [p for p in _PLACES if not isinstance(layout, str) or f"{{{p}}}" not in layout]
        if missing or not isinstance(layout, str):
            raise ConfigError(f"The judge's prompt {path}: `layout` has no place {{{missing[0]}}}.")
        return {"system": system, "rules": rules, "layout": layout}

    def describe(self) -> dict[str, object]:
        """Name, settings and prompt with its sha256, for a manifest; not where it is."""
        text = json.dumps(self.template, sort_keys=True, ensure_ascii=False)
        return {
            **self._endpoint.describe(),
            "tries": self.tries,
            "prompt": dict(self.template),
            "prompt_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }

    def reviews(self, pairs: Sequence[Pair]) -> list[Review]:
        """One per pair, in order, several at a time. Raises EndpointError as the endpoint does, and where it gives a
        pair no answer."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(self._review, pairs))
            except ReplyError as error:
                raise EndpointError(
                    f"{as_sentence(error)} What was judged before is kept, and the same command goes on there, with "
                    "more time or fewer requests at once too (--set task.judge.timeout=600, --set "
                    "task.judge.concurrency=1). A question that the judge always refuses must be left out of the data."
                ) from None

    def _review(self, pair: Pair) -> Review:
        text = ""
        for attempt in range(self.tries):
            text = self._endpoint.send(self._request(pair, attempt)).text
            if scores := parse(text):
                return Review(scores, attempt + 1, text)
        return Review(None, self.tries, text)

    def _request(self, pair: Pair, attempt: int) -> Request:
        rules = self.template["rules"]
        filled = {
            "context": pair.context,
            "question": pair.question,
            "first": pair.first,
            "second": pair.second,
            "rule": str(rules.get(pair.category, rules["other"])).strip(),
        }
        # In one pass: what an answer holds in braces is no place.
        content = re.sub(rf"\{{({'|'.join(_PLACES)})\}}", lambda m: filled[m[1]], self.template["layout"]).strip()
        messages = (
            {"role": "system", "content": self.template["system"].strip()},
            {"role": "user", "content": content},
        )
        return Request(pair.name, messages, attempt)

    def probe(self, pairs: Sequence[Pair]) -> Counter[str]:
        """How the judge takes pairs whose first answer is the right one and whose second belongs to another question:
        ``right`` in both orders, ``first`` or ``second`` whichever stood there, ``mixed``, ``unread``.

        Raises EndpointError when it cannot distinguish more than half of them: such a judge's scores mean nothing.
        """
        both = self.reviews([p for pair in pairs for p in (pair, pair.turned())])
        found = Counter(_verdict(a, b) for a, b in zip(both[::2], both[1::2], strict=True))
        if found["right"] * 2 <= len(pairs):
            fault = _fault(found, {review.scores for review in both}, len(pairs))
            shown = next((review for review in both if review.scores is None), both[0]).text.strip()
            raise EndpointError(
                f"The judge {self.model} {fault} of {len(pairs)} pairs of a right answer and one to another question. "
                f"It wrote, for instance: {shown[:120]!r}. Its scores would mean nothing: take another judge or "
                "prompt, or use it all the same with --set task.sanity=false."
            )
        return found


def _verdict(straight: Review, turned: Review) -> str:
    """``straight`` has the right answer first, ``turned`` has it second."""
    if straight.scores is None or turned.scores is None:
        return "unread"
    one, other = (_sign(first - second) for first, second in (straight.scores, turned.scores))
    return {(1, -1): "right", (1, 1): "first", (-1, -1): "second"}.get((one, other), "mixed")


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _fault(found: Counter[str], different: set[Scores | None], pairs: int) -> str:
    """What such a judge does, in words that a number of pairs follows."""
    if len(different) == 1 and None not in different:
        return f"gives the same scores, {next(iter(different))}, to both orders of all"
    for name, words in (
        ("first", "prefers the answer that stands first, whichever it is, in"),
        ("second", "prefers the answer that stands second, whichever it is, in"),
        ("unread", "writes nothing that can be read as two scores about"),
    ):
        if found[name] * 2 > pairs:
            return f"{words} {found[name]}"
    return f"prefers the right answer, in both orders, only in {found['right']}"
