"""Captions and boxes of COCO, Visual Genome, JSON lines and scenes."""

import json

import pytest

from isthmus.data.instruct import read_symbols
from isthmus.data.instruct.symbols import guess_symbols
from isthmus.demo.scenes.instruct import scene_symbols
from isthmus.errors import ConfigError, DataError

CAPTIONS = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 200, "height": 100},
        {"id": 8, "file_name": "b.jpg", "width": 10, "height": 10},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": " Two dogs\n run. "},
        {"id": 2, "image_id": 7, "caption": "Dogs on grass."},
    ],
}
INSTANCES = {
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "images": CAPTIONS["images"],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [20, 10, 100, 50], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 250, 100], "iscrowd": 1},
    ],
}
VG = {
    "region_descriptions.json": [
        {
            "id": 1,
            "regions": [
                {"phrase": "a cup", "width": 5, "height": 5, "x": 0, "y": 0},
                {"phrase": "a wooden  table", "width": 50, "height": 40, "x": 0, "y": 0},
                {"phrase": "a cup", "width": 4, "height": 4, "x": 0, "y": 0},
            ],
        }
    ],
    "objects.json": [{"image_id": 1, "objects": [{"names": ["table"], "x": 0, "y": 50, "w": 100, "h": 50}]}],
    "image_data.json": [{"image_id": 1, "width": 100, "height": 200, "url": "https://x.org/rak248/VG_100K_2/1.jpg"}],
}


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(content))


@pytest.fixture
def coco(tmp_path):
    write(tmp_path, captions_val__json=CAPTIONS, instances_val__json=INSTANCES)
    return tmp_path


def test_coco_captions_with_boxes_by_sight(coco):
    spec = guess_symbols(coco)
    assert spec == guess_symbols(coco / "captions_val.json")
    (only,) = read_symbols(spec)
    assert (only.id, only.image, only.captions) == ("7", "a.jpg", ("Two dogs run.", "Dogs on grass."))
    assert only.text(boxes=False) == "Two dogs run.\nDogs on grass."
    assert only.text(boxes=True).splitlines()[2:] == [
        "",
        "dog: [0.100, 0.100, 0.600, 0.600]",
        "person: [0.000, 0.000, 1.000, 1.000]",
    ]
    assert only.uncounted == {"person"}, "a crowd's number is not known"


def test_coco_without_boxes_says_so(coco):
    (coco / "instances_val.json").unlink()
    (only,) = read_symbols(guess_symbols(coco))
    assert not only.known
    assert only.text(boxes=True) == only.text(boxes=False)


def test_visual_genome_by_sight(tmp_path):
    for name, content in VG.items():
        (tmp_path / name).write_text(json.dumps(content))
    (only,) = read_symbols(guess_symbols(tmp_path))
    assert only.image == "VG_100K_2/1.jpg"
    assert only.captions == ("a wooden table", "a cup"), "the largest region first, each phrase once"
    assert [str(b) for b in only.boxes] == ["table: [0.000, 0.250, 1.000, 0.500]"]
    assert "table" in only.uncounted


def test_json_lines_as_llava_has_them(tmp_path):
    rows = [
        {"id": "1", "image": "a.jpg", "captions": ["x"], "instances": [{"category": "cat", "bbox": [0, 0.1, 0.5, 1]}]},
        {"image": "b.jpg", "captions": ["y"]},
    ]
    path = tmp_path / "symbols.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_symbols(guess_symbols(path))
    assert str(first.boxes[0]) == "cat: [0.000, 0.100, 0.500, 1.000]"
    assert (second.id, second.known) == ("b.jpg", False)


def test_llavas_own_file_is_read(real_data):
    found = read_symbols(guess_symbols(real_data / "formats/llava/caps_boxes_coco2014_val_80.jsonl"))
    assert len(found) == 80
    assert found[0].counts["donut"] == 10


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "cocoo"}, "did you mean 'coco'"),
        ({"kind": "coco", "captions": "captions_val.json", "boxes": "x"}, "no option 'boxes'"),
        ({"kind": "coco"}, "captions"),
        ({"kind": "coco", "captions": "instances_val.json"}, "not a COCO captions file"),
        ({"kind": "coco", "captions": "captions_val.json", "instances": "captions_val.json"}, "not a COCO instances"),
        ({"kind": "jsonl", "file": "bad.jsonl"}, "entry 1"),
        ({"kind": "jsonl", "file": "twice.jsonl"}, "there twice"),
        ({"kind": "jsonl", "file": "pixels.jsonl"}, "fractions"),
    ],
)
def test_what_does_not_fit_is_explained(coco, spec, words):
    pixels = {"image": "a", "captions": ["x"], "instances": [{"category": "c", "bbox": [0, 0, 30, 40]}]}
    (coco / "bad.jsonl").write_text('{"image": "a.jpg"}')
    (coco / "twice.jsonl").write_text('{"image": "a", "captions": ["x"]}\n' * 2)
    (coco / "pixels.jsonl").write_text(json.dumps(pixels))
    spec = {k: str(coco / v) if k in ("captions", "instances", "file") else v for k, v in spec.items()}
    with pytest.raises((ConfigError, DataError), match=words):
        read_symbols(spec)


def test_several_files_of_captions_are_not_guessed(coco):
    write(coco, captions_train__json=CAPTIONS)
    with pytest.raises(DataError, match="2 files of captions"):
        guess_symbols(coco)


def test_scenes_hold_their_solids():
    for scene, symbols in scene_symbols(20):
        assert [b.category for b in symbols.boxes] == [s.shape for s in scene.solids]
        for solid, box in zip(scene.solids, symbols.boxes, strict=True):
            left, top, right, bottom = box.corners
            assert 0 <= left < solid.x < right <= 1
            assert 0 <= top < solid.y < bottom <= 1
