"""``isthmus doctor``: what is installed, what the machine can do, and the traps around us."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

from rich.console import Console
from rich.table import Table

PACKAGES = (
    "isthmus",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "pydantic",
    "peft",
    "tensorboard",
    "gradio",
    "fastapi",
    "av",
)


def run() -> None:
    """Print the report; exit code 1 when something known to break is found."""
    import torch

    from isthmus.training.precision import computes_bf16

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    table.add_row("cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    table.add_row(
        "bf16",
        "yes: `precision: auto` times it against float32, once per net"
        if computes_bf16(torch.device("cpu"))
        else "no: training runs in float32",
    )
    table.add_row("cuda", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none")
    for package in PACKAGES:
        try:
            table.add_row(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(package, "[dim]not installed[/]")
    console = Console()
    console.print(table)
    if importlib.util.find_spec("torchvision") is None:
        console.print("No torchvision: good, isthmus reads pictures with Pillow.")
        return
    console.print(
        "[bold red]torchvision is installed.[/] When it does not match torch, every vision class of transformers fails "
        "with \"Could not import module 'CLIPModel'\". Cure: [bold]pip uninstall torchvision[/]",
        highlight=False,
    )
    sys.exit(1)
