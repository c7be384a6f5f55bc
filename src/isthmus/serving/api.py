"""The application: routes, and what every request passes through.

A further router of one's own is handed to :func:`create_app`; its routes find the models at
``request.app.state.server``.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Scope

from isthmus.model import Model
from isthmus.serving import chat, errors, page, search, vectors
from isthmus.serving.errors import ApiError
from isthmus.serving.fetch import Remote
from isthmus.serving.http import Gate
from isthmus.serving.limits import Limits
from isthmus.serving.parsing import StrictRoute, field_error
from isthmus.serving.pictures import Pictures
from isthmus.serving.server import ERRORS, Server
from isthmus.version import __version__

router = APIRouter(route_class=StrictRoute)


@router.get("/v1/models", responses=ERRORS, operation_id="models")
async def models(request: Request) -> dict[str, object]:
    """The models that this server has, and what each can do."""
    server: Server = request.app.state.server
    return {"object": "list", "data": [_described(server, name) for name in server.models]}


@router.get("/v1/models/{name}", responses=ERRORS, operation_id="model")
async def model(name: str, request: Request) -> dict[str, object]:
    """One model."""
    server: Server = request.app.state.server
    server.model(name)
    return _described(server, name)


def _described(server: Server, name: str) -> dict[str, object]:
    found = server.models[name]
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "isthmus",
        "kind": found.kind,
        "capabilities": list(found.capabilities),
        "vision": found.processor.image is not None,
        "clips": found.net.reads_clips,
    }


@router.get("/health", responses={503: ERRORS[503]}, operation_id="health")
async def health(request: Request) -> dict[str, str]:
    """Whether requests are taken: for a balancer. 503 while the server finishes what it has before it stops."""
    server: Server = request.app.state.server
    if not server.scheduler.takes_requests:
        raise errors.stopping()
    return {"status": "ok", "version": __version__}


@router.get("/metrics", operation_id="metrics", response_class=Response, responses=ERRORS)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    server: Server = request.app.state.server
    return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def create_app(
    models: Mapping[str, Model],
    *,
    limits: Limits | None = None,
    remote: Remote | None = None,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    routers: Sequence[APIRouter] = (),
    places: Mapping[str, Path] | None = None,
    pictures: Path | None = None,
) -> FastAPI:
    """The application for these models.

    ``remote`` is none where no pictures are fetched, ``key`` where no key is needed, ``hosts`` where requests may
    name any host. ``routers`` are further routes, ``places`` the models' folders, whose scores the page shows,
    ``pictures`` a folder that may be searched. Raises ConfigError where that has no pictures, or too many.
    """
    limits = limits or Limits()
    folder = None if pictures is None else Pictures(pictures, limits.images)
    server = Server(models, limits, remote)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.scheduler.start()
        yield
        server.scheduler.stop()
        server.preparers.shutdown(cancel_futures=True)

    app = FastAPI(
        title="isthmus",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.state.server, app.state.places, app.state.pictures = server, dict(places or {}), folder
    for each in (router, chat.router, vectors.router, page.router, search.router, *routers):
        app.include_router(each)
    _handle_errors(app)
    app.add_middleware(_Gate, server=server, limits=limits, key=key, hosts=hosts)
    return app


class _Gate(Gate):
    """The gate, counting what passes it."""

    def __init__(
        self, app: ASGIApp, *, server: Server, limits: Limits, key: str | None, hosts: frozenset[str] | None
    ) -> None:
        super().__init__(app, limits, key=key, hosts=hosts)
        self.server = server

    def note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.server.metrics.requests.labels(route, str(status)).inc()
        self.server.metrics.latency.labels(route).observe(seconds)


def _handle_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=dict(error.headers))

    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(field_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def _(_: Request, error: HTTPException) -> JSONResponse:
        known = errors.of_status(error.status_code)
        known.headers = error.headers or {}
        return answer(known)

    @app.exception_handler(Exception)
    async def _(_: Request, error: Exception) -> JSONResponse:
        return answer(errors.internal())
