"""Pictures in words: their captions and, as ``category: [x1, y1, x2, y2]``, their boxes, corners in fractions of the
picture's width and height with three decimals, as LLaVA's prompts have them."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast, get_type_hints

from isthmus.config import fit
from isthmus.data.sources.coco import CategoryBox, CocoCaptions, CocoInstances, Id
from isthmus.data.sources.files import once, read_json, read_rows
from isthmus.errors import ConfigError, DataError, nearest


@dataclass(frozen=True, slots=True)
class Box:
    """``corners``: left, top, right, bottom in 0..1, y downwards."""

    category: str
    corners: tuple[float, float, float, float]

    def __str__(self) -> str:
        return f"{self.category}: [{', '.join(f'{c:.3f}' for c in self.corners)}]"


@dataclass(frozen=True, slots=True)
class Symbols:
    """What is known of one picture. ``uncounted`` are categories whose boxes are no count, as one stands for a crowd.
    ``known``: whether there is a file of boxes at all."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()
    uncounted: frozenset[str] = frozenset()
    known: bool = True

    def text(self, *, boxes: bool) -> str:
        """As a prompt has it: a caption a line, then with ``boxes`` an empty line and a box a line."""
        text = "\n".join(self.captions)
        return f"{text}\n\n" + "\n".join(map(str, self.boxes)) if boxes and self.boxes else text

    @property
    def counts(self) -> Counter[str]:
        """Boxes by category."""
        return Counter(box.category for box in self.boxes)


def read_symbols(spec: Mapping[str, object]) -> list[Symbols]:
    """The pictures that a description names, each with a caption at least, in the files' order.

    Raises ConfigError for an unknown kind or option, DataError for files of another form.
    """
    options = dict(spec)
    kind = str(options.pop("kind", ""))
    if kind not in READERS:
        raise ConfigError(f"data instruct: unknown kind of data {kind!r}; {nearest(kind, (*READERS, 'scenes'))}")
    reader = READERS[kind]
    hints = {k: v for k, v in get_type_hints(reader).items() if k != "return"}
    for name, value in options.items():
        if name not in hints:
            raise ConfigError(f"data instruct: {kind!r} has no option {name!r}; {nearest(name, hints)}")
        fit(hints[name], value, f"data instruct: {name}")
    try:
        found = reader(**options)
    except TypeError as error:
        raise ConfigError(f"data instruct: {kind!r}: {str(error).partition(') ')[2] or error}") from None
    if not found:
        raise DataError(f"No picture of {dict(spec)} has a caption.")
    return found


def guess_symbols(path: Path) -> dict[str, object]:
    """What :func:`read_symbols` takes, recognised from a file or folder. Raises DataError where nothing fits."""
    if path.is_dir():
        files = {name: path / f"{name}.json" for name in ("region_descriptions", "objects", "image_data")}
        if all(file.is_file() for file in files.values()):
            return {
                "kind": "visual-genome",
                "regions": str(files["region_descriptions"]),
                "objects": str(files["objects"]),
                "images": str(files["image_data"]),
            }
        captions = sorted(path.glob("captions*.json"))
        if len(captions) == 1:
            return guess_symbols(captions[0])
        more = f" It has {len(captions)} files of captions: name one." if captions else ""
        raise DataError(
            f"{path} holds neither COCO's captions*.json nor Visual Genome's region_descriptions.json, objects.json "
            f"and image_data.json.{more}"
        )
    if not path.is_file():
        raise DataError(f"There is no data at {path}.")
    if path.suffix == ".jsonl":
        return {"kind": "jsonl", "file": str(path)}
    instances = path.with_name(path.name.replace("captions", "instances", 1))
    beside = {"instances": str(instances)} if instances != path and instances.is_file() else {}
    return {"kind": "coco", "captions": str(path), **beside}


def coco(*, captions: str, instances: str | None = None, image_folder: str | None = None) -> list[Symbols]:
    """COCO: a captions file and, for boxes, the instances file of the same pictures (annotations with ``bbox`` as x, y,
    width, height in pixels; a crowd is no countable thing). Lin et al. 2014, cocodataset.org/#format-data."""
    path = Path(captions)
    content = cast("CocoCaptions", read_json(path))
    try:
        once((image["id"] for image in content["images"]), path, "image id")
        texts: defaultdict[Id, list[str]] = defaultdict(list)
        for annotation in content["annotations"]:
            if text := " ".join(str(annotation["caption"]).split()):
                texts[annotation["image_id"]].append(text)
        pictures = [(image["id"], str(image["file_name"])) for image in content["images"]]
    except (KeyError, TypeError):
        raise DataError(
            f"{path} is not a COCO captions file: it needs images (id, file_name) and annotations (image_id, caption)"
        ) from None
    if unknown := texts.keys() - {number for number, _ in pictures}:
        raise DataError(f"{path}: a caption is for the image {min(unknown)}, which is not among `images`.")
    found = _coco_boxes(Path(instances)) if instances is not None else None
    if found is not None and not found.keys() & {number for number, _ in pictures}:
        raise DataError(f"{instances} is about none of the pictures of {captions}; are the two of one split?")
    return [
        Symbols(
            str(number),
            name,
            tuple(texts[number]),
            tuple(_box(c, xywh, size, path, number) for c, xywh, _, size in boxes),
            frozenset(c for c, _, crowd, _ in boxes if crowd),
            found is not None,
        )
        for number, name in pictures
        if texts[number]
        for boxes in [(found or {}).get(number, [])]
    ]


_CocoBox = tuple[str, Sequence[float], bool, tuple[float, float]]
"""Category, box, is it a crowd?, the picture's size."""


def _coco_boxes(path: Path) -> dict[Id, list[_CocoBox]]:
    content = cast("CocoInstances", read_json(path))
    try:
        names = {c["id"]: str(c["name"]) for c in content["categories"]}
        sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
        found: dict[Id, list[_CocoBox]] = {i: [] for i in sizes}
        for a in content["annotations"]:
            image = a["image_id"]
            found[image].append((names[a["category_id"]], a["bbox"], bool(a.get("iscrowd")), sizes[image]))
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO instances file: {error} is missing (categories, images with width and height, "
            "annotations with bbox, which name each other by id)"
        ) from None
    return found


_CAPTIONS = 10
"""Region descriptions of a picture that stand for its captions, as LLaVA-1.5 takes at most 10 regions of one."""


class _Sized(TypedDict):
    """A picture in ``image_data.json``."""

    image_id: Id
    width: float
    height: float
    url: str


class _Region(TypedDict):
    phrase: str
    width: float
    height: float


class _Regions(TypedDict):
    """A picture in ``region_descriptions.json``."""

    id: NotRequired[Id]
    image_id: NotRequired[Id]
    regions: list[_Region]


class _Object(TypedDict):
    names: list[str]
    x: float
    y: float
    w: float
    h: float


class _Objects(TypedDict):
    """A picture in ``objects.json``."""

    id: NotRequired[Id]
    image_id: NotRequired[Id]
    objects: list[_Object]


def visual_genome(
    *, regions: str, objects: str, images: str, captions: int = _CAPTIONS, image_folder: str | None = None
) -> list[Symbols]:
    """Visual Genome: ``region_descriptions.json`` (the largest regions' phrases stand for captions), ``objects.json``
    and ``image_data.json`` (sizes; the picture's name is the last two parts of its URL). Krishna et al. 2017."""
    described = cast("list[_Regions]", read_json(Path(regions)))
    things = cast("list[_Objects]", read_json(Path(objects)))
    facts = cast("list[_Sized]", read_json(Path(images)))
    try:
        sizes: dict[Id | None, tuple[float, float]] = {i["image_id"]: (i["width"], i["height"]) for i in facts}
        names: dict[Id | None, str] = {i["image_id"]: "/".join(str(i["url"]).split("/")[-2:]) for i in facts}
        boxes = {i.get("image_id", i.get("id")): i["objects"] for i in things}
        found = []
        for item in described:
            number = item.get("id", item.get("image_id"))
            largest = sorted(item["regions"], key=lambda r: -r["width"] * r["height"])
            phrases = dict.fromkeys(" ".join(str(r["phrase"]).split()) for r in largest)
            picked = tuple(p for p in phrases if p)[:captions]
            if not picked:
                continue
            listed = [
                _box(str(o["names"][0]), (o["x"], o["y"], o["w"], o["h"]), sizes[number], Path(objects), number)
                for o in boxes.get(number, [])
            ]
            # People marked some things several times, and others never: a number of boxes is no count.
            found.append(
                Symbols(str(number), names[number], picked, tuple(listed), frozenset(b.category for b in listed))
            )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"These are not Visual Genome's files: {error!r} (region_descriptions.json with regions of phrase, width, "
            "height; objects.json with objects of names, x, y, w, h; image_data.json with image_id, width, height, url)"
        ) from None
    return found


def jsonl(*, file: str, image_folder: str | None = None) -> list[Symbols]:
    """JSON lines of ``image``, ``captions`` and ``instances`` (each ``category`` and ``bbox``: corners in 0..1), as in
    LLaVA's ``caps_boxes_coco2014_val_80.jsonl``. ``id`` may be left out: then it is the picture's name."""
    path = Path(file)
    found = []
    for number, row in enumerate(read_rows(path), start=1):
        image, captions, instances = row.get("image"), row.get("captions"), row.get("instances")
        if not isinstance(image, str) or not isinstance(captions, list):
            raise DataError(f"{path}, entry {number}: needs `image` (a name) and `captions` (a list of texts)")
        try:
            given = cast("Sequence[CategoryBox]", instances or ())
            boxes = tuple(Box(str(i["category"]), _corners(i["bbox"])) for i in given)
        except (KeyError, TypeError, ValueError):
            raise DataError(
                f"{path}, entry {number}: `instances` are objects of `category` and `bbox` (left, top, right, bottom, "
                "in fractions of the picture's sides)"
            ) from None
        texts = tuple(text for c in captions if (text := " ".join(str(c).split())))
        if texts:
            name = str(row.get("id", image))
            found.append(Symbols(name, image, texts, boxes, known=instances is not None))
    once((s.id for s in found), path, "id")
    return found


def _corners(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(v) for v in values)
    if not (0 <= left <= right <= 1.001 and 0 <= top <= bottom <= 1.001):
        raise ValueError(values)
    return left, top, right, bottom


def _box(category: str, xywh: Sequence[float], size: tuple[float, float], path: Path, number: object) -> Box:
    try:
        (x, y, w, h), (width, height) = (float(v) for v in xywh), (float(v) for v in size)
        corners = (x / width, y / height, (x + w) / width, (y + h) / height)
    except (TypeError, ValueError, ZeroDivisionError):
        raise DataError(f"{path}: a box of image {number} is {xywh!r} in a picture of {size!r}; it cannot be") from None
    left, top, right, bottom = (min(max(c, 0.0), 1.0) for c in corners)
    return Box(re.sub(r"\s+", " ", category).strip(), (left, top, right, bottom))


READERS: dict[str, Callable[..., list[Symbols]]] = {"coco": coco, "visual-genome": visual_genome, "jsonl": jsonl}
