"""``isthmus look``: what a model attended to for each word of its answer, and what covering each region changes."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from isthmus.cli.options import Loading
from isthmus.errors import CapabilityError, ConfigError

if TYPE_CHECKING:
    from PIL import Image as PilImage


def run(
    name: str,
    question: str,
    image: Path,
    out: Path,
    *,
    cells: int,
    max_new_tokens: int,
    given: Loading,
) -> None:
    """Write ``word-NN-WORD.png``, ``covering.png`` and ``look.json`` into ``out``, which must be new or empty.

    A model that has no maps, or scores no answers, is said so and the other half is written; one that has neither is
    a CapabilityError. Raises ConfigError for a folder that holds something.
    """
    from isthmus.comparison.covering import cover, drawn, word_pictures
    from isthmus.data.images import FileImage, open_image
    from isthmus.opening import load

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; name a new folder with --out.")
    picture = open_image(FileImage(image))
    console, model = Console(emoji=False), load(name, **given)
    if not {"attend", "score"} & set(model.capabilities) or model.processor.image is None:
        can = ", ".join(model.capabilities)
        raise CapabilityError(
            f"This {model.kind} model neither gives attention maps nor scores answers; it can: {can}."
        )
    facts: dict[str, object] = {"model": name, "image": str(image), "question": question}
    words: list[tuple[str, PilImage.Image]] = []
    try:
        answer, words = word_pictures(model, picture, question, max_new_tokens=max_new_tokens)
    except CapabilityError as error:
        console.print(f"No pictures of words: {error}", markup=False, highlight=False)
        answer = model.answer(picture, question, max_new_tokens=max_new_tokens)
    console.print(f"Answer: {answer}", markup=False, highlight=False)
    drawings = {
        f"word-{number:02}-{re.sub(r'[^A-Za-z0-9]+', '', word)[:20] or 'sign'}.png": shown
        for number, (word, shown) in enumerate(words, 1)
    }
    facts |= {"answer": answer, "words": [word for word, _ in words]}
    if "score" in model.capabilities and answer.strip():
        with Progress(transient=True, console=console) as bar:
            task = bar.add_task("covering", total=cells * cells)
            found = cover(
                model, picture, question, answer, cells=cells, note=lambda done, _: bar.update(task, completed=done)
            )
        drawings["covering.png"] = drawn(picture, found)
        facts |= {"logprob": found.logprob, "drop": found.drop.tolist()}
        row, column = divmod(int(found.drop.argmax()), cells)
        console.print(
            f"Log-probability {found.logprob:.3f}; covering row {row + 1}, column {column + 1} of {cells} x {cells} "
            f"lowers it most, by {float(found.drop.max()):.3f}",
            highlight=False,
            soft_wrap=True,
        )
        legend = "covering.png: red where covering makes the answer less likely, blue where likelier"
        console.print(legend, highlight=False, soft_wrap=True)
    else:
        why = "it scores no answers" if answer.strip() else "the answer is empty"
        console.print(f"No covering.png: {why}.", highlight=False)
    out.mkdir(parents=True, exist_ok=True)  # all is written at the end: what was interrupted can be given again
    for file, drawing in drawings.items():
        drawing.save(out / file)
    (out / "look.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pictures = f"{len(words)} picture{'s' * (len(words) != 1)} of words (bright: attended to; attention and not proof)"
    console.print(f"{pictures}: {out}", markup=False, highlight=False, soft_wrap=True)
