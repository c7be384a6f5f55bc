"""``isthmus data instruct``: instruction data from captions and boxes, by a language model or by templates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from isthmus.errors import ConfigError, EndpointError, nearest

if TYPE_CHECKING:
    from isthmus.data.instruct import Report, Symbols
    from isthmus.demo.scenes.scene import Scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says; see ``isthmus data instruct --help``."""

    out: Path | None
    data: str | None
    scenes: int | None
    split: str
    size: int
    image_folder: Path | None
    offline: bool
    endpoint: str | None
    model: str | None
    kinds: Sequence[str]
    prompts: Path | None
    limit: int | None
    attempts: int
    skip: Sequence[str]
    temperature: float
    max_tokens: int
    settings: Sequence[str]
    concurrency: int
    timeout: float
    retries: int
    key: str
    price_in: float | None
    price_out: float | None
    budget: float | None
    token_budget: int | None
    seed: int
    json_file: Path | None


def copy(folder: Path) -> None:
    """The package's prompts in a folder of the user's."""
    from isthmus.data.instruct import copy_prompts

    names = ", ".join(path.name for path in copy_prompts(folder))
    Console(emoji=False).print(f"{names} written to [bold]{folder}[/]; change them and give --prompts {folder}.")


def run(o: Options) -> None:
    """Write ``OUT/instruct.json`` and what belongs to it."""
    from isthmus.data.instruct import KINDS

    if o.out is None:
        raise ConfigError("Name the folder to write (--out DIR).")
    if (o.data is None) == (o.scenes is None):
        raise ConfigError("Give either --data (captions and boxes) or --scenes N (generated pictures).")
    kinds = list(dict.fromkeys(o.kinds)) or list(KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"There is no kind of instruction data {kind!r}; {nearest(kind, KINDS)}")
    if o.offline:
        _offline(o, kinds)
    else:
        _request_all(o, kinds)


def _offline(o: Options, kinds: Sequence[str]) -> None:
    from isthmus.data.instruct import KINDS, Report, write_rows
    from isthmus.demo.scenes.instruct import TEMPLATES, written

    if o.endpoint or o.model:
        raise ConfigError("--offline runs no model; leave --endpoint and --model out.")
    if o.scenes is None or o.out is None:
        raise ConfigError("--offline writes about generated pictures, whose truth is known: give --scenes N.")
    if (o.out / "making").exists():
        raise ConfigError(f"{o.out} holds data that a language model writes; choose another folder for --out.")
    pictures = _drawn(o)
    rows = [written(scene, symbols, kind) for scene, symbols in pictures for kind in KINDS if kind in kinds]
    report = Report()
    report.rows.update(row.kind for row in rows)
    facts = {
        "made_by": {"model": TEMPLATES},
        "prompts": {},
        "source": _scenes(o),
        "image_folder": "images",
        "seed": o.seed,
        **report.to_dict(),
    }
    write_rows(o.out, rows, facts, o.seed)
    _report(o, report, Path("images"))


def _request_all(o: Options, kinds: Sequence[str]) -> None:
    from isthmus.data.instruct import Checks, instruct, load_prompts
    from isthmus.data.instruct.write import categories_of, existing
    from isthmus.endpoint import Budget, Endpoint
    from isthmus.recipes.schema import option_value

    if o.endpoint is None or o.model is None or o.out is None:
        raise ConfigError(
            "A language model writes the data: give --endpoint URL and --model NAME, or --offline for templates."
        )
    settings: dict[str, object] = {}
    for setting in o.settings:
        name, sep, value = setting.partition("=")
        if not sep:
            raise ConfigError(f"--set {setting!r} is not key=value.")
        settings[name] = option_value(value, f"--set {setting!r}")
    endpoint = Endpoint(
        o.endpoint,
        o.model,
        temperature=o.temperature,
        max_tokens=o.max_tokens,
        timeout=o.timeout,
        retries=o.retries,
        key=o.key,
        options=settings,
    )
    budget = Budget(price_in=o.price_in, price_out=o.price_out, money=o.budget, tokens=o.token_budget)
    prompts = load_prompts(kinds, o.prompts)
    console = Console(emoji=False)
    pictures, source, folder = _pictures(o)
    if folder is not None and o.scenes is None:
        pictures, lost = existing(pictures, folder)
        if lost:
            message = f"{len(lost)} pictures are not in {folder} and are left out, such as {lost[0]}."
            console.print(message, style="yellow", markup=False)
    checks = Checks(o.prompts, skip=o.skip, categories=categories_of(pictures))
    with Progress(transient=True, console=console) as bar:
        task = bar.add_task(escape(f"requests to {endpoint.place}"), total=None)
        report = instruct(
            pictures,
            prompts,
            endpoint,
            o.out,
            checks=checks,
            source=source,
            image_folder=str(folder) if folder is not None else None,
            attempts=o.attempts,
            seed=o.seed,
            concurrency=o.concurrency,
            budget=budget,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _report(o, report, folder)
    if report.missing:
        name, reason = next(iter(report.missing.items()))
        raise EndpointError(
            f"{len(report.missing)} requests got no answer, such as {name} ({reason}). The same command repeats "
            "them again; a slow endpoint wants more time (--timeout 600) or fewer at once (--concurrency 1)."
        )


def _pictures(o: Options) -> "tuple[list[Symbols], dict[str, object], Path | None]":
    """The pictures in words, what they are described by, and the folder of the pictures."""
    from isthmus.data.instruct.symbols import guess_symbols, read_symbols

    if o.scenes is not None:
        return [symbols for _, symbols in _drawn(o)], _scenes(o), Path("images")
    spec = _spec(str(o.data)) or guess_symbols(Path(str(o.data)))
    folder = o.image_folder or (Path(str(spec["image_folder"])) if "image_folder" in spec else None)
    return read_symbols(spec)[: o.limit], {**spec, **({"limit": o.limit} if o.limit else {})}, folder


def _spec(data: str) -> dict[str, object] | None:
    if Path(data).suffix not in (".yaml", ".yml"):
        return None
    from isthmus.recipes.schema import read_yaml

    tree = read_yaml(Path(data))
    if not isinstance(tree, dict) or "kind" not in tree:
        raise ConfigError(f"{data} should describe captions and boxes by keys, such as `kind: coco`.")
    return tree


def _drawn(o: Options) -> "list[tuple[Scene, Symbols]]":
    """The scenes and their symbols, drawn below the folder."""
    from isthmus.demo.scenes.instruct import draw_scenes, scene_symbols
    from isthmus.demo.scenes.scene import SPLITS

    if o.split not in SPLITS:
        raise ConfigError(f"Scenes have no split {o.split!r}; {nearest(o.split, SPLITS)}")
    assert o.scenes is not None
    assert o.out is not None
    found = scene_symbols(min(o.scenes, o.limit or o.scenes), split=SPLITS[SPLITS.index(o.split)], seed=o.seed)
    draw_scenes(o.out / "images", found, o.size)
    return found


def _scenes(o: Options) -> dict[str, object]:
    return {"kind": "scenes", "count": o.scenes, "split": o.split, "seed": o.seed, "size": o.size}


def _report(o: Options, report: "Report", folder: Path | None) -> None:
    """What came out, what it cost, and how a recipe reads it."""
    console = Console(emoji=False)
    rows = ", ".join(f"{count} {kind}" for kind, count in report.rows.items()) or "nothing"
    console.print(
        f"{sum(report.rows.values())} samples ({rows}) in [bold]{escape(str(o.out))}/instruct.json[/].", soft_wrap=True
    )
    if not o.offline:
        console.print(_spent(report))
    if report.refused:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.refused.most_common())
        console.print(
            f"{sum(report.refused.values())} replies are not used ({reasons}): {o.out}/making/quarantine.jsonl",
            markup=False,
        )
    if report.stopped:
        message = f"Not all requests were sent: {report.stopped}. The same command with more goes on."
        console.print(message, style="yellow", markup=False)
    place = f"{o.out}/images" if folder == Path("images") else folder
    images = f", image_folder: {place}" if place is not None else ""
    if report.rows:
        recipe = f"In a recipe: {{kind: llava, file: {o.out}/instruct.json{images}}}"
        console.print(recipe, highlight=False, markup=False, soft_wrap=True)
    elif report.refused:
        advice = "No reply passed the checks, so nothing is there to train on: try another model, or --attempts 3."
        console.print(f"[yellow]{advice}[/]", soft_wrap=True)
    if o.json_file is not None:
        o.json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")


def _spent(report: "Report") -> str:
    usage = f"{report.replies} replies, {report.prompt_tokens:,} tokens read, {report.completion_tokens:,} written"
    if report.unreported:
        usage += f" ({report.unreported} replies without a report)"
    return usage + (f", cost {report.cost:.4f}." if report.cost is not None else ".")
