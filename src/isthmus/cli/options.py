"""Options that several commands share."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[Path | None, typer.Option("--json", help="Also write the facts to this file as JSON.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value changes, e.g. stages.align.steps=100.")]
Device = Annotated[str | None, typer.Option(help="auto (a GPU if there is one; the default), cpu, cuda or mps.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (as a rule), bfloat16 or float16 weights.")]
LOADING: dict[str, Any] = {
    "device": Device,
    "dtype": Dtype,
    "vision": Annotated[str | None, typer.Option(help="The vision encoder's model, where a checkpoint holds none.")],
    "language": Annotated[str | None, typer.Option(help="The language model, where a checkpoint holds none.")],
    "base": Annotated[str | None, typer.Option(help="The model that adapters belong to, where it was moved.")],
    "unquantised": Annotated[
        bool | None, typer.Option("--unquantised", help="Over the base as stored, where adapters learnt over 4 bits.")
    ],
    "tokenizer": Annotated[str | None, typer.Option(help="A tokenizer's folder, where a checkpoint comes without.")],
    "activation": Annotated[str | None, typer.Option(help="quick_gelu or gelu, where a CLIP's weights do not tell.")],
    "head_width": Annotated[
        int | None, typer.Option(help="Width of a CLIP's attention heads, where nothing tells it.")
    ],
    "template": Annotated[
        str | None,
        typer.Option(
            help="How it is asked: a template's name, chat (its own, switches after a colon), or a file in Jinja."
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


def opens_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of LOADING besides its own; it gets those that the user gave as ``given``."""

    before = inspect.signature(command)
    own = [p for p in before.parameters.values() if p.name != "given"]
    loading = {name: option for name, option in LOADING.items() if name not in before.parameters}

    def call(**options: Any) -> None:
        given = {name: value for name in loading if (value := options.pop(name)) not in (None, [])}
        command(**options, given=given)

    more = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=a) for n, a in loading.items()
    ]
    # Typer reads a command's options from its signature and its annotations.
    call.__signature__ = before.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *more)} | {"return": None}
    call.__name__, call.__doc__ = command.__name__, command.__doc__
    return call
