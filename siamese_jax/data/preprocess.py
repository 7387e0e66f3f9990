"""From a file to uint8 pixels as people see them, whatever the format.

Pillow reads and resizes: one path for every format, errors that can be caught image by image, JPEG
decoded at the scale that is needed, and Python's global lock released while it works, so tf.data
runs many at a time.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.data.decoding import WHITE, as_rgb, orientation, turned
from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels
FITS = ("squash", "crop", "pad")
_SCALED = ("JPEG", "MPO")  # formats that Pillow decodes at a fraction of their size
MAX_PIXELS = 178_956_970  # where Pillow refuses by itself: 0.5 GB as RGB
_most_pixels = MAX_PIXELS


def limit_pixels(most: int | None) -> None:
    """From here on, this process reads no picture of more than `most` pixels; None: `MAX_PIXELS`.

    Such a picture is broken: skipped, counted and said. It also becomes Pillow's own limit, so that
    Pillow neither refuses nor warns below it. The number of frames needs no limit: of an animation,
    or a file of many pages, the first alone is read, and what follows costs nothing.
    """
    global _most_pixels
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = _most_pixels = most or MAX_PIXELS
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def read_image(
    path: "str | os.PathLike[str] | Image",
    size: int | tuple[int, int],
    *,
    fit: str = "squash",
    box: Sequence[int] | np.ndarray | None = None,
    region: Callable[[float, float], Box] | None = None,
    check: Callable[[bytes], None] | None = None,
) -> np.ndarray:
    """Reads an image at a size, antialiased (bilinear).

    Rotated as its EXIF says; transparency on white; other numbers than 8 bits scaled and other
    colours converted as `siamese_jax.data.decoding.as_rgb` says; the first frame of an animation.

    Args:
      path: of the file; its content, not its suffix, says what it is. Or a Pillow image.
      size: pixels of the result, height and width.
      fit: "squash" changes the aspect ratio, "crop" keeps the middle, "pad" adds white.
      box: left, upper, right, lower of the part that counts, in pixels of the upright picture, as
        people see and mark it; all zero or None for the whole.
      region: width, height -> the part of that to keep, for random crops.
      check: is given the file's bytes, those that are then decoded, and may raise UserError.

    Returns:
      uint8 [h, w, 3].

    Raises:
      UserError: the file is missing, no image, damaged, of a kind that cannot be decoded rightly,
        of more pixels than `limit_pixels` allows, or its box lies outside.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with _opened(path, check) as image:
        return _read(image, (width, height), fit, box, region)


def whole_image(path: "str | os.PathLike[str] | Image") -> "Image":
    """The picture in its own size, upright and in RGB, by the rules of `read_image`."""
    with _opened(path) as image:
        rgb = as_rgb(image)
        upright = turned(rgb, orientation(image)).copy()
    upright.info.clear()  # what it says of orientation and transparency is done
    return upright


@contextlib.contextmanager
def _opened(
    path: "str | os.PathLike[str] | Image", check: Callable[[bytes], None] | None = None
) -> Iterator["Image"]:
    """An opened file, or the image that is given; whatever goes wrong is one UserError."""
    from PIL import Image, UnidentifiedImageError

    name = "the image" if isinstance(path, Image.Image) else path
    try:
        if isinstance(path, Image.Image):
            # It stays as it is: reading a JPEG at a scale would change it.
            yield path.copy() if path.format in _SCALED else path
            return
        source: Any = path
        if check is not None:  # read once: the file may change at any time
            data = Path(path).read_bytes()
            check(data)
            source = io.BytesIO(data)
        with Image.open(source) as image:
            if image.format == "EPS":
                raise UserError("a program in PostScript, which is not run; save it as PNG")
            if image.width * image.height > _most_pixels:
                raise Image.DecompressionBombError
            yield image
    except Image.DecompressionBombError as e:
        raise UserError(
            f"{name}: more than {_most_pixels:,} pixels; to read it, raise the limit "
            "(--config.data.max_pixels, or --max-pixels of a tool)"
        ) from e
    except UserError as e:
        raise UserError(f"{name}: {e}") from e
    except UnidentifiedImageError as e:
        raise UserError(f"{name}: not an image in a format or of a kind known here") from e
    except FileNotFoundError as e:
        raise UserError(f"{name}: the file does not exist") from e
    except Exception as e:  # Pillow's readers report damage by more kinds than can be listed
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{name}: damaged or unreadable ({reason})") from e


def _read(
    image: "Image",
    size: tuple[int, int],
    fit: str,
    box: Sequence[int] | np.ndarray | None,
    region: Callable[[float, float], Box] | None,
) -> np.ndarray:
    from PIL import Image

    jpeg = image.format in _SCALED
    # Others are decoded at once: a TIFF turns itself upright in passing, an icon changes its size.
    rgb = image if jpeg else as_rgb(image)
    turn = orientation(image)
    seen = rgb.size[::-1] if turn in (5, 6, 7, 8) else rgb.size
    outer = part = _clip(box, seen)
    if region is not None:
        left, upper, right, lower = region(part[2] - part[0], part[3] - part[1])
        part = (part[0] + left, part[1] + upper, part[0] + right, part[1] + lower)
    target, part = _fit(fit, size, part)
    scale = 1.0
    if jpeg:  # It can be decoded at 1/2, 1/4 or 1/8: the smallest with twice the pixels needed.
        need = 2 * max(target[0] / (part[2] - part[0]), target[1] / (part[3] - part[1]))
        wide, high = image.size
        drafted = image.draft(None, (max(1, int(wide * need)), max(1, int(high * need))))
        scale = drafted[1][2] / wide if drafted else 1.0
        rgb = as_rgb(image)
    rgb = turned(rgb, turn)
    # The last column and row then may stand for a part of a pixel's width; turned, the first.
    x = rgb.size[0] - seen[0] * scale if turn in (2, 3, 6, 7) else 0.0
    y = rgb.size[1] - seen[1] * scale if turn in (3, 4, 7, 8) else 0.0
    outer, part = (
        (x + b[0] * scale, y + b[1] * scale, x + b[2] * scale, y + b[3] * scale)
        for b in (outer, part)
    )
    # The resampling filter reaches beyond what it is asked for, so what lies outside the box goes.
    edge = (int(outer[0]), int(outer[1]), ceil(outer[2]), ceil(outer[3]))
    if edge != (0, 0, *rgb.size):
        rgb = rgb.crop(edge)
        part = (part[0] - edge[0], part[1] - edge[1], part[2] - edge[0], part[3] - edge[1])
    rgb = rgb.resize(target, Image.Resampling.BILINEAR, box=part, reducing_gap=3.0)
    if target != size:
        canvas = Image.new("RGB", size, WHITE)
        canvas.paste(rgb, ((size[0] - target[0]) // 2, (size[1] - target[1]) // 2))
        rgb = canvas
    return np.asarray(rgb)


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
