"""From a file to uint8 pixels as people see them, whatever the format.

Pillow reads and resizes: one path for every format, errors that can be caught image by image, JPEG
decoded at the scale that is needed, and Python's global lock released while it works, so tf.data
runs many at a time.
"""

import os
from collections.abc import Callable, Sequence
from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
FITS = ("squash", "crop", "pad")
_ORIENTATION = 0x0112  # the EXIF tag
_WHITE = (255, 255, 255)


def read_image(
    path: "str | os.PathLike[str] | Image",
    size: int | tuple[int, int],
    *,
    fit: str = "squash",
    box: Sequence[int] | np.ndarray | None = None,
    region: Callable[[float, float], Box] | None = None,
) -> np.ndarray:
    """Reads an image at a size, antialiased (bilinear).

    Rotated as its EXIF says; transparency on white; 16-bit grey scaled to 8; CMYK converted; the
    first frame of an animation.

    Args:
      path: of the file; its content, not its suffix, says what it is. Or a Pillow image.
      size: pixels of the result, height and width.
      fit: "squash" changes the aspect ratio, "crop" keeps the middle, "pad" adds white.
      box: left, upper, right, lower of the part that counts; all zero or None for the whole.
      region: width, height -> the part of that to keep, for random crops.

    Returns:
      uint8 [h, w, 3].

    Raises:
      UserError: the file is missing, no image, damaged, or its box lies outside.
    """
    from PIL import Image, UnidentifiedImageError

    height, width = (size, size) if isinstance(size, int) else size
    try:
        # An image that is given stays as it is: reading at a scale would change it.
        if isinstance(path, Image.Image):
            return _read(path.copy(), (width, height), fit, box, region)
        with Image.open(path) as image:
            return _read(image, (width, height), fit, box, region)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except UnidentifiedImageError as e:
        raise UserError(f"{path}: not an image in a format known here") from e
    except FileNotFoundError as e:
        raise UserError(f"{path}: the file does not exist") from e
    except Exception as e:  # Pillow's readers report damage by more kinds than can be listed
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path}: damaged or unreadable ({reason})") from e


def _read(
    image: "Image",
    size: tuple[int, int],
    fit: str,
    box: Sequence[int] | np.ndarray | None,
    region: Callable[[float, float], Box] | None,
) -> np.ndarray:
    from PIL import Image, ImageOps

    orientation = _orientation(image)
    seen = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
    outer = part = _clip(box, seen)
    if region is not None:
        left, upper, right, lower = region(part[2] - part[0], part[3] - part[1])
        part = (part[0] + left, part[1] + upper, part[0] + right, part[1] + lower)
    target, part = _fit(fit, size, part)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8: the smallest with twice the pixels that are needed.
    need = 2 * max(target[0] / (part[2] - part[0]), target[1] / (part[3] - part[1]))
    image.draft(None, (max(1, int(image.size[0] * need)), max(1, int(image.size[1] * need))))
    # Both would copy an image that needs neither.
    image = ImageOps.exif_transpose(image) if orientation != 1 else image
    image = _rgb(image) if image.mode != "RGB" or "transparency" in image.info else image
    sx, sy = image.size[0] / seen[0], image.size[1] / seen[1]
    # The resampling filter reaches beyond what it is asked for, so what lies outside the box goes.
    edge = (int(outer[0] * sx), int(outer[1] * sy), ceil(outer[2] * sx), ceil(outer[3] * sy))
    if edge != (0, 0, *image.size):
        image = image.crop(edge)
    x, y = edge[:2]
    scaled = (part[0] * sx - x, part[1] * sy - y, part[2] * sx - x, part[3] * sy - y)
    bilinear = Image.Resampling.BILINEAR
    image = image.resize(target, bilinear, box=scaled, reducing_gap=3.0)
    if target != size:
        canvas = Image.new("RGB", size, _WHITE)
        canvas.paste(image, ((size[0] - target[0]) // 2, (size[1] - target[1]) // 2))
        image = canvas
    return np.asarray(image)


def _orientation(image: "Image") -> int:
    """1 to 8 as EXIF counts them; 1, upright, where the EXIF data is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note on a sound picture: people see the picture
        return 1


def _rgb(image: "Image") -> "Image":
    """Any mode to RGB as it looks: transparency on white, 16 bits to 8."""
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would cut at 255
        grey = np.asarray(image).astype(np.float64) * (255 / 65535)
        return Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*_WHITE, 255)), image).convert(
            "RGB"
        )
    return image.convert("RGB")


def _clip(box: Sequence[int] | np.ndarray | None, size: tuple[int, int]) -> Box:
    if box is None or not np.any(box):
        return (0.0, 0.0, float(size[0]), float(size[1]))
    left, right = np.clip([box[0], box[2]], 0, size[0])
    upper, lower = np.clip([box[1], box[3]], 0, size[1])
    if left >= right or upper >= lower:
        raise UserError(f"its box {[int(b) for b in box]} lies outside of {size[0]} x {size[1]}")
    return (float(left), float(upper), float(right), float(lower))


def _fit(fit: str, size: tuple[int, int], part: Box) -> tuple[tuple[int, int], Box]:
    """Width and height to resize to, and what to resize."""
    wide, high = part[2] - part[0], part[3] - part[1]
    scales = (size[0] / wide, size[1] / high)
    if fit == "squash":
        return size, part
    if fit == "crop":
        w, h = size[0] / max(scales), size[1] / max(scales)
        x, y = part[0] + (wide - w) / 2, part[1] + (high - h) / 2
        # Rounding may carry a corner outside by a millionth of a pixel.
        return size, (max(x, part[0]), max(y, part[1]), min(x + w, part[2]), min(y + h, part[3]))
    if fit == "pad":
        scale = min(scales)
        w, h = max(1, round(wide * scale)), max(1, round(high * scale))
        return (min(w, size[0]), min(h, size[1])), part
    raise UserError(f"unknown fit '{fit}'; use {', '.join(FITS)}")
