"""The fields that are read of COCO's annotation files (Lin et al. 2014, cocodataset.org/#format-data). A file is taken
for one as it is read; where a field is missing, its reader says so."""

from typing import NotRequired, TypedDict

Id = int | str


class CategoryBox(TypedDict):
    """A thing in LLaVA's files of captions and boxes: ``bbox`` are its corners in fractions of the picture's sides."""

    category: str
    bbox: list[float]


class CocoImage(TypedDict):
    id: Id
    file_name: str


class CocoCaption(TypedDict):
    id: NotRequired[Id]
    image_id: Id
    caption: str


class CocoCaptions(TypedDict):
    """``captions_*.json``."""

    images: list[CocoImage]
    annotations: list[CocoCaption]


class SizedImage(CocoImage):
    width: float
    height: float


class CocoInstance(TypedDict):
    """``bbox``: x, y, width, height in pixels."""

    image_id: Id
    category_id: Id
    bbox: list[float]
    iscrowd: NotRequired[int]


class CocoCategory(TypedDict):
    id: Id
    name: str


class CocoInstances(TypedDict):
    """``instances_*.json``."""

    images: list[SizedImage]
    annotations: list[CocoInstance]
    categories: list[CocoCategory]
