"""A stand-in for an OpenAI-compatible endpoint: a small threaded HTTP server that answers by a function, or fails."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[Mapping[str, Any]], str]


class StandIn(ThreadingHTTPServer):
    """``answer`` gets the request's body and returns the reply's text. ``faults`` are taken one per request, from the
    front, until none is left; then all is well:

    ``429`` with a Retry-After, ``500``, ``401``, ``404``, ``400``, ``cut`` (the body breaks off), ``no-json``,
    ``no-choices``, ``slow`` (longer than the client waits), ``wrong-model``, ``no-usage``, ``length``, ``hold`` (until
    :attr:`release`).

    ``served`` counts the whole replies by their request's key; ``most`` is how many were open at once.
    """

    daemon_threads = True

    def __init__(self, answer: Answer, *, model: str = "writer", faults: list[str] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.model, self.faults = answer, model, list(faults or [])
        self.served: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.release = threading.Event()
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "StandIn":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no fault of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def log_message(self, *_: object) -> None:
        """Quietly."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization", ""))
            fault = server.faults.pop(0) if server.faults else ""
        try:
            self._reply(body, fault)
        finally:
            with server.lock:
                server.now -= 1

    def _reply(self, body: Mapping[str, Any], fault: str) -> None:
        server = self.server
        if fault == "slow":
            time.sleep(0.6)
        if fault == "hold":
            server.release.wait(20)
        time.sleep(server.delay)
        if fault in ("429", "500", "401", "404", "400"):
            retry = {"retry-after-ms": "5"} if fault == "500" else {"Retry-After": "0.02"} if fault == "429" else {}
            self._send(int(fault), json.dumps({"error": {"message": f"fault {fault}"}}).encode(), headers=retry)
            return
        completion: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "another" if fault == "wrong-model" else server.model,
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "length" if fault == "length" else "stop",
                    "message": {"role": "assistant", "content": server.answer(body)},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        if fault == "no-usage":
            del completion["usage"]
        if fault == "no-choices":
            del completion["choices"]
        raw = json.dumps(completion).encode()
        if fault == "no-json":
            raw = raw[: len(raw) // 2]
        if fault == "cut":
            self._send(200, raw[: len(raw) // 2], length=len(raw))
            self.close_connection = True
            return
        self._send(200, raw)
        if not fault:
            with server.lock:
                server.served[self.headers["Idempotency-Key"]] += 1

    def _send(
        self, status: int, raw: bytes, *, length: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        told = {"Content-Type": "application/json", "Content-Length": str(length or len(raw))}
        for name, value in {**told, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)
