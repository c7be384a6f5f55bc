"""Writes a stand-in for torchvision into a site-packages folder: just enough for open_clip, timm and open_flamingo
(through transformers) to import.

What runs in the peers' environment never calls it: classes are empty, functions raise. Run by tools/peers.sh.
"""

import sys
from pathlib import Path

ROOT = '''"""Stand-in for torchvision: importable, not usable."""

__version__ = "0.0.0"
'''

MISC = '''import torch


class FrozenBatchNorm2d(torch.nn.Module):
    """Only ever an argument of isinstance."""
'''

EMPTY_CLASSES = """def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
"""

TRANSFORMS = (
    """from torchvision.transforms.functional import InterpolationMode
"""
    + EMPTY_CLASSES
)

FUNCTIONAL = """from enum import Enum


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def unusable(*arguments, **options):
        raise NotImplementedError(f"torchvision's {name} is not in this environment")

    return unusable
"""

FILES = {
    "__init__.py": ROOT,
    "ops/__init__.py": "",
    "io/__init__.py": EMPTY_CLASSES,
    "ops/misc.py": MISC,
    "datasets/__init__.py": EMPTY_CLASSES,
    "transforms/__init__.py": TRANSFORMS,
    "transforms/functional.py": FUNCTIONAL,
    "transforms/v2/__init__.py": TRANSFORMS,
    "transforms/v2/functional.py": FUNCTIONAL,
}


def main(site_packages: str) -> None:
    for name, text in FILES.items():
        path = Path(site_packages, "torchvision", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
