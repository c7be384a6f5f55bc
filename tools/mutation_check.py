"""Which facts of the papers are guarded by a test: breaks one at a time in a copy and runs the tests near it.

    nice -n 15 .venv/bin/python tools/mutation_check.py [--only NAME ...] [--out docs/guards.md]

Each row of mutation_facts.yaml names a file below src/isthmus, a text that stands in it exactly once, what it is
replaced by, and the tests near it. A fact is guarded when one of these fails. A row whose text is gone is an error: the
table follows the code.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mutation_facts.yaml")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One row of the table. ``tests``: paths (and node ids) below tests, separated by blanks."""

    fact: str
    file: str
    text: str
    broken: str
    tests: str


def table() -> list[Fact]:
    """All rows. Raises SystemExit when two have one name, or a text is not there exactly once."""
    facts = [Fact(**row) for row in yaml.safe_load(TABLE.read_text(encoding="utf-8"))]
    names = [fact.fact for fact in facts]
    odd = [f"{name!r} is there twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for fact in facts:
        count = (ROOT / "src" / "isthmus" / fact.file).read_text(encoding="utf-8").count(fact.text)
        odd += [f"{fact.fact}: {fact.file} holds {fact.text!r} {count} times, not once"] * (count != 1)
    if odd:
        raise SystemExit("\n".join([f"{TABLE.name}:", *odd]))
    return facts


def broken_copy(fact: Fact, place: Path) -> None:
    """The project in ``place`` with the fact broken."""
    for name in ("src", "tests", "docs", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, place / name)
    file = place / "src" / "isthmus" / fact.file
    file.write_text(file.read_text(encoding="utf-8").replace(fact.text, fact.broken), encoding="utf-8")


def guarded(fact: Fact) -> tuple[bool, str]:
    """Whether a test failed, and which one first. Raises RuntimeError when the tests could not be run.

    They run in a fork, which has the large libraries already.
    """
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        broken_copy(fact, place)
        tests = [str(place / "tests" / test) for test in fact.tests.split()]
        said = place / "said.txt"
        if (child := os.fork()) == 0:
            os._exit(_run(place, tests, said))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output = said.read_text(encoding="utf-8")
    failed = [line for line in output.splitlines() if line.startswith("FAILED ")]
    if code not in (0, 1) or (code == 1 and not failed):
        raise RuntimeError(f"{fact.fact}: the tests did not run.\n{output[-3000:]}")
    return bool(failed), failed[0].split("::")[1].split(" ")[0] if failed else ""


def _run(place: Path, tests: list[str], said: Path) -> int:
    """pytest over the copy in ``place``, in this process, which must not return; what it says goes to a file."""
    paths = [str(place / "src"), str(place)]
    with open(said, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        os.chdir(place)
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for the processes that tests start
        sys.path[:0] = paths
        # A library that the parent has imported is one that pytest's plugins cannot rewrite any more.
        known = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *known, *tests]))
    except BaseException:
        traceback.print_exc()
        return 99


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", help="parts of names: these facts alone, nothing is written")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "guards.md")
    given = options.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)  # before any fork
    # What most tests load first; a fork then has it.
    models = (f"transformers.models.{kind}.modeling_{kind}" for kind in ("clip", "llama", "llava"))
    for name in ("beartype.claw", "hypothesis", "jaxtyping", "requests", "schemathesis", "xdist", *models):
        import_module(name)
    rows, lost, chosen = [], 0, [f for f in table() if not given.only or any(part in f.fact for part in given.only)]
    for fact in chosen:
        started = time.monotonic()
        try:
            found, test = guarded(fact)
        except RuntimeError as error:
            print(error, flush=True)
            lost += 1
            continue
        rows.append(f"| {fact.fact} | `{fact.file}` | {f'`{test}`' if found else '**no test**'} |")
        print(
            f"{'guarded' if found else 'UNGUARDED':9} {time.monotonic() - started:5.0f} s  {fact.fact}  {test}",
            flush=True,
        )
    if lost:
        raise SystemExit(f"{lost} rows could not be tried; nothing is written.")
    if not given.only:
        # What stands there after the table is written by hand and stays.
        before = given.out.read_text(encoding="utf-8") if given.out.is_file() else ""
        further = before[before.index("\n## ") :] if "\n## " in before else ""
        held = sum("no test" not in row for row in rows)
        head = (
            "# Guarded facts\n\n"
            "Written by `tools/mutation_check.py`: each fact was broken by itself in a copy of the project, and the "
            f"tests near it were run. {held} of {len(rows)} were noticed.\n\n"
            "| fact | file | the first test that failed |\n|---|---|---|\n"
        )
        given.out.write_text(head + "\n".join(rows) + "\n" + further, encoding="utf-8")


if __name__ == "__main__":
    main()
