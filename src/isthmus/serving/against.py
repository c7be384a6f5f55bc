"""The same requests to a model of ours and to another engine that serves it, compared token by token.

Both get the same requests: ours by an application in this process, the other one over HTTP. Where an engine
gives log-probabilities, tokens and numbers are compared; else the texts, cut into tokens by our tokenizer.
"""

import asyncio
import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NotRequired, TypedDict, cast

import torch
from PIL import Image as PilImage
from PIL import ImageDraw

from isthmus.errors import CheckpointError, ConfigError, MissingExtraError
from isthmus.model import Model
from isthmus.serving.api import create_app
from isthmus.serving.batch import post

OURS = "model"
NEW_TOKENS = 24
TOP = 5
TOLERANCE = 1e-3
HALF_TOLERANCE = 0.1
"""Largest difference of log-probabilities (or of vectors' numbers), by the precision of our weights."""

_QUESTIONS = (
    "What is this?",
    "How many red things are there?",
    "Describe it in one sentence, please: colours, shapes and where they are.",
)


class Likely(TypedDict):
    """One of the likeliest tokens of a place."""

    logprob: float


class Token(TypedDict):
    """A token as an answer gives it."""

    token: str
    bytes: NotRequired[list[int] | None]
    logprob: float
    top_logprobs: list[Likely]


class Logprobs(TypedDict):
    content: NotRequired[list[Token] | None]


class Said(TypedDict):
    content: str | None


class Choice(TypedDict):
    message: Said
    logprobs: NotRequired[Logprobs | None]


class Chat(TypedDict):
    """What is read of a conversation's answer, ours or the engine's."""

    choices: list[Choice]


class Vector(TypedDict):
    embedding: list[float]


class Vectors(TypedDict):
    """What is read of vectors, ours or the engine's."""

    data: list[Vector]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. ``tokens`` of ours were equal from the start; ``difference`` the largest of what was compared by
    size, none where the engine gave no numbers; ``detail`` the first difference."""

    name: str
    verdict: Literal["pass", "FAIL"]
    tokens: int
    of: int
    difference: float | None
    detail: str

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "told": self.detail}  # its name before, which readers of the JSON know


class Engine:
    """Another engine's API, by the official client."""

    def __init__(self, url: str, name: str | None, key: str, hint: str) -> None:
        """``hint`` is what the model is called where none is named. Raises MissingExtraError without the client,
        CheckpointError for an engine that is not there, ConfigError when it serves several models, none of that name.
        """
        try:
            import openai
        except ModuleNotFoundError:
            raise MissingExtraError(
                "Asking an engine needs the package openai: `pip install 'isthmus[endpoint]'`."
            ) from None
        self.errors = openai
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=120, max_retries=2)
        self.name = name or self._found(url, hint)

    def _found(self, url: str, hint: str) -> str:
        try:
            names = [model.id for model in self.client.models.list()]
        except self.errors.OpenAIError as error:
            raise CheckpointError(
                f"{url} gives no list of models ({type(error).__name__}): is an engine there?"
            ) from None
        if len(names) == 1 or hint in names:
            return hint if hint in names else names[0]
        shown = ", ".join(names[:20]) or "none"
        raise ConfigError(f"{url} serves {len(names)} models: name yours with --served-as. They are: {shown}.")

    def send(self, path: str, body: Mapping[str, object]) -> object:
        """The answer as plain JSON. Raises the client's BadRequestError and its kin."""
        return self.client.post(path.removeprefix("/v1"), body=dict(body) | {"model": self.name}, cast_to=object)


def compare(
    model: Model, url: str, *, served_as: str | None = None, hint: str = "", key: str = "none"
) -> list[Outcome]:
    """One outcome per request that the model can answer. Arguments and errors are those of :class:`Engine`."""
    engine = Engine(url, served_as, key, hint)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.net.parameters())
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    return asyncio.run(_compared(model, engine, tolerance))


async def _compared(model: Model, engine: Engine, tolerance: float) -> list[Outcome]:
    app = create_app({OURS: model})
    found = []
    async with app.router.lifespan_context(app):
        for name, path, body in _requests(model):
            status, ours = await post(app, path, body | {"model": OURS})
            if status == 200:  # what our model does not take is no matter of comparison
                found.append(_outcome(model, engine, tolerance, name, path, body, ours))
    return found


def _requests(model: Model) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Name, route and body of each request."""
    sees = model.processor.image is not None
    writing: dict[str, object] = {"max_tokens": NEW_TOKENS, "temperature": 0.0}
    if "chat" in model.capabilities:
        for number, question in enumerate(_QUESTIONS):
            for count in (0, 1, 2) if sees else (0,):
                parts = [*(_shown(number + n) for n in range(count)), {"type": "text", "text": question}]
                content = parts if count else question
                name = f"question {number + 1}, {count} picture{'' if count == 1 else 's'}"
                body = {"messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": TOP}
                yield name, "/v1/chat/completions", writing | body
        first = [_shown(5), {"type": "text", "text": _QUESTIONS[0]}] if sees else _QUESTIONS[0]
        turns = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "two red cubes"},
            {"role": "user", "content": "Are they large?"},
        ]
        body = {"messages": turns, "logprobs": True, "top_logprobs": TOP}
        yield "conversation", "/v1/chat/completions", writing | body
    if "embed_texts" in model.capabilities:
        yield "texts", "/v1/embeddings", {"input": list(_QUESTIONS), "encoding_format": "float"}


def _shown(number: int) -> dict[str, object]:
    """A picture of plain shapes, another one for each number, as a part of a message."""
    image = PilImage.new("RGB", (96 + 16 * (number % 3), 96), (230, 230, 225 - 9 * number))
    draw = ImageDraw.Draw(image)
    for n in range(1 + number % 3):
        corner = (8 + 28 * n, 12 + 11 * ((number + n) % 4))
        colour = ((200, 30, 30), (30, 60, 200), (40, 160, 60))[(number + n) % 3]
        draw.rectangle((*corner, corner[0] + 20, corner[1] + 30), fill=colour)
    raw = io.BytesIO()
    image.save(raw, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(raw.getvalue()).decode()}"},
    }


def _outcome(
    model: Model, engine: Engine, tolerance: float, name: str, path: str, body: Mapping[str, object], ours: object
) -> Outcome:
    try:
        theirs = _their_answer(engine, path, body)
    except engine.errors.APIStatusError as error:
        return Outcome(name, "FAIL", 0, 0, None, f"the engine refuses it with status {error.status_code}")
    except engine.errors.OpenAIError as error:
        return Outcome(name, "FAIL", 0, 0, None, f"the engine does not answer: {type(error).__name__}")
    if path.endswith("embeddings"):
        return _vectors(name, tolerance, cast(Vectors, ours), cast(Vectors, theirs))
    own, other = cast(Chat, ours)["choices"][0], cast(Chat, theirs)["choices"][0]
    logprobs = (own.get("logprobs") or {}).get("content"), (other.get("logprobs") or {}).get("content")
    if logprobs[0] and logprobs[1]:
        return _tokens(name, tolerance, logprobs[0], logprobs[1])
    return _texts(name, model, own["message"]["content"] or "", other["message"]["content"] or "")


def _their_answer(engine: Engine, path: str, body: Mapping[str, object]) -> object:
    """With log-probabilities, and without them where the engine does not know the field."""
    try:
        return engine.send(path, body)
    except (engine.errors.BadRequestError, engine.errors.UnprocessableEntityError):
        plain = {k: v for k, v in body.items() if k not in ("logprobs", "top_logprobs")}
        if len(plain) == len(body):
            raise
        return engine.send(path, plain)


def _tokens(name: str, tolerance: float, ours: Sequence[Token], theirs: Sequence[Token]) -> Outcome:
    worst, equal = 0.0, 0
    for place, (own, other) in enumerate(zip(ours, theirs, strict=False)):
        if _bytes(own) != _bytes(other):
            gap = own["logprob"] - own["top_logprobs"][1]["logprob"] if len(own["top_logprobs"]) > 1 else float("inf")
            detail = (
                f"token {place + 1}: ours {own['token']!r} at {own['logprob']:.4f} ({gap:.4f} above our next), "
                f"theirs {other['token']!r} at {other['logprob']:.4f}"
            )
            return Outcome(name, "FAIL", equal, len(ours), worst, detail)
        difference = abs(own["logprob"] - other["logprob"])
        if not difference <= tolerance:  # also one that is no number
            detail = f"token {place + 1}, {own['token']!r}: ours {own['logprob']:.5f}, theirs {other['logprob']:.5f}"
            return Outcome(name, "FAIL", equal, len(ours), max(worst, difference), detail)
        worst, equal = max(worst, difference), equal + 1
    if len(ours) != len(theirs):
        detail = f"ours ends after {len(ours)} tokens, theirs after {len(theirs)}"
        return Outcome(name, "FAIL", equal, len(ours), worst, detail)
    return Outcome(name, "pass", equal, len(ours), worst, "tokens and log-probabilities")


def _bytes(token: Token) -> bytes:
    own = token.get("bytes")
    return str(token["token"]).encode() if own is None else bytes(own)


def _texts(name: str, model: Model, ours: str, theirs: str) -> Outcome:
    tokenizer = model.processor.tokenizer
    own, other = tokenizer.encode(ours), tokenizer.encode(theirs.strip())
    equal = next((n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    if own == other:
        return Outcome(name, "pass", equal, len(own), None, "tokens; the engine gives no log-probabilities")
    shown = [tokenizer.decode(ids[equal : equal + 1]) if equal < len(ids) else "its end" for ids in (own, other)]
    return Outcome(name, "FAIL", equal, len(own), None, f"token {equal + 1}: ours {shown[0]!r}, theirs {shown[1]!r}")


def _vectors(name: str, tolerance: float, ours: Vectors, theirs: Vectors) -> Outcome:
    pairs = list(zip(ours["data"], theirs["data"], strict=False))
    if len(ours["data"]) != len(theirs["data"]) or any(len(a["embedding"]) != len(b["embedding"]) for a, b in pairs):
        return Outcome(name, "FAIL", 0, len(pairs), None, "the vectors are not of one number and length")
    apart = [max(abs(x - y) for x, y in zip(a["embedding"], b["embedding"], strict=True)) for a, b in pairs]
    wrong = [n for n, d in enumerate(apart) if not d <= tolerance]
    detail = f"vector {wrong[0] + 1} differs by {apart[wrong[0]]:.3g}" if wrong else "vectors"
    return Outcome(name, "FAIL" if wrong else "pass", len(pairs) - len(wrong), len(pairs), max(apart), detail)
