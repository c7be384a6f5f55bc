"""``isthmus chat``: one answer about pictures, or a conversation at the prompt."""

from collections.abc import Sequence
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
        raise CapabilityError(f"A {model.kind} model reads only text; leave --image out or take a model that sees.")
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    console = Console(emoji=False)
    pictures = [{"type": "image", "image": path} for path in images]
    pictures += [{"type": "video", "video": path} for path in videos]
    if question is not None:
        console.print(model.chat([_turn(pictures, question)], **decoding), markup=False, highlight=False)
        return
    console.print("[dim]An empty line ends the conversation.[/]")
    messages: list[dict[str, Any]] = []
    while text := _ask(console):
        messages.append(_turn(pictures if not messages else [], text))
        reply = model.chat(messages, **decoding)
        messages.append({"role": "assistant", "content": reply})
        console.print(reply, markup=False, highlight=False)


def _turn(pictures: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
