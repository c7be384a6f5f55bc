"""Sources: other people's files, and our scenes, as Records. A source is described by a dict with a ``kind``.

    open_source({"kind": "webdataset", "shards": "easy_vqa/train-*.tar", "fields": {"questions": "qa"}}, data_root=...)

Options that most kinds share: ``name``, ``limit`` (first rows only) and those of :class:`rows.Form`: ``fields``,
``turns``, ``max_turns``, ``matching``, ``suffix``, ``instruction``, ``classes`` (a file of names or a list),
``templates`` and ``captions`` (a side file: ``{file, key, fields}``).
"""

import itertools
import json
import os.path
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TypeVar, cast, get_type_hints

from isthmus.config import check_options, fit
from isthmus.data.mix import Mix, Source
from isthmus.data.sources.annotations import READERS
from isthmus.data.sources.benchmarks import BENCHMARKS
from isthmus.data.sources.coco import CocoCaptions
from isthmus.data.sources.documents import DocumentSource, JsonPages
from isthmus.data.sources.files import (
    DELIMITERS,
    NamedImages,
    Names,
    Root,
    below,
    columns_of,
    merged_names,
    named_images,
    once,
    read_json,
    read_lines,
    read_rows,
    read_table,
    safe_name,
    stems,
)
from isthmus.data.sources.objects import pope_objects
from isthmus.data.sources.rows import KNOWN, LOOKED_AT, Form, Row, Rows, RowSource, flat, picture_names
from isthmus.data.sources.webdataset import IMAGE_ENDINGS, WebDatasetRows
from isthmus.data.video import VIDEOS, FileFrames, FolderFrames
from isthmus.errors import ConfigError, DataError, IsthmusWarning, nearest
from isthmus.user_code import is_user_code, label, pin, resolve

T = TypeVar("T")


def open_source(spec: Mapping[str, object], *, data_root: Path | str | None = None) -> Source:
    """The source a description names; relative paths start at ``data_root`` (else the working directory).

    Everything that can be checked without decoding pictures is checked here, before a run's first step. Raises
    ConfigError for an unknown kind or option (the nearest is named), DataError for missing or damaged files.
    """
    options = _without_paths(spec)
    kind = str(options.pop("kind", ""))
    if kind in BY_NAME or is_user_code(kind):
        return _made(kind, options)
    if kind not in (*SOURCES, *DOCUMENTS):
        raise ConfigError(f"source: unknown kind {kind!r}; {nearest(kind, (*SOURCES, *DOCUMENTS, *BY_NAME))}")
    root = Root(Path(data_root) if data_root is not None else Path())
    name: str | None = fit(str | None, options.pop("name", None), "source: name")
    if kind in DOCUMENTS:
        return _call(kind, _documents, options, root=root, layout=kind, name=name or _name(kind, spec))
    limit: int | None = fit(int | None, options.pop("limit", None), "source: limit")
    form = _form(options, root)
    rows = _call(kind, SOURCES[kind], options, root=root, form=form)
    if not len(rows):
        files = next((options[key] for key in ("file", "shards", "folder", "questions") if options.get(key)), None)
        where = "" if files is None else f" in {files}"
        raise DataError(
            f"the source {name or _name(kind, spec)!r} holds no sample: there is no row{where}; check its files"
        )
    return RowSource(name or _name(kind, spec), rows, form, limit=limit)


def named_apart(specs: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Descriptions whose files' sources have different names, for losses and bad samples are counted by name: of those
    that would be called alike, as two files ``train.json`` are, the later ones get a number after it.

    Where two of them say the same ``name`` they are counted as one, which one warning says.
    """
    found: list[dict[str, object]] = []
    taken: set[str] = set()
    for spec in map(dict, specs):
        kind, said = str(spec.get("kind", "")), spec.get("name")
        name = str(said or _name(kind, _without_paths(spec)))
        if name in taken and said:
            warnings.warn(
                f"Two sources are called {name!r}: their losses and bad samples are counted as one source's.",
                IsthmusWarning,
                stacklevel=2,
            )
        elif name in taken and kind not in BY_NAME and not is_user_code(kind):  # these name themselves
            name = next(f"{name} ({n})" for n in itertools.count(2) if f"{name} ({n})" not in taken)
            spec["name"] = name
        taken.add(name)
        found.append(spec)
    return found


def open_mix(specs: Sequence[Mapping[str, object]], *, data_root: Path | str | None = None) -> Mix:
    """Several descriptions, each with an optional ``weight`` (visits per epoch, default 1), as one mixture."""
    weights: list[float] = [fit(float, spec.get("weight", 1.0), "source: weight") for spec in specs]
    bare = [{k: v for k, v in spec.items() if k != "weight"} for spec in specs]
    return Mix([open_source(spec, data_root=data_root) for spec in named_apart(bare)], weights)


def _llava(root: Root, form: Form, *, file: Names, image_folder: str | None = None, images: Names = ()) -> Rows:
    """LLaVA conversations: a JSON list or JSON lines with id, image (a name, several, or none), conversations."""
    return _jsonl(root, form, file=file, image_folder=image_folder, images=images)


def _jsonl(root: Root, form: Form, *, file: Names, image_folder: str | None = None, images: Names = ()) -> Rows:
    """Any JSON lines or JSON list; pictures by name from ``image_folder`` or from the tars ``images``."""
    paths = root.files(file)
    rows = [(stem, row) for stem, path in zip(stems(paths), paths, strict=True) for row in read_rows(path)]
    if rows:
        _demand_fields(form, set().union(*(row.keys() for _, row in rows)), paths[0])
    return _NamedRows(rows, form, named_images(root, image_folder, images, beside=paths[0]))


def _demand_fields(form: Form, known: Collection[str], path: Path) -> None:
    """Raises ConfigError for a field of the form that no row has, naming the nearest; of a table whose header is one
    column that another delimiter divides, naming that."""
    for theirs in form.theirs:
        if theirs not in known:
            raise ConfigError(f"{path} has no field {theirs!r}; {nearest(theirs, known)}")


def _demand_columns(form: Form, columns: Sequence[str], path: Path) -> None:
    """:func:`_demand_fields` of a table; where its header is one column, its delimiter is found first."""
    wanted = {*form.theirs, *(name for name in KNOWN if name not in form.fields)}
    if len(columns) == 1 and columns[0] not in wanted:
        for other in (*DELIMITERS, ":", " "):
            found = columns_of(columns[0], other)
            if len(found) > 1 and (other in DELIMITERS or wanted & {*found}):
                raise ConfigError(
                    f"{path}: its header is read as one column, {columns[0]!r}, which {other!r} would divide into "
                    f"{len(found)}; {'take the option `delimiter` out, or ' if other in DELIMITERS else ''}make "
                    f"{'it' if other in DELIMITERS else 'the option `delimiter`'} {json.dumps(other)}"
                )
    if not wanted & {*columns} and any(name.rpartition(".")[2].lower() in IMAGE_ENDINGS for name in columns):
        raise ConfigError(
            f"{path}: its first line holds a sample ({', '.join(columns)[:80]}) and should name the columns; write a "
            "line before it, as image,caption"
        )
    _demand_fields(form, columns, path)


def _csv(
    root: Root,
    form: Form,
    *,
    file: Names,
    image_folder: str | None = None,
    images: Names = (),
    delimiter: str | None = None,
) -> Rows:
    """Pairs in a table with a header line; see :func:`read_table` for what separates its cells."""
    paths = root.files(file)
    rows: list[tuple[str, dict[str, object]]] = []
    for stem, path in zip(stems(paths), paths, strict=True):
        columns, found = read_table(path, delimiter, (*form.theirs, *KNOWN))
        _demand_columns(form, columns, path)
        rows += [(stem, row) for row in found]
    return _NamedRows(rows, form, named_images(root, image_folder, images, beside=paths[0]))


def _coco(root: Root, form: Form, *, file: str, image_folder: str | None = None, images: Names = ()) -> Rows:
    """COCO captions: one record a picture, all its captions as alternatives; pictures without captions left out."""
    path = root.path(file)
    content = cast("CocoCaptions", read_json(path))
    try:
        once((image["id"] for image in content["images"]), path, "image id")
        once((a["id"] for a in content["annotations"] if "id" in a), path, "annotation id")
        captions: dict[str, list[str]] = {str(image["id"]): [] for image in content["images"]}
        for annotation in content["annotations"]:
            if str(annotation["image_id"]) not in captions:
                raise DataError(
                    f"{path}: a caption is for the image {annotation['image_id']}, which is not among `images`; add "
                    "the image or remove the annotation"
                )
            captions[str(annotation["image_id"])].append(annotation["caption"])
        rows = [
            (path.stem, {"id": str(image["id"]), "image": image["file_name"], "caption": captions[str(image["id"])]})
            for image in content["images"]
            if captions[str(image["id"])]
        ]
    except (KeyError, TypeError):
        raise DataError(
            f"{path} is not a COCO captions file: it needs images (id, file_name) and annotations (image_id, caption)"
        ) from None
    return _NamedRows(rows, form, named_images(root, image_folder, images, beside=path))


def _folder(root: Root, form: Form, *, folder: str) -> Rows:
    """A folder with one subfolder of pictures per class; class names are the folders' unless ``classes`` gives them."""
    top = root.path(folder)
    if top.is_file():
        raise DataError(f"{top} is a file; a source of kind 'folder' reads a folder with one of pictures per class")
    if not top.is_dir():
        raise DataError(f"no such folder: {top}; check the path and the DATA= folder")
    classes = sorted(p for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        here = "its pictures lie in it directly: name the folder above" if any(top.iterdir()) else "it is empty"
        raise DataError(f"{top} has no folder of pictures per class; {here}")
    if {c.name.lower() for c in classes} <= _SPLITS:
        warnings.warn(
            f"{top}: its folders, {', '.join(c.name for c in classes)}, are taken for classes; name one of them.",
            IsthmusWarning,
            stacklevel=2,
        )
    if form.classes and len(form.classes) != len(classes):
        raise DataError(f"{top} has {len(classes)} class folders and the class file {len(form.classes)} names")
    found = NamedImages(top)
    rows = _Listed(
        Row(
            f"{c.name}/{p.relative_to(c).as_posix()}",
            {"label": number if form.classes else c.name.replace("_", " ")},
            (found.find(p.relative_to(top).as_posix()),),
            key=p.stem,
        )
        for number, c in enumerate(classes)
        for p in sorted(c.rglob("*"))
        if p.suffix.lower().lstrip(".") in IMAGE_ENDINGS and not p.name.startswith(".")
    )
    if form.captions is not None:  # two folders number their pictures alike: a name that is nobody's choice
        once((row.key for row in rows), top, "picture name, by which the side file gives captions,")
    return rows


def _webdataset(root: Root, form: Form, *, shards: Names) -> Rows:
    """Tar shards, with brace ranges and globs."""
    return WebDatasetRows(root.files(shards), form)


_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test"}


SOURCES: dict[str, Callable[..., Rows]] = {
    "llava": _llava,
    "jsonl": _jsonl,
    "csv": _csv,
    "coco": _coco,
    "folder": _folder,
    "webdataset": _webdataset,
    **READERS,
    **BENCHMARKS,
    "pope-objects": pope_objects,
}


BY_NAME = {"scenes": "isthmus.demo.scenes.source:SceneSource"}
"""Kinds that are sources by themselves, made with the description's options; imported when first named."""


DOCUMENTS = ("obelics", "mmc4")
"""Pages of interleaved text and pictures, opened by :func:`_documents`."""


def _documents(
    root: Root,
    layout: str,
    name: str,
    *,
    file: Names = (),
    shards: Names = (),
    image_folder: str | None = None,
    images: Names = (),
    min_sim: float = 0.0,
    max_images: int | None = None,
    min_images: int = 1,
    limit: int | None = None,
) -> Source:
    """Pages in JSON lines (``file``) with pictures by name, or in tar ``shards`` that hold each page's pictures."""
    if bool(file) == bool(shards):
        raise ConfigError(f"source of kind {layout!r}: give either file (JSON lines) or shards (tars)")
    options = {"min_sim": min_sim, "max_images": max_images, "min_images": min_images, "limit": limit}
    if shards:
        return DocumentSource(name, WebDatasetRows(root.files(shards)), layout, None, **options)
    paths = root.files(file)
    pages = JsonPages([(stem, row) for stem, path in zip(stems(paths), paths, strict=True) for row in read_rows(path)])
    found = named_images(root, image_folder, images, beside=paths[0])
    return DocumentSource(name, pages, layout, found, **options)


class _Listed(list[Row]):
    """Rows that are all known from the start."""

    def listing(self) -> Iterator[object]:
        return ((row.id, row.values) for row in self)


class _NamedRows:
    """Rows of a file whose ``image`` field names pictures, and ``video`` clips: one, several, or none."""

    def __init__(self, rows: Sequence[tuple[str, Mapping[str, object]]], form: Form, images: NamedImages) -> None:
        self.rows, self.form, self.images = rows, form, images
        files = ", ".join(dict.fromkeys(stem for stem, _ in rows))
        form.name_unread((values for _, values in rows), files)
        self._name_empty(files)
        self._name_unmapped(files)

    def __len__(self) -> int:
        return len(self.rows)

    def listing(self) -> Iterator[object]:
        yield from self.rows
        yield from self.images.listing()

    def __getitem__(self, index: int) -> Row:
        stem, values = self.rows[index]
        surplus = values.get(None)  # type: ignore[call-overload]  (a table's row: see read_table)
        if isinstance(surplus, list):
            raise DataError(
                f"bad row: row {index + 1} has more cells than the header has columns, {surplus[0]!r} the first; a "
                "cell with the delimiter in it needs quotation marks"
            )
        bare = Row("", values)
        names = picture_names(self.form, bare)
        clips = tuple(self._clip(name) for name in flat(self.form.value(bare, "video"), "video"))
        given = self.form.value(bare, "id")
        key = str(given) if given is not None else names[0] if names else str(index)
        return Row(
            f"{stem}/{key if given is not None else index}",
            values,
            (*(self.images.find(name) for name in names), *clips),
            key=key,
        )

    def _name_empty(self, files: str) -> None:
        """One warning with the number of rows whose field of pictures is empty, where others name some."""
        empty = sum(self._is_empty(values) for _, values in self.rows)
        if empty and any(values.get(self._field) and not self._is_empty(values) for _, values in self.rows):
            warnings.warn(
                f"{files}: the field `{self._field}` of {empty:,} of {len(self.rows):,} samples is empty: they are "
                "read as text alone.",
                IsthmusWarning,
                stacklevel=2,
            )

    def _name_unmapped(self, files: str) -> None:
        """One warning where no sample that is looked at names a picture or clip, and a field that is not read does."""
        for _, values in self.rows[:LOOKED_AT]:
            bare = Row("", values)
            with suppress(DataError):  # met, and counted as bad, when it is visited
                if picture_names(self.form, bare) or flat(self.form.value(bare, "video")):
                    return
        for name, value in self.rows[0][1].items() if self.rows else ():
            first = value[0] if isinstance(value, list) and value else value
            ending = first.rpartition(".")[2].lower() if isinstance(first, str) else ""
            ours = "image" if ending in IMAGE_ENDINGS else "video" if f".{ending}" in VIDEOS else ""
            if ours and name not in (*KNOWN, *self.form.theirs):
                warnings.warn(
                    f"{files}: no sample names a picture, and the field `{name}` seems to ({first!r:.60}); it is not "
                    f"read. If it does, map it: `fields: {{{ours}: {name}}}`.",
                    IsthmusWarning,
                    stacklevel=2,
                )
                return

    @property
    def _field(self) -> str:
        return str(self.form.fields.get("image", "image"))

    def _is_empty(self, values: Mapping[str, object]) -> bool:
        found = values.get(self._field, "none is named")
        return found is None or found == [] or (isinstance(found, str) and not found.strip())

    def _clip(self, name: str) -> FolderFrames | FileFrames:
        if not safe_name(name):
            raise DataError(f"bad video name: {name!r} leaves the image folder; use names relative to it")
        path = below(self.images.folder, name)
        return FolderFrames(path) if os.path.isdir(path) else FileFrames(path)


def _form(options: dict[str, object], root: Root) -> Form:
    """The options of Form taken out of a description, its files read."""
    hints = get_type_hints(Form)
    chosen = {k: options.pop(k) for k in list(options) if k in Form.__dataclass_fields__}
    for name in chosen.keys() - {"classes", "templates", "captions"}:  # these may name files or be single
        chosen[name] = fit(hints[name], chosen[name], f"source: {name}")
    if isinstance(classes := chosen.get("classes"), str):
        classes = read_lines(root.path(classes))
    if isinstance(classes, list):
        chosen["classes"] = merged_names(classes, "class")
    if isinstance(template := chosen.get("templates"), str):
        chosen["templates"] = [template]
    if "captions" in chosen:
        side: dict[str, object] = fit(dict[str, object], chosen["captions"], "source: captions")
        chosen["captions"] = _call("captions", _side_captions, side, root=root)
    return replace(Form(), **chosen)


def _side_captions(root: Root, *, file: str, key: str, fields: Names) -> dict[str, tuple[str, ...]]:
    names = [fields] if isinstance(fields, str) else list(fields)
    rows = read_rows(root.path(file))
    known = set().union(*(row.keys() for row in rows)) if rows else set()
    _demand_fields(Form(fields={"caption": [key, *names]}), known, root.path(file))
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        try:
            texts = flat([row.get(name) for name in names])
        except DataError as error:
            raise DataError(f"{root.path(file)}: the captions of {row.get(key)!r}: {error}") from None
        found[str(row.get(key))] = found.get(str(row.get(key)), ()) + texts
    return found


def _made(kind: str, options: dict[str, object]) -> Source:
    """The source class that the kind names, made with the options; they are checked against what it takes."""
    if kind in BY_NAME:
        module, _, name = BY_NAME[kind].partition(":")
        maker = getattr(import_module(module), name)
    else:
        kind, maker = label(kind), resolve(pin(kind))
    check_options(maker, options, f"source of kind {kind!r}")
    made = maker(**options)
    if not isinstance(made, Source):
        raise ConfigError(
            f"source of kind {kind!r} must have name, len() and records by index: derive it from "
            "isthmus.data.mix.Source."
        )
    return made


def _call(kind: str, function: Callable[..., T], options: dict[str, object], **given: object) -> T:
    shared = () if kind in ("captions", *DOCUMENTS) else (*Form.__dataclass_fields__, "name", "limit")
    check_options(function, options, f"source of kind {kind!r}", given=tuple(given), also=shared)
    return function(**given, **options)


def _without_paths(spec: Mapping[str, object]) -> dict[str, object]:
    """The description with paths as texts, which is what its options take."""
    return {key: _without_path(item) for key, item in spec.items()}


def _without_path(value: object) -> object:
    if isinstance(value, Mapping):
        return _without_paths(value)
    if isinstance(value, list | tuple):
        return [_without_path(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _name(kind: str, spec: Mapping[str, object]) -> str:
    files = spec.get("file") or spec.get("shards") or spec.get("folder")
    first = files[0] if isinstance(files, list | tuple) and files else files or ""
    return f"{kind}:{Path(str(first)).stem}"
