"""Shared by all tests: one thread each, no network, the folder of real data where there is one."""

import os
import socket
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """No test may look up a host: isthmus makes no network call that nobody asked for."""

    def refuse(host, *args, **kwargs):
        if host in ("localhost", "127.0.0.1", "::1", None) or host == socket.gethostname():
            return real(host, *args, **kwargs)
        raise AssertionError(f"a test looked up the host {host!r}")

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: $ISTHMUS_DATA, or shared/data beside the project. Skips when there is none."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("ISTHMUS_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ISTHMUS_DATA to the folder that holds easy_vqa, emoji, …")
    return folder


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """A folder with finished runs clip, lm and llava (see miniature.py). Tests must not write into it."""
    from tests.miniature import run_story

    return run_story(tmp_path_factory.mktemp("story"))
