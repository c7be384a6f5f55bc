"""``isthmus train``: run a recipe and say what came out and what to do next."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape


def run(
    recipe: str,
    overrides: Sequence[str],
    out: Path | None,
    *,
    tensorboard: bool,
    processes: int = 1,
    stop_at: int | None = None,
) -> None:
    """Every stage, then where the model is; with several processes, this command in each of them."""
    if processes > 1:
        from isthmus.cli.several import Ended, start

        placed = [] if out is None else ["--out", str(out)]
        stops = [] if stop_at is None else ["--stop-at", str(stop_at)]
        words = ["train", recipe, *overrides, *placed, *stops, *(["--tensorboard"] if tensorboard else [])]
        raise Ended(start(words, processes))
    from isthmus.processes import first
    from isthmus.recipes.run import train
    from isthmus.recipes.scoring import own_tasks

    folder = out if out is not None else Path("runs") / Path(recipe).stem
    model = train(recipe, folder, overrides=overrides, tensorboard=tensorboard, stop_at=stop_at)
    if not first():
        return
    console = Console(emoji=False)
    shown = escape(str(folder))
    console.print(f"The {model.kind} model is in [bold]{shown}[/]. It can: {', '.join(model.capabilities)}.")
    score = f"isthmus eval {shown}{'' if own_tasks(folder) else ' --task TASK --data FILE'}"
    talk = f", [bold]isthmus chat {shown}{' --image PICTURE' if model.processor.image else ''}[/]"
    console.print(f"Next: [bold]{score}[/]" + (talk if "chat" in model.capabilities else ""))
