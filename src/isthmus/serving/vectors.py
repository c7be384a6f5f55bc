"""/v1/embeddings, /v1/score and /v1/classify."""

import base64
from collections.abc import Iterator, Sequence

from fastapi import APIRouter, Request
from torch import Tensor

from isthmus.data.images import image_size
from isthmus.data.record import Image, Part, Record, Text
from isthmus.model import Model
from isthmus.serving import schema
from isthmus.serving.errors import ApiError, bad_request
from isthmus.serving.parsing import StrictRoute
from isthmus.serving.prepare import checked
from isthmus.serving.server import ERRORS, Server

router = APIRouter(route_class=StrictRoute)
AT_ONCE = 32
"""Texts or candidates of one piece of work."""
MOST_PROMPTS = 1024
"""Labels times templates."""
MEASURES = {"likelihood": "score", "match": "match", "similarity": "similarity"}
"""What /v1/score can measure, and the capability it takes; the first that a model has is its own."""


@router.post("/v1/embeddings", responses=ERRORS, operation_id="embed")
async def embeddings(body: schema.EmbeddingRequest, request: Request) -> dict[str, object]:
    """Texts and pictures as vectors. A BLIP-2 gives one vector per query for a picture: ``shape`` says how many."""
    server: Server = request.app.state.server
    model = server.model(body.model, "embed_images", "embed_texts")
    with server.ticket(request, body) as hearing:
        inputs = [body.input] if isinstance(body.input, str) else body.input
        parts = await server.prepared(lambda: server.reader.parts(inputs, "user"))
        for needed, what in (("embed_images", "pictures"), ("embed_texts", "texts")):
            if needed not in model.capabilities and any(isinstance(p, Image) == (what == "pictures") for p in parts):
                raise bad_request("model_cannot", f"This model gives no vectors of {what}.", "input")
        vectors = await hearing.call(_vectors(model, parts))
        read = await server.prepared(lambda: _embedded_tokens(model, parts))
        server.count_read(body.model, read)
        return {
            "object": "list",
            "model": body.model,
            "data": [_vector(n, v, body.encoding_format) for n, v in enumerate(vectors)],
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }


def _vectors(model: Model, parts: Sequence[Part]) -> Iterator[list[Tensor]]:
    """The vectors of all parts so far, some more with each piece."""
    found: dict[int, Tensor] = {}
    for number, part in enumerate(parts):
        if isinstance(part, Image):
            found[number] = model.embed_images([part])[0]
            yield []
    texts = [(n, str(p.text)) for n, p in enumerate(parts) if not isinstance(p, Image)]
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        found |= zip((n for n, _ in some), model.embed_texts([t for _, t in some]), strict=True)
        yield []
    yield [found[n] for n in range(len(parts))]


def _vector(number: int, vector: Tensor, form: str) -> dict[str, object]:
    flat = vector.float().flatten()
    value = base64.b64encode(flat.numpy().astype("<f4").tobytes()).decode() if form == "base64" else flat.tolist()
    return {"object": "embedding", "index": number, "embedding": value, "shape": list(vector.shape)}


@router.post("/v1/score", responses=ERRORS, operation_id="score")
async def score(body: schema.ScoreRequest, request: Request) -> dict[str, object]:
    """How well each candidate fits: its log-likelihood as the answer, its probability of matching the picture, or its
    similarity with it."""
    server: Server = request.app.state.server
    model = server.model(body.model, *MEASURES.values())
    measure = body.measure or next(m for m, can in MEASURES.items() if can in model.capabilities)
    if MEASURES[measure] not in model.capabilities:
        raise bad_request("model_cannot", "This model has no such measure.", "measure")
    with server.ticket(request, body) as hearing:
        parts = await server.prepared(lambda: server.reader.parts(body.input, "user"))
        candidates = [checked(c) for c in body.candidates]
        if measure == "likelihood":
            scores = await hearing.call(_likelihoods(model, parts, candidates))
            read = await server.prepared(lambda: _prompt_tokens(model, parts))
        else:
            scores = await hearing.call(fits(model, _one_picture(parts), candidates, measure))
            read = await server.prepared(lambda: _embedded_tokens(model, parts))
        server.count_read(body.model, read)
        return {
            "object": "list",
            "model": body.model,
            "measure": measure,
            "data": [{"object": "score", "index": n, "score": s} for n, s in enumerate(scores)],
            "usage": {"prompt_tokens": read, "total_tokens": read},
        }


def _likelihoods(model: Model, parts: Sequence[Part], candidates: Sequence[str]) -> Iterator[list[float]]:
    if any(isinstance(p, Image) for p in parts) and model.processor.image is None:
        raise bad_request("no_vision", "This model reads only text; send no picture.", "input")
    found: list[float] = []
    for start in range(0, len(candidates), AT_ONCE):
        found += model.score(parts, candidates[start : start + AT_ONCE])
        yield found


def _prompt_tokens(model: Model, parts: Sequence[Part]) -> int:
    """Tokens of the prompt that candidates are the answers to, those of its pictures and its template among them."""
    return model.processor.uncut().prompt(Record(id="request", parts=tuple(parts))).length


def fits(model: Model, image: Image, candidates: Sequence[str], measure: str) -> Iterator[list[float]]:
    """How well each candidate fits a picture, by ``match`` or ``similarity``: those so far, more with each step."""
    if measure == "similarity":
        yield model.similarity([image], candidates)[0].tolist()
        return
    found: list[float] = []
    for candidate in candidates:
        found.append(model.match(image, candidate))
        yield found


@router.post("/v1/classify", responses=ERRORS, operation_id="classify")
async def classify(body: schema.ClassifyRequest, request: Request) -> dict[str, object]:
    """Zero-shot probabilities of labels for one picture, in the order of the labels."""
    server: Server = request.app.state.server
    model = server.model(body.model, "classify")
    if any(t.count("{}") != 1 for t in body.templates):
        raise bad_request("invalid_value", "Each template has exactly one {} where the label goes.", "templates")
    if len(set(body.labels)) < len(body.labels):
        raise bad_request("invalid_value", "The labels must differ from each other.", "labels")
    if len(body.labels) * len(body.templates) > MOST_PROMPTS:
        raise bad_request("invalid_value", f"Labels times templates are at most {MOST_PROMPTS:,}.", "labels")
    with server.ticket(request, body) as hearing:
        parts = await server.prepared(lambda: server.reader.parts(body.input, "user"))
        image, labels = _one_picture(parts), [checked(label) for label in body.labels]
        templates = [checked(template) for template in body.templates]
        found = await hearing.call(_classes(model, image, labels, templates))
        prompts = [Text(t.replace("{}", label)) for label in labels for t in templates]
        server.count_read(body.model, await server.prepared(lambda: _embedded_tokens(model, [image, *prompts])))
        probs = [found[label] for label in labels]
        best = max(range(len(labels)), key=probs.__getitem__)
        one = {"index": 0, "label": labels[best], "probs": probs, "num_classes": len(labels)}
        return {"object": "list", "model": body.model, "labels": labels, "data": [one]}


def _classes(model: Model, image: Image, labels: Sequence[str], templates: Sequence[str]) -> Iterator[dict[str, float]]:
    yield model.classify(image, labels, templates=templates)


def _one_picture(parts: Sequence[Part]) -> Image:
    if len(parts) == 1 and isinstance(parts[0], Image):
        return parts[0]
    raise ApiError(400, "one_picture", "The input must be one picture and nothing else.", "input")


def _embedded_tokens(model: Model, parts: Sequence[Part]) -> int:
    """Tokens of what becomes vectors: of a text as its processor lays it out, start and end among them and cut where
    that cuts it, of a picture as its net counts them."""
    read, transform = 0, model.processor.image
    for part in parts:
        if not isinstance(part, Image):
            read += model.processor.text_example(str(part.text)).length
        elif transform is not None:
            read += model.net.embedded_tokens(*transform.shape(*image_size(part.source)))
    return read
