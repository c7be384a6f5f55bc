"""A user's own classes by name: ``path/file.py:Class``, or ``my_file:Class`` for ``my_file.py`` of the working folder.

    recipe, --task, --data ── pin(name, folder) ──→ /home/me/file.py:Class#sha256=… ── resolve(pinned) ──→ the class
                                                    (run.json, config.json hold this)

A name is *pinned* where the user wrote it: the file's place and the sha256 of what it says are put into it. That is
what runs and model folders store, so a run resumes only with the code it began with. :func:`resolve` imports pinned
names alone, from exactly the bytes that were hashed; a name that came out of somebody's checkpoint was never pinned
and is refused. :func:`vetted` is for what was read from a model's folder: a file inside it is never imported.

A file stands for itself: what lies beside it cannot be imported from it unless Python finds it anyway.
"""

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard, TypeVar, cast

from isthmus.errors import CheckpointError, ConfigError, nearest

T = TypeVar("T")

_FILE = re.compile(r"(?P<file>[^:#{}\n]+\.py):(?P<cls>[A-Za-z_]\w*)(?:#sha256=(?P<sha>[0-9a-f]{64}))?")
_SHORT = re.compile(r"(?P<file>[A-Za-z_]\w*):(?P<cls>[A-Za-z_]\w*)")
_SHA = "__sha256__"
_KEYS = ("model", "projector", "kind", "task")
"""Where a recipe names code; the short form, which other texts may resemble, counts only there."""


def is_user_code(name: object) -> TypeGuard[str]:
    """Does this name a class in a user's file, pinned or not?"""
    return isinstance(name, str) and bool(_FILE.fullmatch(name) or _SHORT.fullmatch(name))


def label(name: str) -> str:
    """``file.py:Class`` of a name, for people: without its place and hash. Other names are what they are."""
    found = _FILE.fullmatch(name)
    return f"{Path(found['file']).name}:{found['cls']}" if found else name


def files_of(names: Iterable[str]) -> list[Path]:
    """Where the classes among these pinned names are; other names are passed over."""
    return [Path(found["file"]) for name in names if (found := _FILE.fullmatch(name))]


def pin(name: str, folder: Path | str | None = None) -> str:
    """The name with the file's absolute place and sha256. A relative file is looked for in ``folder`` (by default the
    working folder), the short form always in the working folder. A pinned name is returned as it is.

    Raises ConfigError when it is no such name, and when the file is not there, fails, or has no such class.
    """
    long = _FILE.fullmatch(name)
    if long is not None and long["sha"]:
        return name
    short = _SHORT.fullmatch(name)
    if long is None and short is None:
        raise ConfigError(f"{name!r} names no code: write path/file.py:Class, or my_file:Class for the working folder.")
    if long is not None:
        file, cls = (Path(folder) if folder is not None else Path()) / Path(long["file"]).expanduser(), long["cls"]
    else:
        assert short is not None
        file, cls = Path(f"{short['file']}.py"), short["cls"]
    if not file.is_file():
        raise ConfigError(f"{name}: there is no file {file.absolute()}; give its path relative to {_where(short)}.")
    pinned = f"{file.resolve()}:{cls}#sha256={hashlib.sha256(file.read_bytes()).hexdigest()}"
    resolve(pinned)  # what is wrong with it shows here, before anything else is opened
    return pinned


def _where(short: re.Match[str] | None) -> str:
    return "the recipe (on the command line: to the working folder)" if short is None else "the working folder"


def pinned_in(tree: T, folder: Path | str | None = None, key: str = "") -> T:
    """A recipe or description with every name of code in it pinned; see :func:`pin`."""

    def pinned(text: str, key: str) -> str:
        named = _FILE.fullmatch(text) or (key in _KEYS and _SHORT.fullmatch(text))
        return pin(text, folder) if named else text

    return _with_texts(tree, pinned, key)


def _with_texts(tree: T, change: Callable[[str, str], str], key: str = "") -> T:
    """The tree with each of its texts as ``change`` makes it from the text and the key that it stands under."""
    return cast(T, _changed(tree, change, key))


def _changed(tree: object, change: Callable[[str, str], str], key: str) -> object:
    if isinstance(tree, Mapping):
        return {k: _changed(v, change, str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_changed(v, change, key) for v in tree]
    return change(tree, key) if isinstance(tree, str) else tree


def resolve(name: str) -> Callable[..., Any]:
    """The class that a pinned name says. One file of one content is imported once.

    Raises ConfigError for a name that is not pinned, a file that has changed or is gone, that fails while it is
    imported, or that has no such class.
    """
    found = _FILE.fullmatch(name)
    if found is None or not found["sha"]:
        raise ConfigError(
            f"{name} would be a file of yours, but a checkpoint named it and not you, so it is not imported. If you "
            "know the file, name it: --code FILE, or load(..., code=[FILE])."
        )
    path, cls = Path(found["file"]), found["cls"]
    module = sys.modules.get(_module_name(path, found["sha"])) or _imported(path, found["sha"], name)
    if cls not in vars(module):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{label(name)}: {path} has no class {cls}; {nearest(cls, public)}")
    return vars(module)[cls]


def _module_name(path: Path, sha: str) -> str:
    return f"isthmus_user_{path.stem}_{sha[:16]}"


def _imported(path: Path, sha: str, name: str) -> ModuleType:
    """The file as a module of a name that belongs to its content, run from the bytes that were checked."""
    if not path.is_file():
        raise ConfigError(
            f"{label(name)} is not at {path} any more. Put it back, or name where it is: --code FILE, or "
            "load(..., code=[FILE])."
        )
    content = path.read_bytes()
    if (now := hashlib.sha256(content).hexdigest()) != sha:
        raise ConfigError(
            f"{path} has changed since it was named (sha256 {now[:12]}…, then {sha[:12]}…). Take the file of then, or, "
            "if the new one is meant, name it: --code FILE, or load(..., code=[FILE])."
        )
    module = ModuleType(_module_name(path, sha))
    module.__file__ = str(path)
    vars(module)[_SHA] = sha
    sys.modules[module.__name__] = module  # before it runs: dataclasses look their module up
    try:
        exec(compile(content, str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[module.__name__]
        raise ConfigError(f"{path} fails when it is imported: {type(error).__name__}: {error}") from error
    return module


def code_of(cls: type) -> str | None:
    """``file.py:Class#sha256=…`` of a class that :func:`resolve` gave; None for any other."""
    module = sys.modules.get(cls.__module__)
    sha = vars(module).get(_SHA) if module is not None else None
    return f"{Path(str(vars(module)['__file__'])).name}:{cls.__name__}#sha256={sha}" if module and sha else None


def outermost(folder: Path) -> Path:
    """The run folder that a model folder is in; else what the user named. What lies in there came with the model."""
    for run in (folder.parent, *folder.parent.parents[1:2]):  # RUN/model and RUN/stages/NAME/model
        if folder.name == "model" and (run / "run.json").is_file():
            return run
    return folder


def vetted(values: T, folder: Path, code: Iterable[str | Path] = ()) -> T:
    """What was read from a model's folder, fit to be resolved: names of code that the user gave in ``code`` (files)
    lead to those, whatever they say now; the others must be pinned and lie outside ``folder``, and :func:`resolve`
    wants them unchanged.

    Raises CheckpointError for a file inside the folder or a name that is not pinned, ConfigError for a file of ``code``
    that is not there.
    """
    files = {Path(file).stem: Path(file) for file in code}
    place = folder.resolve()
    return _with_texts(values, lambda text, key: _vetted(text, place, files, key))


def _vetted(text: str, folder: Path, files: Mapping[str, Path], key: str) -> str:
    found = _FILE.fullmatch(text) or (_SHORT.fullmatch(text) if key in _KEYS else None)
    if not found:
        return text
    if (file := files.get(Path(found["file"]).stem)) is not None:
        return pin(f"{file.absolute()}:{found['cls']}")
    path = Path(found["file"])
    if "sha" not in found.groupdict() or not found["sha"]:
        raise CheckpointError(
            f"{folder} names code, {text}, without saying what it was when the model was trained. If you know the "
            "file, name it: --code FILE, or load(..., code=[FILE])."
        )
    if path.resolve().is_relative_to(folder):
        raise CheckpointError(
            f"{folder} names code that lies in the model's own folder, {path}: nothing is ever imported from there. "
            "Read the file, copy it elsewhere, and name it: --code FILE, or load(..., code=[FILE])."
        )
    return text


def placeless(tree: T) -> T:
    """A tree with pinned names reduced to file, class and hash: what a run is compared by, wherever its code lies."""
    return _with_texts(tree, lambda text, _: _placeless(text))


def _placeless(text: str) -> str:
    found = _FILE.fullmatch(text)
    return f"{label(text)}#sha256={found['sha']}" if found and found["sha"] else text
