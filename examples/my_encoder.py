"""Vision encoders of one's own, for CLIP, Flamingo, BLIP-2 and LLaVA alike: a small ConvNet, and any of transformers.

    pixels (n, 3, H, W) ─ stem, p x p ─→ (n, D, h, w) ─ block ─→ … ─ block ─→ (n, D, h, w): layers + 1 maps (n, P, D)

Legend: n pictures, p ``patch_size``, h and w patches down and across, P = h·w, D ``width``.

In a recipe, relative to the recipe's file:

    config:
      vision: {kind: my_encoder.py:ConvNet, image_size: 64, patch_size: 16, width: 96, layers: 4, options: {kernel: 3}}

``isthmus train examples/my_encoder.yaml`` makes a CLIP with it, which as the part ``vision`` brings it to the others.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from isthmus.nn.vit import VisionConfig, VisionEncoder


class ConvNet(VisionEncoder):
    """Residual blocks of a depthwise and two pointwise convolutions, all at the resolution of the patches."""

    def __init__(self, config: VisionConfig, *, kernel: int = 3) -> None:
        super().__init__(config)
        width = config.width
        self.stem = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width),
                nn.GroupNorm(1, width),
                nn.Conv2d(width, 2 * width, 1),
                nn.GELU(),
                nn.Conv2d(2 * width, width, 1),
            )
            for _ in range(config.layers)
        )

    def hidden_states(self, pixels: Tensor) -> Sequence[Tensor]:
        """What a connector may read: the map of patches before the first block, and after each."""
        maps = [self.stem(pixels)]
        for block in self.blocks:
            maps.append(maps[-1] + block(maps[-1]))
        return [each.flatten(2).transpose(1, 2) for each in maps]


class Library(VisionEncoder):
    """An encoder of transformers from its configuration, drawn anew: ``options: {settings: {model_type: vit, ...}}``.

    The sizes are those beside ``kind``. A class token and registers stand before the patches and are left out. What no
    hidden state depends on (a last norm, a mask's token) stays out of a stage's patterns: ``vision.model.layers.*``.
    """

    def __init__(self, config: VisionConfig, *, settings: dict[str, object]) -> None:
        super().__init__(config)
        sizes = {"image_size": config.image_size, "patch_size": config.patch_size, "hidden_size": config.width}
        own = {**sizes, "num_hidden_layers": config.layers, **settings}
        self.model = AutoModel.from_config(AutoConfig.for_model(str(own.pop("model_type")), **own))

    def hidden_states(self, pixels: Tensor) -> Sequence[Tensor]:
        rows, columns = self.grid(*pixels.shape[-2:])
        found = self.model(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [state[:, -rows * columns :] for state in found]
