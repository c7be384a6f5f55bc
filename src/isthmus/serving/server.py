"""What the routes share: the models, and a request's place before the scheduler."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

from fastapi import Request

from isthmus.model import Model
from isthmus.serving import schema
from isthmus.serving.errors import ApiError, bad_request
from isthmus.serving.fetch import Remote
from isthmus.serving.limits import Limits
from isthmus.serving.metrics import Metrics
from isthmus.serving.prepare import Reader
from isthmus.serving.scheduler import Call, Event, Found, Said, Scheduler, Ticket

T = TypeVar("T")
PREPARERS = 2
"""Threads that decode pictures and tokenise."""

ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": schema.ErrorBody, "description": what}
    for status, what in (
        (400, "The request is not valid."),
        (401, "The key is missing or wrong."),
        (404, "There is no such model, or no such picture."),
        (408, "The request did not arrive in time."),
        (413, "The body is too large."),
        (415, "The body is not plain JSON."),
        (421, "The server does not answer for that host."),
        (431, "The headers are too large."),
        (429, "The queue is full; Retry-After names the time to wait."),
        (503, "The server is stopping, or the request took too long."),
    )
}


class Server:
    """The models of one application, and what their requests share."""

    def __init__(self, models: Mapping[str, Model], limits: Limits, remote: Remote | None) -> None:
        self.models, self.limits = dict(models), limits
        self.metrics = Metrics()
        self.scheduler = Scheduler(models, limits, self.metrics)
        self.reader = Reader(limits, remote)
        self.started = int(time.time())
        self.preparers = ThreadPoolExecutor(PREPARERS, thread_name_prefix="isthmus-prepare")

    def model(self, name: str, *capabilities: str) -> Model:
        """The model, which has one of the capabilities. Raises ApiError."""
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404, "model_not_found", "This server has no model of that name; /v1/models lists them.", "model"
            )
        if capabilities and not set(capabilities) & set(found.capabilities):
            raise bad_request("model_cannot", "This model cannot do that; /v1/models lists what each can.", "model")
        return found

    def count_read(self, model: str, tokens: int) -> None:
        """Note tokens that a model has read, as ``usage`` counts them."""
        self.metrics.tokens.labels(model, "read").inc(tokens)

    async def prepared(self, function: Callable[[], T]) -> T:
        """What a function returns that decodes or tokenises, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.preparers, function)

    def ticket(self, request: Request, body: schema.BaseRequest, units: int = 1) -> "Hearing":
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        host = request.client.host if request.client else ""

        def hear(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.scheduler.reserve(
            f"{host} {body.user or ''}",
            body.model,
            hear,
            units,
        )
        return Hearing(self, request, ticket, events)


class Hearing:
    """A request before the scheduler: its events, until it ends or its client is gone. Used as a context."""

    def __init__(self, server: Server, request: Request, ticket: Ticket, events: asyncio.Queue[Event]) -> None:
        self.server, self.request, self.ticket, self.events = server, request, ticket, events

    def __enter__(self) -> "Hearing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nobody listens any more; of a request that has ended nothing is left to stop."""
        self.server.scheduler.cancel(self.ticket)

    async def next(self) -> Said | Found:
        """The next event. Raises ApiError when the request failed."""
        event = await self.events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    async def unless_gone(self, answer: Awaitable[T]) -> T:
        """The answer; given up as soon as the client hangs up."""
        work = asyncio.ensure_future(answer)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ApiError(400, "client_gone", "The client closed the connection.")
            return work.result()
        finally:
            work.cancel()
            gone.cancel()

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def call(self, work: Iterator[T]) -> T:
        """The last thing that ``work`` gives, computed in its turn and a piece at a time."""
        self.server.scheduler.submit(self.ticket, [Call(self.ticket, work)])
        found = await self.unless_gone(self.next())
        assert isinstance(found, Found)
        return cast(T, found.value)
