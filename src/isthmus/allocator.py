"""Keep freed memory in the process: on Linux, training on a CPU spends most of its time on page faults otherwise.

A step frees and takes the same large buffers again and again. The C library by default gives each of them back to
the system, which must find and clear the pages anew (benchmarks/allocator.py: up to 12 times slower steps).
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER, _AT_ONCE = 2**31 - 1, 64 * 2**20


def keep_freed_memory() -> bool:
    """Tell glibc not to return freed memory before the process ends; true where that is possible.

    The peak stays what it is, only the way back down is missing, so it suits programs that train or serve.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_TOP_PAD, _AT_ONCE)])
