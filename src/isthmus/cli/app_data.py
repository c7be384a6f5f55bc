"""The commands of ``isthmus data`` and their options; each hands over to a module of its own."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.options import OF_ANY_MODEL, Json, Loading, takes

app = typer.Typer(help="Write scenes as files; instruction data; better captions.", no_args_is_help=True)


@app.command(name="scenes")
def data_scenes(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    format: Annotated[str, typer.Option(help="llava, webdataset or coco.")] = "llava",
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 1000,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
    size: Annotated[int, typer.Option(help="Side of a picture in pixels.")] = 64,
) -> None:
    """Write the generated scenes in a format other tools read."""
    from isthmus.cli.data import scenes

    scenes(out, format, count=count, split=split, seed=seed, size=size)


@app.command(name="instruct")
def data_instruct(
    out: Annotated[Path | None, typer.Option(help="Folder to write; the same command goes on in it.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Captions and boxes: COCO, Visual Genome, JSON lines, or a YAML file.")
    ] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Instead, so many generated pictures.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Write by templates, from the scenes' truth.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="OpenAI-compatible URL of the model that writes.")] = None,
    model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="conversation, detail, reasoning (default: all).")] = None,
    image_folder: Annotated[
        Path | None, typer.Option(help="Where the pictures are; missing ones are left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pictures.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Your own prompts and checks, see --copy-prompts.")] = None,
    copy_prompts: Annotated[Path | None, typer.Option(help="Copy the prompts and checks there, and end.")] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Replies to try where the checks refuse one.")] = 1,
    skip_check: Annotated[list[str] | None, typer.Option(help="A check to leave out (repeat for several).")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the language model.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 1024,
    option: Annotated[list[str] | None, typer.Option("--set", help="key=value: further fields of the request.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a reply.")] = 120.0,
    retries: Annotated[int, typer.Option(min=0, help="Times to ask again where the endpoint fails.")] = 6,
    key: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "OPENAI_API_KEY",
    price_in: Annotated[float | None, typer.Option(help="Price of a million tokens read.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Price of a million tokens written.")] = None,
    budget: Annotated[float | None, typer.Option(help="Stop before this much is spent, earlier runs included.")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="The same, in tokens.")] = None,
    split: Annotated[str, typer.Option(help="Of the scenes: train, dev or test.")] = "train",
    size: Annotated[int, typer.Option(help="Of the scenes: side of a picture in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes and of what is drawn.")] = 0,
    json_file: Json = None,
) -> None:
    """Instruction data as LLaVA's were made: a language model reads captions and boxes, and writes."""
    from isthmus.cli import instruct as work

    if copy_prompts is not None:
        work.copy(copy_prompts)
        return
    work.run(
        work.Options(
            out=out,
            data=data,
            scenes=scenes,
            split=split,
            size=size,
            image_folder=image_folder,
            offline=offline,
            endpoint=endpoint,
            model=model,
            kinds=kind or [],
            prompts=prompts,
            limit=limit,
            attempts=attempts,
            skip=skip_check or [],
            temperature=temperature,
            max_tokens=max_tokens,
            settings=option or [],
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            key=key,
            price_in=price_in,
            price_out=price_out,
            budget=budget,
            token_budget=token_budget,
            seed=seed,
            json_file=json_file,
        )
    )


@app.command(name="capfilt")
@takes(OF_ANY_MODEL, "given")
def data_capfilt(
    data: Annotated[str, typer.Option(help="Pictures with web captions: a file, a folder or a YAML file of a source.")],
    captioner: Annotated[str, typer.Option(help="A model that captions.")],
    clip: Annotated[str, typer.Option(help="A model that compares pictures with texts.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    k: Annotated[int, typer.Option(help="Synthetic captions per picture.")] = 10,
    keep: Annotated[int, typer.Option(help="Captions kept per picture.")] = 2,
    wrong: Annotated[float, typer.Option(help="Mislabel this share first, to measure what filtering does.")] = 0.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N pictures.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="key=value of the source; task.key=value.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the captions drawn.")] = 0,
    json_file: Json = None,
    *,
    given: Loading,
) -> None:
    """Better captions for a web data set (BLIP-2's CapFilt): write k, rank them by a CLIP, keep the best."""
    from isthmus.cli.data import capfilt

    capfilt(
        data,
        out,
        captioner=captioner,
        clip=clip,
        k=k,
        keep=keep,
        wrong=wrong,
        limit=limit,
        options=option or [],
        seed=seed,
        json_file=json_file,
        given=given,
    )
