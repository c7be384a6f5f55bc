"""The one function that fetches: which addresses it refuses, that it connects as it checked, and its bounds."""

import re
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import isthmus
from isthmus.serving.fetch import RefusedError, Remote, fetch, is_public

PUBLIC = "93.184.216.34"


class World:
    """Hosts with addresses, and one server on loopback that every public address leads to."""

    def __init__(self, answers: Mapping[str, bytes | list[bytes | float]], **addresses: list[str]) -> None:
        self.answers, self.addresses = answers, addresses
        self.looked_up: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self.requests: list[bytes] = []

    def resolve(self, host, port, **_):
        self.looked_up.append(host)
        found = self.addresses.get(host.split(".")[0], [PUBLIC])
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def connect(self, address, timeout=None):
        self.connected.append(address)
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    @contextmanager
    def open(self):
        world = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                head = b""
                while b"\r\n\r\n" not in head:
                    head += self.rfile.readline() or b"\r\n\r\n"
                world.requests.append(head)
                path = head.split()[1].decode()
                answer = world.answers[path]
                for piece in answer if isinstance(answer, list) else [answer]:
                    if not isinstance(piece, bytes):
                        time.sleep(piece)
                        continue
                    try:
                        self.wfile.write(piece)
                    except OSError:
                        return

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            self.port = server.server_address[1]
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def remote(self, *hosts, size=1000, seconds=5.0):
        return Remote(frozenset(hosts), size, seconds, self.resolve, self.connect)


def ok(body: bytes, more: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body


def moved(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_picture_of_an_allowed_host_comes_from_the_checked_address():
    with World({"/a.png?x=1": ok(b"picture")}).open() as world:
        assert fetch("http://images.example.org/a.png?x=1", world.remote("images.example.org")) == b"picture"
        assert world.looked_up == ["images.example.org"]
        assert world.connected == [(PUBLIC, 80)]
        assert b"Host: images.example.org\r\n" in world.requests[0]
        assert b"Cookie" not in world.requests[0]
        assert fetch("http://images.example.org:80/a.png?x=1", world.remote("images.example.org")) == b"picture"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.org/a.png",
        "http://images.example.org.evil.org/a.png",
        "http://sub.images.example.org/a.png",
        "http://images.example.org@evil.org/a.png",
        "http://user:pw@images.example.org/a.png",
        "http://images.example.org:8080/a.png",
        "http://images.example.org:22/a.png",
        "http://images.example.org:99999/a.png",
        "http://images.example.org\\@evil.org/a.png",
        "http://evil.org#@images.example.org/a.png",
        "http://images.example.org%2f@evil.org/",
        "http://[::1]/a.png",
        "http://127.0.0.1/a.png",
        "http://2130706433/a.png",
        "http://0x7f.1/a.png",
        "http://images.example.org\r\nX: y/a.png",
        "http://images.example.org/a b",
        "http://ímages.example.org/a.png",
        "http://images。example.org/a.png",
        "http:/images.example.org/a.png",
        "http:images.example.org",
        "//images.example.org/a.png",
        "ftp://images.example.org/a.png",
        "file:///etc/passwd",
        "file://images.example.org/etc/passwd",
        "gopher://images.example.org/",
        "http://",
        "",
    ],
)
def test_addresses_that_are_refused_are_not_even_looked_up(url):
    world = World({})
    with pytest.raises(RefusedError):
        fetch(url, world.remote("images.example.org"))
    assert world.looked_up == []
    assert world.connected == []


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "100.100.100.200", "192.0.0.1", "192.0.2.1", "192.88.99.1", "198.18.0.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
    "64:ff9b::7f00:1", "64:ff9b:1::1", "2001::1", "2002:7f00:1::1", "2002:c0a8:101::1", "2001:db8::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "nonsense", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a_host_at_an_address_that_is_not_public_is_refused(address):
    assert not is_public(address)
    for found in ([address], [PUBLIC, address]):  # one among several is enough
        world = World({}, images=found)
        with pytest.raises(RefusedError, match="not a public one"):
            fetch("http://images.example.org/a.png", world.remote("images.example.org"))
        assert world.connected == []


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address):
    assert is_public(address)


def test_every_hop_is_checked_anew():
    answers = {"/in": moved("/a.png"), "/a.png": ok(b"x"), "/out": moved("http://other.org/a.png")}
    answers |= {
        "/home": moved("http://home.example.org/"),
        "/file": moved("file:///etc/passwd"),
        "/round": moved("/round"),
    }
    with World(answers, home=["10.0.0.1"]).open() as world:
        remote = world.remote("images.example.org", "home.example.org")
        assert fetch("http://images.example.org/in", remote) == b"x"
        assert world.looked_up == ["images.example.org"] * 2
        for path, why in (
            ("out", "not among"),
            ("home", "not a public one"),
            ("file", "only http"),
            ("round", "too many"),
        ):
            with pytest.raises(RefusedError, match=why):
                fetch(f"http://images.example.org/{path}", remote)
        assert {address for address, _ in world.connected} == {PUBLIC}


def test_size_status_and_time_are_bounded():
    answers = {
        "/long": ok(b"x" * 1001),
        "/endless": [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 500] * 4],
        "/zip": ok(b"x", "Content-Encoding: gzip\r\n"),
        "/missing": b"HTTP/1.1 404 No\r\nContent-Length: 1\r\n\r\nx",
        "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
        "/noise": b"\x00\x01\x02\r\n\r\n",
        "/drip": [b"HTTP/1.1 200 OK\r\n", *[piece for n in range(40) for piece in (f"X-{n}: y\r\n".encode(), 0.1)]],
        "/slow": [b"HTTP/1.1 200 OK\r\n\r\n", *[piece for _ in range(40) for piece in (b"x", 0.1)]],
    }
    with World(answers).open() as world:
        for path in ("long", "endless", "zip", "missing", "short", "noise"):
            with pytest.raises(RefusedError):
                fetch(f"http://images.example.org/{path}", world.remote("images.example.org"))
        for path in ("drip", "slow"):
            began = time.monotonic()
            with pytest.raises(RefusedError):
                fetch(f"http://images.example.org/{path}", world.remote("images.example.org", seconds=0.4))
            assert time.monotonic() - began < 3


def test_nothing_else_in_the_package_opens_a_connection():
    """One function fetches what a request names; the hub's own client fetches models that a user names."""
    opens = re.compile(
        r"urlopen|urllib\.request|http\.client|requests\.get|import requests|httpx|aiohttp|create_connection"
    )
    root = Path(isthmus.__file__).parent
    found = {str(f.relative_to(root)) for f in root.rglob("*.py") if opens.search(f.read_text(encoding="utf-8"))}
    assert found == {"serving/fetch.py"}
    uses = {str(f.relative_to(root)) for f in root.rglob("*.py") if re.search(r"\bfetch\(", f.read_text("utf-8"))}
    assert uses == {"serving/fetch.py", "serving/prepare.py"}
