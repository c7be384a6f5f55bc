"""Requests to an endpoint with faults: each is answered once and kept, nothing is lost, nothing comes twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from isthmus.endpoint import Budget, Endpoint, Replies, Request, send_all
from isthmus.errors import ConfigError, DataError, EndpointError, MissingExtraError, ReplyError
from tests.standin import StandIn


def last(body):
    return "echo: " + body["messages"][-1]["content"]


def requests(count):
    return [Request(f"r{i}", ({"role": "user", "content": f"number {i}"},)) for i in range(count)]


def endpoint(server, **options):
    return Endpoint(server.url, "writer", **{"timeout": 0.3, "retries": 4} | options)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replies.jsonl"


def test_faults_lose_nothing_and_double_nothing(path):
    faults = ["429", "500", "cut", "no-json", "slow", "no-choices", "500", "429"]
    with StandIn(last, faults=faults) as server, Replies(path) as replies:
        outcome = send_all(endpoint(server), requests(12), replies, concurrency=3)
        assert (outcome.sent, outcome.failed, outcome.stopped) == (12, {}, "")
        assert not server.faults
        assert 1 < server.most <= 3, "several at once, never more than asked for"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(f"echo: number {i}" for i in range(12))
    assert {row["finish"] for row in rows} == {"stop"}
    assert rows[0]["prompt_tokens"] == 100


def test_known_replies_are_not_asked_again(path):
    with StandIn(last) as server:
        for expected in (4, 0):
            with Replies(path) as replies:
                done = []
                assert send_all(endpoint(server), requests(4), replies, progress=done.append).sent == expected
                assert done[-1] == 4
        with Replies(path) as replies:
            asked = send_all(endpoint(server, temperature=0.1), requests(1), replies).sent
        assert asked == 1, "another temperature is another request"
        assert set(server.served.values()) == {1}


def test_equal_requests_are_asked_once(path):
    twins = [Request("a", ({"role": "user", "content": "x"},)), Request("b", ({"role": "user", "content": "x"},))]
    with StandIn(last) as server, Replies(path) as replies:
        assert send_all(endpoint(server), twins, replies).sent == 1
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [("401", "OPENAI_API_KEY"), ("404", "no model 'writer'"), ("wrong-model", "answered as 'another'")],
)
def test_what_would_fail_again_stops(path, fault, words):
    with StandIn(last, faults=[fault] * 9) as server, Replies(path) as replies:
        with pytest.raises(EndpointError, match=words):
            send_all(endpoint(server), requests(9), replies, concurrency=1)
        assert len(server.requests) == 1
        assert len(replies) == 0


def test_replies_on_their_way_are_kept_when_it_stops(path):
    """One of three fails for good while the others are being written: those are paid for."""
    with StandIn(last, faults=["", "", "401"]) as server, Replies(path) as replies:
        server.delay = 0.05
        with pytest.raises(EndpointError):
            send_all(endpoint(server), requests(3), replies, concurrency=3)
        assert len(replies) == 2


def test_one_request_may_fail_many_in_a_row_stop(path):
    with StandIn(last, faults=["400"]) as server, Replies(path) as replies:
        outcome = send_all(endpoint(server), requests(3), replies, concurrency=1)
        assert (outcome.sent, list(outcome.failed)) == (2, ["r0"])
        assert "fault 400" in outcome.failed["r0"]
        server.faults[:] = ["400"] * 9
        with pytest.raises(EndpointError, match="5 requests in a row"):
            send_all(endpoint(server, temperature=0.2), requests(9), replies, concurrency=1)
    with (
        Replies(path) as replies,
        pytest.raises(EndpointError, match=r"running at that URL\? The same command goes on"),
    ):
        send_all(endpoint(server, temperature=0.2, retries=0), requests(9), replies, concurrency=1)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"isthmus\[endpoint\]"):
        Endpoint("http://127.0.0.1:9", "writer").send(requests(1)[0])


def test_nobody_there(path):
    quiet = Endpoint("http://127.0.0.1:9", "writer", retries=0, timeout=1)
    with pytest.raises(ReplyError, match="did not answer r0"):
        quiet.send(requests(1)[0])


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with StandIn(last) as server:
        endpoint(server, key="MY_KEY").send(requests(1)[0])
        assert server.keys == ["Bearer secret"]
        told = endpoint(server, key="MY_KEY")
        assert "secret" not in json.dumps(told.describe()) + repr(told)


def test_a_url_is_shown_without_its_password():
    asked = Endpoint("http://me:pass@localhost:8000?x=1", "m")
    assert asked.place == "http://localhost:8000/v1"
    with pytest.raises(ConfigError, match="no URL"):
        Endpoint("localhost:8000", "m")


def test_options_left_out_and_added():
    with StandIn(last) as server:
        endpoint(server, options={"max_tokens": None, "top_p": 0.5}).send(requests(1)[0])
        body = server.requests[0]
        assert "max_tokens" not in body
        assert body["top_p"] == 0.5
        assert body["seed"] == 0


@pytest.mark.parametrize(
    "limits", [{"money": 0.0065, "price_in": 10.0, "price_out": 50.0}, {"tokens": 400}], ids=["money", "tokens"]
)
def test_a_budget_stops_before_it_is_passed(path, limits):
    """A reply takes 100 and 20 tokens: 0.002 of money. No further one fits beside three."""
    with StandIn(last) as server, Replies(path) as replies:
        budget = Budget(**limits)
        outcome = send_all(endpoint(server, max_tokens=20), requests(9), replies, concurrency=4, budget=budget)
        assert outcome.stopped == "the budget is used up"
        assert outcome.sent == len(replies) == 3
        again = Budget(**limits)
        assert send_all(endpoint(server, max_tokens=20), requests(9), replies, budget=again).sent == 0, "all runs count"
        assert again.prompt_tokens == 300


def test_budgets_that_cannot_be_kept(path):
    with pytest.raises(ConfigError, match="prices"):
        Budget(money=1.0)
    with StandIn(last, faults=["no-usage"]) as server, Replies(path) as replies:
        with pytest.raises(EndpointError, match="did not report"):
            send_all(endpoint(server), requests(2), replies, concurrency=1, budget=Budget(tokens=10**6))
        assert len(replies) == 1, "what was paid for is kept"


def test_one_process_at_a_time(path):
    with Replies(path), pytest.raises(DataError, match="another process"), Replies(path):
        pass


def test_a_torn_line_is_asked_again_damage_is_named(path):
    with StandIn(last) as server:
        with Replies(path) as replies:
            send_all(endpoint(server), requests(3), replies, concurrency=1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        with Replies(path) as replies:
            assert send_all(endpoint(server), requests(3), replies).sent == 1
        assert path.read_bytes() == whole
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"), Replies(path):
        pass


KILLED = """
import sys
from isthmus.endpoint import Endpoint, Replies, send_all
from tests.endpoint.test_endpoint import requests
with Replies(sys.argv[2]) as replies:
    send_all(Endpoint(sys.argv[1], "writer"), requests(40), replies, concurrency=4)
"""


def test_kill_nine_and_go_on(path):
    """What was answered whole before the kill is on the disk, apart from those that were on their way."""
    with StandIn(last) as server:
        server.delay = 0.02
        child = subprocess.Popen([sys.executable, "-c", KILLED, server.url, str(path)], cwd=os.getcwd())
        deadline = time.time() + 60
        while sum(server.served.values()) < 10 and time.time() < deadline:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        before = len(path.read_bytes().splitlines())
        assert before >= 5
        with Replies(path) as replies:
            outcome = send_all(endpoint(server), requests(40), replies, concurrency=4)
            assert len(replies) == 40
            assert 40 - before <= outcome.sent + 1
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["request"] for row in rows}) == len(rows) == 40, "nothing lost, nothing twice"


def test_an_interruption_keeps_what_is_on_its_way(path):
    """Ctrl-C while replies are being written: they are kept, and the rest is not asked."""
    with StandIn(last, faults=["", "hold"]) as server, Replies(path) as replies:

        def asked():
            yield from requests(2)
            while server.now < 1:
                time.sleep(0.01)
            threading.Timer(0.05, server.release.set).start()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            send_all(endpoint(server, timeout=5), asked(), replies, concurrency=4)
        assert len(replies) == 2
