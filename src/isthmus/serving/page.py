"""The browser page at ``/``: static files, and the few routes of ours that it needs beside the public API.

``/isthmus/scene`` and ``/isthmus/clip``: a generated picture or clip with its truth; ``/isthmus/look``: what a model
attended to for each word of its answer; ``/isthmus/runs``: each model's parts, counts, losses and scores.
"""

import base64
from collections.abc import Iterator
from functools import partial
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from PIL import Image as PilImage
from pydantic import Field

from isthmus.data.attention import Attention
from isthmus.data.images import open_image
from isthmus.data.mix import Source
from isthmus.data.record import Image, Record, Video
from isthmus.data.sources import open_source
from isthmus.errors import CapabilityError
from isthmus.model import Model
from isthmus.pretrained import FOLDER
from isthmus.recipes.facts import parts_of, visual_tokens, visual_tokens_text
from isthmus.serving import schema
from isthmus.serving.errors import bad_request
from isthmus.serving.limits import MOST_MESSAGES
from isthmus.serving.parsing import StrictRoute
from isthmus.serving.prepare import Frames
from isthmus.serving.run_facts import scores, training
from isthmus.serving.server import ERRORS, Server
from isthmus.weights import state_tensors

router = APIRouter(route_class=StrictRoute)

SCENES = 1_000_000
"""Generated pictures to choose from: those of the test split, which no model of the demo was trained on."""

LONGEST_LOOK = 256
"""Most tokens of an answer with attention maps: each has its own."""

_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src blob:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
}
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
"""The static files by their address."""


async def _static(name: str, media_type: str) -> Response:
    content = files("isthmus.serving").joinpath("static", name).read_bytes()
    return Response(content, media_type=media_type, headers=_HEADERS)


for _path, _file in PAGE.items():
    router.add_api_route(_path, partial(_static, *_file), include_in_schema=False)


class LookRequest(schema.BaseRequest):
    """A conversation that the model is to continue greedily, as ``/v1/chat/completions`` takes it."""

    messages: Annotated[list[schema.Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=LONGEST_LOOK)] = 128


@router.get("/isthmus/scene", responses=ERRORS, operation_id="scene")
async def scene(request: Request, number: Annotated[int, Query(ge=0, lt=SCENES)] = 0) -> dict[str, object]:
    """A generated picture as a PNG, what it shows, and questions about it with their answers."""
    server: Server = request.app.state.server
    return await server.prepared(lambda: _scene(number))


def _scene(number: int) -> dict[str, object]:
    described, body = (_made(form)[number] for form in ("describe", "conversations"))
    # A scene that no question fits is drawn anew for its conversation: then the questions are about another picture.
    turns = [str(t.text) for t in body.texts] if body.images[0].key == described.images[0].key else []
    return {
        "number": number,
        "picture": _png(open_image(described.images[0].source)),
        "truth": next(str(t.text) for t in described.texts if t.role == "assistant"),
        "questions": [{"question": q, "answer": a} for q, a in zip(turns[::2], turns[1::2], strict=True)],
    }


@router.get("/isthmus/clip", responses=ERRORS, operation_id="clip")
async def clip(request: Request, number: Annotated[int, Query(ge=0, lt=SCENES)] = 0) -> dict[str, object]:
    """The frames of a generated clip as PNGs, and a question about what happens with its answer."""
    server: Server = request.app.state.server
    return await server.prepared(lambda: _clip(number))


def _clip(number: int) -> dict[str, object]:
    record = _made("clip_questions")[number]
    question, answer = (str(t.text) for t in record.texts)
    made = record.images[0]
    assert isinstance(made, Video)  # as all of that form
    frames = [_png(frame) for frame in made.source.read()]
    return {"number": number, "frames": frames, "questions": [{"question": question, "answer": answer}]}


def _made(form: str) -> Source:
    return open_source({"kind": "scenes", "form": form, "split": "test", "count": SCENES})


def _png(picture: PilImage.Image) -> str:
    out = BytesIO()
    picture.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


@router.post("/isthmus/look", responses=ERRORS, operation_id="look")
async def look(body: LookRequest, request: Request) -> dict[str, object]:
    """What the model attended to for each word of its greedy answer: per picture of the conversation a map per word.

    Each frame of a clip counts as a picture.
    A map is rows x columns of patches, row by row, the mean over layers and the word's tokens. ``box`` (left, top,
    right, bottom) is the part of the picture that the map covers, in fractions of its width and height; it reaches
    beyond 0 and 1 where the picture was padded. Of a picture read in tiles the map is that of the overview.
    """
    server: Server = request.app.state.server
    model = server.model(body.model, "attend")
    with server.ticket(request, body) as hearing:
        record = server.reader.conversation(body.messages)
        await server.prepared(lambda: server.reader.prompt(model, record))  # refuses what the model cannot read
        boxes = await server.prepared(lambda: [_boxes(server, model, image) for image in record.images])
        found = await hearing.call(_attention(model, record, body.max_tokens))
        words = found.words()
        pictures = [
            {
                "box": box,
                "rows": maps.shape[-2],
                "columns": maps.shape[-1],
                "maps": [[round(x, 5) for x in heat[frame].flatten().tolist()] for heat in found.heat(n)],
            }
            for n, (own, maps) in enumerate(zip(boxes, found.maps, strict=True))
            for frame, box in enumerate(own)
        ]
        return {"model": body.model, "text": found.text, "words": [w for w, _ in words], "pictures": pictures}


def _attention(model: Model, record: Record, tokens: int) -> Iterator[Attention]:
    try:
        yield model.attend([record], max_new_tokens=tokens)[0]
    except CapabilityError:
        raise bad_request("no_maps", "This model's attention cannot be traced back to the picture.", "model") from None


def _boxes(server: Server, model: Model, image: Image) -> list[tuple[float, float, float, float]]:
    """Of a picture one, of a clip one per frame."""
    transform = model.processor.image
    assert transform is not None  # a model that reads only text was refused its pictures before
    sources = image.source.pictures if isinstance(image.source, Frames) else [image.source]
    return [transform.box(*open_image(source, server.limits.images).size) for source in sources]


@router.get("/isthmus/runs", responses=ERRORS, operation_id="runs")
async def runs(request: Request) -> dict[str, object]:
    """Each model's parts with their numbers of parameters, its size in memory, whether it came with the package, and of
    its folder the stages of its training with their losses, and the tables of its scores; what a picture may weigh, and
    how many pictures can be searched."""
    server: Server = request.app.state.server
    places, searched = request.app.state.places, request.app.state.pictures
    facts = await server.prepared(
        lambda: [_model_facts(name, model, places.get(name)) for name, model in server.models.items()]
    )
    limits = server.limits
    return {
        "models": facts,
        "limits": {
            "pictures": limits.pictures,
            "picture_bytes": limits.picture,
            "picture_pixels": limits.pixels,
            "picture_side": limits.side,
        },
        "pictures": 0 if searched is None else len(searched.files),
    }


def _model_facts(name: str, model: Model, place: Path | None) -> dict[str, object]:
    return {
        "id": name,
        "kind": model.kind,
        "capabilities": list(model.capabilities),
        "shipped": place is not None and place.parent == FOLDER,
        "parts": parts_of(model.net),
        "weight_bytes": sum(t.numel() * t.element_size() for t in state_tensors(model.net).values()),
        "visual_tokens": "" if visual_tokens(model.net) is None else visual_tokens_text(model.net),
        "stages": [] if place is None else training(place),
        "scores": [] if place is None else scores(place),
    }
