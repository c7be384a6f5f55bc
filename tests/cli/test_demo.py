"""How the demo ends: at a terminal by serving the page, elsewhere by nothing more."""

import json
import socket
import sys
import time
import urllib.request

import pytest

from isthmus.cli import demo, serve
from isthmus.demo import story
from isthmus.errors import MissingExtraError


@pytest.fixture
def ended(monkeypatch):
    """What was served, of a demo that trains nothing; ``at(True)`` makes it end at a terminal."""
    served = []
    monkeypatch.setattr(story, "run_demo", lambda out, **_: None)
    monkeypatch.setattr(serve, "run", lambda models, **options: served.append((models, options)))

    def at(terminal):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        return served

    return at


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_only_a_terminal_is_served_the_page(tmp_path, ended, terminal, wanted):
    served = ended(terminal)
    demo.run(tmp_path, seed=0, serve=wanted, jobs=None, budget=1.0)
    assert len(served) == (terminal and wanted)
    for models, options in served:
        own = [str(tmp_path / name) for name in ("llava", "blip2", "flamingo", "lm", "clip")]
        assert models == [
            *own,
            *(f"shipped-{name}=isthmus:{name}" for name in ("lm", "llava", "flamingo", "clip", "blip2")),
        ]
        assert len(list(options["pictures"].glob("*.png"))) == 200
        assert options["host"] == "127.0.0.1"
        assert options["browse"]


def test_a_page_that_is_closed_or_cannot_be_is_no_failure(ended, monkeypatch, capsys):
    def closed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "run", closed)
    demo.show(["some"])
    assert "The page is closed" in capsys.readouterr().out

    def missing():
        raise MissingExtraError("install the extra")

    monkeypatch.setattr(serve, "needs_extra", missing)
    demo.show(["some"])
    assert "No page: install the extra" in capsys.readouterr().out


def test_the_page_beside_is_there_and_ends(tmp_path, monkeypatch, capsys):
    """It serves what came with the package while its context is open, in a process that ends with it."""
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    with socket.socket() as free:
        free.bind((demo.HOST, 0))
        monkeypatch.setattr(demo, "PORT", free.getsockname()[1])
    monkeypatch.setattr(demo, "packaged", lambda: ["shipped-clip=isthmus:clip"])
    with demo.page_beside(tmp_path):
        end = time.monotonic() + 60
        while not (opened.exists() and opened.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert opened.read_text() == f"http://127.0.0.1:{demo.PORT}/\n", (tmp_path / "page.log").read_text()
        with urllib.request.urlopen(f"http://{demo.HOST}:{demo.PORT}/isthmus/runs") as reply:
            told = json.load(reply)
    assert [(model["id"], model["shipped"]) for model in told["models"]] == [("shipped-clip", True)]
    assert told["pictures"] == 200
    assert f"http://127.0.0.1:{demo.PORT}/" in capsys.readouterr().out
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((demo.HOST, demo.PORT), timeout=1)


def test_a_port_that_is_taken_is_left_alone(monkeypatch):
    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        monkeypatch.setattr(demo, "PORT", taken.getsockname()[1])
        assert demo.free_port() not in (0, demo.PORT)
