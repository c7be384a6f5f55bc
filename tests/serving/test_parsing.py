"""Bodies that are no JSON, not finite, too deep or half a character: refused in fixed words."""

import json

import pytest
from pydantic_core import ErrorDetails

from isthmus.serving.errors import ApiError
from isthmus.serving.parsing import field_error, parsed


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": -Infinity}', "invalid_json"),
        (b'{"a": 1e999}', "invalid_number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"a": "\xff"}', "invalid_utf8"),
        ('{"a": "x"}'.encode("utf-16"), "invalid_utf8"),
        (b'{"a": "\\ud800"}', "lone_surrogate"),
        (b'{"\\udfff": 1}', "lone_surrogate"),
        (b"[" * 30 + b"]" * 30, "too_deep"),
        (b"[" * 100_000 + b"]" * 100_000, "too_deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "too_deep"),
        (b"[" * 100_000, "too_deep"),
    ],
)
def test_what_is_no_sound_json_is_refused(body, code):
    with pytest.raises(ApiError) as refused:
        parsed(body, 24)
    assert refused.value.code == code


def test_sound_json_comes_through():
    value = {"a": ["ä🧊", 1, 2.5, None, True, {"b": "\u0000"}]}
    assert parsed(json.dumps(value).encode(), 24) == value


def test_a_field_is_named_by_what_is_known_only():
    place = ("body", "messages", 0, "/etc/passwd")
    unknown: ErrorDetails = {"type": "extra_forbidden", "loc": place, "ctx": {}, "input": "secret", "msg": "x"}
    error = field_error([unknown])
    assert (error.code, error.param) == ("unknown_field", "messages.0")
    ctx = {"le": 1.0}
    large: ErrorDetails = {
        "type": "less_than_equal",
        "loc": ("body", "top_p"),
        "ctx": ctx,
        "input": "secret",
        "msg": "x",
    }
    assert field_error([large]).message == "This number is too large: it must be at most 1.0."
    assert field_error([]).code == "invalid_value"
