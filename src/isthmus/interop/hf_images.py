"""Pictures as a folder of transformers has them made into pixels: its image processor as an :class:`ImageTransform`.

What a file leaves out has the default of the class that it names, and the same field means other steps in another
class. A class, or steps, that are not known here are refused: pixels would differ, and nothing would say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

from isthmus.checkpoint import read_json
from isthmus.data.images import CLIP_MEAN, CLIP_STD, ImageTransform, Mode
from isthmus.errors import CheckpointError, nearest
from isthmus.interop.hf_files import RESAMPLE
from isthmus.nn.tiles import PINPOINTS

Channels = tuple[float, float, float]
_HALF: Channels = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    """What a class of image processors does where a folder says nothing of it.

    ``size`` are its pixels, of the ``short`` side or of both; ``crops``: it cuts out the middle; ``one_is_both``: a
    single number means both sides; ``pads``: ``do_pad`` puts a picture on a square canvas first (in others it fills up
    a batch, whose pictures are equal here).
    """

    size: int = 224
    short: bool = False
    crops: bool = False
    one_is_both: bool = True
    pads: bool = False
    mean: Channels = CLIP_MEAN
    std: Channels = CLIP_STD
    resample: int = RESAMPLE["bicubic"]


_CLIP = _Class(short=True, crops=True, one_is_both=False)
_CLASSES: Mapping[str, _Class] = {
    **dict.fromkeys(("CLIPImageProcessor", "BitImageProcessor", "ChineseCLIPImageProcessor"), _CLIP),
    **dict.fromkeys(("LlavaImageProcessor", "LlavaNextImageProcessor"), replace(_CLIP, pads=True)),
    "SiglipImageProcessor": _Class(one_is_both=False, mean=_HALF, std=_HALF),
    "BlipImageProcessor": _Class(size=384),
    "IdeficsImageProcessor": _Class(),
    "ViTImageProcessor": _Class(mean=_HALF, std=_HALF, resample=RESAMPLE["bilinear"]),
}
_BY_MODEL = {
    **dict.fromkeys(("siglip", "siglip_vision_model"), "SiglipImageProcessor"),
    **dict.fromkeys(("blip-2", "instructblip"), "BlipImageProcessor"),
    "idefics": "IdeficsImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
}
"""The class where no file names one; of other models CLIP's."""


class _Fields(TypedDict, total=False):
    """What is read of an image processor."""

    size: int | Sequence[int] | Mapping[str, int]
    image_size: int
    crop_size: int | Sequence[int] | Mapping[str, int]
    resample: int
    rescale_factor: float
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    image_grid_pinpoints: Sequence[tuple[int, int]]
    do_resize: bool
    do_rescale: bool
    do_normalize: bool
    do_center_crop: bool
    do_pad: bool


def image_transform(
    folder: Path, size: int, pinpoints: Sequence[tuple[int, int]] = (), *, siglip: bool = False
) -> ImageTransform:
    """What the folder's image processor does to a picture; without one that of its kind of model, with SigLIP's mean
    and std for a tower of ``siglip``.

    Raises CheckpointError for steps that are not done here, and when they make another size than the vision encoder
    reads, or cut tiles from other canvases than ``pinpoints``, the model's.
    """
    found = _described(folder)
    name, steps = _class_of(folder, found)
    base = ImageTransform(
        size=size,
        mode="anyres" if pinpoints else "square" if steps.crops else "squash",
        pinpoints=tuple(pinpoints),
        mean=steps.mean,
        std=steps.std,
        deep="clip",
    )
    if pinpoints and name != "LlavaNextImageProcessor":
        raise CheckpointError(f"{folder}: its pictures are made by {name}, which cuts no tiles; its model reads tiles.")
    if not found:
        return replace(ImageTransform.siglip(size), deep="clip") if siglip and not pinpoints else base
    _as_here(folder, found)
    default = PINPOINTS if name == "LlavaNextImageProcessor" else pinpoints
    theirs = tuple((int(h), int(w)) for h, w in found.get("image_grid_pinpoints") or default)
    if theirs != tuple(pinpoints):
        raise CheckpointError(
            f"{folder}: its image processor cuts tiles from the canvases {list(theirs)}, its model from "
            f"{list(pinpoints)}."
        )
    mode = _mode(folder, found, steps, size, tiled=bool(pinpoints))
    mean, std = _channels(found.get("image_mean", steps.mean)), _channels(found.get("image_std", steps.std))
    if not found.get("do_normalize", True):
        if mode == "pad":  # on a canvas of the mean's colour
            raise CheckpointError(
                f"{folder}: its image processor puts pictures on a canvas of the mean's colour (do_pad) and does not "
                "subtract the mean (do_normalize), which is not done here."
            )
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return replace(
        base, mode=mode, mean=mean, std=std, resample=_resample(found.get("resample", steps.resample), folder)
    )


def _described(folder: Path) -> _Fields:
    """The image processor's fields: those within the processor's file, else of a file of their own. A field without a
    value is one that is left out."""
    for name, within in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        values = content.get(within) if within else content
        if isinstance(values, Mapping) and values:
            return cast(_Fields, {key: value for key, value in values.items() if value is not None})
    return {}


def _class_of(folder: Path, found: _Fields) -> tuple[str, _Class]:
    """The class that makes the pixels. Raises CheckpointError for one whose steps are not known here."""
    values: Mapping[str, object] = found
    named = values.get("image_processor_type") or values.get("feature_extractor_type")
    if named is None:
        file = folder / "config.json"
        model_type = str(read_json(file).get("model_type")) if file.is_file() else ""
        name = _BY_MODEL.get(model_type, "CLIPImageProcessor")
        return name, _CLASSES[name]
    name = str(named).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in _CLASSES:
        raise CheckpointError(
            f"{folder}: its pictures are made by {named}, whose steps are not known here; {nearest(name, _CLASSES)} "
            "Correct image_processor_type if it is wrong."
        )
    return name, _CLASSES[name]


def _as_here(folder: Path, found: _Fields) -> None:
    """Raises CheckpointError for steps that are others than ours whatever the sizes are."""
    values: Mapping[str, object] = found
    for name in ("do_resize", "do_rescale"):
        if not (done := values.get(name, True)):
            raise CheckpointError(f"{folder}: its image processor has {name} {done}, which is not done here.")
    factor = found.get("rescale_factor", 1 / 255)
    if abs(factor * 255 - 1) > 1e-5:
        raise CheckpointError(f"{folder}: its image processor scales by {factor}, here it is 1/255.")


def _mode(folder: Path, found: _Fields, steps: _Class, size: int, *, tiled: bool) -> Mode:
    """How a picture becomes one of ``size``. Raises CheckpointError where it becomes one of another, or is resized to
    one size and cut out in another."""
    given = found.get("image_size") or found.get("size")
    short, sides = (steps.short, (steps.size,) * 2) if given is None else _sides(folder, given, steps.one_is_both)
    crops, end = found.get("do_center_crop", steps.crops), sides
    if crops:
        _, end = _sides(folder, found.get("crop_size") or 224, True)
    if end != (size, size):
        made = end[0] if end[0] == end[1] else f"{end[0]} x {end[1]}"
        raise CheckpointError(
            f"{folder}: its image processor makes pictures of {made} pixels, its vision encoder reads {size}."
        )
    if sides != end:
        made = sides[0] if sides[0] == sides[1] else f"{sides[0]} x {sides[1]}"
        raise CheckpointError(
            f"{folder}: its image processor resizes to {made} pixels before it cuts out {size}; here it is one size."
        )
    if tiled:
        return "anyres"
    if steps.pads and found.get("do_pad"):
        return "pad"
    if short and not crops:
        raise CheckpointError(
            f"{folder}: its image processor makes the short side of a picture {size} pixels and cuts nothing out "
            f"(do_center_crop is off), but its vision encoder reads {size} x {size}: say height and width in `size`, "
            "or cut out the middle."
        )
    return "square" if short else "squash"


def _sides(
    folder: Path, given: int | Sequence[int] | Mapping[str, int], one_is_both: bool
) -> tuple[bool, tuple[int, int]]:
    """Whether a size is that of the short side, and height and width. Raises CheckpointError for another rule."""
    if isinstance(given, int):
        return not one_is_both, (given, given)
    if not isinstance(given, Mapping):
        return False, (given[0], given[1])
    if given.keys() == {"shortest_edge"}:
        return True, (given["shortest_edge"], given["shortest_edge"])
    if given.keys() == {"height", "width"}:
        return False, (given["height"], given["width"])
    raise CheckpointError(
        f"{folder}: its image processor resizes by the rule {dict(given)}; here it is shortest_edge, or "
        "height and width."
    )


def _channels(values: float | Sequence[float]) -> Channels:
    """Of red, green and blue; ImageTransform refuses another number of them."""
    return (values, values, values) if isinstance(values, int | float) else cast(Channels, tuple(values))


def _resample(number: int, folder: Path) -> str:
    """Pillow's number of a filter by name."""
    for name, known in RESAMPLE.items():
        if number == known:
            return name
    raise CheckpointError(f"{folder}: its image processor resizes by Pillow's filter {number}; known: {RESAMPLE}.")
