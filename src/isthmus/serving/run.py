"""The application on a port: uvicorn with this server's limits, finishing what it has before it stops."""

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from isthmus.errors import ConfigError
from isthmus.serving.http import Protocol
from isthmus.serving.limits import Limits
from isthmus.serving.scheduler import Scheduler


class Draining(uvicorn.Server):
    """On SIGTERM and Ctrl-C new requests are refused and those that were taken are finished."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self.scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.scheduler.draining = True
        super().handle_exit(sig, frame)


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at every address of ``host``, not listening yet, closed at the end; port 0 is any that is free. Raises
    ConfigError where that cannot be: before a model is opened."""
    found: list[socket.socket] = []
    try:
        _bind(host, port, found)
        yield found
    finally:
        for one in found:
            one.close()


def _bind(host: str, port: int, found: list[socket.socket]) -> None:
    try:
        for family, kind, _, _, address in dict.fromkeys(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)):
            one = socket.socket(family, kind)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], found[0].getsockname()[1] or port, *address[2:]))
    except OSError as error:
        why = "because something else listens there" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise ConfigError(f"Cannot serve at port {port} of {host} {why}: choose another --port or --host.") from None


def server(app: FastAPI, host: str, port: int, limits: Limits, *, log_requests: bool = False) -> Draining:
    """A server for the application, to be run. With ``log_requests`` the log has a line per request, of its address
    and route and never of its body."""

    class Own(Protocol):
        reading = limits.reading

    log = logging.getLogger("uvicorn.access")
    log.setLevel(logging.INFO if log_requests else logging.WARNING)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Own,
        ws="none",
        log_config=None,
        access_log=log_requests,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=int(limits.reading),
        h11_max_incomplete_event_size=limits.headers,
        timeout_graceful_shutdown=int(limits.deadline),
    )
    return Draining(config, app.state.server.scheduler)
