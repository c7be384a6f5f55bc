"""``isthmus chat``: one answer about pictures, or a conversation at the prompt."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from isthmus.cli.options import Loading
from isthmus.errors import CapabilityError, DataError, MissingExtraError

if TYPE_CHECKING:
    from isthmus.data.messages import Message


def run(
    model_folder: str,
    question: str | None,
    images: Sequence[Path],
    *,
    videos: Sequence[Path] = (),
    max_new_tokens: int,
    temperature: float,
    given: Loading | None = None,
) -> None:
    """Answer ``question`` about ``images`` and ``videos``, or talk until an empty line. ``given``: further arguments of
    :func:`isthmus.load`."""
    from isthmus.opening import load

    shown = [*(("image", path) for path in images), *(("video", path) for path in videos)]
    for modality, path in shown:
        _there(modality, path)
    if question is not None and not question.strip():
        raise DataError("The question is empty; leave it out to start a conversation.")
    model = load(model_folder, **(given or Loading()))
    model.need("chat")
    if images and model.processor.image is None:
        raise CapabilityError(f"This model ({model.kind}) reads only text; leave --image out, or take one that sees.")
    if videos and not model.net.reads_clips:
        raise CapabilityError(f"This model ({model.kind}) reads no clips; leave --video out, or take a Flamingo.")
    if model.processor.template == "plain":
        Console(stderr=True, emoji=False).print(
            "This model learnt captions (template plain): it is shown pictures, and not what you ask. "
            "--template chat asks in its language model's own template, where it has one."
        )
    pictures = [_opened(modality, path) for modality, path in shown]
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    console = Console(emoji=False)
    if question is not None:
        _say(console, model.stream([_turn(pictures, question)], **decoding))
        return
    _talk(console, lambda messages: model.stream(messages, **decoding), pictures)


def _say(console: Console, pieces: Iterable[str]) -> str:
    """The answer, shown as it comes."""
    said = ""
    for piece in pieces:
        said += piece
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return said


def _talk(
    console: Console, answer: "Callable[[Sequence[Message]], Iterable[str]]", shown: list[dict[str, object]]
) -> None:
    """Turn by turn until an empty line; ``shown`` goes with the next turn. What cannot be answered is taken back."""
    from isthmus.data.messages import NO_ANSWER

    console.print("[dim]/image FILE or /video CLIP shows one more; an empty line ends the conversation.[/]")
    messages: list[Message] = []
    while text := _read_question(console):
        command, _, path = text.partition(" ")
        if command in ("/image", "/video"):
            try:
                shown = [*shown, _opened(command[1:], Path(path.strip()))]
            except (DataError, MissingExtraError) as error:
                console.print(str(error), markup=False)
            continue
        turn = _turn(shown, text)
        try:
            said = _say(console, answer([*messages, turn]))
        except (DataError, CapabilityError) as error:
            what = "That turn and what it showed are" if shown else "That turn is"
            console.print(f"{error}\n{what} taken back; an empty line ends the conversation.", markup=False)
            shown = []
            continue
        if not said:
            console.print(NO_ANSWER, markup=False, highlight=False)
        messages += [turn, {"role": "assistant", "content": said or NO_ANSWER}]
        shown = []


def _there(modality: str, path: Path) -> None:
    if modality == "image" and not path.is_file():
        raise DataError(f"There is no picture at {path}. Check the path.")
    if modality == "video" and not path.exists():
        raise DataError(f"There is no video file or folder of frames at {path}. Check the path.")


def _opened(modality: str, path: Path) -> dict[str, object]:
    """The part of a turn that shows what is there. Raises DataError when it cannot be read, MissingExtraError when a
    package is missing that reads it."""
    from isthmus.data.images import FileImage, open_image
    from isthmus.data.video import FileFrames, FolderFrames

    _there(modality, path)
    if modality == "image":
        open_image(FileImage(path))
    else:
        (FolderFrames(path) if path.is_dir() else FileFrames(path)).read()
    return {"type": modality, modality: path}


def _turn(pictures: list[dict[str, object]], text: str) -> "Message":
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _read_question(console: Console) -> str:
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
