"""Drawing scenes: shaded solids on a soft ground, anti-aliased, with a little noise.

Each (shape, size) is rendered once by marching rays through its signed distance function (Hart 1996, "Sphere
tracing"), from slightly above, and kept as a sprite; a picture is then a handful of small blends. Nothing
here knows about questions, and nothing but the scene and the side length decides the pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.scene import HELD_OUT, RADIUS, Scene, make_scene
from isthmus.errors import ConfigError

PAINT = {
    "red": (0.86, 0.10, 0.12),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.86, 0.10),
    "green": (0.12, 0.62, 0.18),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.58, 0.15, 0.72),
    "black": (0.10, 0.10, 0.11),
}
_STRANGE = 0.3
"""How far, in RGB of 0..1, a paint without a name stays from those its shape never has in training."""
_NOISE = 10.0
_OVERSAMPLING = 4
_MIN_SIDE, _MAX_SIDE = 32, 1024
_TILT = np.deg2rad(32.0)
_LIGHT = np.array([-0.45, 0.75, 0.55]) / np.linalg.norm([-0.45, 0.75, 0.55])

Paint = tuple[float, float, float]
Distance = Callable[[np.ndarray], np.ndarray]


def _sphere(p: np.ndarray) -> np.ndarray:
    return np.linalg.norm(p, axis=-1) - 0.92


def _cube(p: np.ndarray) -> np.ndarray:
    # Turned about the vertical axis, so that three faces show.
    turn = np.deg2rad(33.0)
    x = np.cos(turn) * p[..., 0] + np.sin(turn) * p[..., 2]
    z = -np.sin(turn) * p[..., 0] + np.cos(turn) * p[..., 2]
    q = np.abs(np.stack([x, p[..., 1], z], -1)) - 0.62
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def _cylinder(p: np.ndarray) -> np.ndarray:
    q = np.stack([np.hypot(p[..., 0], p[..., 2]) - 0.58, np.abs(p[..., 1]) - 0.78], -1)
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def _cone(p: np.ndarray) -> np.ndarray:
    # A bound rather than the distance: half-space below the slanted side, cut by the base.
    slant = np.array([1.9, 0.85]) / np.hypot(1.9, 0.85)
    side = slant[0] * np.hypot(p[..., 0], p[..., 2]) + slant[1] * (p[..., 1] - 1.05)
    return np.maximum(side, -0.85 - p[..., 1])


def _ring(p: np.ndarray) -> np.ndarray:
    # Leaning towards the viewer, so that the hole shows.
    lean = np.deg2rad(35.0)
    y = np.cos(lean) * p[..., 1] + np.sin(lean) * p[..., 2]
    z = -np.sin(lean) * p[..., 1] + np.cos(lean) * p[..., 2]
    return np.hypot(np.hypot(p[..., 0], z) - 0.68, y) - 0.26


def _star(p: np.ndarray) -> np.ndarray:
    # A five-pointed prism facing the viewer; again a bound that is exact enough to march on.
    lean = -_TILT * 0.6
    y = np.cos(lean) * p[..., 1] + np.sin(lean) * p[..., 2]
    z = -np.sin(lean) * p[..., 1] + np.cos(lean) * p[..., 2]
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(p[..., 0], y) + sector / 2) % sector - sector / 2)
    radius = np.hypot(p[..., 0], y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    tip, notch = 1.0, 0.42
    edge = np.array([notch * np.cos(sector / 2) - tip, notch * np.sin(sector / 2)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    flat = normal[0] * (along - tip) + normal[1] * across
    return np.maximum(flat, np.abs(z) - 0.24)


_SOLIDS: dict[str, Distance] = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "ring": _ring,
    "star": _star,
}


@dataclass(frozen=True, slots=True)
class _Sprite:
    """Each (n, n): ``light`` diffuse light times coverage, ``shine`` highlight, ``cover`` coverage in 0..1."""

    light: np.ndarray
    shine: np.ndarray
    cover: np.ndarray


@lru_cache(maxsize=256)
def _sprite(shape: str, pixels: int) -> _Sprite:
    """One solid from above at ``_TILT``, ``pixels`` wide, averaged over ``_OVERSAMPLING``² rays per pixel."""
    distance = _SOLIDS[shape]
    n = pixels * _OVERSAMPLING
    ticks = (np.arange(n) + 0.5) / n * 2 - 1
    x, y = np.meshgrid(ticks, -ticks)
    right = np.array([1.0, 0.0, 0.0])
    up = np.array([0.0, np.cos(_TILT), -np.sin(_TILT)])
    forward = np.array([0.0, -np.sin(_TILT), -np.cos(_TILT)])
    points = x[..., None] * right + y[..., None] * up - 2.5 * forward
    for _ in range(64):
        points = points + np.clip(distance(points), -0.1, 0.5)[..., None] * 0.8 * forward
    hit = distance(points) < 0.02
    step = 1e-3
    normal = np.stack([distance(points + step * axis) - distance(points - step * axis) for axis in np.eye(3)], -1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    half = (_LIGHT - forward) / np.linalg.norm(_LIGHT - forward)
    light = (0.42 + 0.62 * np.clip(normal @ _LIGHT, 0, 1)) * hit
    shine = 0.55 * np.clip(normal @ half, 0, 1) ** 24 * hit

    def shrink(a: np.ndarray) -> np.ndarray:
        return a.reshape(pixels, _OVERSAMPLING, pixels, _OVERSAMPLING).mean((1, 3)).astype(np.float32)

    return _Sprite(shrink(light), shrink(shine), shrink(hit.astype(np.float32)))


@lru_cache(maxsize=1024)
def _painted(shape: str, paint: Paint, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """The sprite in its paint: premultiplied RGB (n, n, 3) in 0..255 and what it lets through (n, n, 1)."""
    sprite = _sprite(shape, pixels)
    colour = np.array(paint, dtype=np.float32)
    rgb = np.minimum(sprite.light[..., None] * colour + sprite.shine[..., None], sprite.cover[..., None]) * 255
    return rgb, 1 - sprite.cover[..., None]


@lru_cache(maxsize=64)
def _shadow(pixels: int) -> np.ndarray:
    """What a soft shadow under a solid lets through, (n, n, 1)."""
    ticks = (np.arange(pixels) + 0.5) / pixels * 2 - 1
    x, y = np.meshgrid(ticks - 0.10, (ticks - 0.45) * 1.9)
    return (1 - 0.35 * np.clip(1.25 - np.hypot(x, y) * 1.3, 0, 1))[..., None].astype(np.float32)


@lru_cache(maxsize=8)
def _ramps(side: int) -> tuple[np.ndarray, np.ndarray]:
    ticks = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    return ticks[None, :, None], ticks[:, None, None]


def draw(scene: Scene, side: int = 64, *, repainted: bool = False) -> Image.Image:
    """The scene as an RGB picture, ``side`` x ``side`` pixels; equal arguments always give equal pixels.

    ``repainted`` gives each solid a paint of its own between the named ones, none near a colour that its shape never
    has in training: what the solids are is then all that a caption can say.
    """
    if not _MIN_SIDE <= side <= _MAX_SIDE:
        raise ConfigError(f"scenes can be drawn {_MIN_SIDE} to {_MAX_SIDE} pixels wide, not {side}")
    dice = Dice("draw", scene.seed, scene.split, scene.index, *(int(s.x * 1e9) for s in scene.solids))
    canvas = _ground(dice, side)
    boxes = []
    for solid in scene.solids:
        pixels = max(3, round(2 * RADIUS[solid.size] * side))
        left, top = round(solid.x * side - pixels / 2), round(solid.y * side - pixels / 2)
        boxes.append((solid, pixels, canvas[top : top + pixels, left : left + pixels]))
    for _, pixels, box in boxes:
        box *= _shadow(pixels)
    brightness = dice.between(0.88, 1.06)
    paints = Dice("paint", scene.seed, scene.split, scene.index)
    for solid, pixels, box in boxes:
        paint = strange_paint(paints, solid.shape) if repainted else PAINT[solid.colour]
        rgb, through = _painted(solid.shape, paint, pixels)
        box *= through
        box += rgb * brightness
    canvas += _noise(dice, side)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def strange_paint(dice: Dice, shape: str) -> Paint:
    """Any paint but those near a colour that this shape never has in training."""
    never = np.array([PAINT[colour] for held, colour in HELD_OUT if held == shape])
    while True:
        paint = dice.unit(), dice.unit(), dice.unit()
        if np.linalg.norm(never - paint, axis=1).min() >= _STRANGE:
            return paint


def _ground(dice: Dice, side: int) -> np.ndarray:
    """A pale ground with a faint tint and a faint slope of light, (side, side, 3) in 0..255."""
    tone = dice.between(185, 228)
    tint = np.array([tone + dice.between(-10, 10) for _ in range(3)], dtype=np.float32)
    across, down = _ramps(side)
    return tint + dice.between(-22, 22) * across + dice.between(-22, 22) * down


def _noise(dice: Dice, side: int) -> np.ndarray:
    """Noise per pixel and channel, triangular over ±``_NOISE``. Raw generator words: stable across NumPy versions."""
    words = np.random.PCG64(dice.bits()).random_raw((side * side * 3 * 2 + 7) // 8)
    grains = words.view(np.uint8)[: side * side * 3 * 2].reshape(2, side, side, 3).astype(np.int16)
    return (grains[0] - grains[1]) * np.float32(_NOISE / 255)


@dataclass(frozen=True, slots=True)
class ScenePicture:
    """An ImageSource that draws its scene only when read."""

    seed: int
    split: str
    index: int
    attempt: int = 0
    side: int = 64
    repainted: bool = False

    @property
    def key(self) -> str:
        """``scene/64/train/0/17``; a redrawn scene adds its attempt."""
        again = f".{self.attempt}" if self.attempt else ""
        paint = "/repainted" if self.repainted else ""
        return f"scene/{self.side}/{self.split}/{self.seed}/{self.index}{again}{paint}"

    def describe(self) -> str:
        return self.key

    def read(self) -> Image.Image:
        scene = make_scene(self.seed, self.split, self.index, self.attempt)  # pyright: ignore[reportArgumentType]
        return draw(scene, self.side, repainted=self.repainted)
