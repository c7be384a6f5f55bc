"""End with the process that started this one, however that ended: no training is left over that nobody watches."""

import ctypes
import os
import signal
import sys

PARENT = "ISTHMUS_PARENT"
"""Environment variable: the id of the process to end with."""


def end_with_parent() -> None:
    """Where the environment names one, be ended as by SIGTERM, saving first, when it is gone. On Linux only."""
    parent = os.environ.pop(PARENT, "")
    if not parent or not sys.platform.startswith("linux"):
        return

    def check_parent(*_: object) -> None:
        if os.getppid() != int(parent):
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGTERM)

    # Linux signals the end of each of the parent's threads, and a second SIGTERM would end us without saving.
    signal.signal(signal.SIGUSR2, check_parent)
    ctypes.CDLL(None).prctl(1, signal.SIGUSR2)  # PR_SET_PDEATHSIG
    check_parent()
