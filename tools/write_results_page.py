"""Writes docs/results.md from the results.json of the models that come with the package.

python -m tools.write_results_page            # run it again after tools/score_shipped.py
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "isthmus" / "pretrained" / "results.json"
PAGE = ROOT / "docs" / "results.md"
MOST = 80
"""Lines of the page."""

TITLES = {
    "clip": "CLIP: retrieval among new scenes",
    "lm": "The language model: questions about symbolic descriptions",
    "llava": "LLaVA: questions about pictures",
    "flamingo": "Flamingo: questions about pictures",
    "flamingo-clips": "Flamingo: questions about clips of four frames",
    "blip2": "BLIP-2: questions about pictures",
    "blip2-zero-shot-vqa": "BLIP-2 before its fine-tuning: the same questions, zero-shot",
}
CONTROLS = (("blind", "no picture"), ("shuffled", "shuffled"), ("prior", "prior"), ("gain", "**gain**"))
HEAD = """# Results
<!-- Written by tools/write_results_page.py; do not edit. -->

The scores of the models that come with the package (`isthmus:llava` and the others), in percent. They are **one
run** of `isthmus demo` with seed {seed}: {machine}, torch {torch}. The
steps of its trainings took {seconds}
by the clock, whatever else ran there; how long a demo takes is in [Speed](speed.md#the-demo).
They are those of the weights as they come, in bfloat16; BLIP-2's retrieval and zero-shot answers are of its earlier
stages, which do not come along, and were scored in that run.
Another run differs by more than the intervals say, for they are over questions alone: the same recipe and seed have
differed between two machines by 7 points (LLaVA) and by 15 (Flamingo's clips).

Brackets hold 95 % bootstrap intervals. Test scenes hold combinations of shape and colour that no training scene had.
*No picture*, *shuffled* (another scene's picture) and *prior* (the most frequent training answer) are what is reached
without looking; *gain* is the distance above the best of the three ([how to read a score](evaluation.md)). Comparisons
at equal budgets are in [side by side](comparison.md), scores on data that others made in [On real data](real-data.md),
and earlier runs and trials in the [notes of December 2026](notes/2026-12-trainings.md).
"""


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def within(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({percent(interval[0])}-{percent(interval[1])})"


def questions(facts: Mapping[str, Any]) -> list[str]:
    """Kinds of questions side by side; a control that was not run has no row."""
    kinds = {**facts["kinds"], "all": facts}
    rows = [[f"{facts['n']:,} questions", *kinds], ["---"] * (len(kinds) + 1)]
    rows.append(["exact answers", *(percent(k["accuracy"]) for k in kinds.values())])
    rows[-1][-1] += within(facts["accuracy_interval"])
    for name, shown in CONTROLS:
        if facts[name] is not None:
            rows.append([shown, *(percent(k[name]) for k in kinds.values())])
            rows[-1][-1] += within(facts["gain_interval"]) if name == "gain" else ""
    return [f"| {' | '.join(row)} |" for row in rows]


def retrieval(facts: Mapping[str, Any]) -> list[str]:
    """Recall both ways; with ``first_step`` it is that after reranking, and recall at 1 before stands beside it."""
    first = facts.get("first_step")
    lines = [f"| | n | R@1 |{' R@1 before reranking |' if first else ''} R@5 | R@10 |"]
    lines.append("|---" * (6 if first else 5) + "|")
    for way in ("image_to_text", "text_to_image"):
        own = facts[way]
        before = f" {percent(first[way]['recall_at_1'])} |" if first else ""
        at_1 = percent(own["recall_at_1"]) + within(own["recall_at_1_interval"])
        more = f"{percent(own['recall_at_5'])} | {percent(own['recall_at_10'])}"
        lines.append(f"| {way.replace('_', ' ')} | {own['n']:,} | {at_1} |{before} {more} |")
    return lines


def page(results: Mapping[str, Any]) -> str:
    """The whole page."""
    machine = results["machine"]
    lines = HEAD.format(
        seed=results["seed"],
        machine=f"{machine['cores']} cores of {machine['processor']} without a GPU" if not machine["gpus"] else machine,
        torch=results["versions"]["torch"],
        seconds=", ".join(f"{round(value / 60)} minutes ({name})" for name, value in results["seconds"].items()),
    ).splitlines()
    for name, title in TITLES.items():
        facts = results["models"][name]
        lines += ["", f"## {title}"]
        if "kinds" in facts:
            lines += questions(facts)
        if "image_to_text" in facts:
            lines += ["", *retrieval(facts)] if "kinds" in facts else retrieval(facts)
    return "\n".join(lines) + "\n"


def main() -> None:
    text = page(json.loads(SOURCE.read_text(encoding="utf-8")))
    if (count := len(text.splitlines())) > MOST:
        raise SystemExit(f"the page would have {count} lines, more than {MOST}")
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {count} lines")


if __name__ == "__main__":
    main()
