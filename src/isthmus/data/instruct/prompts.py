"""The prompts of the language model, by kind of data: YAML files in ``prompts/``, which a user can copy and change."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

from isthmus.data.instruct.symbols import Symbols
from isthmus.data.mix import key
from isthmus.endpoint import Request
from isthmus.errors import ConfigError, nearest

Kind = Literal["conversation", "detail", "reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHECKS = "checks.yaml"
SEPARATOR = "==="


@dataclass(frozen=True, slots=True)
class Shot:
    """An example in the context: a picture in words, and the reply that is wanted."""

    symbols: str
    reply: str


class _Example(TypedDict):
    """A Shot as the file has it."""

    symbols: str
    reply: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """``boxes``: whether boxes are shown beside captions. ``questions``: with some, the reply is the answer to one of
    them, drawn for each picture; without, the reply holds questions and answers. ``turns``: the most of those."""

    kind: Kind
    system: str
    boxes: bool
    examples: tuple[Shot, ...]
    questions: tuple[str, ...] = ()
    turns: int = 1

    @property
    def hash(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def request(self, symbols: Symbols, attempt: int = 0) -> Request:
        """System message, examples in turns, then the picture in words."""
        messages = [{"role": "system", "content": self.system}]
        for shot in self.examples:
            messages += [{"role": "user", "content": shot.symbols}, {"role": "assistant", "content": shot.reply}]
        messages.append({"role": "user", "content": symbols.text(boxes=self.boxes)})
        return Request(f"{symbols.id}-{self.kind}", tuple(messages), attempt)

    def question(self, symbols: Symbols, seed: int) -> str:
        return self.questions[key(seed, "question", symbols.id) % len(self.questions)]

    def turns_of(self, text: str, symbols: Symbols, seed: int) -> list[tuple[str, str]] | None:
        """The reply as (question, answer) pairs; none where it is not of the requested form."""
        if self.questions:
            return [(self.question(symbols, seed), text.strip())]
        pieces = [piece.strip() for piece in text.strip().strip("=").split(SEPARATOR)]
        pieces = [piece for piece in pieces if piece]
        if len(pieces) % 2 or not pieces or len(pieces) > 2 * self.turns:
            return None
        pairs = []
        for question, answer in zip(pieces[::2], pieces[1::2], strict=True):
            if not question.lower().startswith("question:") or not answer.lower().startswith("answer:"):
                return None
            pairs.append((question.partition(":")[2].strip(), answer.partition(":")[2].strip()))
        return pairs


def load_prompts(kinds: Sequence[str], folder: Path | None = None) -> dict[Kind, Prompt]:
    """The prompts of the kinds, from ``folder`` or the package. Raises ConfigError in words."""
    found: dict[Kind, Prompt] = {}
    for name in kinds:
        if name not in KINDS:
            raise ConfigError(f"There is no kind of instruction data {name!r}; {nearest(name, KINDS)}")
        kind = KINDS[KINDS.index(name)]
        found[kind] = _prompt(kind, read_prompt_file(f"{kind}.yaml", folder), folder)
    if not found:
        raise ConfigError(f"Name at least one kind of {', '.join(KINDS)}.")
    return found


def read_prompt_file(name: str, folder: Path | None = None) -> Mapping[str, object]:
    """A file of prompts: of ``folder``, else of the package."""
    import yaml

    home = folder if folder is not None else files("isthmus.data.instruct") / "prompts"
    try:
        content = yaml.safe_load((home / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"There is no readable {name} in {home}. `isthmus data instruct --copy-prompts {folder}` writes the "
            "package's files there, to be changed."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{home / name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{home / name} should hold keys and values.")
    return content


def copy_prompts(folder: Path) -> list[Path]:
    """The package's files, in ``folder``. Raises ConfigError rather than write over one."""
    home = files("isthmus.data.instruct") / "prompts"
    names = sorted(item.name for item in home.iterdir() if item.name.endswith(".yaml"))
    for name in names:
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} is there already; name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with (home / name).open("rb") as source, (folder / name).open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return [folder / name for name in names]


_KEYS = ("system", "boxes", "examples", "questions", "turns")


def _prompt(kind: Kind, content: Mapping[str, object], folder: Path | None) -> Prompt:
    where = f"{folder or 'the package'}: {kind}.yaml"
    for name in content:
        if name not in _KEYS:
            raise ConfigError(f"{where}: unknown key {name!r}; {nearest(str(name), _KEYS)}")
    system, questions, turns = content.get("system"), content.get("questions", []), content.get("turns", 1)
    if not isinstance(system, str) or not system.strip():
        raise ConfigError(f"{where}: `system` should be a text.")
    if not isinstance(questions, list) or not all(isinstance(q, str) and q.strip() for q in questions):
        raise ConfigError(f"{where}: `questions` should be a list of texts.")
    if isinstance(turns, bool) or not isinstance(turns, int) or turns < 1:
        raise ConfigError(f"{where}: `turns` should be a number, 1 or more.")
    examples = cast("Sequence[_Example]", content.get("examples", []))
    try:
        shots = tuple(Shot(str(e["symbols"]).strip(), str(e["reply"]).strip()) for e in examples)
    except (KeyError, TypeError):
        raise ConfigError(f"{where}: `examples` are objects of `symbols` and `reply`.") from None
    return Prompt(kind, system.strip(), bool(content.get("boxes", False)), shots, tuple(questions), turns)
