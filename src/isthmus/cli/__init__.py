"""The ``isthmus`` program. Each command's work is imported when it runs, so ``isthmus --help`` is instant."""

import os
import sys

from isthmus.allocator import keep_freed_memory
from isthmus.cli.app import app
from isthmus.errors import IsthmusError

# Speak to no hub unless the user has said otherwise: every default is offline.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

EXIT_USER, EXIT_INTERRUPTED = 2, 130


def main() -> None:
    """Run the program; an error a user can mend is one paragraph and exit code 2, never a traceback."""
    keep_freed_memory()
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        _say("Interrupted. The same command goes on where this one stopped.")
        sys.exit(EXIT_INTERRUPTED)
    except IsthmusError as error:
        _say(str(error))
        sys.exit(getattr(error, "exit_code", EXIT_USER))


def _say(text: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True).print(f"[bold red]isthmus:[/] {escape(text)}", highlight=False)
