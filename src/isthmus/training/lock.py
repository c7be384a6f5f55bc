"""One writer per run folder."""

import errno
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

from isthmus.errors import CheckpointError


class RunBusyError(CheckpointError):
    """Another process is writing in this run folder."""

    exit_code = 3


class RunLock:
    """One writer per run folder: ``with RunLock(folder): ...``; a second process is refused at once.

    The lock is the kernel's (flock), so it ends with the process that holds it, however that ends: a file left by a
    killed run never blocks. The file names the holder's process and host for the message.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "run.lock"
        self._handle: int | None = None

    def __enter__(self) -> "RunLock":
        import fcntl  # Not on every system; loading a model must work without it.

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.path.parent} cannot be a run folder: {error.strerror}.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"{self.path} cannot be locked ({error.strerror}): put the run folder on a file "
                    "system that has locks."
                ) from error
            raise RunBusyError(
                f"{self.path.parent} is in use by {self._holder()}. Wait until that run ends, stop "
                "it, or choose another folder."
            ) from error
        # Only for the message to others: a full disk must not stop a run that may have nothing left to write.
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._handle = handle
        # Workers are forked with our handle open; a worker that outlives a killed run would keep the lock.
        os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
