"""Replies in a file that is only ever appended to, one JSON line each, found by the hash of their request."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from isthmus.endpoint.client import Reply
from isthmus.errors import DataError


class Replies:
    """The replies in ``path``, and the place for more: ``with Replies(path) as replies: ...``.

    Each is on the disk before :meth:`add` returns. A last line cut short by a kill is dropped when the file is opened:
    its request is sent again. One process at a time: the file is locked by the kernel, for as long as it is open.

    Raises DataError for a file that another process has open, or a damaged line before the last.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._found: dict[str, Reply] = {}
        self._file: int | None = None

    def __enter__(self) -> "Replies":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._recall()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # a system without: then nothing is promised about two processes at once
            return
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{self.path} is being written by another process; wait for it, or stop it.") from None

    def _recall(self) -> None:
        assert self._file is not None
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
            try:
                reply = Reply(**json.loads(line))
            except (ValueError, TypeError):
                raise DataError(f"{self.path}, line {number} is damaged; delete that line and run again.") from None
            self._found.setdefault(reply.request, reply)
        if complete != content:
            os.ftruncate(self._file, len(complete))

    def add(self, reply: Reply) -> None:
        """Kept once: a second reply to one request is dropped."""
        if reply.request in self._found:
            return
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open")
        line = json.dumps(reply.to_dict(), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        while line:  # a full disk writes less than it is given, then raises
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)
        self._found[reply.request] = reply

    def get(self, request: str) -> Reply | None:
        return self._found.get(request)

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Reply]:
        return iter(self._found.values())
