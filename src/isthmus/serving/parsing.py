"""Bodies: strict JSON, and errors of their fields in fixed words."""

import json
import math
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import ErrorDetails

from isthmus.serving.errors import ApiError, bad_request

_FIXED = {
    "missing": "This field is required.",
    "extra_forbidden": "This field is not known here, and leaving it out would change the answer.",
    "string_too_short": "This text is too short.",
    "string_too_long": "This text is too long.",
    "too_short": "This list is too short.",
    "too_long": "This list is too long.",
    "greater_than": "This number is too small.",
    "greater_than_equal": "This number is too small.",
    "less_than": "This number is too large.",
    "less_than_equal": "This number is too large.",
    "literal_error": "This value is none of those that are allowed.",
    "list_type": "This value must be a list.",
    "string_type": "This value must be a text.",
    "int_type": "This value must be a whole number.",
    "int_from_float": "This value must be a whole number.",
    "float_type": "This value must be a number.",
    "bool_type": "This value must be true or false.",
    "model_type": "This value must be an object.",
    "model_attributes_type": "This value must be an object.",
    "union_tag_invalid": "A part is of type text or image_url, or in a conversation video_url.",
    "union_tag_not_found": "A part names its type: text or image_url, or in a conversation video_url.",
}
_OTHERWISE = "This value is of the wrong type."
_NONE = ErrorDetails(type="", loc=(), msg="", input=None)
_PLAIN = re.compile(r"[a-z]+(_[a-z]+){0,4}")
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


class StrictRequest(Request):
    """A request whose JSON is UTF-8, finite, not too deep and without halves of surrogate pairs."""

    value: object = None

    async def json(self) -> object:
        """Parsed once, by :class:`StrictRoute`, whose errors are not the framework's to reword."""
        return self.value


class StrictRoute(APIRoute):
    """Hands every endpoint a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[object, None, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            own = StrictRequest(request.scope, request.receive, request._send)
            if body := await own.body():
                own.value = parsed(body, request.app.state.server.limits.depth)
            return await handle(own)

        return strict


def parsed(body: bytes, depth: int) -> object:
    """The value of a JSON text. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise bad_request("invalid_utf8", "The body is not valid UTF-8.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # also an integer of thousands of digits
        raise bad_request("invalid_json", "The body is not valid JSON.") from None
    _check(value, depth)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _too_deep() -> ApiError:
    return bad_request("too_deep", "Lists and objects of the body are nested too deeply.")


def _check(value: object, depth: int) -> None:
    if depth < 0:
        raise _too_deep()
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise bad_request("invalid_number", "A number of the body is not finite.")
    elif isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name)
            _check(item, depth - 1)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("lone_surrogate", "A text of the body holds half a surrogate pair.") from None


def field_error(problems: Sequence[ErrorDetails]) -> ApiError:
    """The first thing that is wrong with a body's fields, in fixed words; the place by names that are known here, and
    an unknown field by its own where that is a plain word."""
    problem = _worst(problems)
    kind, bounds = str(problem["type"]), problem.get("ctx", {})
    text = _FIXED.get(kind, _OTHERWISE)
    limits = [f"{_BOUNDS[name]} {bounds[name]:,}" for name in _BOUNDS if isinstance(bounds.get(name), int | float)]
    if isinstance(bounds.get("max_length"), int):
        limits.append(f"at most {bounds['max_length']:,} long")
    if limits:
        text = f"{text[:-1]}: it must be {' and '.join(limits)}."
    place = [p for p in problem["loc"] if p != "body"]
    unknown = kind == "extra_forbidden"
    if unknown and not _PLAIN.fullmatch(str(place[-1])):
        place.pop()
    param = ".".join(str(p) for p in place if isinstance(p, int) or str(p).isidentifier())
    return bad_request("unknown_field" if unknown else "invalid_value", text, param or None)


def _worst(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """Of a value that fits none of several kinds, the complaint of the one that it came nearest to."""
    return max(problems, key=lambda p: len(p["loc"])) if problems else _NONE
