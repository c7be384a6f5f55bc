import pytest

from isthmus.errors import misspelt, nearest


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("cvs", ["vsr", "csv", "coco"], "did you mean 'csv'?"),
        ("LLaVA", ["clip", "llava"], "did you mean 'llava'?"),
        ("stepps", ["steps", "stop"], "did you mean 'steps'?"),
        ("x", ["b", "a"], "known: a, b."),
    ],
)
def test_the_nearest_name(name, known, said):
    assert nearest(name, known) == said


def test_the_nearest_file_has_the_same_ending(tmp_path):
    (tmp_path / "tests.yaml").touch()
    (tmp_path / "tests.csv").touch()
    assert misspelt(tmp_path / "test.csv") == f"; did you mean '{tmp_path / 'tests.csv'}'?"
    assert (
        misspelt(tmp_path / "test.json") == misspelt(tmp_path / "tests.csv") == misspelt(tmp_path / "a" / "b.csv") == ""
    )
