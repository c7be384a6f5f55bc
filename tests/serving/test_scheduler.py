"""The scheduler: answers as given alone, a fair bounded queue, deadlines, gone clients, errors, the end."""

import threading
import time
from dataclasses import replace

import pytest

from isthmus.data.record import Example
from isthmus.data.words import Words
from isthmus.errors import DataError
from isthmus.language import Decoding
from isthmus.serving.engine import Token
from isthmus.serving.errors import ApiError
from isthmus.serving.limits import Limits
from isthmus.serving.metrics import Metrics
from isthmus.serving.scheduler import Call, Found, Said, Scheduler, Text, Work
from tests.serving.helpers import models, until

EXAMPLE, BROKEN = (Example(id=name, source="", streams={}) for name in ("asked", "broken"))


class Slow:
    """A speaker whose tokens come when the test lets them: letters, one of every row per step."""

    has_logprobs, context = True, None

    def __init__(self, rows: int) -> None:
        self.rows, self.most = {}, rows
        self.go, self.stepped = threading.Semaphore(0), 0
        self.begun, self.dropped = [], []

    def room(self):
        return self.most - len(self.rows)

    def begin(self, row, example, decoding, top):
        if example is BROKEN:
            raise DataError("sec" + "ret")
        self.begun.append(row)
        self.rows[row] = 0

    def step(self):
        if not self.go.acquire(timeout=0.005):
            return []
        if self.stepped < 0:
            raise RuntimeError("sec" + "ret")
        self.stepped += 1
        found = []
        for row in self.rows:
            self.rows[row] += 1
            full = self.rows[row] >= row.decoding.max_new_tokens
            found.append(Token(row, 70 + self.rows[row], ended="length" if full else ""))
        return found

    def drop(self, row):
        self.rows.pop(row, None)
        self.dropped.append(row)


class Stage:
    """A scheduler over a slow speaker; what each client hears."""

    def __init__(self, **limits):
        self.limits = replace(Limits(), **{"rows": 2, "queue": 4, **limits})
        self.scheduler = Scheduler({"lm": models()["lm"]}, self.limits, Metrics())
        self.speaker = self.scheduler.speakers["lm"] = Slow(self.limits.rows)
        self.heard = {}
        self.scheduler.start()

    def text(self, name, client="a", tokens=3, example=EXAMPLE):
        events = self.heard[name] = []
        ticket = self.scheduler.reserve(client, "lm", events.append)
        words = Words(models()["lm"].processor.tokenizer)
        work: list[Work] = [Text(ticket, 0, example, Decoding(max_new_tokens=tokens), words, None)]
        self.scheduler.submit(ticket, work)
        return ticket

    def call(self, name, pieces, client="a"):
        events = self.heard[name] = []
        ticket = self.scheduler.reserve(client, "lm", events.append)
        self.scheduler.submit(ticket, [Call(ticket, pieces)])
        return ticket

    def steps(self, count):
        for _ in range(count):
            self.speaker.go.release()

    def ended(self, name):
        event = self.heard[name][-1] if self.heard[name] else None
        return isinstance(event, ApiError | Found) or (isinstance(event, Said) and bool(event.ended))


@pytest.fixture
def stage(request):
    found = Stage(**getattr(request, "param", {}))
    yield found
    found.steps(10_000)
    found.scheduler.stop()


def test_beyond_the_queue_is_429_and_places_come_back(stage):
    running = [stage.text(f"r{n}", client=f"c{n}") for n in range(2)]
    until(lambda: len(stage.speaker.rows) == 2)
    waiting = [stage.text(f"w{n}", client=f"c{n}") for n in range(4)]
    with pytest.raises(ApiError) as refused:
        stage.text("late", client="new")
    assert (refused.value.status, refused.value.headers) == (429, {"retry-after": "1"})
    stage.scheduler.cancel(waiting[0])
    again = stage.text("again", client="new")
    stage.steps(30)
    until(lambda: all(stage.ended(name) for name in ("r0", "r1", "w1", "w2", "w3", "again")))
    assert not stage.heard["w0"]
    assert not stage.scheduler._waiting
    assert len({id(t) for t in (*running, again)}) == 3


def test_one_client_cannot_fill_the_queue(stage):
    for n in range(4):
        stage.text(f"x{n}", client="greedy")
        until(lambda n=n: len(stage.speaker.rows) == min(n + 1, 2))
    with pytest.raises(ApiError):
        stage.text("more", client="greedy")
    stage.text("mine", client="modest")


@pytest.mark.parametrize("stage", [{"queue": 40, "rows": 1}], indirect=True)
def test_clients_take_turns(stage):
    stage.text("first", client="greedy", tokens=1)
    until(lambda: len(stage.speaker.rows) == 1)
    tickets = {stage.text(f"g{n}", client="greedy", tokens=1): f"g{n}" for n in range(5)}
    tickets |= {stage.text(f"m{n}", client="modest", tokens=1): f"m{n}" for n in range(2)}
    stage.steps(8)
    until(lambda: stage.ended("g4"))
    order = [tickets[row.ticket] for row in stage.speaker.begun[1:]]
    assert order == ["g0", "m0", "g1", "m1", "g2", "g3", "g4"] or order == ["m0", "g0", "m1", "g1", "g2", "g3", "g4"]


def test_a_gone_client_gets_no_further_token(stage):
    gone, stays = stage.text("gone", "a", 1000), stage.text("stays", "b", 6)
    stage.steps(3)
    until(lambda: len(stage.heard["stays"]) == 3)
    stage.scheduler.cancel(gone)
    stage.steps(3)
    until(lambda: stage.ended("stays"))
    assert len(stage.heard["gone"]) == 3
    assert stage.speaker.dropped[0].ticket is gone
    assert stays.over
    until(lambda: not stage.speaker.rows)


@pytest.mark.parametrize("stage", [{"deadline": 0.3}], indirect=True)
def test_a_deadline_ends_what_runs_and_what_waits(stage):
    for n in range(3):
        stage.text(f"t{n}", client=f"c{n}", tokens=1000)
    until(lambda: len(stage.speaker.rows) == 2)
    time.sleep(0.4)
    stage.steps(2)
    until(lambda: all(stage.ended(f"t{n}") for n in range(3)))
    for n in range(3):
        assert (stage.heard[f"t{n}"][-1].status, stage.heard[f"t{n}"][-1].code) == (503, "deadline_exceeded")
    assert not stage.speaker.rows


def test_a_text_that_does_not_fit_fails_alone(stage, caplog):
    stage.text("broken", "a", example=BROKEN)
    stage.text("sound", "b")
    stage.steps(3)
    until(lambda: stage.ended("sound") and stage.ended("broken"))
    assert stage.heard["broken"][-1].code == "invalid_prompt"
    assert "secret" not in stage.heard["broken"][-1].message
    assert [event.ended for event in stage.heard["sound"]] == ["", "", "length"]


def test_after_a_failing_step_the_next_texts_are_written(stage, caplog):
    stage.text("lost")
    until(lambda: stage.speaker.rows)
    stage.speaker.stepped = -1
    stage.steps(1)
    until(lambda: stage.ended("lost"))
    assert stage.heard["lost"][-1].status == 500
    assert "secret" not in caplog.text + stage.heard["lost"][-1].message
    assert "RuntimeError" in caplog.text
    assert not isinstance(stage.scheduler.speakers["lm"], Slow)  # a fresh one


def test_calls_take_turns_with_tokens(stage):
    let = threading.Semaphore(0)

    def pieces():
        for n in range(3):
            assert let.acquire(timeout=20)
            yield n

    stage.text("text", "a", 3)
    until(lambda: stage.speaker.rows)
    stage.call("call", pieces(), "b")
    for n in range(3):
        let.release()
        stage.steps(1)
        until(lambda n=n: len(stage.heard["text"]) == n + 1)
    until(lambda: stage.ended("call"))
    assert stage.heard["call"] == [Found(2)]


def test_a_cancelled_call_computes_no_further_piece(stage):
    done = []

    def pieces():
        for n in range(1000):
            done.append(n)
            time.sleep(0.01)
            yield n

    ticket = stage.call("call", pieces())
    until(lambda: done)
    stage.scheduler.cancel(ticket)
    time.sleep(0.05)
    count = len(done)
    time.sleep(0.05)
    assert len(done) == count < 100
    assert not stage.heard["call"]


def test_the_end_answers_what_is_left(stage):
    stage.text("runs", tokens=1000)
    until(lambda: stage.speaker.rows)
    for n in range(2):
        stage.text(f"w{n}", client=f"c{n}", tokens=1000)
    stage.steps(1)
    threading.Thread(target=stage.scheduler.stop).start()
    stage.steps(2)
    until(lambda: all(stage.ended(name) for name in ("runs", "w0", "w1")))
    assert {stage.heard[name][-1].code for name in ("runs", "w0", "w1")} == {"shutting_down"}
    with pytest.raises(ApiError) as refused:
        stage.text("after")
    assert refused.value.status == 503
