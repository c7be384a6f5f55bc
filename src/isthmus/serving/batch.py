"""``isthmus batch``: a file of requests in OpenAI's batch form, answered offline by the server's own application.

Nothing listens: each request goes through the same checks, the same queue and the same routes in this process. Every
answer is written as soon as it is there, so a run that was interrupted goes on where it stopped.
"""

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from fastapi import FastAPI
from starlette.types import Message, Scope

from isthmus.errors import DataError

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score", "/v1/classify")
CLIENT = ("batch", 0)
_TRIES = 1000
_PAUSE = 0.05


class RequestLine(TypedDict):
    """A line of the file of requests."""

    custom_id: str
    method: str
    url: str
    body: dict[str, object]


class Response(TypedDict):
    """What the application answers to a request."""

    status_code: int
    request_id: str
    body: dict[str, object]


class AnswerLine(TypedDict):
    """A line of the file of answers."""

    id: str
    custom_id: str
    response: Response
    error: object


@dataclass(slots=True)
class Outcome:
    """What a run did: requests in the file, those answered before, now, and of all these with an error."""

    requests: int = 0
    before: int = 0
    answered: int = 0
    failed: int = 0


def run_batch(
    app: FastAPI, requests: Path, out: Path, *, together: int, note: Callable[[Outcome], None] = lambda _: None
) -> Outcome:
    """Answer what ``out`` does not answer yet, ``together`` requests at a time; one line of JSON per answer.

    Raises DataError for a line that is no request of the form, before anything is computed, and for an ``out`` that
    belongs to other requests.
    """
    lines = _read(requests)
    done = _answered(out, {line["custom_id"] for line in lines})
    outcome = Outcome(requests=len(lines), before=len(done), failed=sum(status != 200 for status in done.values()))
    waiting = iter([line for line in lines if line["custom_id"] not in done])
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:

        def write(line: AnswerLine) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            outcome.answered += 1
            outcome.failed += line["response"]["status_code"] != 200
            note(outcome)

        asyncio.run(_run(app, waiting, together, write))
    return outcome


def models_of(requests: Path) -> list[str]:
    """The models that a file of requests names. Raises DataError as :func:`run_batch` does."""
    named = [line["body"].get("model") for line in _read(requests)]
    return list(dict.fromkeys(name for name in named if isinstance(name, str) and name))


def _read(path: Path) -> list[RequestLine]:
    """The requests, each checked for its form. Raises DataError naming the line."""
    found: dict[str, RequestLine] = {}
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError:
        raise DataError(f"There is no readable file {path}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; write it again.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{where} is not a JSON object; write one request per line.") from None
        known = ("custom_id", "method", "url", "body")
        if not isinstance(value, dict) or set(value) != set(known):
            raise DataError(f"{where}: a request has the fields {', '.join(known)}, and no others.")
        name, method, url, body = (value[field] for field in known)
        if not isinstance(name, str) or not name or name in found:
            raise DataError(f"{where}: custom_id must be a text of its own, which no other line has.")
        if method != "POST" or url not in ROUTES or not isinstance(body, dict):
            raise DataError(f"{where}: method is POST, url one of {', '.join(ROUTES)}, body an object.")
        if body.get("stream"):
            raise DataError(f"{where}: an answer in a file cannot stream; leave stream out.")
        found[name] = RequestLine(custom_id=name, method=method, url=url, body=body)
    if not found:
        raise DataError(f"{path} holds no requests.")
    return list(found.values())


def _answered(out: Path, known: set[str]) -> dict[str, int]:
    """The requests that have their answer already, with its status; a line that was cut off by the end of a run is
    taken away, and so is an error of the server's own, which another try may not meet."""
    if not out.exists():
        return {}
    kept: list[str] = []
    done: dict[str, int] = {}
    for line in out.read_text(encoding="utf-8", errors="replace").split("\n"):  # an answer may hold other ends of lines
        try:
            answer = json.loads(line)
            name, status = answer["custom_id"], answer["response"]["status_code"]
        except (ValueError, KeyError, TypeError):
            continue
        if name not in known:
            raise DataError(f"{out} answers {name!r}, which is no request of this file; name another --out.")
        if name not in done and status < 500 and status != 429:
            kept.append(line)
            done[name] = status
    aside = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    aside.replace(out)
    return done


async def _run(
    app: FastAPI, waiting: Iterator[RequestLine], together: int, write: Callable[[AnswerLine], None]
) -> None:
    async def work() -> None:
        for line in waiting:
            status, body = await _patient(app, line["url"], line["body"])
            answer = AnswerLine(
                id=f"batch_req_{uuid.uuid4().hex}",
                custom_id=line["custom_id"],
                response=Response(status_code=status, request_id=uuid.uuid4().hex, body=body),
                error=None if status == 200 else body.get("error"),
            )
            write(answer)

    async with app.router.lifespan_context(app), asyncio.TaskGroup() as group:
        for _ in range(together):
            group.create_task(work())


async def _patient(app: FastAPI, path: str, body: Mapping[str, object]) -> tuple[int, dict[str, object]]:
    """Posted again while the queue is full: there is time."""
    status, answer = await post(app, path, body)
    for _ in range(_TRIES):
        if status != 429:
            break
        await asyncio.sleep(_PAUSE)
        status, answer = await post(app, path, body)
    return status, answer


async def post(app: FastAPI, path: str, body: Mapping[str, object]) -> tuple[int, dict[str, object]]:
    """Status and answer of one request to an application in this process."""
    raw = json.dumps(body).encode()
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())],
        "client": CLIENT,
        "server": ("batch", 0),
    }
    given, status, pieces, never = False, 0, [], asyncio.Event()

    async def receive() -> Message:
        nonlocal given
        if given:
            await never.wait()
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(b"".join(pieces))
