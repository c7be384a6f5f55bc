"""``isthmus train``: run a recipe and say what came out and what to do next."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from isthmus.errors import ConfigError


def run(recipe: str, overrides: Sequence[str], out: Path | None, *, tensorboard: bool, processes: int = 1) -> None:
    """Every stage, then where the model is. Several processes are started by torchrun, which runs this command anew."""
    if processes > 1:
        _start(processes)
    from isthmus.recipes.run import train

    folder = out if out is not None else Path("runs") / Path(recipe).stem
    model = train(recipe, folder, overrides=overrides, tensorboard=tensorboard)
    if os.environ.get("RANK", "0") != "0":
        return
    console = Console(emoji=False)
    console.print(f"The {model.kind} model is in [bold]{folder}[/]. It can: {', '.join(model.capabilities)}.")
    talk = f", [bold]isthmus chat {folder}{' --image PICTURE' if model.processor.image else ''}[/]"
    console.print(f"Next: [bold]isthmus eval {folder}[/]" + (talk if "chat" in model.capabilities else ""))


def _start(processes: int) -> None:
    """Become torchrun with this many processes of this command on this machine, the cores shared among them.

    Raises ConfigError inside a torchrun of the user's own.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--processes is for a command started by itself; here torchrun says how many processes run.")
    given = sys.argv[1:]
    place = next(n for n, word in enumerate(given) if word.startswith("--processes"))
    command = given[:place] + given[place + (1 if "=" in given[place] else 2) :]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    os.execv(sys.executable, [*runner, "-m", "isthmus", *command])
