"""What kind of source a file or folder is, by its content, for the command line."""

import json
import os.path
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from isthmus.data.sources.files import below, read_table, safe_name
from isthmus.data.sources.rows import KNOWN, Form, Row, picture_names
from isthmus.data.sources.webdataset import IMAGE_ENDINGS
from isthmus.errors import DataError
from isthmus.file_type import but_is, file_type, start_of

_TABLES = (".csv", ".tsv", ".tab")
_FILES = (*_TABLES, ".json", ".jsonl")
_WRITTEN = {"instruct.json": "manifest.json", "captions.jsonl": "report.json"}
"""What `isthmus data instruct` and `capfilt` write, and how it was made, which stands beside."""
_BINARY = ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow")
"""Where Hugging Face's data sets have their rows, as they are downloaded and as they are saved."""
_BESIDE_BINARY = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_HELP = (
    "Describe it in a YAML file instead, for example `kind: jsonl`, `file: data.jsonl`, "
    "`fields: {question: q, answer: a}`."
)

_COLUMNS = (*KNOWN, "file_name")
_BY_SIGHT = {
    "obelics": {"texts"},
    "mmc4": {"text_list"},
    "llava": {"conversations"},
    "pope": {"question_id", "image", "text", "label"},
    "vizwiz": {"image", "question", "answers", "answer_type", "answerable"},
}
"""The fields of the first entry that identify a layout."""


_TEXTVQA = {"question_id", "image_id", "question"}


def guess(path: Path) -> dict[str, object]:
    """The description that ``open_source`` takes. Raises DataError when nothing fits."""
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".tar":
        return {"kind": "webdataset", "shards": str(path)}
    if not path.is_file():
        hint = " A description of a source goes into a file that ends in .yaml." if str(path).startswith("{") else ""
        raise DataError(f"There is no data at {path}.{hint}")
    return _file(path)[0]


def _folder(path: Path) -> dict[str, object]:
    """Shards; or one file that names pictures, as `isthmus data scenes` and others write it; or a folder per class.
    What could be two things is not guessed."""
    here = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    shards = [p for p in here if p.suffix.lower() == ".tar"]
    if shards:
        return {"kind": "webdataset", "shards": [str(s) for s in shards]}
    files = [p for p in here if p.suffix.lower() in _FILES]
    binary = next((p for form in _BINARY for p in sorted(path.glob(form))), None)
    if binary is not None:
        files = [p for p in files if p.name not in _BESIDE_BINARY]
    for ours, beside in _WRITTEN.items():
        if path / ours in files:
            files = [p for p in files if p.name != beside]
    if len(files) == 1:
        found, place = _file(files[0])
        # A table in a folder of classes may be about something else: its pictures decide.
        if found["kind"] not in ("csv", "jsonl") or place is not None:
            return found
    if _classes(path):
        return {"kind": "folder", "folder": str(path)}
    if binary is not None:
        raise DataError(f"{binary} is no list that is read here{but_is(start_of(binary), 'name another file')}.")
    lists = f", and {len(files)} lists, {files[0].name} and {files[1].name} among them" if len(files) > 1 else ""
    raise DataError(
        f"{path} holds neither tar shards, nor one list that names its pictures, nor folders of pictures, one for each "
        f"of two classes or more{lists}. Name one file or folder in it. {_HELP}"
    )


def _classes(path: Path) -> bool:
    """Whether the folders in it are classes: two at least hold pictures, and none holds them only further below, as
    ``train`` and ``val`` would."""
    folders = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    here = [p for p in folders if any(map(_is_picture, p.iterdir()))]
    return len(here) > 1 and not any(any(map(_is_picture, p.rglob("*"))) for p in folders if p not in here)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_ENDINGS


def _file(path: Path) -> tuple[dict[str, object], Path | None]:
    """The file's description with, where that is plain to see, the field that names pictures and their folder; and that
    folder, or none."""
    kind, first = ("csv", _first_row(path)) if path.suffix.lower() in _TABLES else _json_kind(path)
    found: dict[str, object] = {"kind": kind, "file": str(path)}
    field = "file_name" if "file_name" in first and "image" not in first else "image"
    if kind in ("csv", "jsonl") and field != "image":
        found["fields"] = {"image": field}  # Hugging Face's folders of pictures
    place = _place(path.parent, _shown(first, field))
    return (found if place in (None, path.parent) else {**found, "image_folder": str(place)}), place


def _shown(first: Mapping[str, object], field: str) -> object:
    """The pictures that an entry names, in that field, in ``images`` or in the parts of its messages."""
    try:
        return list(picture_names(Form(fields={"image": field}), Row("", first)))
    except DataError:  # told when it is read
        return None


def _place(folder: Path, name: object) -> Path | None:
    """Where the picture of that name (of several, the first) is: the folder, or the only one below that has it."""
    if isinstance(name, list) and name:
        name = name[0]
    if not isinstance(name, str) or not safe_name(name):
        return None
    if os.path.isfile(below(folder, name)):  # which holds of no name that is too long, as a data: URL may be
        return folder
    places = [p for p in folder.iterdir() if p.is_dir() and os.path.isfile(below(p, name))]
    return places[0] if len(places) == 1 else None


def _first_row(path: Path) -> Mapping[str, object]:
    """Of a table; an unreadable one is explained when it is opened."""
    try:
        return next(iter(read_table(path, None, _COLUMNS, most=1)[1]), {})
    except DataError:
        return {}


def _json_kind(path: Path) -> tuple[str, Mapping[str, object]]:
    """llava, coco, obelics, mmc4, pope or jsonl, with the first entry (a COCO file's first picture). JSON lines,
    whatever the file's ending, are judged by the first."""
    try:
        content = _first_line(path) if path.suffix.lower() == ".jsonl" else _first_value(path)
    except (ValueError, RecursionError):
        if file_type(start_of(path)):
            raise DataError(f"{path} is neither JSON nor JSON lines{but_is(start_of(path), '')}") from None
        raise DataError(f"{path} is neither JSON nor JSON lines. {_HELP}") from None
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        images = content["images"]
        return "coco", images[0] if isinstance(images, list) and images and isinstance(images[0], dict) else {}
    data = content.get("data") if isinstance(content, dict) else None
    if isinstance(data, list) and data and isinstance(data[0], dict) and data[0].keys() >= _TEXTVQA:
        return "textvqa", {"image": f"{data[0]['image_id']}.jpg"}
    if isinstance(content, list) and content and isinstance(content[0], dict):
        kind = next((kind for kind, fields in _BY_SIGHT.items() if fields <= content[0].keys()), "jsonl")
        return kind, content[0]
    raise DataError(f"{path} is not a layout that is known by sight. {_HELP}")


def _first_line(path: Path) -> list[object]:
    with path.open(encoding="utf-8-sig") as file:
        return [json.loads(line) for line in islice((line for line in file if line.strip()), 1)]


def _first_value(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return _first_line(path)  # POPE's files are JSON lines and end in .json
