"""Signals that end a training after the step that runs."""

import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from isthmus.errors import IsthmusError
from isthmus.processes import STOPS


class Interrupted(IsthmusError):
    """The run was stopped by Ctrl-C after a step was finished and saved. The command line exits with 130."""

    exit_code = 130


class Preempted(Interrupted):
    """The same by SIGTERM, SIGUSR1 or ``stop_at``: whoever schedules the run is to start it again. The command line
    exits with 85."""

    exit_code = 85


def signalled(found: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The first process's note of a signal that has one."""
    return next((note for note in found if note), {})


@contextmanager
def stop_flag() -> Iterator[Mapping[str, str]]:
    """While inside, SIGTERM, SIGUSR1 and Ctrl-C only leave a note; a second one ends the process as usual."""
    stopped: dict[str, str] = {}
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers; elsewhere the caller stops the run.
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in STOPS}

    def note(number: int, _frame: object) -> None:
        stopped["signal"] = signal.Signals(number).name
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
