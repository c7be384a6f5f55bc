"""Interleaved pages: OBELICS and MMC4 layouts, real files, shards, and what is wrong with bad ones."""

import base64
import json

import pytest

from isthmus.data.record import Image
from isthmus.data.sources import open_source
from isthmus.data.sources.guess import guess
from isthmus.errors import ConfigError, DataError
from tests.data.helpers import png, write_tar

OBELICS = {"texts": ["a", None, "b", None], "images": [None, "x.png", None, "y.png"], "url": "https://example.org"}
MMC4 = {
    "text_list": ["one.", "two.", "three."],
    "image_info": [
        {"image_name": "y.png", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.2},
    ],
}


def told(record) -> list[str]:
    return [p.source.describe().rsplit("/", 1)[-1] if isinstance(p, Image) else str(p.text) for p in record.parts]


@pytest.fixture
def folder(tmp_path):
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def write(folder, name, *rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_obelics_pages_keep_their_order(folder):
    source = open_source(
        {"kind": "obelics", "file": write(folder, "p.jsonl", OBELICS, {"texts": ["t"], "images": [None]})}
    )
    assert len(source) == 1  # a page without a picture is left out
    record = source[0]
    assert told(record) == ["a", "x.png", "b", "y.png"]
    assert all(p.role == "text" for p in record.parts)
    assert all(p.learn for p in record.texts)
    assert (record.id, record.meta) == ("p/0", {"url": "https://example.org"})
    both = open_source({"kind": "obelics", "file": write(folder, "p.jsonl", OBELICS), "max_images": 1})
    assert told(both[0]) == ["a", "x.png", "b"]
    assert (
        len(
            open_source(
                {
                    "kind": "obelics",
                    "file": write(folder, "q.jsonl", OBELICS, {"texts": ["t"], "images": [None]}),
                    "min_images": 0,
                }
            )
        )
        == 2
    )


def test_mmc4_pictures_stand_before_their_sentence(folder):
    file = write(folder, "m.jsonl", MMC4)
    assert told(open_source({"kind": "mmc4", "file": file})[0]) == ["x.png", "one. two.", "y.png", "three."]
    assert told(open_source({"kind": "mmc4", "file": file, "min_sim": 0.24})[0]) == ["one. two.", "y.png", "three."]


def test_pages_in_shards_bring_their_pictures(folder):
    page = {**OBELICS, "images": [None, "0", None, "1"]}
    shard = write_tar(
        folder / "s.tar", [("k.json", json.dumps(page).encode()), ("k.0.png", png()), ("k.1.png", png((0, 9, 0)))]
    )
    (record,) = [open_source({"kind": "obelics", "shards": str(shard)})[0]]
    assert told(record) == ["a", "s.tar :: k.0.png", "b", "s.tar :: k.1.png"]
    coded = {
        "text_list": ["one."],
        "image_info": [{"image_name": "z", "matched_text_index": 0, "image_base64": base64.b64encode(png()).decode()}],
    }
    shard = write_tar(folder / "c.tar", [("k.json", json.dumps(coded).encode())])
    record = open_source({"kind": "mmc4", "shards": str(shard)})[0]
    assert record.images[0].source.read() == png()


def in_shard(folder, kind, page, members, **options):
    """The only record of a shard with the page ``k`` and these members behind its key."""
    members = [(f"k.{name}", png((0, n, 0))) for n, name in enumerate(members)]
    shard = write_tar(folder / "s.tar", [("k.json", json.dumps(page).encode()), *members])
    return open_source({"kind": kind, "shards": str(shard), **options})[0]


def test_members_are_found_by_name_in_any_order(folder):
    def pictures(*args, **options):
        return [name.removeprefix("s.tar :: k.") for name in told(in_shard(folder, *args, **options)) if "::" in name]

    assert pictures("mmc4", MMC4, ["y.png", "x.png"]) == ["x.png", "y.png"]
    assert pictures("mmc4", MMC4, ["x.png", "y.png"], min_sim=0.24) == ["y.png"]
    assert pictures("mmc4", MMC4, ["y.png"], min_sim=0.24) == ["y.png"]  # one that is not shown need not be there
    assert pictures("obelics", OBELICS, ["y.png", "x.png"]) == ["x.png", "y.png"]
    for names in (["a/X.png", "a/y.png"], ["x", "y"], ["k.x.png", "k.y.png"], ["x.png", "y"]):
        page = {**OBELICS, "images": [None, names[0], None, names[1]]}
        assert pictures("obelics", page, ["y.png", "x.png"]) == ["x.png", "y.png"]
    with pytest.raises(DataError, match=r"holds no picture 'x\.png'"):
        in_shard(folder, "obelics", OBELICS, ["y.png", "z.png"])
    twins = {**OBELICS, "images": [None, "a/x.png", None, "b/x.png"]}
    with pytest.raises(DataError, match=r"'a/x\.png' and 'b/x\.png' both mean 'k\.x\.png'"):
        in_shard(folder, "obelics", twins, ["x.png", "y.png"])
    with pytest.raises(DataError, match=r"holds no picture 'x'"):
        in_shard(folder, "obelics", {**OBELICS, "images": [None, "x", None, "y"]}, ["x.png", "x.jpg", "y.png"])


def test_members_without_the_pages_names_are_told_by_number(folder):
    urls = [f"https://example.org/{name}.jpg" for name in "abcdefghijkl"]
    members = [f"{n}.png" for n in sorted(range(12), key=str)]
    assert members[2] == "10.png"
    record = in_shard(folder, "obelics", {"texts": [None] * 12 + ["t"], "images": [*urls, None]}, members)
    assert told(record)[:-1] == [f"s.tar :: k.{n}.png" for n in range(12)]
    infos = [
        {"image_name": None, "matched_text_index": place, "matched_sim": sim}
        for place, sim in ((2, 0.3), (0, 0.1), (1, 0.3))
    ]
    page = {**MMC4, "image_info": infos}
    record = in_shard(folder, "mmc4", page, ["0.png", "1.png", "2.png"], min_sim=0.24)
    assert told(record) == ["one.", "s.tar :: k.2.png", "two.", "s.tar :: k.0.png", "three."]
    with pytest.raises(DataError, match="3 pictures and its sample in the tar 2"):
        in_shard(folder, "mmc4", page, ["0.png", "2.png"], min_sim=0.24)


def test_a_similarity_that_is_no_number_is_a_bad_page(folder):
    info = {"image_name": "x.png", "matched_text_index": 0, "matched_sim": "0.3"}
    source = open_source({"kind": "mmc4", "file": write(folder, "p.jsonl", {**MMC4, "image_info": [info]})})
    with pytest.raises(DataError, match=r"matched_sim should be a number and is '0.3'"):
        source[0]


def test_neighbouring_texts_are_kept_apart(folder):
    page = {"texts": ["a", "b\n", "c", None, "d", " e", "", None, "f"], "images": [None] * 9}
    page["images"][3], page["images"][7] = "x.png", "y.png"
    file = write(folder, "p.jsonl", page)
    assert told(open_source({"kind": "obelics", "file": file})[0]) == ["a b\nc", "x.png", "d e", "y.png", "f"]
    few = open_source({"kind": "obelics", "file": file, "max_images": 1})[0]
    assert told(few) == ["a b\nc", "x.png", "d e f"]


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("obelics", {**OBELICS, "texts": ["a"]}, "1 texts and 4 images"),
        ("obelics", {"texts": ["a"], "images": ["x.png"]}, "place 0 must hold either"),
        ("obelics", {"texts": "a", "images": []}, "no list 'texts'"),
        ("mmc4", {**MMC4, "image_info": [{"image_name": "x.png"}]}, "needs image_name and matched_text_index"),
        ("mmc4", {**MMC4, "image_info": [{"image_name": "x.png", "matched_text_index": 9}]}, "sentence 9 of 3"),
        ("obelics", {"texts": [None, "a"], "images": ["../x.png", None]}, "leaves the image folder"),
    ],
)
def test_bad_pages_are_explained(folder, kind, row, words):
    source = open_source({"kind": kind, "file": write(folder, "p.jsonl", row)})
    with pytest.raises(DataError, match=words):
        source[0]


def test_bad_descriptions_are_explained(folder):
    with pytest.raises(ConfigError, match="did you mean 'obelics'"):
        open_source({"kind": "obelic"})
    with pytest.raises(ConfigError, match="either file"):
        open_source({"kind": "mmc4"})
    file = write(folder, "p.jsonl", {"texts": ["t"], "images": [None]})
    with pytest.raises(DataError, match="no page with 1 pictures"):
        open_source({"kind": "obelics", "file": file})
    with pytest.raises(ConfigError, match="did you mean 'max_images'"):
        open_source({"kind": "obelics", "file": file, "max_image": 3})


def test_layouts_are_known_by_sight(folder):
    assert guess(folder / write(folder, "p.jsonl", OBELICS))["kind"] == "obelics"
    assert guess(folder / write(folder, "m.jsonl", MMC4))["kind"] == "mmc4"


def test_the_real_files(real_data):
    pages = {
        kind: open_source(
            {
                "kind": kind,
                "file": str(real_data / "recipes" / f"{kind}_style.jsonl"),
                "image_folder": str(real_data / "recipes" / "images"),
            }
        )
        for kind in ("obelics", "mmc4")
    }
    assert {kind: len(source) for kind, source in pages.items()} == {"obelics": 85, "mmc4": 85}
    for source in pages.values():
        assert sum(len(source[i].images) for i in range(85)) == 98
    (sample,) = [open_source({"kind": "mmc4", "file": str(real_data / "formats" / "mmc4" / "docs_sample.jsonl")})]
    assert [len(told(sample[0])), len(sample[0].images)] == [5, 2]
