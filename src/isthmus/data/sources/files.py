"""Finding and reading the files of a source: brace ranges, globs, JSON and JSON lines, pictures by name."""

import csv
import glob
import itertools
import json
import os.path
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO, cast

from isthmus.data.images import EncodedImage, FileImage, TarImage
from isthmus.data.record import ImageSource
from isthmus.data.sources.tar import index_tar
from isthmus.errors import ConfigError, DataError, IsthmusWarning, misspelt
from isthmus.file_type import but_is, file_type, start_of

Names = str | Sequence[str]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_DATA_URL = re.compile(r"data:image/[a-z+.-]+;base64,", re.IGNORECASE)
_LONGEST = 1024
"""Characters of a picture's name."""


@dataclass(frozen=True, slots=True)
class Root:
    """Where relative paths of a source's description start."""

    folder: Path = Path()

    def path(self, name: str | Path) -> Path:
        """A name written with backslashes, and not there under it, is read with slashes."""
        path = self.folder / Path(name).expanduser()
        if "\\" in str(name) and not path.exists():
            return self.folder / Path(slashed(str(name))).expanduser()
        return path

    def files(self, patterns: str | Sequence[str]) -> list[Path]:
        """Files named by one pattern or several, with ``{000..012}``, ``{a,b}``, ``*`` and ``?``, each once.

        A pattern that is itself the name of a file, as ``set [1].json``, means that file.

        Raises DataError for a pattern that names no file, or a file that is not there.
        """
        found: dict[Path, None] = {}
        for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
            literal = str(Path(pattern).expanduser())
            for name in [literal] if self.path(literal).is_file() else _braces(literal):
                if self.path(name).is_file():
                    paths = [self.path(name)]
                else:
                    start, rest = self._begun(name)
                    found_here = glob.glob(rest, root_dir=start, recursive=True) if glob.has_magic(rest) else []
                    paths = [start / p for p in sorted(found_here)]
                if not paths:
                    raise _not_there(self.path(name))
                found.update(dict.fromkeys(paths))
        return list(found)

    def _begun(self, pattern: str) -> tuple[Path, str]:
        """The folder that a pattern begins with, whose own name is no pattern, and the rest of it."""
        start, parts = self.folder, list(Path(pattern).parts)
        while parts and (start / parts[0]).is_dir():
            start /= parts.pop(0)
        return start, str(Path(*parts))


def _braces(pattern: str) -> Iterator[str]:
    """``a{1..3}b`` -> a1b a2b a3b, widths kept; ``{x,y}`` -> x y. What is neither stays as it is."""
    fixed = _BRACES.split(pattern)
    options: list[list[str]] = []
    for place, piece in enumerate(fixed):
        ends = _RANGE.fullmatch(piece)
        if place % 2 == 0:
            options.append([piece])
        elif ends:
            width = len(ends[1]) if ends[1].startswith("0") else 0
            options.append([str(n).zfill(width) for n in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            options.append(piece.split(",") if "," in piece else [f"{{{piece}}}"])
    return ("".join(choice) for choice in itertools.product(*options))


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file open to be read. Raises DataError, also within, when it is missing or not UTF-8."""
    try:
        with open(path, newline=newline, encoding="utf-8-sig") as file:
            yield file
    except OSError:
        raise _not_there(path) from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text{but_is(start_of(path), 'save it as UTF-8')}") from None


def _not_there(path: Path) -> DataError:
    if path.is_dir():
        return DataError(f"{path} is a folder; name the files in it, for example {path.name}/*.json")
    return DataError(f"no such file: {path}; check the path and the DATA= folder{misspelt(path)}")


def read_json(path: Path) -> object:
    """A JSON file. Raises DataError when it is missing or not JSON, with the line where it stops being."""
    with _text(path) as file:
        content = file.read()
    try:
        return json.loads(content)
    except RecursionError:
        raise DataError(f"{path} is nested too deeply to be data; is it a file of this format?") from None
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        if not content.strip():
            raise DataError(f"{path} is empty; write it again") from None
        if file_type(content.encode()):
            raise DataError(f"{path} is not JSON{but_is(content.encode(), '')}") from None
        raise DataError(f"{path} is not valid JSON: it goes wrong at line {line}; is it truncated?") from None


def read_rows(path: Path) -> list[dict[str, object]]:
    """Rows of a JSON list or of JSON lines, whichever the file is. Raises DataError naming the line."""
    with _text(path) as file:
        first = next((line.lstrip()[:1] for line in file if line.strip()), "")
        rows = None if first == "[" else _read_lines(path, file)
    rows = read_json(path) if rows is None else rows
    if isinstance(rows, list):
        found = [row for row in rows if isinstance(row, dict)]
        if len(found) == len(rows):
            return found
    raise DataError(f"{path} must hold a list of JSON objects, or one object a line")


def _read_lines(path: Path, file: TextIO) -> list[object]:
    file.seek(0)
    rows: list[object] = []
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise _no_line(path, number, line) from None
    return rows


def _no_line(path: Path, number: int, line: str) -> DataError:
    """Of JSON lines, one that is none: cut off, or the first of a file of another form."""
    begun = line.lstrip()[:1] == "{"
    if number > 1 or begun:
        if number == 1 and isinstance(read_json(path), dict):
            return DataError(f"{path} holds one JSON object over several lines; write a list, or one object a line")
        return DataError(f"{path}, line {number}: not valid JSON; is the file truncated?")
    if file_type(line.encode()):
        return DataError(f"{path} is not JSON{but_is(line.encode(), '')}")
    table = any(len(columns_of(line.rstrip(), delimiter)) > 1 for delimiter in DELIMITERS)
    return DataError(
        f"{path}, line 1: not JSON, it begins {line[:40].rstrip()!r}; "
        + ("a table is read by `kind: csv`" if table else "is it a file of this format?")
    )


DELIMITERS = (",", "\t", ";", "|")


def read_table(
    path: Path, delimiter: str | None, known: Collection[str], *, most: int | None = None
) -> tuple[list[str], list[dict[str, object]]]:
    """Columns and (``most``: the first) rows of a table with a header line; cells beyond the header's are a row's list
    under ``None``.

    Without a ``delimiter`` it is the one that the name promises (a tab in .tsv and .tab files, else a comma), unless
    another one finds columns that are ``known`` and this one finds none of them; Excel's line ``sep=;`` names its own.
    Raises DataError naming the line, ConfigError for a delimiter that is not one character.
    """
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '\r\n"'):
        raise ConfigError(
            f'source: the delimiter must be one character, not {delimiter!r} (in YAML a tab is "\\t", in double quotes)'
        )
    with _text(path, newline="") as table:
        first = table.readline()
        named = re.fullmatch(r'"?sep=([^"\r\n])"?[,;\t]*', first.rstrip("\r\n"))
        if first.lstrip().startswith(("[{", '{"')):
            raise DataError(f"{path} holds JSON and no table; JSON is read by `kind: jsonl`")
        if file_type(first.encode()):
            raise DataError(f"{path} is no table{but_is(first.encode(), '')}")
        if not first.strip():
            raise DataError(f"{path} has no header in its first line: it is empty")
        if not named:
            table.seek(0)
        try:
            found = delimiter or (named[1] if named else _delimiter(first, path, known))
            reader = csv.DictReader(table, delimiter=found, strict=True)
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            for name in known:
                if columns.count(name) > 1:
                    raise DataError(f"{path} has the column {name!r} {columns.count(name)} times; rename all but one")
            return columns, cast("list[dict[str, object]]", list(itertools.islice(reader, most)))
        except csv.Error as error:
            line = reader.line_num + 1 + bool(named)  # it counts the lines before
            raise DataError(
                f"{path}, line {line}: not a valid table: {error}; is a quotation mark left open?"
            ) from None


def _delimiter(header: str, path: Path, known: Collection[str]) -> str:
    promised = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    names = {d: set(columns_of(header, d)) for d in (promised, *(d for d in DELIMITERS if d != promised))}
    if len(names[promised]) > 1 and names[promised] & {*known}:
        return promised
    # Most columns that are known, then most columns, then the promised one.
    return max(names, key=lambda d: (len(names[d]) > 1 and len(names[d] & {*known}), len(names[d])))


def columns_of(header: str, delimiter: str) -> list[str]:
    """The names in a header line; the line itself where it is not valid with that delimiter."""
    try:
        return [name.strip() for name in next(csv.reader([header], delimiter=delimiter, strict=True), [])]
    except csv.Error:
        return [header]


def stems(paths: Sequence[Path]) -> list[str]:
    """What the ids of each file's samples begin with: its name without the ending, and as many of its folders as
    distinguish it from the others; a number where nothing does."""
    for depth in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        found = ["/".join(path.with_suffix("").parts[-depth:]) for path in paths]
        if len(set(found)) == len(found):
            return found
    return [f"{path.stem} ({number})" for number, path in enumerate(paths, start=1)]


def once(ids: Iterable[object], path: Path | str, what: str) -> None:
    """Raises DataError for an id that comes twice; ``17`` and ``"17"`` are one."""
    seen: set[str] = set()
    for i in map(str, ids):
        if i in seen:
            raise DataError(f"{path}: the {what} {i} is there twice; nothing is counted twice, so remove one.")
        seen.add(i)


def same_name(name: str) -> str:
    """What names have in common that read alike: case and white space aside."""
    return " ".join(name.casefold().split())


def merged_names(names: Iterable[object], what: str) -> list[str]:
    """The names, as many, with what is one name written in several ways (case, white space) in its first spelling; one
    warning says which."""
    first: dict[str, str] = {}
    found = [first.setdefault(same_name(str(name)), str(name)) for name in names]
    if len(first) < len(found):
        counts = Counter(found)
        again = ", ".join(f"{name!r}" for name in counts if counts[name] > 1)
        warnings.warn(
            f"{len(found) - len(first)} {what} names are there again ({again}): those that read alike are one {what}.",
            IsthmusWarning,
            stacklevel=2,
        )
    return found


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file, stripped: class names. Raises DataError when it is missing or not UTF-8."""
    with _text(path) as file:
        return [line.strip() for line in file.read().splitlines() if line.strip()]


def safe_name(name: str) -> bool:
    """Does the name stay inside its folder? Absolute names and ``..`` do not."""
    path = PurePosixPath(slashed(name))
    stays = not path.is_absolute() and ".." not in path.parts and not re.match(r"[A-Za-z]:", name)
    return bool(name) and stays and "\0" not in name  # which ends a name for the system


def slashed(name: str) -> str:
    """A name with slashes where it was written with backslashes, as on Windows."""
    return name.replace("\\", "/")


def _plain(name: str) -> str:
    """A name without a leading ``./``, as ``tar -cf x.tar .`` writes it, with slashes, and in one form of Unicode."""
    return unicodedata.normalize("NFC", PurePosixPath(slashed(name)).as_posix())


def below(folder: Path, name: str) -> Path:
    """The file of that name below the folder; one that is not there under it with slashes for backslashes, and in
    another form of Unicode: macOS decomposes letters with accents."""
    path = folder / name
    if (name.isascii() and "\\" not in name) or os.path.exists(path):
        return path
    straight = slashed(name)
    others = [
        folder / other for other in (straight, *(unicodedata.normalize(form, straight) for form in ("NFC", "NFD")))
    ]
    return next((other for other in others if os.path.exists(other)), others[0])


class NamedImages:
    """Pictures by the names a JSON or CSV file gives them: files below a folder, or members of tars."""

    def __init__(self, folder: Path, shards: Sequence[Path] = ()) -> None:
        """Raises DataError when a shard is damaged or two shards hold the same name."""
        self.folder = folder
        self.members: Mapping[str, TarImage] | None = None
        if shards:
            members: dict[str, TarImage] = {}
            for shard in shards:
                for member in index_tar(shard):
                    name = _plain(member.name)
                    if name in members:
                        raise DataError(
                            f"{shard}: it holds {member.name!r} and so does {members[name].path}; names must differ"
                        )
                    members[name] = member
            self.members = members

    def listing(self) -> Iterator[tuple[str, int, int]]:
        """(name, offset, size) of every member of the tars; nothing for a folder, which is not read through."""
        return ((m.name, m.offset, m.size) for m in (self.members or {}).values())

    def find(self, name: str) -> ImageSource:
        """The file or member of that name, or the picture that a data: URL holds. Raises DataError for a name that
        leaves the folder or is in no shard. A missing file shows when read."""
        if inline := _DATA_URL.match(name):
            return EncodedImage(name[inline.end() :], f"a data: URL of {len(name):,} characters")
        if len(name) > _LONGEST:
            raise DataError(
                f"bad image name: {name[:40]!r}… has {len(name):,} characters, more than a file's name may have; a "
                "picture in base64 begins with data:image/png;base64, (or jpeg, webp, gif, bmp)"
            )
        if re.match(r"https?://", name):
            raise DataError(f"bad image name: {name!r} is an address, and nothing is fetched; download the picture")
        if not safe_name(name):
            raise DataError(f"bad image name: {name!r} leaves the image folder; use names relative to it")
        if self.members is None:
            return FileImage(below(self.folder, name))
        if _plain(name) not in self.members:
            raise DataError(f"missing image: no shard holds {name!r}; check the names in the file and in the tars")
        return self.members[_plain(name)]

    def find_first(self, names: Sequence[str]) -> ImageSource:
        """The first of several names that is there; where none is, what :meth:`find` says of the first."""
        for name in names:
            there = os.path.isfile(below(self.folder, name)) if self.members is None else _plain(name) in self.members
            if safe_name(name) and there:
                return self.find(name)
        return self.find(names[0])


def named_images(root: Root, image_folder: str | None, images: Names, *, beside: Path) -> NamedImages:
    """Pictures below ``image_folder`` (else beside the file), or in the tars ``images``. Raises ConfigError for both,
    DataError for a folder that is not there."""
    if image_folder is not None and images:
        raise ConfigError("source: give image_folder or images (tars), not both")
    folder = root.path(image_folder) if image_folder is not None else beside.parent
    if not folder.is_dir():
        raise DataError(f"no such image folder: {folder}; check the path and the DATA= folder")
    return NamedImages(folder, root.files(images) if images else ())
