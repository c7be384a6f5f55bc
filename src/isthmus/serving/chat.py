"""/v1/chat/completions and /v1/completions."""

import json
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from isthmus.data.record import Example, Record, Text
from isthmus.data.words import Words
from isthmus.model import Model
from isthmus.serving import schema
from isthmus.serving.choices import Answer
from isthmus.serving.errors import ApiError, bad_request
from isthmus.serving.parsing import StrictRoute
from isthmus.serving.prepare import checked, decoding, stops
from isthmus.serving.scheduler import Said, Work
from isthmus.serving.scheduler import Text as Written
from isthmus.serving.server import ERRORS, Hearing, Server

router = APIRouter(route_class=StrictRoute)
_STREAMS: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer."}
}


class Events(StreamingResponse):
    """A stream of events that lets go of its request however it ends, even before it began."""

    def __init__(self, pieces: AsyncIterator[str], hearing: Hearing) -> None:
        super().__init__(pieces, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.hearing = hearing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.hearing.close()


@router.post("/v1/chat/completions", responses=ERRORS | _STREAMS, operation_id="chat")
async def chat(body: schema.ChatRequest, request: Request) -> Response:
    """The assistant's next turn of a conversation with pictures, complete or as server-sent events."""
    server: Server = request.app.state.server
    model = server.model(body.model, "chat")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("invalid_value", "top_logprobs needs logprobs: true.", "top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    hearing = server.ticket(request, body, body.n or 1)
    try:
        reader = server.reader
        example = await server.prepared(lambda: reader.prompt(model, reader.conversation(body.messages)))
        tokens = body.max_completion_tokens or body.max_tokens
        texts = _texts(server, hearing, model, body, [example], tokens, top, strip=True)
        answer = Answer(body.model, model.processor.tokenizer, example.length, chat=True, top=top)
        return await _answered(hearing, body, texts, answer)
    except BaseException:
        hearing.close()
        raise


@router.post("/v1/completions", responses=ERRORS | _STREAMS, operation_id="complete")
async def complete(body: schema.CompletionRequest, request: Request) -> Response:
    """Running text continued, by a language model without a vision encoder."""
    server: Server = request.app.state.server
    model = server.model(body.model, "generate")
    if model.processor.image is not None:
        raise bad_request("model_cannot", "Only a language model alone continues text; use chat/completions.", "model")
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    hearing = server.ticket(request, body, len(prompts) * (body.n or 1))
    try:
        records = [Record(id="request", parts=(Text(checked(p), "text"),)) for p in prompts]
        examples = await server.prepared(lambda: [server.reader.prompt(model, record) for record in records])
        texts = _texts(server, hearing, model, body, examples, body.max_tokens or 16, body.logprobs, strip=False)
        read = sum(example.length for example in examples)
        answer = Answer(body.model, model.processor.tokenizer, read, chat=False, top=body.logprobs)
        return await _answered(hearing, body, texts, answer)
    except BaseException:
        hearing.close()
        raise


def _texts(
    server: Server,
    hearing: Hearing,
    model: Model,
    body: schema.Writing,
    examples: list[Example],
    tokens: int | None,
    top: int | None,
    *,
    strip: bool,
) -> list[Work]:
    """The choices to be written, those of each prompt together."""
    speaker = server.scheduler.speakers[body.model]
    if top is not None and not speaker.has_logprobs:
        raise bad_request("no_logprobs", "This model does not give log-probabilities.", "logprobs")
    texts: list[Work] = []
    choices = body.n or 1
    for number, example in enumerate(examples):
        room = None if speaker.context is None else speaker.context - example.length
        for choice in range(choices):
            how = decoding(body, tokens, choice, room)
            words = Words(model.processor.tokenizer, stops(body), strip=strip)
            texts.append(Written(hearing.ticket, number * choices + choice, example, how, words, top))
        server.count_read(body.model, example.length)
    return texts


async def _answered(hearing: Hearing, body: schema.Writing, texts: list[Work], answer: Answer) -> Response:
    """The texts written, in one answer or as a stream, whose status is only fixed when the first event is there."""
    hearing.server.scheduler.submit(hearing.ticket, texts)
    first = await hearing.unless_gone(_next(hearing))
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Events(_pieces(hearing, first, answer, len(texts), usage), hearing)
    answer.hear(first)
    await hearing.unless_gone(_heard(hearing, answer, len(texts)))
    hearing.close()
    return JSONResponse(answer.response())


async def _heard(hearing: Hearing, answer: Answer, choices: int) -> None:
    while not answer.complete(choices):
        answer.hear(await _next(hearing))


async def _next(hearing: Hearing) -> Said:
    event = await hearing.next()
    assert isinstance(event, Said)  # a text's events are no call's
    return event


async def _pieces(hearing: Hearing, said: Said, answer: Answer, choices: int, usage: bool) -> AsyncIterator[str]:
    try:
        for choice in range(choices) if answer.chat else ():
            yield _event(answer.opening(choice))
        while True:
            answer.hear(said)
            if said.text or said.ended or answer.top is not None:
                yield _event(answer.piece(said))
            if answer.complete(choices):
                break
            said = await _next(hearing)
        if usage:
            yield _event(answer.closing())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())


def _event(value: object) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
