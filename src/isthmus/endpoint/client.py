"""One request to an OpenAI-compatible endpoint and its reply.

Waiting out 429 (with its ``Retry-After``), 5xx, timeouts and connections that break is the ``openai`` client's work;
what it does not check is checked here: replies that are no JSON or no chat completion, and another model's name.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel

from isthmus.errors import ConfigError, EndpointError, MissingExtraError, ReplyError

if TYPE_CHECKING:
    import openai

KEY = "OPENAI_API_KEY"
"""The environment variable that holds the key, unless another is named."""
_BAD_REPLIES = 3
"""Replies that are no chat completion before a request is given up."""

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """``messages`` to be answered. ``name`` says what they are about, in messages to people; it is not sent.
    ``attempt`` counts repetitions of the same request; it is sent as the seed."""

    name: str
    messages: tuple[Message, ...]
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back for the request with this hash. Tokens are none where the endpoint does not report them."""

    request: str
    name: str
    text: str
    finish: str = ""
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Endpoint:
    """A model at a URL. A URL without a path gets ``/v1``. The key is read from the environment variable ``key``; an
    endpoint that needs none gets none. ``options`` are further fields of the request; one that is none is left
    out (``{"max_tokens": None, "max_completion_tokens": 500}``).

    Raises ConfigError for what is no URL, MissingExtraError without the ``openai`` package (at the first request).
    """

    url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 6
    key: str = KEY
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.url!r} is no URL of an endpoint; write it as http://127.0.0.1:8000/v1.")
        if not self.model:
            raise ConfigError(f"Name the model at {self.place} (--model).")
        if self.max_tokens < 1 or self.timeout <= 0 or self.retries < 0:
            raise ConfigError("An endpoint needs max_tokens >= 1, timeout > 0 and retries >= 0.")

    @property
    def base(self) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))

    @property
    def place(self) -> str:
        """The URL without user, password and query: what may be shown and kept."""
        parts = urlsplit(self.base)
        host = parts.hostname or ""
        return urlunsplit((parts.scheme, f"{host}:{parts.port}" if parts.port else host, parts.path, "", ""))

    def describe(self) -> dict[str, object]:
        """What decides its answers, for manifests."""
        settings = {"model": self.model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        return {**settings, **self.options}

    def hash(self, request: Request) -> str:
        """sha256 of all that decides the reply, where the endpoint stands aside."""
        settings = {**self.describe(), "messages": [dict(m) for m in request.messages], "seed": request.attempt}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @cached_property
    def _client(self) -> "openai.OpenAI":
        try:
            import openai
        except ImportError:
            raise MissingExtraError(
                "Asking an endpoint needs the openai client: pip install 'isthmus[endpoint]'."
            ) from None
        # The client insists on a key; an endpoint without one never reads it.
        key = os.environ.get(self.key) or "none"
        return openai.OpenAI(base_url=self.base, api_key=key, timeout=self.timeout, max_retries=self.retries)

    def send(self, request: Request) -> Reply:
        """Its reply. Raises EndpointError where further requests would fail too (key, model, quota), ReplyError where
        only this one did."""
        for attempt in range(_BAD_REPLIES):
            try:
                return self._once(request)
            except _NoCompletionError as error:
                fault = error
                time.sleep(min(0.05 * 4**attempt, 5.0))
        raise ReplyError(f"bad reply: {self.place} answered {request.name} {_BAD_REPLIES} times with {fault}")

    def _once(self, request: Request) -> Reply:
        client = self._client  # says which extra is missing, before the package is imported

        import openai

        name = self.hash(request)
        # Its types are of OpenAI's own models; others take further fields, and answer anything.
        create = cast(Callable[..., object], client.chat.completions.create)
        try:
            found = create(
                messages=[dict(m) for m in request.messages],
                extra_headers={"Idempotency-Key": name},
                **{k: v for k, v in {**self.describe(), "seed": request.attempt}.items() if v is not None},
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointError(
                f"{self.place} refuses the key ({_detail(error)}). It is read from the environment variable {self.key}."
            ) from None
        except openai.NotFoundError as error:
            raise EndpointError(
                f"{self.place} has no model {self.model!r}, or does not complete chats ({_detail(error)}). Check the "
                "URL (it usually ends in /v1) and the model's name."
            ) from None
        except openai.RateLimitError as error:
            raise EndpointError(
                f"{self.place} takes no more requests for now ({_detail(error)}), also after {self.retries} tries. The "
                "same command goes on where this one stopped; fewer at once may help (--concurrency, of a judge --set "
                "task.judge.concurrency=1)."
            ) from None
        except openai.APIStatusError as error:
            raise ReplyError(f"request refused: {self.place} answered {request.name} with {_detail(error)}") from None
        except openai.APITimeoutError:
            raise ReplyError(
                f"no answer: {self.place} took longer than {self.timeout:g} s for {request.name}"
            ) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise ReplyError(
                f"no answer: {self.place} did not answer {request.name} ({cause}): is a server running at that URL?"
            ) from None
        except ValueError as error:  # a body that says it is JSON and is none
            raise _NoCompletionError(f"no JSON ({error})") from None
        return self._read(found, request, name)

    def _read(self, found: object, request: Request, name: str) -> Reply:
        # The client checks no shapes: a server's JSON of any kind, or its text, comes as it is.
        facts = found.model_dump(warnings=False) if isinstance(found, BaseModel) else {}
        choices = facts.get("choices")
        choice = choices[0] if isinstance(choices, Sequence) and choices else None
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if choice is None or not isinstance(message, Mapping):
            raise _NoCompletionError(f"no chat completion ({str(found)[:80]!r})")
        model = str(facts.get("model") or "")
        if model and not model.startswith(self.model):
            raise EndpointError(
                f"{self.place} got a request for the model {self.model!r} and answered as {model!r}. Nothing is kept "
                "of another model's answers: name the one that is meant (--model; of a judge --judge-model)."
            )
        usage = facts.get("usage") or {}
        return Reply(
            request=name,
            name=request.name,
            text=str(message.get("content") or ""),
            finish=str(choice.get("finish_reason") or ""),
            model=model,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )


class _NoCompletionError(Exception):
    """A reply that is of no use: the request can only be repeated."""


def _detail(error: "openai.APIStatusError") -> str:
    """Status and message of an error, in one short line."""
    return " ".join(f"{error.status_code} {error.message}".split())[:200]
