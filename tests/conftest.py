"""Shared by all tests: one thread each, no network, the folder of real data where there is one."""

import os
import socket
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from tests import shapes  # noqa: F401  (named below)

# Before anything of these is imported: the shapes in signatures are checked at every call. Modules without shapes are
# left out, for the hook hides from torch that a function is a generator.
SHAPED = [
    *("isthmus.nn", "isthmus.models"),
    *(f"isthmus.language.{name}" for name in ("causal", "decoder", "library", "scoring", "seq2seq", "window")),
    *("isthmus.data.images", "isthmus.data.augment", "isthmus.data.cache"),
]
install_import_hook(SHAPED, "tests.shapes.shapes_only")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What a test computes does not depend on which tests of its process came before: isthmus/products.py is a setting of
# the process. ISTHMUS_PRODUCTS=auto runs all tests with it.
os.environ.setdefault("ISTHMUS_PRODUCTS", "torch")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory):
    """What is kept between runs of a user is not the tests' to read or write."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


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


@pytest.fixture(scope="session")
def rivals(story, tmp_path_factory):
    """The story's models with a Flamingo and a BLIP-2 of the same encoder and LM: folders of finished runs by name.

    Tests must not write into them.
    """
    from isthmus.recipes.run import train
    from isthmus.recipes.schema import parse_recipe
    from tests.recipes.test_blip2 import tree as blip2_tree
    from tests.recipes.test_flamingo import recipe as flamingo_recipe

    folder = tmp_path_factory.mktemp("rivals")
    train(flamingo_recipe(story), folder / "flamingo", progress=False)
    train(parse_recipe(blip2_tree(story)), folder / "blip2", progress=False)
    return {name: story / name for name in ("clip", "lm", "llava")} | {n: folder / n for n in ("flamingo", "blip2")}
