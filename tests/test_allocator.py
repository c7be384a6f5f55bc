"""Freed memory: kept up to a bound, given back above it and where memory runs short. Each case in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import isthmus
from isthmus import allocator

SCRIPT = """
import sys
from isthmus import allocator
kept, usable, top = (int(x) for x in sys.argv[1:])
allocator.usable_bytes = lambda: usable * 2**20
assert allocator.keep_freed_memory() == (kept > 0)
before = allocator.resident_bytes()
blocks = [bytearray(2**20) for _ in range(300)]
del blocks[: 299 if top else 300]  # the newest block, at the heap's top, may stay
freed = allocator.resident_bytes() - before
relieved = allocator.relieve()
print(freed // 2**20, int(relieved), (allocator.resident_bytes() - before) // 2**20)
"""


def held(kept: int, usable: int = 2**20, *, top: bool = False) -> tuple[int, bool, int]:
    """MiB still held after 300 MiB were taken and freed, whether memory was then given back, MiB held after that."""
    environment = {**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1]), allocator.VARIABLE: str(kept)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(kept), str(usable), str(int(top))],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    freed, relieved, after = (int(word) for word in done.stdout.split())
    return freed, bool(relieved), after


pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")


def test_what_is_kept_is_bounded():
    assert held(1000)[0] > 280
    assert held(100)[0] < 200
    assert held(0)[0] < 50


def test_where_memory_is_short_all_of_it_goes_back():
    freed, relieved, after = held(1000, usable=100)
    assert (freed > 280, relieved, after < 60) == (True, True, True)
    freed, relieved, after = held(100, usable=100, top=True)  # a hole, which no threshold reaches
    assert (freed > 280, relieved, after < 60) == (True, True, True)


def test_where_there_is_enough_nothing_is_given_back():
    _, relieved, after = held(1000)
    assert (relieved, after > 280) == (False, True)


def test_the_bound_follows_the_machine_and_the_user(monkeypatch):
    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    for usable, kept in ((2**31, 2**28), (2**36, 2**31), (0, 0)):
        monkeypatch.setattr(allocator, "usable_bytes", lambda usable=usable: usable)
        assert allocator.kept_bytes() == kept
    monkeypatch.setenv(allocator.VARIABLE, "7")
    assert allocator.kept_bytes() == 7 * 2**20


def test_sizes_are_plausible():
    assert 2**24 < allocator.resident_bytes() < allocator.usable_bytes()


@pytest.mark.parametrize(
    ("offered", "said", "wanted"),
    [
        ("always [madvise] never\n", None, "1"),
        ("always [madvise] never\n", "0", "0"),
        ("[always] madvise never\n", None, None),
        ("always madvise [never]\n", None, None),
        (None, None, None),
    ],
)
def test_large_pages_are_asked_for_where_linux_gives_them_for_the_asking(monkeypatch, tmp_path, offered, said, wanted):
    file = tmp_path / "enabled"
    if offered is not None:
        file.write_text(offered)
    monkeypatch.setattr(allocator, "_LARGE_PAGES", file)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", said or "")  # put back afterwards
    if said is None:
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert allocator.ask_for_large_pages() is (wanted == "1")
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == wanted


LARGE = """
import torch
from pathlib import Path
from isthmus import allocator
assert allocator.ask_for_large_pages()
kept = torch.ones(64 * 2**18)
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""


def test_torch_asks_for_large_pages_when_told_before_its_first_tensor(monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as it may be already; taken back afterwards
    if not allocator.ask_for_large_pages():
        pytest.skip("Linux gives large pages unasked here, or not at all.")
    environment = {**os.environ, "PYTHONPATH": str(Path(isthmus.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) >= 32 * 1024  # KiB, of 64 MiB
