"""The application on a port: uvicorn with this server's limits, finishing what it has before it stops."""

import logging
from types import FrameType

import uvicorn
from fastapi import FastAPI

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
