import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from isthmus.comparison.report import Answer, Chart, Note, Report, SamplePicture, TrainedPart, write_report
from isthmus.comparison.report.page import render
from isthmus.comparison.report.tables import bar, percent, score_table
from isthmus.evaluation.retrieval import score as retrieval_score
from isthmus.evaluation.vqa import Score
from isthmus.evaluation.vqa import score as vqa_score
from tests.evaluation.fakes import changed, row
from tests.narrow import there

EVIL = "<script src=x>\"'&</script>"
ROW = row(answer="yes", truth=["yes"], kind="colour", blind="no", shuffled="no", prior="no")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


def full(text: str = "plain", kinds: tuple[str, ...] = ("colour", "count")) -> Report:
    """A page with every section, every text of which holds ``text``."""
    rows = [changed(ROW, kind=f"{k} {text}", answer="yes" if i % 3 else "") for k in kinds for i in range(320)]
    return Report(
        title=f"title {text}",
        summary=f"summary {text}",
        scores={f"llava {text}": vqa_score(rows)},
        retrieval={f"clip {text}": retrieval_score([0, 3], [[0, 1], [4]])},
        charts=[Chart(title=f"chart {text}", series={f"loss {text}": [(0, 3.0), (10, 1.0)]}, x_label=text,
                      y_label=text)],
        samples=[SamplePicture(png=png(), question=f"question {text}", truth=f"truth {text}", kind=f"kind {text}",
                               answers={f"llava {text}": Answer(text=f"answer {text}", right=False),
                                        f"other {text}": Answer(text="", right=False)})],
        training=[TrainedPart(model=f"model {text}", stage=f"stage {text}", part=f"part {text}", parameters=12345,
                              trained=0)],
        seconds={f"time {text}": 3725.0},
        facts={f"fact {text}": f"value {text}"},
        notes=[Note(heading=f"heading {text}", text=f"note {text}")],
    )  # fmt: skip


class Reader(HTMLParser):
    """Tags with their attributes, the text of the body, and whether every element is closed in order."""

    VOID = frozenset({"meta", "img", "link", "br", "path", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_is_one_well_formed_file(tmp_path):
    path = write_report(tmp_path / "deep" / "report.html", full())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert Reader(html).open == []
    assert html == render(full()), "the same facts give the same bytes"


def test_the_page_loads_nothing():
    html = render(full())
    assert not re.search(r"(https?:)?//[a-z]|url\(|@import|<script|<link|<iframe", html.replace("data:image", ""))
    for tag, attributes in Reader(html).tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/png;base64,"), (tag, name, value)


def test_the_page_suits_phones_and_dark_rooms():
    html = render(full())
    assert 'name="viewport" content="width=device-width' in html
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 640px" in html


def test_every_text_is_escaped():
    html = render(full(EVIL))
    page = Reader(html)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.open == []
    plain = Reader(render(full()))
    assert [t for t, _ in page.tags] == [t for t, _ in plain.tags], "no text makes or breaks an element"
    for word in ("title", "summary", "llava", "clip", "chart", "loss", "question", "truth", "kind", "answer", "model",
                 "stage", "part", "time", "fact", "value", "heading", "note"):  # fmt: skip
        assert f"{word} {EVIL}" in page.text, word


def test_the_picture_is_the_bytes_given():
    sources = [a["src"] for t, a in Reader(render(full())).tags if t == "img"]
    assert [base64.b64decode(there(s).split(",")[1]) for s in sources] == [png()]
    assert "image-rendering: pixelated" in render(full())


def test_right_wrong_and_missing_answers_are_told_apart_without_colour():
    answers = {"a": Answer(text="red", right=True), "b": Answer(text="blue", right=False),
               "c": Answer(text=" ", right=False)}  # fmt: skip
    sample = SamplePicture(png=png(), question="?", truth="red", answers=answers)
    text = Reader(render(Report(title="t", samples=[sample]))).text
    assert "✓ red a ✗ blue b ✗ no answer c" in text


def test_scores_show_every_column_and_mark_small_kinds():
    rows = [changed(ROW, prior="yes" if i < 90 else "no") for i in range(300)] + [changed(ROW, kind="few")] * 10
    html = render(Report(title="t", scores={"llava": vqa_score(rows)}))
    text = Reader(html).text
    for column in ("accuracy", "blind", "shuffled", "prior", "gain"):
        assert column in text
    assert "colour 300 100.0 100.0 – 100.0 0.0 0.0 30.0 +70.0" in text
    assert "few † 10" in text
    assert html.count("<sup>†</sup>") == 1
    assert '<td class="num control best">30.0</td>' in html


def test_several_models_stand_together_under_each_kind():
    first, second = vqa_score([ROW] * 300), vqa_score([changed(ROW, answer="no")] * 300)
    html = render(Report(title="t", scores={"llava": first, "flamingo": second}))
    group = html[html.index('class="group"') :]
    assert group.index("colour") < group.index("llava") < group.index("flamingo")
    assert "−" not in Reader(html).text
    assert 'class="num gain flat"' in group


def test_a_gain_is_only_coloured_where_its_interval_leaves_out_zero():
    def page(better):
        some = [changed(ROW, answer="yes" if i < better else "no", blind="yes" if i % 2 else "no") for i in range(100)]
        return render(Report(title="t", scores={"m": vqa_score(some)}))

    assert 'class="num gain up"' in page(95)
    assert 'class="num gain flat"' in page(52)
    assert 'class="num gain down"' in page(5)


@pytest.mark.parametrize(
    ("score", "shape", "x", "width"),
    [
        (Score(n=1, accuracy=0.8, interval=(0.7, 0.9), blind=0.3), "gained", 30.0, 50.0),
        (Score(n=1, accuracy=0.2, interval=(0.1, 0.3), blind=0.3), "missed", 20.0, 10.0),
        (Score(n=1, accuracy=0.2, interval=(0.1, 0.3)), "alone", 0.0, 20.0),
    ],
)
def test_the_bar_draws_the_gain(score, shape, x, width):
    assert f'class="{shape}" x="{x}" width="{width}"' in bar(score)


def test_the_training_table_says_frozen_and_counts():
    parts = [
        TrainedPart(model="llava", stage="align", part="vision", parameters=1_641_120, trained=0, rate=1e-3),
        TrainedPart(model="llava", stage="align", part="connector", parameters=1000, trained=1000, rate=1e-3),
    ]
    text = Reader(render(Report(title="t", training=parts))).text
    assert "llava align vision 1,641,120 frozen connector 1,000 1,000 0.001" in text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(3.14, "3.1 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (3725, "1 h 02 min")]
)
def test_times_are_readable(seconds, shown):
    assert shown in Reader(render(Report(title="t", seconds={"a": seconds}))).text


@pytest.mark.parametrize(
    ("empty", "unparsable", "told"), [(0, 0, "1,000"), (7, 7, "1,000; 7 empty"), (7, 1200, "1,000; 1,200 unparsable")]
)
def test_answers_that_cannot_be_read_are_told_beside_their_number(empty, unparsable, told):
    score = Score(n=1000, accuracy=0.5, interval=(0.4, 0.6), empty=empty, unparsable=unparsable)
    assert f'<span class="n">{told}</span>' in score_table([("", [("m", score)])], "c", "model")


def test_a_score_that_nothing_was_left_out_of_is_told_so():
    alone = vqa_score([row(answer="yes", truth=["yes"], kind="colour")] * 3)
    told = "a score without these controls"
    assert told in Reader(render(Report(title="t", scores={"lm": alone}))).text
    assert told not in Reader(render(full())).text


def test_what_is_read_of_a_score_stands_below_the_first_table():
    text = Reader(render(full())).text
    assert text.index("Table 1.") < text.index("How to read a score.") < text.index("Table 2.")


def test_a_command_stands_by_itself_to_be_copied():
    html = render(Report(title="t", command=("Ask <them>:", "isthmus serve 'a & b'")))
    assert "Ask &lt;them&gt;:</p><pre><code>isthmus serve &#x27;a &amp; b&#x27;</code></pre>" in html


def test_times_are_of_models_and_their_sum_is_called_one():
    text = Reader(render(Report(title="t", seconds={"clip": 100.0, "lm": 60.0}))).text
    assert "side by side count each in full. model time clip 1 min 40 s lm 1 min 00 s sum 2 min 40 s" in text


def test_no_accelerator_is_a_word():
    assert "gpus none seeds 0, 1" in Reader(render(Report(title="t", facts={"gpus": [], "seeds": [0, 1]}))).text


def test_an_empty_report_has_a_title_and_no_empty_sections():
    html = render(Report(title="only a title"))
    assert "only a title" in html
    assert "<section>" not in html


def test_percent():
    assert percent(0.71449) == "71.4"
    assert percent(None) == "–"
    assert percent(-0.05, signed=True) == "−5.0"
    assert percent(0.05, signed=True) == "+5.0"
