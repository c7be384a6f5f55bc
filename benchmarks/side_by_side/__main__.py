"""Side by side with other libraries: `make bench ARGS="--json bench.json"`.

Equal losses, tokens or scores are asserted first; then both sides run in turns in one process. ``--clock cpu`` counts
the process's own seconds, for machines on which other work runs: read ratios only. Then each side's peak memory, its
FLOPs and its bytes are counted, and set against what the machine multiplies and copies (the roofline).
``ISTHMUS_PRODUCTS=torch`` leaves fp32 products as torch has them on our side too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from benchmarks.side_by_side.models import PUBLISHED, TINY, Sizes
from benchmarks.side_by_side.roofline import bound, peak_mib, rates, work
from benchmarks.side_by_side.rows import ROWS, Row

import isthmus
from isthmus.products import multiply_quickly

ROOT = Path(__file__).resolve().parents[2]
HALF = "bfloat16: training under autocast and answers with cast weights, on both sides"
PEERS = ROOT / ".venv-peers" / "bin" / "python"


def equal(ours: Any, theirs: Any, dtype: torch.dtype = torch.float32) -> str | None:
    """None, or how the two differ. In bf16 two libraries round otherwise, and texts go on from what they have written:
    there only losses and scores are compared."""
    exact = dtype == torch.float32
    if isinstance(ours, float):
        ours, theirs = [ours], [theirs]
    if len(ours) != len(theirs):
        return f"{len(ours)} against {len(theirs)} results"
    if isinstance(ours[0], float):
        worst = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
        return None if worst < (1e-3 if exact else 3e-2) else f"they differ by {worst:.1e}"
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return None if same == len(ours) or not exact else f"{same} of {len(ours)} texts are equal"


def timed(side: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    side()
    return clock() - start


def as_used(side: Callable[[], Any]) -> Callable[[], Any]:
    """Our side with fp32 products as `isthmus.load` and training set them (isthmus/products.py); the peer's side has
    torch's own setting."""

    def run() -> Any:
        multiply_quickly()
        try:
            return side()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def run(name: str, row: Row, given: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """The facts of a row. Raises SystemExit where the two sides do not agree."""
    if row.elsewhere:
        return _elsewhere(name, given) if PEERS.is_file() else {"peer_name": row.peer, "skipped": "make peers"}
    torch.manual_seed(0)
    ours, theirs = row.make(sizes, given.rows)
    ours = as_used(ours)
    if (wrong := equal(ours(), theirs(), sizes.dtype)) is not None:
        raise SystemExit(f"{name}: the two sides do not agree: {wrong}")
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    pairs = []
    for n in range(given.pairs):
        if n % 2:
            second = timed(theirs, clock)
            pairs.append((timed(ours, clock), second))
        else:
            pairs.append((timed(ours, clock), timed(theirs, clock)))
    mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    found = {"peer": round(other, 4), "ours": round(mine, 4), "ratio": round(ratio, 3), "peer_name": row.peer}
    found |= {"memory": {"peer": peak_mib(theirs), "ours": peak_mib(ours)}}
    found |= {"work": {"peer": work(theirs), "ours": work(ours)}}
    return found | ({"note": row.note} if row.note else {})


def _elsewhere(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The row's facts, both sides run by the interpreter of the peers' environment."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "row.json"
        numbers = [f"--{option}={getattr(given, option)}" for option in ("pairs", "rows", "threads", "clock", "dtype")]
        words = ["--only", name, *numbers, *["--tiny"] * given.tiny, "--json", str(file)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        command = [str(PEERS), "-m", "benchmarks.side_by_side", *words]
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{name} did not run in {PEERS}; its error stands above.")
        return json.loads(file.read_text())["rows"][name]


def machine(dtype: torch.dtype) -> dict[str, Any]:
    name = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    flags = sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True)
    libraries = {"isthmus": isthmus.__version__, **{n: version(n) for n in ("torch", "transformers")}}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    own = {"cpu": name, "flags": flags, "threads": torch.get_num_threads(), "versions": libraries, "load": load}
    quick = as_used(lambda: (torch.get_float32_matmul_precision() == "medium", rates(dtype)))()
    own |= {"our_products": "oneDNN" if quick[0] else "torch's own", "rates": quick[1], "peer_rates": rates(dtype)}
    return own


def markdown(facts: dict[str, Any]) -> str:
    """The table; the roofline's columns are of our side."""
    heads = ("row", "peer", "peer s", "ours s", "ratio", "peer MiB", "ours MiB", "GFLOP", "GB", "least s", "bound by")
    lines = ["| " + " | ".join([*heads, "of it reached", "|"]), "|" + "---|" * (len(heads) + 2)]
    own = facts["machine"]
    for name, row in facts["rows"].items():
        if "skipped" in row:
            lines.append(f"| {name} | {row['peer_name']} |" + " |" * 10 + f" {row['skipped']} |")
            continue
        done, memory = row["work"]["ours"], row["memory"]
        least, what = bound(done, own["rates"])
        cells = [name, row["peer_name"], *(f"{row[k]:.2f}" for k in ("peer", "ours", "ratio"))]
        cells += ["" if memory[k] is None else f"{memory[k]:,.0f}" for k in ("peer", "ours")]
        cells += [
            f"{done['gflop']:,.1f}",
            f"{done['gb']:,.1f}",
            f"{least:.2f}",
            what,
            f"{100 * least / row['ours']:.0f} %",
        ]
        lines.append("| " + " | ".join([*cells, row.get("note", "")]) + " |")
    told = ", ".join(f"{k} {v}" for k, v in own["versions"].items())
    head = f"{own['cpu']} ({', '.join(own['flags'])}), {own['threads']} threads; {told}; load {own['load']:.1f}; "
    head += (
        f"{facts['pairs']} pairs, {facts['clock']} seconds, {facts['dtype']}; our products by {own['our_products']}: "
    )
    head += f"1,024³ at {own['rates']['gflops']:,.0f} GFLOP/s, the peer's at {own['peer_rates']['gflops']:,.0f}; "
    head += f"copies at {own['rates']['gbs']:.1f} GB/s"
    return head + "\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, default=4, help="rows of a generation; others are multiples of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=HALF)
    parser.add_argument("--tiny", action="store_true", help="small sizes: does every row run?")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes = replace(TINY if given.tiny else PUBLISHED, dtype=getattr(torch, given.dtype))
    facts: dict[str, Any] = {
        "machine": machine(sizes.dtype),
        "pairs": given.pairs,
        "clock": given.clock,
        "dtype": given.dtype,
    }
    facts["rows"] = {}
    for name in given.only:
        facts["rows"][name] = run(name, ROWS[name], given, sizes)
        print(name, facts["rows"][name], file=sys.stderr, flush=True)
        if given.json:
            given.json.write_text(json.dumps(facts, indent=2) + "\n")
            given.json.with_suffix(".md").write_text(markdown(facts))
    print(markdown(facts))


if __name__ == "__main__":
    main()
