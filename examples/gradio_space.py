"""A Gradio page over the models that come with isthmus, for a Space or for yourself: ``pip install isthmus gradio``,
then ``python gradio_space.py``. A Space takes this file as ``app.py`` and both names in its ``requirements.txt``.

Gradio is no dependency of isthmus: the page of ``isthmus serve`` needs none and shows more (docs/page.md).
"""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import isthmus
from isthmus.data.sources import open_source
from isthmus.pretrained import SCHEME, names

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST = 64
"""New tokens of an answer."""
LONGEST_QUESTION = 500
"""Characters."""


@cache
def opened(name: str) -> isthmus.Model:
    return isthmus.load(f"{SCHEME}{name}", device="cpu")


def talkative() -> list[str]:
    """Those of the package's models that answer about pictures."""
    return [name for name in names() if "attend" in opened(name).capabilities]


def answer(model: str, picture: "Image | None", question: str) -> Iterator[str]:
    """The answer so far, again and again while it is written. Only names of :func:`talkative` are opened."""
    if model not in talkative():
        yield "There is no such model."
    elif picture is None or not question.strip():
        yield "Give a picture and a question."
    else:
        asked = {"type": "text", "text": question.strip()[:LONGEST_QUESTION]}
        content = [{"type": "image", "image": picture.convert("RGB")}, asked]
        said = ""
        for piece in opened(model).stream([{"role": "user", "content": content}], max_new_tokens=LONGEST):
            said += piece
            yield said


def scenes(count: int) -> "list[Image]":
    """Pictures of the kind that the models know: generated scenes that they were not trained on."""
    source = open_source({"kind": "scenes", "form": "describe", "split": "test", "count": count})
    return [source[n].images[0].source.read() for n in range(count)]


def page() -> Any:
    """The Gradio interface."""
    import gradio

    models = talkative()
    return gradio.Interface(
        answer,
        inputs=[
            gradio.Dropdown(models, value=models[-1], label="Model"),
            gradio.Image(type="pil", label="Picture"),
            gradio.Textbox(label="Question", placeholder="what colour is the cube?"),
        ],
        outputs=gradio.Textbox(label="Answer"),
        examples=[[models[-1], scene, "how many things are there?"] for scene in scenes(4)],
        cache_examples=False,
        title="isthmus",
        description="Tiny models that know coloured solids in generated scenes, and no photographs.",
    )


if __name__ == "__main__":
    page().launch()
