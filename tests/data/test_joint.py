"""Passes shared by rows of several sources: every row once, and no cut that would cost less."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.joint import cut_passes
from isthmus.data.record import Example, Span


def row(number, length) -> Example:
    return Example(id=str(number), source="", streams={"lm": Span([0] * length)})


LENGTHS = st.lists(st.integers(1, 40), min_size=0, max_size=7)


def padded(passes, cost):
    return sum(len(rows) * max(row.length for row in rows) + cost for rows in passes)


@given(LENGTHS, st.integers(1, 60))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths, cost):
    rows = [row(*pair) for pair in enumerate(lengths)]
    passes = cut_passes(rows, cost)
    assert sorted(int(row.id) for some in passes for row in some) == list(range(len(rows)))
    assert all(passes)
    ordered = sorted(rows, key=lambda row: -row.length)
    inner = range(1, len(rows))
    bounds = [(0, *some, len(rows)) for n in range(len(rows)) for some in combinations(inner, n)]
    every = [[ordered[a:b] for a, b in pairwise(cut)] for cut in bounds]
    assert padded(passes, cost) == min((padded(cut, cost) for cut in every), default=0)


def test_what_a_pass_costs_decides_how_many_there_are():
    rows = [row(*pair) for pair in enumerate([10, 30, 10, 30])]
    assert [[int(row.id) for row in some] for some in cut_passes(rows, 39)] == [[1, 3], [0, 2]]
    assert [[int(row.id) for row in some] for some in cut_passes(rows, 41)] == [[1, 3, 0, 2]]
