"""Console tables: what a person reads first must stand in a row, not in a list of keys."""

import io

from rich.console import Console

from isthmus.evaluation.vqa import Score, VqaScores
from isthmus.recipes.tables import score_table


def shown(facts):
    out = io.StringIO()
    Console(width=100, file=out).print(score_table("retrieval", facts))
    return [line.split("│") for line in out.getvalue().splitlines()]


def direction(n, first, interval):
    return {
        "n": n,
        "recall_at_1": first,
        "recall_at_1_interval": interval,
        "chance_at_1": 0.004,
        "recall_at_5": 0.9,
        "recall_at_5_interval": [0.8, 1.0],
        "chance_at_5": 0.02,
    }


def test_retrieval_has_a_row_per_direction_and_step():
    first = {"image_to_text": direction(256, 0.5, [0.4, 0.6]), "text_to_image": direction(1280, 0.6, [0.5, 0.7])}
    cells = [[cell.strip() for cell in row[1:-1]] for row in shown({"recall_at_1": 0.5, **first}) if len(row) > 2]
    assert cells == [
        ["image to text", "256", "50.0", "40.0-60.0", "0.4", "90.0"],
        ["text to image", "1280", "60.0", "50.0-70.0", "0.4", "90.0"],
    ]
    gains = {
        "image_to_text": {"value": 0.1, "interval": [0.05, 0.15]},
        "text_to_image": {"value": -0.02, "interval": [-0.06, 0.01]},
    }
    second = {"image_to_text": direction(256, 0.6, [0.5, 0.7]), "text_to_image": direction(1280, 0.58, [0.5, 0.6])}
    rows = shown({**second, "first_step": first, "gain_at_1": gains})
    assert [row[1].strip() for row in rows if len(row) > 2][2:] == [
        "image to text, reranked",
        "text to image, reranked",
    ]
    said = " ".join(cell.strip() for row in rows for cell in row)
    assert "image to text +10.0 (5.0-15.0), text to image -2.0 (-6.0 to 1.0)" in said


def test_too_few_questions_are_marked_as_in_the_report():
    few, many = (Score(n=n, accuracy=0.5, interval=(0.4, 0.6)) for n in (12, 300))
    rows = shown(VqaScores(many, {"colour": few, "count": many}).to_dict())
    assert [row[1].strip() for row in rows if len(row) > 2] == ["colour †", "count", "all"]
    assert "† fewer than 300 questions: too few to rest a claim on" in " ".join(rows[-1])
    assert "†" not in str(shown(VqaScores(many, {"count": many}).to_dict()))
