"""What kind of source a file or folder is, seen from its content, for the command line."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from isthmus.errors import DataError

_HELP = (
    "Describe it in a YAML file instead, for example `kind: jsonl`, `file: data.jsonl`, "
    "`fields: {question: q, answer: a}`."
)

_BY_SIGHT = {
    "obelics": {"texts"},
    "mmc4": {"text_list"},
    "llava": {"conversations"},
    "pope": {"question_id", "image", "text", "label"},
}
"""The fields of the first entry that tell a layout."""


def guess(path: Path) -> dict[str, Any]:
    """The description that ``open_source`` takes. Raises DataError when nothing fits."""
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if shards:
            return {"kind": "webdataset", "shards": [str(s) for s in shards]}
        if any(p.is_dir() for p in path.iterdir()):
            return {"kind": "folder", "folder": str(path)}
        raise DataError(f"{path} holds neither tar shards nor one folder of pictures per class. {_HELP}")
    if path.suffix == ".tar":
        return {"kind": "webdataset", "shards": str(path)}
    if not path.is_file():
        raise DataError(f"There is no data at {path}.")
    if path.suffix in {".csv", ".tsv"}:
        return {"kind": "csv", "file": str(path)}
    return {"kind": _json_kind(path), "file": str(path)}


def _json_kind(path: Path) -> str:
    """llava, coco, obelics, mmc4, pope or jsonl. JSON lines, whatever the file's ending, are judged by the first."""
    try:
        content = _first_line(path) if path.suffix == ".jsonl" else _whole(path)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is neither JSON nor JSON lines. {_HELP}") from None
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return "coco"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return next((kind for kind, fields in _BY_SIGHT.items() if fields <= content[0].keys()), "jsonl")
    raise DataError(f"{path} is not a layout that is known by sight. {_HELP}")


def _first_line(path: Path) -> list[Any]:
    with path.open(encoding="utf-8-sig") as file:
        return [json.loads(line) for line in islice(file, 1)]


def _whole(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return _first_line(path)  # POPE's files are JSON lines and end in .json
