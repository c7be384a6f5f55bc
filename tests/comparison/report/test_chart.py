import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.comparison.report.chart import HEIGHT, WIDTH, Chart, figure, log_ticks, ticks

numbers = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1e-6, 1e6)


def coordinates(html):
    lines = re.findall(r'class="line s\d(?: dashed)?" d="M([^"]+)"', html)
    return [[tuple(map(float, p.split())) for p in line.split("L")] for line in lines]


@given(numbers, numbers)
def test_linear_ticks_enclose_the_values_and_are_round(a, b):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, 5)
    slack = 1e-6 * (high - low)
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert 2 <= len(found) <= 8
    step = found[1] - found[0]
    leading = round(step / 10.0 ** math.floor(math.log10(step) + 1e-6), 3)
    assert leading in (1, 2, 5, 10)


@given(positive, positive)
def test_log_ticks_enclose_the_values(a, b):
    low, high = min(a, b), max(a, b)
    found = log_ticks(low, high)
    assert found[0] <= low * (1 + 1e-9)
    assert found[-1] >= high * (1 - 1e-9)
    assert found == sorted(found)


@given(st.lists(st.tuples(st.integers(0, 10_000), positive), min_size=1, max_size=50, unique_by=lambda p: p[0]),
       st.booleans())  # fmt: skip
def test_every_point_lies_inside_the_drawing(points, log):
    (line,) = coordinates(figure(Chart(title="t", series={"a": sorted(points)}, log=log), 1))
    assert len(line) == len(points)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)


def test_larger_values_stand_higher_on_both_axes():
    series = {"a": [(1, 1.0), (2, 10.0), (3, 100.0)]}
    for log in (False, True):
        (line,) = coordinates(figure(Chart(title="t", series=series, log=log), 1))
        heights = [y for _, y in line]
        assert heights == sorted(heights, reverse=True)
        drops = [a - b for a, b in pairwise(heights)]
        assert (abs(drops[0] - drops[1]) < 0.3) == log, "equal ratios are equal steps on a log axis only"


def test_a_long_series_is_thinned_and_keeps_its_last_point():
    points = [(float(i), 1.0 if i < 9999 else 7.0) for i in range(10_000)]
    html = figure(Chart(title="t", series={"a": points, "b": points[:10]}), 1)
    first, second = coordinates(html)
    assert len(first) <= 201
    assert len(second) == 10
    assert "training" not in html
    assert "<span class=num>7</span>" in html


def test_a_few_points_are_seen_as_points():
    few, many = [(0, 1.0), (4, 2.0)], [(float(i), float(i)) for i in range(50)]
    assert figure(Chart(title="t", series={"a": few, "b": few[:1]}), 1).count("<circle") == 3
    assert "<circle" not in figure(Chart(title="t", series={"a": many}), 1)


def test_more_series_than_colours_are_told_apart_by_dashes():
    html = figure(Chart(title="t", series={str(i): [(0, 1.0), (1, 2.0)] for i in range(8)}), 1)
    styles = re.findall(r'class="line ([^"]+)"', html)
    assert len(set(styles)) == 8
    assert styles[6] == "s0 dashed"


def test_what_cannot_be_drawn_is_left_out():
    points = [(0, float("nan")), (1, 2.0), (2, float("inf")), (3, -1.0)]
    assert len(coordinates(figure(Chart(title="t", series={"a": points}), 1))[0]) == 2
    assert len(coordinates(figure(Chart(title="t", series={"a": points}, log=True), 1))[0]) == 1
    assert "no values were recorded" in figure(Chart(title="t", series={"a": []}), 1)
    assert "no values were recorded" in figure(Chart(title="t", series={}), 1)


def test_legend_and_labels_are_escaped():
    html = figure(Chart(title="<t>", series={"<a>": [(0, 1.0)]}, x_label="<x>", y_label="<y>"), 1)
    assert not re.search(r"<[taxy]>", html)


def test_three_decades_do_not_waste_one_at_the_ends():
    assert log_ticks(0.05, 6.0) == pytest.approx([0.03, 0.1, 0.3, 1, 3, 10])
    assert log_ticks(0.004, 6.0) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
