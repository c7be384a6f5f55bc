"""A folder's image processor: the pixels of transformers' own, or refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from transformers import AutoImageProcessor

from isthmus.data.images import MadeImage
from isthmus.errors import CheckpointError
from isthmus.interop.hf_images import image_transform

SHORT, BOTH = {"shortest_edge": 28}, {"height": 28, "width": 28}
CROPS: dict[str, Any] = {"do_center_crop": True, "crop_size": BOTH}


def write(folder: Path, described: dict[str, Any], model_type: str = "clip") -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    return folder


def pictures() -> list[PilImage.Image]:
    noise = np.random.default_rng(0)
    return [
        PilImage.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((20, 31), (60, 33), (28, 28), (7, 61))
    ]


def assert_equal_pixels(folder: Path) -> str:
    """Returns the mode that was read."""
    ours, theirs = image_transform(folder, 28), AutoImageProcessor.from_pretrained(folder)
    for picture in pictures():
        made = theirs(picture)
        made = made["pixel_values"] if hasattr(made, "keys") else made  # IDEFICS's are bare
        assert torch.equal(ours(MadeImage(picture)), torch.as_tensor(np.asarray(made[0])))
    return ours.mode


@pytest.mark.parametrize(
    ("described", "model_type", "mode"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "size": SHORT, **CROPS}, "clip", "square"),
        ({"image_processor_type": "CLIPImageProcessor", "size": BOTH, **CROPS}, "clip", "squash"),
        ({"image_processor_type": "CLIPImageProcessorFast", "size": 28, "crop_size": 28}, "clip", "square"),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28}, "clip", "square"),
        ({"image_processor_type": "CLIPImageProcessor", "size": SHORT, **CROPS, "do_pad": True}, "llava", "square"),
        ({"size": SHORT, **CROPS, "do_pad": True}, "llava", "pad"),
        ({"image_processor_type": "LlavaImageProcessor", "size": BOTH, **CROPS, "do_pad": True}, "llava", "pad"),
        ({"size": BOTH, "do_center_crop": None, "crop_size": None, "do_pad": None}, "siglip", "squash"),
        ({"size": BOTH, "image_mean": 0.25, "image_std": [0.2, 0.3, 0.4]}, "siglip", "squash"),
        ({"size": 28}, "blip-2", "squash"),
        ({"image_processor_type": "CLIPImageProcessor", "size": SHORT, **CROPS}, "blip-2", "square"),
        ({"image_processor_type": "ViTImageProcessor", "size": BOTH}, "clip_vision_model", "squash"),
        ({"image_processor_type": "BitImageProcessor", "size": SHORT, **CROPS}, "clip", "square"),
    ],
)
def test_pixels_are_those_of_the_class_that_is_named(
    described: dict[str, Any], model_type: str, mode: str, tmp_path: Path
) -> None:
    """The same field means other steps in another class, and what is left out has its default."""
    assert assert_equal_pixels(write(tmp_path, described, model_type)) == mode


def test_the_processors_own_file_goes_before_the_older_one(tmp_path: Path) -> None:
    write(tmp_path, {"image_processor_type": "CLIPImageProcessor", "size": SHORT, **CROPS})
    own = {"image_processor_type": "SiglipImageProcessor", "size": BOTH}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert assert_equal_pixels(tmp_path) == "squash"
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert assert_equal_pixels(tmp_path) == "square"


@pytest.mark.parametrize(
    ("described", "model_type", "named"),
    [
        ({"image_processor_type": "ConvNextImageProcessor", "size": SHORT}, "clip", "made by ConvNextImageProcessor"),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": 28}, "clip", "resizes to 224 pixels before"),
        ({"image_processor_type": "CLIPImageProcessor", "size": SHORT}, "clip", "makes pictures of 224 pixels"),
        ({"size": SHORT, "do_center_crop": False}, "llava", "cuts nothing out"),
        ({"size": {"shortest_edge": 28, "longest_edge": 50}, **CROPS}, "clip", "by the rule"),
        ({"size": {"height": 28, "width": 56}}, "siglip", "makes pictures of 28 x 56 pixels"),
        ({"size": SHORT, **CROPS, "do_pad": True, "do_normalize": False}, "llava", "canvas of the mean's colour"),
        ({"size": BOTH, "resample": 1}, "siglip", "Pillow's filter 1"),
    ],
)
def test_steps_that_are_not_done_here_are_refused(
    described: dict[str, Any], model_type: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=named):
        image_transform(write(tmp_path, described, model_type), 28)
