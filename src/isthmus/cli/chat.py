"""``isthmus chat``: one answer about pictures, or a conversation at the prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.errors import CapabilityError, DataError


def run(
    model_folder: str,
    question: str | None,
    images: Sequence[Path],
    *,
    videos: Sequence[Path] = (),
    max_new_tokens: int,
    temperature: float,
    revision: str | None = None,
) -> None:
    """Answer ``question`` about ``images`` and ``videos``, or talk until an empty line."""
    from isthmus.model import load

    for image in images:
        if not image.is_file():
            raise DataError(f"There is no picture at {image}.")
    for video in videos:
        if not video.exists():
            raise DataError(f"There is no video file or folder of frames at {video}.")
    if question is not None and not question.strip():
        raise DataError("The question is empty; leave it out to start a conversation.")
    model = load(model_folder, revision=revision)
    model.need("chat")
    if images and model.processor.image is None:
        raise CapabilityError(f"This model ({model.kind}) reads only text; leave --image out, or take one that sees.")
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    console = Console(emoji=False)
    pictures = [{"type": "image", "image": path} for path in images]
    pictures += [{"type": "video", "video": path} for path in videos]
    if question is not None:
        console.print(model.chat([_turn(pictures, question)], **decoding), markup=False, highlight=False)
        return
    _talk(console, lambda messages: model.chat(messages, **decoding), pictures)


def _talk(console: Console, say: Callable[[list[dict[str, Any]]], str], shown: list[dict[str, Any]]) -> None:
    """Turn by turn until an empty line; ``shown`` goes with the next turn. What cannot be answered is taken back."""
    from isthmus.data.messages import NO_ANSWER

    console.print("[dim]/image FILE or /video CLIP shows one more; an empty line ends the conversation.[/]")
    messages: list[dict[str, Any]] = []
    while text := _ask(console):
        command, _, path = text.partition(" ")
        if command in ("/image", "/video"):
            if Path(path.strip()).exists() and path.strip():
                shown = [*shown, {"type": command[1:], command[1:]: Path(path.strip())}]
            else:
                console.print(f"There is nothing at {path.strip()!r}.", markup=False)
            continue
        turn = _turn(shown, text)
        try:
            reply = say([*messages, turn])
        except DataError as error:
            console.print(f"{error}\nThat turn is taken back; an empty line ends the conversation.", markup=False)
            continue
        said = reply or NO_ANSWER
        messages += [turn, {"role": "assistant", "content": said}]
        console.print(said, markup=False, highlight=False)
        shown = []


def _turn(pictures: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
