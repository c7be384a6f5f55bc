"""What a client reads when something is refused: OpenAI's error form, and texts that are fixed here.

No text of an exception is ever passed on: those of libraries may hold paths, addresses of memory or parts of other
people's data. A figure in a text is a limit, never something that was sent.
"""

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.errors import ConfigError, DataError

log = logging.getLogger("isthmus.serving")


@dataclass(slots=True)
class ApiError(Exception):
    """An answer that is an error. ``param`` is the field it is about, in the request's own words."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad_request(code: str, message: str, param: str | None = None) -> ApiError:
    return ApiError(400, code, message, param)


def unfit() -> ApiError:
    return bad_request(
        "invalid_prompt", "The model cannot read this: prompt and answer do not fit it, or a picture is damaged."
    )


def busy(seconds: int = 1) -> ApiError:
    return ApiError(
        429,
        "queue_full",
        "As many requests are waiting as may wait. Try again after the time that Retry-After names.",
        headers={"retry-after": str(seconds)},
    )


def too_late(seconds: int = 5) -> ApiError:
    return ApiError(
        503,
        "deadline_exceeded",
        "The request was not finished within the time that one may take, and was stopped. Ask for fewer tokens, or "
        "try again when there are fewer requests.",
        headers={"retry-after": str(seconds)},
    )


def stopping() -> ApiError:
    return ApiError(
        503, "shutting_down", "The server is shutting down and takes no more requests.", headers={"retry-after": "5"}
    )


def internal() -> ApiError:
    return ApiError(500, "internal_error", "The server failed at this request; its log says where.")


def of_status(status: int) -> ApiError:
    """The error of a status that the framework chose."""
    known = {
        404: ("not_found", "There is nothing at this address. The API's routes begin with /v1."),
        405: ("method_not_allowed", "This address does not take that method."),
        413: ("body_too_large", "The request's body is larger than allowed."),
    }
    code, message = known.get(status, ("bad_request", "The request cannot be understood."))
    return ApiError(status, code, message)


def answer_to(error: Exception) -> ApiError:
    """What a client reads of an error in computing."""
    if isinstance(error, ApiError):
        return error
    return unfit() if isinstance(error, DataError | ConfigError) else failed(error)


def failed(error: Exception) -> ApiError:
    """The answer to an error of ours. The log has the places in the code and not the error's text, which may hold
    what somebody wrote."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("a request failed with %s at\n%s", type(error).__name__, places)
    return internal()
