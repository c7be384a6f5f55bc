"""The commands and their options; each hands over to a module of its own."""

from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.app_data import app as data_app
from isthmus.cli.options import (
    OF_ANY_MODEL,
    SCORING,
    Json,
    Loading,
    Overrides,
    Scoring,
    as_words,
    opens_a_model,
    takes,
    written,
)

app = typer.Typer(
    name="isthmus",
    help="CLIP, Flamingo, BLIP-2 and LLaVA: train, study and compare multimodal language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")


def _version(value: bool) -> None:
    if value:
        from isthmus.version import __version__

        typer.echo(f"isthmus {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options before a command."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs, results.json and report.html.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and order.")] = 0,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="At a terminal, end by serving the page.")] = True,
    jobs: Annotated[
        int | None, typer.Option(help="Trainings at a time, which share the cores (default: 3; 1 on one core).")
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the recipes' steps: 0.3 is soon done and learns less.")] = 1.0,
) -> None:
    """The full story on the embedded scenes: train all five models, score them, show them."""
    from isthmus.cli.demo import run

    run(out, seed=seed, serve=serve, jobs=jobs, budget=budget)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/<recipe>).")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard events.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share each step's rows, as by torchrun.")] = 1,
    stop_at: Annotated[
        int | None, typer.Option(min=1, help="Save and leave (exit code 85) after this step of the stage that runs.")
    ] = None,
) -> None:
    """Run every stage of a recipe. The same command again resumes a run that was interrupted."""
    from isthmus.cli.train import run

    run(recipe, overrides or [], out, tensorboard=tensorboard, processes=processes, stop_at=stop_at)


@app.command()
@opens_a_model
def show(
    what: Annotated[str, typer.Argument(help="A recipe, a model folder or a checkpoint file.")],
    overrides: Overrides = None,
    json_file: Json = None,
    render: Annotated[
        str | None, typer.Option(help="A question: show its prompt, every character and id, as the model reads it.")
    ] = None,
    *,
    parallel: Annotated[
        str | None, typer.Option(help="ddp or fsdp: what each process of a recipe's stages would hold and exchange.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, help="Number of processes for --parallel.")] = 8,
    given: Loading,
) -> None:
    """Parts, exact parameter counts, what each stage trains, tokens per image, memory, compute-optimal tokens."""
    from isthmus.cli.show import run

    run(what, overrides or [], json_file, given, render=render, shared=None if parallel is None else (parallel, ranks))


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples of each source to show token by token.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Steps to try of each stage.")] = 2,
    json_file: Json = None,
) -> None:
    """Preflight: real samples token by token, bad samples, two steps of each stage, save and resume, compared."""
    from isthmus.cli.check import run

    run(recipe, overrides or [], json_file, samples=samples, steps=steps)


@app.command(name="eval")
@opens_a_model
@takes(SCORING, "scoring")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="A model, or hf:FOLDER to run transformers' own.")] = None,
    more_shots: Annotated[list[int] | None, typer.Argument(hidden=True)] = None,
    judge: Annotated[str | None, typer.Option(help="URL of a judge, for --task llava-bench.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="Its prompt: a file like judge.yaml.")] = None,
    rescore: Annotated[Path | None, typer.Option(help="Score this folder's outputs again, without a model.")] = None,
    against: Annotated[Path | None, typer.Option(help="With --rescore: the folder to compare it with, paired.")] = None,
    json_file: Json = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share the items, as by torchrun.")] = 1,
    *,
    scoring: Scoring,
    given: Loading,
) -> None:
    """Score a model: with intervals, raw outputs, and the best score without looking. No task: the recipe's own."""
    from isthmus.cli.evaluate import run, run_rescore

    judged = {"judge": judge, "judge_model": judge_model, "judge_prompt": judge_prompt}
    if rescore is not None or against is not None or model is None:
        run_rescore(
            rescore,
            against,
            model=model,
            options=scoring.pop("options", []),
            seed=scoring.pop("seed", 0),
            code=given.pop("code", []),
            given=written(
                [
                    *scoring,
                    *(n for n, value in judged.items() if value is not None),
                    *given,
                    *(["processes"] if processes > 1 else []),
                ]
            ),
            json_file=json_file,
        )
        return
    if processes > 1:
        from isthmus.cli.several import Ended, start

        options = {**scoring, **judged, **given, "json": json_file}
        raise Ended(start(["eval", model, *map(str, more_shots or []), *as_words(options)], processes))
    who = {"url": judge, "model": judge_model, "prompt": str(judge_prompt) if judge_prompt else None}
    who = {field: value for field, value in who.items() if value is not None}
    run(model, **scoring, more_shots=more_shots or [], json_file=json_file, given=given, judge=who)


@app.command()
@takes(OF_ANY_MODEL, "given")
@takes(SCORING, "scoring")
def compare(
    models: Annotated[
        list[str], typer.Argument(help="Model folders, two or more; or a comparison RECIPE key=value ...")
    ],
    arm: Annotated[list[str] | None, typer.Option(help="Of a recipe, run only this arm (repeat for several).")] = None,
    json_file: Json = None,
    *,
    scoring: Scoring,
    given: Loading,
) -> None:
    """Models side by side on the same questions: scores, differences with intervals, costs, one report."""
    from isthmus.cli import compare as work

    if work.is_recipe(models[0]):
        out = scoring.pop("out", None)
        work.run_recipe(
            models[0], models[1:], arms=arm or [], out=out, given=written([*scoring, *given]), json_file=json_file
        )
        return
    work.no_arms(arm)
    work.run(models, **scoring, json_file=json_file, given=given)


@app.command()
def score(
    references: Annotated[Path, typer.Argument(help="COCO captions, or VQA annotations.")],
    predictions: Annotated[
        Path, typer.Argument(help="A results file: a list of image_id, caption; question_id, answer.")
    ],
    task: Annotated[str, typer.Option(help="caption, vqa or ok-vqa.")],
    metric: Annotated[list[str] | None, typer.Option(help="Also METEOR or SPICE (Java, extra `eval`).")] = None,
    subset: Annotated[bool, typer.Option(help="Score only the items that have a prediction.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also keep a score folder, for --rescore and --against.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals.")] = 0,
    json_file: Json = None,
) -> None:
    """Official metrics on official files, without a model."""
    from isthmus.cli.score import run

    run(
        references,
        predictions,
        task=task,
        metrics=metric or [],
        subset=subset,
        out=out,
        seed=seed,
        json_file=json_file,
    )


@app.command()
@opens_a_model
def chat(
    model: Annotated[str, typer.Argument(help="A model: anything `isthmus.load` opens.")],
    question: Annotated[str | None, typer.Argument(help="One question; without it a conversation starts.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture (repeat for several).")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A clip: a folder of frames or a video file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    *,
    given: Loading,
) -> None:
    """One answer about pictures, or a conversation."""
    from isthmus.cli.chat import run

    run(
        model,
        question,
        image or [],
        videos=video or [],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        given=given,
    )


@app.command()
@opens_a_model
def look(
    model: Annotated[str, typer.Argument(help="A model: anything `isthmus.load` opens.")],
    question: Annotated[str, typer.Argument(help="What to ask about the picture.")],
    image: Annotated[Path, typer.Option(help="The picture.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    cells: Annotated[int, typer.Option(min=1, max=64, help="Cells a side to cover, one at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    *,
    given: Loading,
) -> None:
    """Pictures of what a model attended to for each word of its answer, and of what covering each region changes."""
    from isthmus.cli.look import run

    run(model, question, image, out, cells=cells, max_new_tokens=max_new_tokens, given=given)


@app.command()
@opens_a_model
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="MODEL or NAME=MODEL ...; none: those that came with the package.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at.")] = 8000,
    allow_image_domain: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from this host (repeat for several); none otherwise.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=256, help="Texts decoded together, per model.")] = 16,
    queue: Annotated[int, typer.Option(min=1, max=65536, help="Texts that may wait; beyond it clients get 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=1, max=86400, help="Seconds that a request may take.")] = 120.0,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="A line per request: address, route, status.")
    ] = False,
    pictures: Annotated[Path | None, typer.Option(help="Folder of pictures that the page may search.")] = None,
    browse: Annotated[bool, typer.Option("--browse", help="Open the page in a browser.")] = False,
    *,
    given: Loading,
) -> None:
    """Models behind an OpenAI-compatible API. The environment's ISTHMUS_API_KEY, where it is set, must be sent."""
    from isthmus.cli.serve import run

    run(
        models or [],
        host=host,
        port=port,
        domains=allow_image_domain or [],
        limits={"rows": rows, "queue": queue, "deadline": deadline},
        log_requests=log_requests,
        given=given,
        browse=browse,
        pictures=pictures,
    )


@app.command()
@opens_a_model
def batch(
    requests: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch form, one JSON object a line.")],
    out: Annotated[Path | None, typer.Option(help="Answers (default: REQUESTS with .answers.jsonl).")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="NAME=MODEL: what requests call NAME (repeat); else a name is a MODEL.")
    ] = None,
    together: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 16,
    allow_image_domain: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from this host (repeat for several); none otherwise.")
    ] = None,
    json_file: Json = None,
    *,
    given: Loading,
) -> None:
    """Answer a file of API requests offline, through the server's checks; the same command resumes."""
    from isthmus.cli.batch import run

    run(
        requests,
        out,
        named=model or [],
        together=together,
        domains=allow_image_domain or [],
        json_file=json_file,
        given=given,
    )


@app.command()
@opens_a_model
def convert(
    source: Annotated[str, typer.Argument(help="A model: anything `isthmus.load` opens.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="isthmus, hf, openai, open_clip, original, lavis or open_flamingo.")],
    replace: Annotated[bool, typer.Option(help="Replace the folder if it exists.")] = False,
    lossy: Annotated[bool, typer.Option(help="Leave out what the format has no place for.")] = False,
    shard_size: Annotated[str | None, typer.Option(help="Largest file of weights, such as 500MB (hf: 5GB).")] = None,
    dtype: Annotated[str, typer.Option(help="stored (as the weights were), float32, bfloat16 or float16.")] = "stored",
    merge: Annotated[
        bool, typer.Option(help="Add its adapters to their layers first; the outputs are compared.")
    ] = False,
    json_file: Json = None,
    *,
    given: Loading,
) -> None:
    """Write a model in another project's form; what that cannot hold is an error that names the field."""
    from isthmus.cli.convert import run

    run(
        source,
        destination,
        to,
        given=given,
        replace=replace,
        lossy=lossy,
        shard=shard_size,
        dtype=dtype,
        merge=merge,
        json_file=json_file,
    )


@app.command()
@opens_a_model
def verify(
    model: Annotated[str, typer.Argument(help="A model: anything `isthmus.load` opens.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this contract (repeat for several).")] = None,
    against: Annotated[
        str | None, typer.Option(help="An engine's http://host/v1 that serves the same model: token by token.")
    ] = None,
    served_as: Annotated[str | None, typer.Option(help="The model's name at --against, where it has several.")] = None,
    json_file: Json = None,
    *,
    given: Loading,
) -> None:
    """Contracts on any checkpoint: batch = single, cached = uncached, save = load, the picture matters, ..."""
    from isthmus.cli.verify import run, run_against

    if against is not None:
        run_against(model, against, json_file, served_as=served_as, only=only or [], given=given)
        return
    run(model, json_file, only=only or [], given=given, served_as=served_as)


@app.command()
def doctor() -> None:
    """What is installed, what the machine can do, and the known traps (a torchvision that must not be there)."""
    from isthmus.cli.doctor import run

    run()
