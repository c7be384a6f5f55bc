"""A stage with a feature cache: each picture goes through the frozen vision encoder once.

The encoder meets every picture alone, never in a batch: what is kept is then a function of picture and encoder, and a
resumed run sees the same bits as one that was never stopped.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from isthmus.batch import Batch, Visuals
from isthmus.config import plain
from isthmus.data.cache import FeatureCache
from isthmus.data.images import ImageTransform
from isthmus.errors import ConfigError
from isthmus.net import Net
from isthmus.recipes.schema import StageSpec
from isthmus.stage import opens
from isthmus.training import Loader, Position
from isthmus.training.precision import choose, context
from isthmus.training.protocols import ending

GIB = 2**30


def open_cache(net: Net, transform: ImageTransform | None, stage: StageSpec, folder: Path) -> FeatureCache:
    """The cache of this stage's encoder, transform and precision, below the stage's own folder or ``folder``.

    Raises ConfigError as :func:`demand_frozen` does.
    """
    assert stage.feature_cache is not None
    demand_frozen(net, transform, stage)
    assert transform is not None  # a net with pictures has one
    place = Path(stage.feature_cache.folder) if stage.feature_cache.folder else folder
    return FeatureCache(place / identity(net, transform, stage), int(stage.feature_cache.gib * GIB))


def demand_frozen(net: Net, transform: ImageTransform | None, stage: StageSpec) -> None:
    """Raises ConfigError for a model whose pictures cannot be cached, and a stage that trains its vision encoder."""
    if net.tap is None or transform is None:
        raise ConfigError(f"Stage {stage.name!r}: a {net.KIND} has no feature cache; take `feature_cache` out.")
    opened = [name for name in opens(net, stage.stage.train) if name.startswith("vision.")]
    if opened:
        raise ConfigError(
            f"Stage {stage.name!r} trains {opened[0]}, so features change at every step; freeze vision.* or take "
            "`feature_cache` out."
        )


def identity(net: Net, transform: ImageTransform, stage: StageSpec) -> str:
    """What features depend on beside the picture, as 16 hex digits: encoder, hidden state, transform, precision."""
    device = next(net.parameters()).device
    facts = {
        "kind": net.KIND,
        "read": None if net.tap is None else plain(net.tap),
        "image": transform.to_dict(),
        "precision": [choose(stage.stage, net, device).precision, device.type],
    }
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in net.vision.state_dict().items():
        sha256.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]


class FeatureLoader:
    """``loader``'s steps with features in the place of pixels. Encodes what the cache lacks, and keeps it."""

    def __init__(self, loader: Loader, net: Net, cache: FeatureCache, stage: StageSpec) -> None:
        self.loader, self.net, self.cache, self.stage = loader, net, cache, stage
        self.device = next(net.parameters()).device
        self.precision = choose(stage.stage, net, self.device).precision

    def position(self, saved: Mapping[str, object]) -> Position:
        return self.loader.position(saved)

    def steps(self, start: Position) -> Iterator[tuple[Position, list[Batch]]]:
        with ending(self.loader.steps(start)) as stream:
            for position, batches in stream:
                yield position, [self._cached_or_encoded(batch) for batch in batches]

    def _cached_or_encoded(self, batch: Batch) -> Batch:
        """The batch with its pictures grouped by shape of features: the same order for whatever was cached before."""
        found: dict[int, Tensor] = {}
        sizes: dict[int, Tensor] = {}
        for group in batch.visuals:
            if group.sizes is not None:
                sizes.update(zip(group.index.tolist(), group.sizes, strict=True))
            values = group.features if group.features is not None else group.pixels
            assert values is not None
            for number, value in zip(group.index.tolist(), values, strict=True):
                found[number] = value if group.features is not None else self._encode(batch.keys[number], value)
        groups: dict[tuple[int, ...], list[int]] = {}
        for number in sorted(found):
            groups.setdefault(tuple(found[number].shape), []).append(number)
        visuals = (
            Visuals(
                index=torch.tensor(numbers),
                features=torch.stack([found[n] for n in numbers]),
                sizes=torch.stack([sizes[n] for n in numbers]) if sizes else None,
            )
            for numbers in groups.values()
        )
        return replace(batch, visuals=tuple(visuals))

    @torch.no_grad()
    def _encode(self, key: str, pixels: Tensor) -> Tensor:
        """(F, P, D) in float32. The loader may have decoded a picture before it was kept."""
        kept = self.cache.get(key)
        if kept is None:
            with context(self.precision, self.device):
                kept = self.net.visual_features(pixels[None].to(self.device))[0].float().cpu()
            self.cache.put(key, kept)
        return kept
