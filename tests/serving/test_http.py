"""What is refused before the application sees it: sizes, times, hosts, keys, forms; each in OpenAI's error form."""

import json
import socket
import time
from dataclasses import replace

import pytest

from isthmus.errors import ConfigError
from isthmus.serving.limits import Limits
from isthmus.serving.run import bound
from tests.cli.test_cli import run
from tests.serving.helpers import asked, models, on_port

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def small():
    """A server with little patience and small limits, and a key."""
    limits = replace(Limits(), body=20_000, headers=2_000, reading=0.6, pictures=2)
    with on_port({"lm": models()["lm"]}, limits=limits, key="secret", hosts=frozenset({"127.0.0.1"})) as found:
        yield found


KEY = {"authorization": "Bearer secret"}


def ask(**more):
    return {"model": "lm", "messages": asked(), "max_tokens": 2, **more}


def talk(port, *pieces, patience=5.0):
    """What a raw connection answers to pieces (bytes, or seconds to wait)."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as sock:
        for piece in pieces:
            if isinstance(piece, float):
                time.sleep(piece)
            else:
                sock.sendall(piece)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    return answer


def code_of(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "secret"}, {"authorization": "Bearer secre"}, {"authorization": "Bearer secret2"},
                {"authorization": "Basic secret"}, {"authorization": "Bearer \xff"}]
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/metrics", "/nowhere"])
def test_without_the_key_nothing_is_answered_but_health(small, headers, path):
    found = small.post(path, ask(), headers=headers) if path == CHAT else small.get(path, headers)
    assert (found.status, found.code) == (401, "invalid_api_key")
    assert found.headers["www-authenticate"] == "Bearer"
    assert small.get("/health", headers).status == 200


def test_with_the_key_it_answers(small):
    assert small.post(CHAT, ask(), headers=KEY).status == 200
    assert small.post(CHAT, ask(), headers={"authorization": "bearer  secret "}).status == 200


@pytest.mark.parametrize("host", ["evil.org", "127.0.0.1.evil.org", "localhost", "", "[::1"])
def test_a_host_of_another_name_is_not_answered_for(small, host):
    found = small.get("/health", {"host": host})
    assert (found.status, found.code) == (421, "wrong_host")


def test_no_page_of_another_origin_is_let_in(small):
    found = small.ask(
        "OPTIONS", CHAT, None, {**KEY, "origin": "http://evil.org", "access-control-request-method": "POST"}
    )
    assert found.status == 405
    assert not [name for name in found.headers if name.startswith("access-control")]
    found = small.post(CHAT, ask(), headers={**KEY, "origin": "http://evil.org"})
    assert not [name for name in found.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"content-type": "text/plain"}, "unsupported_media_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
        ({"content-type": ""}, "unsupported_media_type"),
        ({"content-encoding": "gzip"}, "unsupported_encoding"),
    ],
)
def test_only_plain_json_is_read(small, headers, code):
    found = small.post(CHAT, ask(), headers={**KEY, **headers})
    assert (found.status, found.code) == (415, code)


def test_a_body_over_the_limit_is_refused_announced_or_not(small):
    long = json.dumps(ask(user="x" * 30_000)).encode()
    found = small.post(CHAT, raw=long, headers=KEY)
    assert (found.status, found.code) == (413, "body_too_large")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n"
    head += b"Content-Type: application/json\r\nConnection: close\r\n"
    chunks = [b"%x\r\n%s\r\n" % (len(long[i : i + 4000]), long[i : i + 4000]) for i in range(0, len(long), 4000)]
    answer = talk(small.port, head + b"Transfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
    assert code_of(answer) == (413, "body_too_large")
    answer = talk(small.port, head + b"Content-Length: 99999999999\r\n\r\n{}", patience=8.0)
    assert code_of(answer) == (413, "body_too_large")
    assert small.post(CHAT, ask(), headers=KEY).status == 200


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"y" * 9000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(900)) + b"\r\n", 431),
        (b"GET /" + b"y" * 9000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 431),
        (b"GET /" + b"y" * 900_000, 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"y" * 900_000, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked, x\r\n\r\nabcde", 400),
        (b"nonsense\r\n\r\n", 400),
    ],
)
def test_what_is_no_http_or_has_huge_headers_is_refused(small, request_, expected):
    found = code_of(talk(small.port, request_))
    assert found == (expected, "headers_too_large" if expected == 431 else "invalid_http")


def test_connections_that_stall_are_closed_in_time(small):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n"
    began = time.monotonic()
    assert talk(small.port) == b""  # not a word
    assert talk(small.port, head) == b""  # never a blank line
    body = b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: 500\r\n\r\n{"
    assert code_of(talk(small.port, head + body)) == (408, "too_slow")
    first = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert talk(small.port, first, 0.2, b"GET /hea").startswith(b"HTTP/1.1 200")  # the second never comes
    assert time.monotonic() - began < 15


def test_stalled_connections_slow_nobody(small):
    """Some say nothing, some stop within their headers, some within their body."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer secret\r\n"
    whole = head + b"Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    stalled = []
    try:
        for n in range(50):
            sock = socket.create_connection(("127.0.0.1", small.port))
            sock.sendall((b"", head[: 5 + n], whole)[n % 3])
            stalled.append(sock)
        began = time.monotonic()
        assert small.post(CHAT, ask(), headers=KEY).status == 200
        assert time.monotonic() - began < 5
    finally:
        for sock in stalled:
            sock.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/nothing", 404), ("GET", "/docs", 404)],
)
def test_addresses_and_methods_that_are_not_there(small, method, path, status):
    found = small.ask(method, path, None, KEY)
    assert found.status == status
    assert found.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_value", None),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "invalid_conversation", "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "invalid_conversation", "messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "invalid_conversation", "messages"),
        ({"messages": [{"role": r, "content": "a"} for r in ("user", "system", "user")]}, "invalid_conversation", None),
        ({"messages": [{"role": "user", "content": "\U0010fffd"}]}, "reserved_character", None),
        ({"messages": [{"role": "user", "content": "word " * 500}]}, "context_length_exceeded", "messages"),
        ({"max_tokens": 4096}, "context_length_exceeded", "messages"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**30}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_value", "max_tokens"),
        ({"max_tokens": True}, "invalid_value", "max_tokens"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": "0"}, "invalid_value", "temperature"),
        ({"top_p": 0}, "invalid_value", "top_p"),
        ({"top_k": -1}, "invalid_value", "top_k"),
        ({"n": 9}, "invalid_value", "n"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"stop": ["a"] * 5}, "invalid_value", None),
        ({"stop": ""}, "invalid_value", None),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
        ({"frequency_penalty": 0.5}, "invalid_value", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "invalid_value", "response_format.type"),
        ({"tools": []}, "unknown_field", "tools"),
        ({"/etc/passwd": 1}, "unknown_field", ""),
        ({"model": ""}, "invalid_value", "model"),
        ({"model": 3}, "invalid_value", "model"),
    ],
)  # fmt: skip
def test_every_field_has_its_range(small, change, code, param):
    found = small.post(CHAT, ask(**change), headers=KEY)
    assert (found.status, found.code) == (400, code)
    if param is not None:
        assert (found.json["error"]["param"] or "") == param


def test_a_picture_is_refused_by_what_it_is(small, served):
    def with_url(url, count=1):
        part = {"type": "image_url", "image_url": {"url": url}}
        return {"model": "llava", "messages": [{"role": "user", "content": [part] * count}], "max_tokens": 2}

    for url, code in (
        ("http://127.0.0.1/a.png", "remote_images_off"),
        ("https://example.org/a.png", "remote_images_off"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("data:text/html;base64,PGI+", "invalid_image_url"),
        ("data:image/svg+xml;base64,PGI+", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:image/png;base64,!!", "invalid_base64"),
        ("data:image/png;base64,aGFsbG8=", "invalid_image"),
        ("data:image/png;base64,", "invalid_image"),
    ):
        found = served.post(CHAT, with_url(url))
        assert (found.status, found.code) == (400, code), url
    assert served.post(CHAT, with_url("data:,", 9)).code == "too_many_pictures"
    blind = with_url("data:,", 1) | {"model": "lm"}
    assert small.post(CHAT, blind, headers=KEY).status == 400


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_value"),
        (b"null", "invalid_value"),
        (b"{", "invalid_json"),
        (b'{"model": "lm", "messages": NaN}', "invalid_json"),
        (b'{"model": "lm", "temperature": 1e999, "messages": []}', "invalid_number"),
        (b'{"model": "lm\xff"}', "invalid_utf8"),
        (b'{"model": "lm", "messages": [{"role": "user", "content": "\\ud83d"}]}', "lone_surrogate"),
        (b'{"model": "lm", "messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "too_deep"),
    ],
)
def test_bodies_that_are_no_sound_json_are_refused(small, body, code):
    found = small.post(CHAT, raw=body, headers=KEY)
    assert (found.status, found.code) == (400, code)
    assert small.post(CHAT, ask(), headers=KEY).status == 200


def test_what_is_said_is_logged_nowhere(small, caplog):
    caplog.set_level("DEBUG")
    secret = "word-that-nobody-logs"
    for body in (ask(messages=asked(secret)), ask(messages=asked(secret * 40)), ask(user=secret, max_tokens=0)):
        small.post(CHAT, body, headers=KEY | {"x-more": secret})
    small.post(CHAT, raw=f'{{"{secret}": '.encode(), headers=KEY)
    assert secret not in caplog.text


def test_a_port_that_is_taken_is_told_before_a_model_is_opened(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said, wrong = run(monkeypatch, capsys, "serve", "no/such/model", "--port", port)
    assert (code, said) == (2, "")
    assert f"Cannot serve at port {port} of 127.0.0.1 because something else listens there" in " ".join(wrong.split())
    with bound("localhost", 0) as sockets:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
    assert all(sock.fileno() == -1 for sock in sockets)

    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with (
        pytest.raises(ConfigError, match=r"at port 1 of nowhere.invalid \(Name or service not known\): choose"),
        bound("nowhere.invalid", 1),
    ):
        pass
