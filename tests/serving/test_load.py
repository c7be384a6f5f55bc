"""Many clients for a while: pictures, streams, clients that hang up; every answer as given alone, nothing left over."""

import gc
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from isthmus.serving.limits import Limits
from tests.serving.helpers import Served, asked, encoded, figure, figures, models, on_port, picture, shown, until
from tests.serving.test_pictures import ask as ask_with

CHAT = "/v1/chat/completions"


def requests() -> list[tuple[str, dict]]:
    """A mix of what clients ask."""
    found = []
    for number in range(4):
        for name in ("lm", "llava", "flamingo", "blip2"):
            pictures = () if name == "lm" else (number,)
            body = {
                "model": name,
                "messages": asked("what? " * (1 + 3 * number), *pictures),
                "max_tokens": 4 + 5 * number,
            }
            found.append((CHAT, body | ({"temperature": 1.0, "seed": number} if number % 2 else {})))
    found.append(("/v1/embeddings", {"model": "clip", "input": ["a red cube", shown(1)]}))
    found.append(("/v1/score", {"model": "matcher", "input": [shown(1)], "candidates": ["a", "b"]}))
    found.append((CHAT, ask_with(encoded(picture(1))[:60])))  # a damaged picture
    return found


def text_of(path: str, body: dict, answer: dict):
    """What must not depend on who else asks."""
    if path == CHAT and "choices" in answer:
        return [(c["message"]["content"], c["finish_reason"]) for c in answer["choices"]], answer["usage"]
    if "error" in answer:
        return answer["error"]["code"]
    return [[round(x, 4) for x in d["embedding"]] if "embedding" in d else round(d["score"], 4) for d in answer["data"]]


class Crowd:
    """Clients that ask until the time is over; what went wrong."""

    def __init__(self, served, clients: int, seconds: float) -> None:
        self.served, self.ends = served, time.monotonic() + seconds
        self.asked = requests()
        self.expected = [text_of(*each, served.post(*each).json) for each in self.asked]
        self.wrong: list[str] = []
        self.statuses: dict[int, int] = {}
        self.times: list[float] = []
        self.gone = 0
        self.threads = [threading.Thread(target=self.client, args=(n,)) for n in range(clients)]

    def run(self):
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join(600)

    def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.ends:
            number = draw.randrange(len(self.asked))
            path, body = self.asked[number]
            way = draw.random()
            try:
                if path == CHAT and way < 0.2:
                    self.hang_up(path, body | {"stream": True, "max_tokens": 200})
                elif path == CHAT and way < 0.5 and number < len(self.asked) - 1:
                    self.stream(path, body, number)
                else:
                    began = time.monotonic()
                    found = self.served.post(path, body)
                    self.times.append(time.monotonic() - began)
                    self.note(found.status, number, found.status in (200, 400) and text_of(path, body, found.json))
            except Exception as error:
                self.wrong.append(f"{type(error).__name__} {error}")

    def note(self, status: int, number: int, found) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status in (200, 400) and found != self.expected[number]:
            self.wrong.append(f"{self.asked[number]}: {found} is not {self.expected[number]}")

    def stream(self, path: str, body: dict, number: int) -> None:
        found = self.served.post(path, body | {"stream": True, "stream_options": {"include_usage": True}})
        if found.status != 200:
            self.note(found.status, number, None)
            return
        events = [json.loads(e[6:]) for e in found.raw.decode().split("\n\n") if e.startswith("data: {")]
        text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        ended = [c["finish_reason"] for e in events for c in e["choices"] if c["finish_reason"]]
        self.note(200, number, ([(text, *ended)], events[-1]["usage"]))

    def hang_up(self, path: str, body: dict) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        try:
            connection.getresponse().read(40)
        finally:
            connection.close()
        self.gone += 1


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    gc.collect()
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def idle(served) -> bool:
    """Whether nothing is being written and nothing waits."""
    known = figures(served)
    return not any(value for name, value in known.items() if name.startswith(("isthmus_queue", "isthmus_running{")))


def check(served, process: int, clients: int, seconds: float, warm: float) -> Crowd:
    Crowd(served, clients, warm).run()  # caches and threads that stay
    stalled = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    before = resident(process)
    crowd = Crowd(served, clients, seconds)
    crowd.run()
    assert not crowd.wrong, crowd.wrong[:3]
    assert set(crowd.statuses) <= {200, 400, 429, 503}, crowd.statuses
    assert crowd.statuses[200] > clients
    assert crowd.gone
    until(lambda: idle(served), 30)  # nothing is written for clients that are gone
    after = resident(process)
    for sock in stalled:
        sock.close()
    assert after < before * 1.05, f"memory grew from {before:,} to {after:,} bytes"
    return crowd


def test_a_few_clients_for_a_few_seconds():
    with on_port(limits=replace(Limits(), features=2**20, prefixes=2**20)) as served:
        check(served, os.getpid(), 8, 15.0, warm=2.0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_clients_for_ten_minutes(tmp_path):
    """The program itself, in a process of its own: the memory of the clients' threads is not the server's."""
    for name, model in models().items():
        model.save(tmp_path / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, "-m", "isthmus", "serve", *map(str, tmp_path.iterdir()), "--port", str(port)]
    server = subprocess.Popen(arguments)
    served = Served(f"http://127.0.0.1:{port}", port)
    try:
        while True:
            try:
                served.get("/health")
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.2)
        crowd = check(served, server.pid, 32, 600.0, warm=30.0)
    finally:
        server.terminate()
        server.wait(60)
    assert server.returncode in (0, -15)
    times = sorted(crowd.times)
    half, most = times[len(times) // 2], times[-len(times) // 100]
    print(f"{crowd.statuses}, {crowd.gone} hung up; seconds per answer: median {half:.3f}, 99 % {most:.3f}")


def test_a_client_that_hangs_up_stops_the_work(monkeypatch):
    """Tokens are written when the test lets them, so that no machine is slow or fast enough to end the answer first."""
    with on_port({"lm": models()["lm"]}) as served:
        scheduler, let = served.app.state.server.scheduler, threading.Semaphore(0)
        step = scheduler._step
        monkeypatch.setattr(scheduler, "_step", lambda name: let.acquire(timeout=0.02) and step(name))
        more = {"max_tokens": 180, "stream": True, "temperature": 0, "logprobs": True}  # with them each token is told
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        body = json.dumps({"model": "lm", "messages": asked(), **more})
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        let.release(5)
        answer = connection.getresponse()
        for _ in range(2 * 6):  # whose turn it is, then five tokens; a blank line behind each
            assert answer.readline()
        answer.close()
        connection.close()
        until(lambda: figure(served, "isthmus_cancelled_total") == 1, 30)
        let.release(1000)
        until(lambda: not scheduler._rows["lm"], 30)
        # One more where the next step had begun when the client was found gone.
        assert figure(served, 'isthmus_tokens_total{kind="written",model="lm"}') in (5, 6)


def test_a_request_that_takes_too_long_is_stopped(monkeypatch):
    with on_port({"lm": models()["lm"]}, limits=replace(Limits(), deadline=1.0)) as served:
        scheduler = served.app.state.server.scheduler
        step = scheduler._step
        monkeypatch.setattr(scheduler, "_step", lambda name: (time.sleep(0.05), step(name)))
        body = {"model": "lm", "messages": asked(), "max_tokens": 180}
        found = served.post(CHAT, body)
        assert (found.status, found.code) == (503, "deadline_exceeded")
        assert int(found.headers["retry-after"]) > 0
        streamed = served.post(CHAT, body | {"stream": True})
        assert streamed.status == 200
        *told, last = streamed.raw.decode().strip().split("\n\n")
        assert len(told) > 1
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        until(lambda: idle(served))
        assert served.post(CHAT, body | {"max_tokens": 1}).status == 200


def test_sigterm_finishes_what_was_taken_and_takes_no_more():
    with on_port({"lm": models()["lm"]}) as served:
        body = {"model": "lm", "messages": asked(), "max_tokens": 180}
        expected = served.post(CHAT, body).json["choices"]
        found = []
        threads = [threading.Thread(target=lambda: found.append(served.post(CHAT, body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        scheduler = served.app.state.server.scheduler
        while len(scheduler._rows["lm"]) < 3:
            time.sleep(0.002)
        served.server.handle_exit(15, None)
        for thread in threads:
            thread.join(60)
        assert [f.json["choices"] for f in found] == [expected] * 3
        served.thread.join(30)
        assert not served.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            served.post(CHAT, body)
