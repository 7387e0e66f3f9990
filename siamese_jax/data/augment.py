"""Random changes to training images, each a pure function of sixteen uniform numbers.

The numbers of an image come from a counter-based generator keyed by (seed, step) at the image's
position, so augmentation has no state and a resumed run repeats it exactly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from siamese_jax.data.preprocess import Box
from siamese_jax.errors import UserError

NUMBERS = 16
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_TO_YIQ = np.array([_LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


@dataclass(frozen=True)
class Augment:
    """What training images undergo; the defaults change nothing.

    Attributes:
      crop_scale: least and largest share of the picture's area that is kept.
      crop_ratio: least and largest width / height of that crop.
      flip: mirror every second image.
      brightness, contrast, saturation: factors from [1 - x, 1 + x]; contrast about the mean grey.
      hue: turns of the hue circle from [-x, x], as a rotation in YIQ.
      greyscale: probability.
      erase: probability of a rectangle of one random grey.
      erase_area: least and largest share of the area that it covers.
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    greyscale: float = 0.0
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        for name in ("crop_scale", "crop_ratio", "erase_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (high > 1 and name != "crop_ratio"):
                raise UserError(f"augment.{name} {low, high}: two numbers, 0 < low <= high (<= 1)")
        for name in ("brightness", "contrast", "saturation", "greyscale", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} {getattr(self, name)}: must lie in [0, 1]")
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"augment.hue {self.hue}: must lie in [0, 0.5]")

    @property
    def crops(self) -> bool:
        """Whether images are cropped at random."""
        return tuple(self.crop_scale) != (1.0, 1.0)

    @property
    def recolours(self) -> bool:
        """Whether any colour is changed at random."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.greyscale))


def make_augment(options: Augment | Mapping[str, Any] | None) -> Augment:
    """An Augment from a mapping of its fields; UserError for a field that it does not have."""
    if options is None or isinstance(options, Augment):
        return options or Augment()
    known = [f.name for f in fields(Augment)]
    for name in options:
        if name not in known:
            raise UserError(f"augment has no field '{name}'; its fields: {', '.join(known)}")
    return Augment(**{name: options[name] for name in options})


def uniforms(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """float64 [count, 16] in [0, 1): rows first .. first + count of the table (seed, stream)."""
    key = np.array([seed % 2**64, stream % 2**64], np.uint64)
    counter = np.array([first * NUMBERS // 4, 0, 0, 0], np.uint64)  # four numbers a count
    bits = np.random.Philox(key=key, counter=counter)
    return np.random.Generator(bits).random((count, NUMBERS))


def crop_region(augment: Augment, u: np.ndarray) -> Callable[[float, float], Box] | None:
    """Random resized crop, from u [16]: area uniform, log(width / height) uniform, place uniform.

    A side longer than the picture is cut to it.
    """
    if not augment.crops:
        return None
    share = _between(augment.crop_scale, u[0])
    ratio = math.exp(_between(tuple(math.log(r) for r in augment.crop_ratio), u[1]))

    def region(width: float, height: float) -> Box:
        area = share * width * height
        w, h = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        left, upper = u[2] * (width - w), u[3] * (height - h)
        return (left, upper, left + w, upper + h)

    return region


def colour(augment: Augment, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colour changes of b images as matrices: from u [b, 16], M float32 [b, 3, 3] and k [b].

    A pixel x of an image with the mean luminance m becomes M x + k m: brightness and contrast
    x -> c (b x - b m) + b m, then saturation x -> s x + (1 - s) luma(x), then the rotation of I
    and Q, then perhaps luma(x). The last three leave greys alone, so all of them are one matrix.
    """
    factor = 2 * u - 1
    b = 1 + augment.brightness * factor[:, 5]
    c = 1 + augment.contrast * factor[:, 6]
    s = (1 + augment.saturation * factor[:, 7])[:, None, None]
    angle = 2 * np.pi * augment.hue * factor[:, 8]
    grey = np.broadcast_to(_LUMA, (3, 3))
    turn = np.zeros((len(u), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    matrix = np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ @ (s * np.eye(3) + (1 - s) * grey)
    matrix = np.where((u[:, 9] < augment.greyscale)[:, None, None], grey @ matrix, matrix)
    return (matrix * (b * c)[:, None, None]).astype(np.float32), ((1 - c) * b).astype(np.float32)


def erase_box(augment: Augment, u: np.ndarray, height: int, width: int) -> np.ndarray:
    """The erased rectangles: int32 [b, 5], upper, left, lower, right, grey level; or zeros."""
    area = _between(augment.erase_area, u[:, 11]) * height * width
    ratio = np.exp(_between((math.log(1 / 2), math.log(2)), u[:, 12]))
    h = np.clip(np.round(np.sqrt(area / ratio)), 1, height)
    w = np.clip(np.round(np.sqrt(area * ratio)), 1, width)
    upper, left = np.floor(u[:, 13] * (height - h + 1)), np.floor(u[:, 14] * (width - w + 1))
    box = np.stack([upper, left, upper + h, left + w, np.floor(u[:, 15] * 256)], axis=1)
    return np.where((u[:, 10] < augment.erase)[:, None], box, 0).astype(np.int32)


def change_pixels(
    augment: Augment,
    image: np.ndarray,
    flip: bool,
    matrix: np.ndarray,
    k: float,
    box: np.ndarray,
) -> np.ndarray:
    """The changes to the pixels of one image: uint8 [h, w, 3] -> uint8 [h, w, 3].

    Args: of one image what `colour` and `erase_box` give for all, and whether to mirror it.
    """
    from PIL import Image

    # Pillow's loops: NumPy's take three to ten times as long on three interleaved bytes.
    picture = Image.fromarray(image)
    if augment.flip and flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.recolours:
        luma = np.asarray(picture.convert("L").histogram())
        shift = float(k * (luma @ np.arange(256)) / luma.sum())
        picture = picture.convert("RGB", tuple(float(x) for row in matrix for x in (*row, shift)))
    if box[2] > 0:
        upper, left, lower, right, grey = (int(x) for x in box)
        picture.paste((grey, grey, grey), (left, upper, right, lower))
    return np.asarray(picture)


def _between(limits: tuple[float, ...], u: Any) -> Any:
    return limits[0] + (limits[1] - limits[0]) * u
