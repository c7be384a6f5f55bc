"""Keep some freed memory in the process: on Linux, training on a CPU spends most of its time on page faults otherwise.

A step frees and takes the same large buffers again and again. The C library by default gives each of them back to
the system, which must find and clear the pages anew (benchmarks/allocator.py: up to 12 times slower steps). How much
is kept is bounded, and where memory runs short all of it goes back.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

VARIABLE = "ISTHMUS_KEEP_MIB"
"""Environment variable: how many MiB of freed memory may be kept; 0 leaves the C library as it is."""

_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TORCH = "THP_MEM_ALLOC_ENABLE"  # c10/core/impl/alloc_cpu.cpp
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_MIB = 2**20
_MOST = 2048 * _MIB
_AT_ONCE = 64 * _MIB
_SHARE = 8
_LARGE, _MAPPINGS = 2**20, 65536
_SHORT = 2


def keep_freed_memory() -> bool:
    """Let glibc keep up to :func:`kept_bytes` of freed memory; true where that is possible and wanted.

    The peak stays what it is, only the way back down is shorter, so it suits programs that train or serve.
    """
    kept = kept_bytes()
    mallopt = _libc("mallopt")
    if mallopt is None or not kept:
        return False
    pad = min(_AT_ONCE, kept // 4)
    # The threshold is an int there; what is above it at the heap's top goes back at once.
    return all(
        [
            mallopt(_M_MMAP_MAX, 0),
            mallopt(_M_TRIM_THRESHOLD, min(kept, 2**31 - 1)),
            mallopt(_M_TOP_PAD, pad),
        ]
    )


def ask_for_large_pages() -> bool:
    """Let torch ask Linux for pages of 2 MiB for tensors of that size and more, where they are not given unasked; true
    where it will. torch reads this before its first tensor, so it has to be said at the start of a program.

    Reading weights by pages of 4 KiB and finding new ones for every buffer takes a tenth to a third of a training
    step of some 100 million weights in bf16 (docs/speed.md).
    """
    try:
        offered = _LARGE_PAGES.read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    if "[madvise]" not in offered:
        return False
    return os.environ.setdefault(_TORCH, "1") == "1"


def return_freed_memory() -> bool:
    """The other way, for what is to hold little rather than to be quick: each freed buffer of a MiB or more goes back
    to the system at once. True where that is possible."""
    mallopt = _libc("mallopt")
    if mallopt is None:
        return False
    wishes = {_M_MMAP_MAX: _MAPPINGS, _M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: _LARGE, _M_TOP_PAD: 0}
    return [mallopt(name, value) for name, value in wishes.items()] == [1] * len(wishes)


def relieve() -> bool:
    """Give all freed memory back, holes in the heap included, if this process holds more than half of what there is.

    Cheap enough for every step where it does not: one small file is read. True when memory was given back.
    """
    usable = usable_bytes()
    if not usable or resident_bytes() * _SHORT < usable:
        return False
    return give_back()


def give_back() -> bool:
    """Give all freed memory back to the system. True when some was."""
    trim = _libc("malloc_trim")
    return trim is not None and bool(trim(0))


def kept_bytes() -> int:
    """What VARIABLE says, else an eighth of the usable memory, at most 2 GiB (0 where its size is unknown)."""
    wish = os.environ.get(VARIABLE, "")
    if wish.isdigit():
        return int(wish) * _MIB
    return min(_MOST, usable_bytes() // _SHARE)


@cache
def usable_bytes() -> int:
    """Memory of the machine or of the container this runs in, whichever is less; 0 when it is unknown."""
    found = []
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 0
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            found.append(int(text))
    return min(found)


def resident_bytes() -> int:
    """Memory this process holds right now; 0 when it is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of glibc; none elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # another C library
        return None
