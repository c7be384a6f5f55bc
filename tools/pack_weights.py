"""The demo's five models into the package: what `isthmus.load("isthmus:llava")` opens.

    python tools/pack_weights.py runs/demo                  # into src/isthmus/pretrained

Each model folder is copied without its recipe, its weights in bfloat16 (they become float32 again when they are
opened), with a manifest of its own; a frozen encoder or language model that an earlier one holds too is taken from
there (:mod:`isthmus.borrowed`). Beside them the demo's results.json: what it says was measured before the weights were
cast, so write it anew with ``tools/score_shipped.py``. Nothing is written when a model is missing or all of it together
would be larger than the package allows.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus import borrowed, checkpoint
from isthmus.errors import CheckpointError, IsthmusError
from isthmus.opening import load

NAMES = ("clip", "lm", "flamingo", "blip2", "llava")
MOST = 25_000_000
"""Bytes of all models together."""

PARTS = ("vision", "language.lm")
"""What later models may hold in common with earlier ones."""

LEFT_OUT = ("recipe.yaml",)
HERE = Path(__file__).resolve().parents[1] / "src" / "isthmus" / "pretrained"


def pack(runs: Path, out: Path) -> dict[str, int]:
    """Write one folder per model below ``out``; the bytes of each. Raises CheckpointError: a model or the results are
    missing or damaged, or the models are too large."""
    if not (runs / "results.json").is_file():
        raise CheckpointError(f"{runs} holds no results.json: let the demo finish.")
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=out.parent) as aside:
        for name in NAMES:
            before = [Path(aside) / earlier for earlier in sizes]
            sizes[name] = _pack_one(runs / name / "model", Path(aside) / name, before)
        if sum(sizes.values()) > MOST:
            told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise CheckpointError(f"{sum(sizes.values()):,} bytes are more than the {MOST:,} of the package: {told}.")
        for name in NAMES:
            shutil.rmtree(out / name, ignore_errors=True)
            shutil.move(Path(aside) / name, out / name)
    shutil.copyfile(runs / "results.json", out / "results.json")
    return sizes


def _pack_one(folder: Path, target: Path, before: Sequence[Path]) -> int:
    """One model folder beside those ``before`` it, opened again to see that it is whole; its bytes."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no model at {folder}: let the demo finish.")
    files: dict[str, Any] = {}
    for name, path in checkpoint.read_folder(folder).items():
        if name.endswith(".safetensors"):
            files[name] = {n: _small(t) for n, t in checkpoint.load_tensors(path).items()}
        elif name not in LEFT_OUT:
            files[name] = path.read_text(encoding="utf-8")
    files[borrowed.FILE], told = borrowed.shared(files[borrowed.FILE], before, PARTS)
    if told:
        files["config.json"] = json.loads(files["config.json"]) | {"borrowed": told}
    checkpoint.write_folder(target, files)
    load(target)
    return sum(f.stat().st_size for f in target.rglob("*") if f.is_file())


def _small(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, help="the demo's folder, such as runs/demo")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder of the package's models")
    given = parser.parse_args()
    try:
        sizes = pack(given.runs, given.out)
    except IsthmusError as error:
        print(error, file=sys.stderr)
        return 1
    for name, size in sizes.items():
        print(f"{name:10}{size / 1e6:8.2f} MB")
    print(f"{'together':10}{sum(sizes.values()) / 1e6:8.2f} MB in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
