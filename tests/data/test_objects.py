"""POPE's three samplings from annotated objects, by hand and from both forms of files."""

import json
from collections import Counter

import pytest

from isthmus.data.sources import open_source
from isthmus.data.sources.objects import SAMPLINGS, questions, read_objects
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import png
from tests.narrow import must_be

# Person is everywhere; a fork stands beside knives, a kite and a dog do not.
PICTURES = {
    "a.png": {"person", "fork", "cup", "table"},
    "b.png": {"person", "knife", "fork"},
    "c.png": {"person", "knife", "fork"},
    "d.png": {"person", "kite"},
    "e.png": {"person", "kite"},
    "f.png": {"person", "kite"},
    "g.png": {"dog"},
}


def test_what_is_not_there_is_taken_in_three_ways():
    def wrong(sampling, **options):
        made = questions(PICTURES, sampling, each=1, fewest=4, **options)
        assert [there for *_, there in made] == [True, False]
        assert {image for image, *_ in made} == {"a.png"}
        assert made[0][1] in PICTURES["a.png"]
        return made[1][1]

    assert wrong("popular") == "kite"  # three pictures have one, two have a knife
    assert wrong("adversarial") == "knife"  # beside the fork and the person
    drawn = Counter(wrong("random", seed=seed) for seed in range(60))
    assert drawn.keys() == {"kite", "knife", "dog"}
    assert min(drawn.values()) > 8


def test_yes_and_no_are_balanced_and_repeatable():
    for sampling in SAMPLINGS:
        made = questions(PICTURES, sampling, each=2, fewest=3, seed=4)
        assert made == questions(PICTURES, sampling, each=2, fewest=3, seed=4)
        assert sum(there for *_, there in made) == len(made) / 2 == 6
        assert all((thing in PICTURES[image]) == there for image, thing, there in made)
        assert len(set(made)) == len(made)


@pytest.fixture
def write(tmp_path):
    for name in PICTURES:
        (tmp_path / name).write_bytes(png((255, 0, 0)))

    def write(name, content):
        lines = name.endswith("l")
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
        return tmp_path / name

    return write


def test_both_forms_of_files_say_the_same(write, tmp_path):
    rows = [{"image": name, "objects": dict.fromkeys(sorted(things), 1)} for name, things in PICTURES.items()]
    numbers = {name: n for n, name in enumerate(sorted(set().union(*PICTURES.values())))}
    coco = {
        "categories": [{"id": n, "name": name} for name, n in numbers.items()],
        "images": [{"id": n, "file_name": name} for n, name in enumerate(PICTURES)],
        "annotations": [
            {"id": 1, "image_id": n, "category_id": numbers[thing]}
            for n, things in enumerate(PICTURES.values())
            for thing in [*things, *things]
        ],
    }
    assert read_objects(write("o.jsonl", rows)) == read_objects(write("o.json", coco)) == PICTURES
    source = open_source({"kind": "pope-objects", "file": "o.json", "each": 2, "fewest": 3}, data_root=tmp_path)
    assert len(source) == 3 * 3 * 4
    assert Counter(source[i].meta["kind"] for i in range(len(source))) == dict.fromkeys(SAMPLINGS, 12)
    first = source[0]
    assert must_be(str, first.texts[0].text).startswith(("Is there a ", "Is there an "))
    assert first.texts[1].text == "yes"
    assert source[1].texts[1].text == "no"
    assert first.images[0].source.read() == png((255, 0, 0))
    assert len({source[i].id for i in range(len(source))}) == len(source)


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([{"image": "a.png"}], {}, DataError, "entry 0 needs `image`"),
        ([{"image": "a.png", "objects": ["x"]}] * 2, {}, DataError, "image a.png is there twice"),
        ([{"image": "a.png", "objects": ["x"]}], {}, DataError, "no picture has 4 different objects"),
        ([{"image": "a.png", "objects": ["x"]}], {"samplings": ["popula"]}, ConfigError, "did you mean 'popular'"),
        ([{"image": "a.png", "objects": ["x"]}], {"each": 5}, ConfigError, "each is 1 to fewest"),
    ],
)
def test_what_cannot_be_asked_is_said(write, tmp_path, rows, options, error, words):
    write("o.jsonl", rows)
    with pytest.raises(error, match=words):
        open_source({"kind": "pope-objects", "file": "o.jsonl", **options}, data_root=tmp_path)
    with pytest.raises(DataError, match="not a COCO instances file: 'categories' is missing"):
        read_objects(write("c.json", {"images": []}))


@pytest.mark.data
def test_real_photographs(real_data):
    spec = {"kind": "pope-objects", "file": "coco_mini/objects_train.jsonl", "image_folder": "coco_mini/images"}
    source = open_source(spec, data_root=real_data)
    assert len(source) % 18 == 0
    assert len(source) > 200
    assert source[1].images[0].source.read()
