"""``isthmus convert``: a model in another project's form."""

import json
import re
from pathlib import Path

from rich.console import Console

from isthmus.cli.options import Loading
from isthmus.errors import ConfigError, nearest

_DTYPES = ("float32", "bfloat16", "float16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(
    source: str,
    destination: Path,
    to: str,
    *,
    given: Loading,
    replace: bool,
    lossy: bool,
    shard: str | None,
    dtype: str,
    merge: bool = False,
    json_file: Path | None,
) -> None:
    """Open, write, and say what was written. ``given`` are further arguments of ``load``; with ``merge`` the model's
    adapters are added to their layers first, and what it then computes is compared.

    Weights are written in the precision that they were stored in, which is widened to float32 and back without loss.
    """
    import torch

    from isthmus.interop.convert import write_model
    from isthmus.opening import load
    from isthmus.testing.merging import merge_and_compare

    size = None if shard is None else byte_count(shard)
    if dtype not in ("stored", *_DTYPES):
        raise ConfigError(f"--dtype {dtype!r}: {nearest(dtype, ('stored', *_DTYPES))}")
    model = load(source, **given)
    console = Console(emoji=False)
    if merge:
        summary = merge_and_compare(model)
        console.print(f"merged: {summary}", highlight=False, markup=False)
    wanted = dtype if dtype != "stored" else model.report.dtype if model.report else "float32"
    if wanted in _DTYPES:
        model.cast(getattr(torch, wanted))
    done = write_model(model, destination, to, replace=replace, lossy=lossy, shard_bytes=size, origin=Path(source))
    total = sum(done.files.values())
    console.print(f"{done.folder}: {to}, {len(done.files)} files, {total / 1e6:,.1f} MB", highlight=False, markup=False)
    for loss in done.losses:
        console.print(f"left out: {loss}", highlight=False, markup=False)
    for note in (*(model.report.notes if model.report else ()), *done.notes):
        console.print(f"note: {note}", highlight=False, markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")


def byte_count(text: str) -> int:
    """``5GB``, ``500 MB`` or a plain number. Raises ConfigError for anything else."""
    found = re.fullmatch(r"([1-9]\d*)\s*(KB|MB|GB)?", text.strip().upper())
    if found is None:
        raise ConfigError(f"--shard-size {text!r} is no size: write 5GB, 500MB or a number of bytes.")
    return int(found[1]) * _UNITS[found[2] or ""]
