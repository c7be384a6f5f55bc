"""Cells of tables and fields of JSON that hold a serialised list: ``["a", "b"]`` in JSON, Python's or numpy's form.

Spreadsheets and data frames write a list into one cell as the text of it. As one text it would be learnt, put and
scored with its brackets and quotation marks.
"""

import ast
import json
import math
import re
from collections.abc import Mapping

from isthmus.errors import DataError

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ARRAY = re.compile(rf"\[\s*({_QUOTED}(?:\s+{_QUOTED})+)\s*\]", re.DOTALL)
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_BEGINS = re.compile(r"""[\[(]\s*(?:[\[({]\s*)*["']""")


def unpacked(value: object, what: str = "text") -> object:
    """The list that a text is the serialised form of; anything else as it is.

    A list of numbers (``[2019]``) is a text. Raises DataError for what begins as a list of texts and cannot be read as
    one, as when it was cut off.
    """
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "(")):
        return value
    if re.fullmatch(r"\[\s*\]", text):
        return []
    if not _BEGINS.match(text):
        return value
    found = _read(text)
    if isinstance(found, list | tuple) and all(isinstance(item, str | list | tuple | Mapping) for item in found):
        return list(found)
    if text.startswith("[") or found is not None:
        raise DataError(
            f"bad list: the {what} begins as a list written into one field and cannot be read as one: {text[:80]!r}; "
            "write it as a JSON list of texts, or as one text"
        )
    return value


def _read(text: str) -> object:
    """By the first of the three forms that fits; none where none does."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if array := _ARRAY.fullmatch(text):  # Python would join neighbours without a comma
        return [ast.literal_eval(item) for item in re.findall(_QUOTED, array[1], re.DOTALL)]
    try:
        return None if re.search(rf"{_QUOTED}\s+{_QUOTED}", text) else ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def string(value: object, what: str) -> str:
    """A text, number or truth value as text. Raises DataError for anything else, and for half a surrogate pair, which
    no tokenizer takes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and _HALF_PAIR.search(value):
        raise DataError(f"bad text: the {what} holds half a surrogate pair, as of an emoji cut in two: {value[:80]!a}")
    if isinstance(value, float) and math.isnan(value):
        value = None  # a hole of a table, as pandas writes it
    if isinstance(value, str | int | float):
        return str(value)
    if value is None and what == "answer":
        raise DataError("empty answer: there is none; write one or drop the sample")
    found = "missing" if value is None else type(value).__name__
    raise DataError(f"bad field: the {what} should be a text and is {found}")
