"""The ``isthmus`` program. Each command's work is imported when it runs, so ``isthmus --help`` is instant."""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial

from isthmus.allocator import ask_for_large_pages, keep_freed_memory
from isthmus.cli.app import app
from isthmus.errors import IsthmusError, IsthmusWarning
from isthmus.lifeline import end_with_parent

# Speak to no hub unless the user has said otherwise: every default is offline.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of a process that is gone torch's C++ would print stack traces beside our sentence; read when torch is imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

EXIT_USER, EXIT_INTERRUPTED = 2, 130
_RESUME = (["demo"], ["train"], ["eval"], ["compare"], ["batch"])


def main() -> None:
    """Run the program; an error a user can mend is one paragraph and exit code 2, never a traceback."""
    keep_freed_memory()
    ask_for_large_pages()
    end_with_parent()
    with warnings.catch_warnings():
        warnings.showwarning = partial(_warn, set(), warnings.showwarning)
        _run()


def _run() -> None:
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED and type(end) is SystemExit:  # what Typer makes of Ctrl-C, without a word
            _say(f"Interrupted. The same command {_after_interruption(sys.argv[1:])}.")
        raise
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_USER)
    except IsthmusError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        _say(_of_the_system(error))
        sys.exit(EXIT_USER)


def _after_interruption(words: list[str]) -> str:
    """What a command does that is given again."""
    resumes = words[:1] in _RESUME or (words[:2] == ["data", "instruct"] and "--offline" not in words)
    return "goes on where this one stopped" if resumes else "begins anew"


def _warn(
    told: set[str], otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *place: object
) -> None:
    """Our own warnings as a paragraph, without their place in the code, and each once, however often its data are
    opened; those of others as they are."""
    if not issubclass(category, IsthmusWarning):
        otherwise(message, category, *place)
    elif str(message) not in told:
        told.add(str(message))
        _say(f"warning: {message}")


def _of_the_system(error: OSError) -> str:
    """A file or disk that refused: what the system says, where, and what is safe."""
    where = f" ({error.filename})" if error.filename else ""
    what = f"{error.strerror or error}{where}."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what} What was saved before is intact: free some space and give the same command again."
    return f"{what} Check that the path exists and may be read or written, then give the same command again."


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, emoji=False).print(f"[bold red]isthmus:[/] {escape(text)}", highlight=False)
