"""Writes the table of docs/checkpoints.md by running its round trips: `python -m tools.write_checkpoints_page`."""

import re
import tempfile
from pathlib import Path

import torch
from tests.interop.round_trips import CASES, HEADER, row, run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "checkpoints.md"
MARKS = "<!-- round trips -->", "<!-- end of round trips -->"


def main() -> None:
    """Run every case and put the rows between the page's two marks."""
    torch.set_num_threads(1)
    lines = [MARKS[0], "", HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            lines.append(row(case, run(case, Path(place) / "model")))
    table = "\n".join([*lines, "", MARKS[1]])
    text = PAGE.read_text(encoding="utf-8")
    found = re.sub(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", lambda _: table, text, flags=re.DOTALL)
    PAGE.write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
