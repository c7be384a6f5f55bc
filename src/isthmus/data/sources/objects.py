"""POPE's questions made from annotated objects (Li et al. 2023, 2305.10355, sec. 5.1): is there such a thing?

Of every picture with enough different objects there are as many questions about what is there as about what is not.
What is not there is taken in three ways: at ``random``; the most ``popular`` objects of all pictures; ``adversarial``,
those that most often stand beside what is in this picture. Each way is the kind of its questions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import cast

from isthmus.data.mix import key, permutation
from isthmus.data.sources.coco import CocoInstances
from isthmus.data.sources.files import Names, Root, named_images, once, read_json, read_rows
from isthmus.data.sources.items import LazyRows
from isthmus.data.sources.rows import Form, Row, Rows
from isthmus.errors import ConfigError, DataError, nearest

SAMPLINGS = ("random", "popular", "adversarial")

Objects = Mapping[str, Set[str]]
"""Name of the picture -> its different objects."""


def pope_objects(
    root: Root,
    form: Form,
    *,
    file: str,
    samplings: Sequence[str] = SAMPLINGS,
    each: int = 3,
    fewest: int = 4,
    seed: int = 0,
    image_folder: str | None = None,
    images: Names = (),
) -> Rows:
    """From COCO's instances, or JSON lines of ``image`` and ``objects`` (names, or counts by name).

    ``each`` objects that are there and ``each`` that are not, of every picture with ``fewest`` different ones or more.
    """
    for name in samplings:
        if name not in SAMPLINGS:
            raise ConfigError(f"source of kind 'pope-objects': no sampling {name!r}; {nearest(name, SAMPLINGS)}")
    if each < 1 or fewest < each:
        raise ConfigError(f"source of kind 'pope-objects': each is 1 to fewest ({fewest}), not {each}")
    path = root.path(file)
    found = read_objects(path)
    made = [(s, *q) for s in samplings for q in questions(found, s, each=each, fewest=fewest, seed=seed)]
    if not made:
        raise DataError(f"{path}: no picture has {fewest} different objects and {each} that it has not")
    pictures = named_images(root, image_folder, images, beside=path)

    def make(item: tuple[str, str, str, bool]) -> Row:
        sampling, image, thing, there = item
        article = "an" if thing[0].lower() in "aeiou" else "a"
        values = {
            "question": f"Is there {article} {thing} in the image?",
            "answer": "yes" if there else "no",
            "kind": sampling,
        }
        return Row(f"pope/{sampling}/{image}/{thing}", values, (pictures.find(image),), key=image)

    return LazyRows(made, make, pictures)


def questions(objects: Objects, sampling: str, *, each: int, fewest: int, seed: int = 0) -> list[tuple[str, str, bool]]:
    """(picture, object, is it there?), yes and no in turns. What is there is drawn by (seed, picture)."""
    common = Counter(thing for things in objects.values() for thing in things)
    beside: dict[str, Counter[str]] = {thing: Counter() for thing in common}
    for things in objects.values():
        for thing in things:
            beside[thing].update(things - {thing})
    found = []
    for image, things in objects.items():
        absent = sorted(common.keys() - things)
        if len(things) < fewest or len(absent) < each:
            continue
        company = sum((beside[thing] for thing in things), Counter())
        order = {"random": Counter(), "popular": common, "adversarial": company}[sampling]
        drawn = _drawn(absent, key(seed, "absent", image))
        wrong = sorted(drawn, key=lambda thing: -order[thing])[:each]  # stable: equal ones stay as drawn
        for right, other in zip(_drawn(sorted(things), key(seed, "there", image))[:each], wrong, strict=True):
            found += [(image, right, True), (image, other, False)]
    return found


def read_objects(path: Path) -> dict[str, Set[str]]:
    """Raises DataError for a file of another form, or a picture that comes twice."""
    if path.suffix == ".json" and isinstance(content := read_json(path), dict):
        return _coco(cast("CocoInstances", content), path)
    found: dict[str, Set[str]] = {}
    for number, row in enumerate(read_rows(path)):
        image, things = row.get("image"), row.get("objects")
        if not isinstance(image, str) or not isinstance(things, dict | list):
            raise DataError(f"{path}: entry {number} needs `image` (a name) and `objects` (names, or counts by name)")
        if image in found:
            raise DataError(f"{path}: the image {image} is there twice; remove one")
        found[image] = {str(thing) for thing in things}
    return found


def _coco(content: CocoInstances, path: Path) -> dict[str, Set[str]]:
    try:
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        files = {i["id"]: str(i["file_name"]) for i in content["images"]}
        once(files.values(), path, "file_name")
        found: dict[str, set[str]] = {name: set() for name in files.values()}
        for annotation in content["annotations"]:
            found[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO instances file: {error} is missing (categories, images and annotations, which name "
            "each other by id)"
        ) from None
    return dict(found)


def _drawn(things: Sequence[str], seed: int) -> list[str]:
    return [things[int(i)] for i in permutation(len(things), seed)]
