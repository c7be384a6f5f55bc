"""What stands before the application: sizes, times, hosts and keys of requests, as pure ASGI."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import Mapping

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from isthmus.serving import errors
from isthmus.serving.errors import ApiError, failed
from isthmus.serving.limits import Limits

OPEN = ("/health", "/", "/page.css", "/page.js")
"""Paths that need no key: they reveal nothing of the models."""

LINGER = 1.0
"""Seconds in which a refused connection may still send what nobody reads."""

_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def encoded(error: ApiError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error."""
    body = json.dumps(error.body()).encode()
    own = [(name.encode(), value.encode()) for name, value in error.headers.items()]
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *own], body


async def refuse(send: Send, error: ApiError) -> None:
    headers, body = encoded(error)
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Gate:
    """Lets a request in when its host, key, kind and size are in order, read in full and in time.

    ``hosts``: what a Host header may name, none for any; that is what keeps a web page from reaching a server on
    loopback under a name of its own.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, *, key: str | None = None, hosts: frozenset[str] | None = None
    ) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self.key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        began = time.monotonic()
        status, read = 0, False

        async def out(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            self._check(scope, headers)
            body = await self._body(headers, receive)
            read = True
            async with asyncio.timeout(self.limits.deadline + 5):
                await self.app(scope, replayed(body, receive), out)
        except ApiError as error:
            if not read:
                await self._discard(receive)
            await refuse(out, error)
        except TimeoutError:
            if not status:
                await refuse(out, errors.too_late())
        except Exception as error:  # the framework has answered it, or the connection is beyond answers
            failed(error)
            if not status:
                await refuse(out, errors.internal())
        finally:
            self.note(scope, status, time.monotonic() - began)

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        """What came of a request; status 0 for no answer."""

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])
        if size > self.limits.headers:
            raise ApiError(431, "headers_too_large", "The request's line and headers are larger than allowed.")
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            raise ApiError(421, "wrong_host", "This server does not answer for the host that the request names.")
        if self.key is not None and scope["path"] not in OPEN:
            sort, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not hmac.compare_digest(given.strip(), self.key) or sort.lower() != b"bearer":
                raise ApiError(
                    401,
                    "invalid_api_key",
                    "The key is missing or wrong; send it as Authorization: Bearer KEY.",
                    headers={"www-authenticate": "Bearer"},
                )
        if scope["method"] in ("POST", "PUT", "PATCH"):
            content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if content_type != b"application/json":
                raise ApiError(
                    415, "unsupported_media_type", "The body must be JSON, of content type application/json."
                )
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise ApiError(415, "unsupported_encoding", "The body must not be compressed.")

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The complete body. Raises ApiError when it is too large, by its header or as it comes, or too slow."""
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.limits.body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.reading):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "incomplete_body", "The request's body is incomplete.")
                    body += message.get("body", b"")
                    if len(body) > self.limits.body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(
                408, "too_slow", "The request did not arrive in time.", headers={"connection": "close"}
            ) from None

    async def _discard(self, receive: Receive) -> None:
        """Read on and drop what comes: a client that still sends would lose the answer with its connection."""
        left = 3 * self.limits.body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.limits.reading):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _too_large(self) -> ApiError:
        message = f"The request's body is larger than {self.limits.body:,} bytes."
        return ApiError(413, "body_too_large", message, headers={"connection": "close"})


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body once and then what comes from the connection: its end."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _host(header: bytes) -> str:
    """A Host header's name without its port."""
    name = header.decode("latin-1").lower()
    return name.partition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]


class Protocol(H11Protocol):
    """uvicorn's protocol with OpenAI's form for what is no HTTP, and an end to connections that say nothing."""

    reading = Limits().reading
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()

    def _wait_for_headers(self) -> None:
        if self.timeout_keep_alive_task is None:
            self._patience = self.loop.call_later(self.reading, self._silent)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        # A request that is not complete yet has the time that was given when its connection, or it, began.
        if self.conn.their_state is h11.IDLE and self.cycle is not None and self._patience.cancelled():
            self._patience = self.loop.call_later(self.reading, self._silent)
        elif self.conn.their_state is not h11.IDLE:
            self._patience.cancel()

    def _silent(self) -> None:
        """Headers did not arrive in time."""
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        error = errors.bad_request("invalid_http", "This is no valid HTTP request, or its headers are too large.")
        headers, body = encoded(error)
        response = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
        with contextlib.suppress(h11.LocalProtocolError):  # in the middle of an answer nothing more can be said
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        # Closed at once, with bytes unread, the connection would be reset and the answer lost.
        self._refused = True
        self.loop.call_later(LINGER, self.transport.close)
