"""Tiny random models behind a server: in this process without a port, or on a port of a thread of its own."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image as PilImage

from isthmus.model import Model
from isthmus.nn.connectors.resampler import ResamplerConfig
from isthmus.serving.api import create_app
from isthmus.serving.limits import Limits
from isthmus.serving.run import server
from tests.interop import tiny_models


@cache
def models() -> dict[str, Model]:
    """One model per kind of work."""
    return {
        "clip": tiny_models.clip(),
        "lm": tiny_models.lm(),
        "llava": tiny_models.llava(),
        "flamingo": tiny_models.flamingo(
            template="paper", resampler=replace(ResamplerConfig.open_flamingo(), frames=4)
        ),
        "blip2": tiny_models.blip2(),
        "matcher": tiny_models.blip2(None),
    }


def picture(number: int = 0, size: tuple[int, int] = (20, 16)) -> PilImage.Image:
    rows = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PilImage.fromarray(rows)


def encoded(image: PilImage.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def data_url(raw: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def shown(number: int = 0) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(encoded(picture(number)))}}


def asked(text: str = "how many red things are there?", *pictures: int) -> list[dict[str, Any]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": [*(shown(n) for n in pictures), {"type": "text", "text": text}]}]


def figures(served) -> dict[str, float]:
    """The server's own figures, by name and labels."""
    lines = served.get("/metrics").raw.decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def figure(served, name: str) -> float:
    return figures(served).get(name, 0.0)


def until(what: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits until ``what`` is true. Raises AssertionError when it is not within ``seconds``."""
    ends = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.005)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


@contextmanager
def on_port(served: dict[str, Model] | None = None, **options: Any) -> Iterator[Any]:
    """(base URL, application, uvicorn's server) of a server on a free port."""
    limits = options.pop("limits", None) or Limits()
    app = create_app(served or models(), limits=limits, **options)
    running = server(app, "127.0.0.1", 0, limits)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(running.serve()), daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", port, app, running, thread)
    finally:
        running.handle_exit(15, None)
        thread.join(30)
        loop.close()


@dataclass
class Served:
    url: str
    port: int
    app: Any = None
    server: Any = None
    thread: Any = None

    def post(self, path: str, body: Any = None, *, raw: bytes | None = None, headers: Any = None) -> Reply:
        content = json.dumps(body).encode() if raw is None else raw
        return self.ask("POST", path, content, {"content-type": "application/json", **(headers or {})})

    def get(self, path: str, headers: Any = None) -> Reply:
        return self.ask("GET", path, None, headers or {})

    def ask(self, method: str, path: str, content: bytes | None, headers: dict[str, str]) -> Reply:
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, content, headers)
            found = connection.getresponse()
            return Reply(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
        finally:
            connection.close()
