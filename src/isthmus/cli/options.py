"""Options that several commands share."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypedDict

import typer

Json = Annotated[Path | None, typer.Option("--json", help="Also write the facts to this file as JSON.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value changes, e.g. stages.align.steps=100.")]
Device = Annotated[str | None, typer.Option(help="auto (a GPU if there is one; the default), cpu, cuda or mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (as a rule), bfloat16 or float16 weights.")]
LOADING: dict[str, object] = {
    "device": Device,
    "dtype": Dtype,
    "vision": Annotated[str | None, typer.Option(help="The vision encoder's model, where a checkpoint holds none.")],
    "language": Annotated[str | None, typer.Option(help="The language model, where a checkpoint holds none.")],
    "base": Annotated[str | None, typer.Option(help="The model that adapters belong to, where it was moved.")],
    "unquantised": Annotated[
        bool | None, typer.Option("--unquantised", help="Over the base as stored, where adapters learnt over 4 bits.")
    ],
    "tokenizer": Annotated[str | None, typer.Option(help="A tokenizer's folder, where a checkpoint comes without.")],
    "activation": Annotated[str | None, typer.Option(help="quick_gelu or gelu, where a CLIP's weights do not say.")],
    "head_width": Annotated[int | None, typer.Option(help="Width of a CLIP's attention heads, where nothing says it.")],
    "template": Annotated[
        str | None,
        typer.Option(
            help="Its prompts' form: a template's name, chat (its own, switches after a colon), or a file in Jinja."
        ),
    ],
    "revision": Annotated[
        str | None, typer.Option(help="Of a hub id owner/name: main, a tag or a commit; it is fetched.")
    ],
    "code": Annotated[
        list[Path] | None, typer.Option(help="Your file with the model's own classes, where it has moved or changed.")
    ],
}
"""The options of every command that opens a model: the further arguments of ``isthmus.load``, by their names there."""


class Loading(TypedDict, total=False):
    """Those of LOADING that the user gave."""

    device: str
    dtype: str
    vision: str
    language: str
    base: str
    unquantised: bool
    tokenizer: str
    activation: str
    head_width: int
    template: str
    revision: str
    code: list[Path]


OF_ANY_MODEL = {name: LOADING[name] for name in ("device", "dtype", "code")}
"""Those of them that make sense for several models at once."""
SCORING: dict[str, object] = {
    "task": Annotated[
        str | None, typer.Option(help="vqa, vqav2, caption, pope, retrieval, … (docs/evaluation.md), or FILE.py:Class.")
    ],
    "data": Annotated[str | None, typer.Option(help="A data file or folder, or a YAML file that describes a source.")],
    "options": Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the sources; also train.key, task.key.")
    ],
    "train": Annotated[
        str | None, typer.Option(help="Training data: the prior's answers, the probe's pictures, the shots.")
    ],
    "shots": Annotated[str | None, typer.Option(help="Examples before each question, from --train: 0 4 8.")],
    "select": Annotated[str | None, typer.Option(help="How shots are chosen: random (default), rices, or the same.")],
    "limit": Annotated[int | None, typer.Option(min=1, help="Score only the first N samples.")],
    "out": Annotated[Path | None, typer.Option(help="Folder of raw outputs and scores (and of compare's report).")],
    "seed": Annotated[int | None, typer.Option(min=0, help="Seed of shuffles and intervals (default: 0).")],
}
"""The options of every command that scores models, by the names that its module takes."""


class Scoring(TypedDict, total=False):
    """Those of SCORING that the user gave."""

    task: str
    data: str
    options: list[str]
    train: str
    shots: str
    select: str
    limit: int
    out: Path
    seed: int


def takes(options: Mapping[str, object], argument: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with these options besides its own; those that the user gave come to it as a dict, ``argument``."""

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        before = inspect.signature(command)
        own = [p for p in before.parameters.values() if p.name != argument]
        more = {name: option for name, option in options.items() if name not in before.parameters}

        def call(**values: object) -> None:
            given = {name: value for name in more if (value := values.pop(name)) not in (None, [])}
            command(**values, **{argument: given})

        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in more.items()
        ]
        # Typer reads a command's options from its signature and its annotations.
        call.__signature__ = before.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in (*own, *added)} | {"return": None}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorated


opens_a_model = takes(LOADING, "given")
"""The options of LOADING; the command gets those that the user gave as ``given``."""


def written(options: Iterable[str]) -> list[str]:
    """Names of options as a user writes them."""
    return ["--set" if name == "options" else f"--{name}".replace("_", "-") for name in options]


def as_words(options: Mapping[str, object]) -> list[str]:
    """Options with their values as a user writes them, but for those that are none: a list's once for each value."""
    words: list[str] = []
    for name, value in zip(written(options), options.values(), strict=True):
        for one in value if isinstance(value, list) else [value]:
            words += [name] if one is True else [] if one is None else [f"{name}={one}"]
    return words
