"""The official file formats of COCO captions and VQA, references and predictions, checked before they are scored.

Ids are compared as text, so that ``17`` and ``"17"`` are the same question, and one of them too many.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from isthmus.data.sources.cells import unpacked
from isthmus.data.sources.files import once, read_json, read_rows
from isthmus.errors import DataError


@dataclass(frozen=True, slots=True)
class Question:
    """What people answered, and the two groups the official scorer reports by."""

    answers: tuple[str, ...]
    answer_type: str
    question_type: str


def caption_references(path: Path) -> dict[str, list[str]]:
    """Image id -> captions, of a COCO captions file. Raises DataError: other content, or an annotation id twice."""
    annotations = _annotations(path, "a COCO captions file", "image_id", "caption")
    once((a["id"] for a in annotations if "id" in a), path, "annotation id")
    found: dict[str, list[str]] = {}
    for a in annotations:
        texts = _texts(a["caption"], path, "caption", a["image_id"])
        found.setdefault(str(a["image_id"]), []).extend(texts)
    return found


def vqa_references(path: Path) -> dict[str, Question]:
    """Question id -> human answers, of annotations of VQA, VizWiz (a list; ids are the images' names) or TextVQA (under
    ``data``, answers are texts). Raises DataError: other content, or an id twice."""
    key = vqa_key(path)
    annotations = _annotations(path, "a VQA annotation file", key, "answers")
    once((a[key] for a in annotations), path, "question id" if key == "question_id" else key)
    found: dict[str, Question] = {}
    for a in annotations:
        given = unpacked(a["answers"], "answers")
        texts = [g.get("answer") if isinstance(g, Mapping) else g for g in given] if isinstance(given, list) else []
        if not texts or None in texts:
            raise DataError(f"{path}: question {a[key]} has no list of answers, each with an `answer`.")
        answers = tuple(_text(answer, path, "answer", a[key]) for answer in texts)
        found[str(a[key])] = Question(answers, str(a.get("answer_type", "other")), str(a.get("question_type", "other")))
    return found


def vqa_key(path: Path) -> str:
    """What the annotations and the predictions for them name a question by: its image in VizWiz, else its id."""
    content = read_json(path)
    first = content[0] if isinstance(content, list) and content else None
    vizwiz = isinstance(first, dict) and "image" in first and "question_id" not in first
    return "image" if vizwiz else "question_id"


def predictions(path: Path, key: str, value: str) -> dict[str, str]:
    """Id -> text, of a results file: a list (or lines) of ``{key: …, value: …}``. An empty text is a prediction.

    Raises DataError: other content, an id twice.
    """
    rows = read_rows(path)
    for number, row in enumerate(rows):
        if key not in row or value not in row:
            raise DataError(
                f"{path}, entry {number}: a prediction needs `{key}` and `{value}`; it has "
                f"{', '.join(map(str, row)) or 'nothing'}."
            )
    once((row[key] for row in rows), path, key)
    return {str(row[key]): _one_text(row[value], path, value, row[key]) for row in rows}


def match(references: Mapping[str, object], given: Mapping[str, str], *, what: str, subset: bool = False) -> list[str]:
    """The ids to score, in the references' order: all of them, or with ``subset`` those that have a prediction.

    Raises DataError: predictions for unknown ids, items without a prediction (unless ``subset``), nothing left.
    """
    unknown = [i for i in given if i not in references]
    if unknown:
        raise DataError(
            f"{len(unknown)} predictions are for ids that the references do not hold ({_few(unknown)}); is it the file "
            f"of another split? Each {what} must be one of the references'."
        )
    missing = [i for i in references if i not in given]
    if missing and not subset:
        raise DataError(
            f"{len(missing)} of {len(references)} items have no prediction ({_few(missing)}). Add them (an empty text "
            "counts as an empty answer), or give --subset to score only the others."
        )
    if len(missing) == len(references):
        raise DataError("There is nothing to score: no item has a prediction.")
    return [i for i in references if i in given]


def _annotations(path: Path, what: str, *needed: str) -> list[dict[str, object]]:
    content = read_json(path)
    found = content.get("annotations", content.get("data")) if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(isinstance(a, dict) for a in found):
        raise DataError(f"{path} is not {what}: it needs a list `annotations` with entries.")
    for number, annotation in enumerate(found):
        for field in needed:
            if field not in annotation:
                raise DataError(f"{path} is not {what}: annotation {number} has no `{field}`.")
    return found


def _texts(value: object, path: Path, what: str, name: object) -> list[str]:
    """One text, or a list of them, also one that is written into one text."""
    try:
        given = unpacked(value, what)
    except DataError as error:
        raise DataError(f"{path}: {what} of {name}: {error}.") from None
    return [_text(text, path, what, name) for text in (given if isinstance(given, list) else [given])]


def _one_text(value: object, path: Path, what: str, name: object) -> str:
    texts = _texts(value, path, what, name)
    if len(texts) != 1:
        raise DataError(f"{path}: the {what} of {name} is a list of {len(texts)} texts; one is scored, so give one.")
    return texts[0]


def _text(value: object, path: Path, what: str, name: object) -> str:
    if not isinstance(value, str):
        raise DataError(f"{path}: the {what} of {name} should be a text and is {type(value).__name__}.")
    return value


def _few(ids: list[str]) -> str:
    return ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
