"""What the page does with many pictures: search of a folder by text or by picture, and which belongs to which."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from isthmus.data.record import Image, Part
from isthmus.errors import DataError
from isthmus.model import Model
from isthmus.serving import schema
from isthmus.serving.errors import ApiError, bad_request
from isthmus.serving.parsing import StrictRoute
from isthmus.serving.pictures import LARGEST, LOSSLESS, MOST_PICTURES, THUMBNAIL, Pictures
from isthmus.serving.prepare import checked
from isthmus.serving.server import ERRORS, Server
from isthmus.serving.vectors import fits

router = APIRouter(route_class=StrictRoute)
MOST_FOUND = 24
MOST_RERANKED = 64
MOST_TEXTS = 32


class SearchRequest(schema.BaseRequest):
    """A text or a picture, for which the most similar pictures of the folder are wanted."""

    input: schema.Said | Annotated[list[schema.Part], Field(min_length=1, max_length=1)]
    top: Annotated[int, Field(ge=1, le=MOST_FOUND)] = 12
    rerank: Annotated[int, Field(ge=0, le=MOST_RERANKED)] = Field(
        0, description="So many of the most similar are put in order by matching each with the text (BLIP-2); 0: none."
    )


class MatchRequest(schema.BaseRequest):
    """Pictures and texts, each of which is held against each."""

    pictures: schema.Parts
    texts: Annotated[list[schema.Said], Field(min_length=1, max_length=MOST_TEXTS)]
    measure: Literal["match", "similarity"] | None = Field(
        None, description="Default: the probability of matching where the model gives it, else the similarity."
    )


def _pictures(request: Request) -> Pictures:
    found: Pictures | None = request.app.state.pictures
    if found is None:
        raise ApiError(404, "no_pictures", "This server has no folder of pictures: it is started with --pictures DIR.")
    return found


@router.get("/isthmus/picture", responses=ERRORS, operation_id="picture")
async def picture(request: Request, number: Annotated[int, Query(ge=0, lt=MOST_PICTURES)] = 0) -> dict[str, object]:
    """A picture of the folder, made smaller where a side is over 1,024 pixels."""
    server: Server = request.app.state.server
    pictures = _pictures(request)
    if number >= len(pictures.files):
        raise ApiError(404, "no_such_picture", "The folder has no picture of that number.", "number")
    try:
        url = await server.prepared(lambda: pictures.url(number, LARGEST, lossless=LOSSLESS))
    except DataError:
        raise bad_request("invalid_image", "That picture of the folder cannot be read.", "number") from None
    return {"number": number, "name": pictures.name(number), "picture": url}


@router.post("/isthmus/search", responses=ERRORS, operation_id="search")
async def search(body: SearchRequest, request: Request) -> dict[str, object]:
    """The pictures of the folder that are most similar to a text or a picture, best first, with small copies.

    The first search with a model reads all of the folder; one that takes longer than a request may goes on where it
    stopped at the next request.
    """
    server: Server = request.app.state.server
    pictures = _pictures(request)
    model = server.model(body.model, "embed_images")
    with server.ticket(request, body) as hearing:
        pieces: Sequence[schema.Part | str] = [body.input] if isinstance(body.input, str) else body.input
        (part,) = await server.prepared(lambda: server.reader.parts(pieces, "user"))
        for needed, wanted in (("embed_texts", not isinstance(part, Image)), ("match", body.rerank > 0)):
            if wanted and needed not in model.capabilities:
                raise bad_request("model_cannot", "This model cannot search so; /v1/models lists what each can.")
        if body.rerank and isinstance(part, Image):
            raise bad_request("invalid_value", "Only a search by text is reranked.", "rerank")
        order = await hearing.call(_search(pictures, body, model, part))
        hits = await server.prepared(lambda: _shown(pictures, order[: body.top]))
        return {
            "object": "list",
            "model": body.model,
            "reranked": min(body.rerank, len(order)),
            "pictures": len(pictures.files),
            "unreadable": len(pictures.unreadable),
            "data": hits,
        }


def _search(pictures: Pictures, body: SearchRequest, model: Model, part: Part) -> Iterator[list[tuple[int, float]]]:
    for _ in pictures.read(body.model, model):
        yield []
    query = model.embed_images([part])[0] if isinstance(part, Image) else model.embed_texts([str(part.text)])
    numbers, scores = pictures.rank(body.model, model, query.reshape(-1, query.shape[-1]))
    values = scores.tolist()
    yield list(zip(numbers, values, strict=True))
    if body.rerank and not isinstance(part, Image):
        first = numbers[: body.rerank]
        for both in pictures.reranked(model, str(part.text), first, scores):
            yield []
            if len(both) == len(first):
                best = sorted(zip(first, both, strict=True), key=lambda pair: -pair[1])
                yield [*best, *zip(numbers[len(first) :], values[len(first) :], strict=True)]


def _shown(pictures: Pictures, order: Sequence[tuple[int, float]]) -> list[dict[str, object]]:
    """The facts of each; one that cannot be read any more is left out."""
    found = []
    for number, score in order:
        try:
            url = pictures.url(number, THUMBNAIL)
        except DataError:
            continue
        found.append({"number": number, "name": pictures.name(number), "score": score, "thumbnail": url})
    return found


@router.post("/isthmus/match", responses=ERRORS, operation_id="match")
async def match(body: MatchRequest, request: Request) -> dict[str, object]:
    """For each picture and each text the probability that they belong together, or their similarity."""
    server: Server = request.app.state.server
    model = server.model(body.model, "match", "similarity")
    measure = body.measure or ("match" if "match" in model.capabilities else "similarity")
    if measure not in model.capabilities:
        raise bad_request("model_cannot", "This model has no such measure.", "measure")
    with server.ticket(request, body) as hearing:
        parts = await server.prepared(lambda: server.reader.parts(body.pictures, "user"))
        images = [part for part in parts if isinstance(part, Image)]
        if len(images) < len(parts):
            raise bad_request("only_pictures", "What is matched with the texts are pictures.", "pictures")
        rows = await hearing.call(_matrix(model, images, [checked(text) for text in body.texts], measure))
        data = [{"object": "match", "index": n, "scores": row} for n, row in enumerate(rows)]
        return {"object": "list", "model": body.model, "measure": measure, "data": data}


def _matrix(model: Model, images: Sequence[Image], texts: Sequence[str], measure: str) -> Iterator[list[list[float]]]:
    rows: list[list[float]] = []
    for image in images:
        for row in fits(model, image, texts, measure):
            yield [*rows, row]
        rows.append(row)
