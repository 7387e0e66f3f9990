"""An opened picture to 8-bit RGB as people see it, on white, whatever its mode.

Pillow decodes. Where its own conversion to RGB would show another picture, the rules are here; what
it is known to decode wrongly is refused.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = (255, 255, 255)
_TURNS = {  # EXIF orientation -> what puts the picture upright
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_WHITES = (1, 2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)
# Tags of TIFF
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 258, 259, 262, 266
_SAMPLES, _PLANAR, _COLOURS, _SAMPLE_FORMAT, _SUBSAMPLING = 277, 284, 320, 339, 530
_ORIENTATION = 274  # of EXIF too


def orientation(image: "Image") -> int:
    """1 to 8 as EXIF counts them; 1, upright, where there is none or the EXIF data is damaged."""
    try:
        found = int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged note on a sound picture: people see the picture
        return 1
    return found if found in _TURNS else 1


def turned(image: "Image", orientation: int) -> "Image":
    """The picture put upright."""
    from PIL import Image

    if orientation == 1:
        return image
    return image.transpose(Image.Transpose[_TURNS[orientation]])


def as_rgb(image: "Image") -> "Image":
    """Any mode to RGB as it looks.

    Transparent pixels are white and half transparent ones are mixed with white. CMYK, YCbCr, LAB
    and HSV are converted; grey of 16 bits is divided by 257, of 12 bits by 4095 / 255.

    Signed integers, integers of 32 bits and floating point numbers do not say what white is. If
    none is negative and the largest is at most 1, or in the upper half of 0 .. 255, 0 .. 65535,
    0 .. 2^31 - 1 or 0 .. 2^32 - 1, then 0 is black and the end of that range white. Else the least
    finite value of the picture is black and the largest white (only one value: black). NaN is
    white, as what is transparent; infinities are black and white.

    Args:
      image: as `Image.open` gives it; TIFF and PNG not loaded yet.

    Raises:
      UserError: a kind of TIFF that Pillow decodes wrongly; a picture without a finite number.
    """
    from PIL import Image

    if misread := _misread(image):
        raise UserError(f"a TIFF file with {misread}, which cannot be decoded; save it as PNG")
    absent = _absent(image)
    _load(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;") or _tag(image, _SAMPLE_FORMAT) == 2:
        rgb = _from_numbers(image)
    elif image.mode == "RGB":
        rgb = image
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or (
        image.mode == "P" and image.has_transparency_data
    ):
        layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*WHITE, 255))
        rgb = Image.alpha_composite(ground, layer).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if absent is not None:
        rgb = rgb.copy()
        rgb.paste(WHITE, mask=Image.fromarray(absent))
    return rgb


def _load(image: Any) -> None:
    """Without mapping the file to memory: Pillow then takes a turned TIFF in a wrong shape."""
    name = getattr(image, "filename", None)
    if image.format != "TIFF":
        image.load()
        return
    image.filename = ""
    try:
        image.load()
    finally:
        image.filename = name


def _from_numbers(image: "Image") -> "Image":
    """Grey of other numbers than 8 bits, by the rules of `as_rgb`."""
    from PIL import Image

    numbers = np.asarray(image)
    bits, signed = _tag(image, _BITS), _tag(image, _SAMPLE_FORMAT) == 2
    if bits == 8 and signed:
        numbers = numbers.view(np.int8)
    if bits == 32 and image.mode == "I" and not signed:
        numbers = numbers.view(np.uint32)
    x = numbers.astype(np.float64)
    if image.mode.startswith("I;") or (image.format == "PPM" and image.mode == "I"):
        black, white = 0.0, 4095.0 if bits == 12 else 65535.0
    else:
        black, white = _range(x)
    grey = np.clip((x - black) * (255 / (white - black or 1.0)), 0, 255)
    if bits and _tag(image, _PHOTOMETRIC) == 0:
        grey = 255 - grey
    grey = np.where(np.isnan(x), 255, np.round(grey)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _range(x: np.ndarray) -> tuple[float, float]:
    finite = x[np.isfinite(x)]
    if not len(finite):
        raise UserError("not one of its numbers is finite")
    low, high = float(finite.min()), float(finite.max())
    if low >= 0:
        for white in _WHITES:
            if high <= white and (white == 1 or high > white / 2):
                return 0.0, float(white)
    return low, high


def _absent(image: Any) -> np.ndarray | None:
    """bool [h, w]: pixels of the one colour that the file calls transparent, or that it lacks."""
    tile = image.tile[0] if getattr(image, "tile", None) else None
    if image.format == "GIF" and tile and tile.extents != (0, 0, *image.size):
        absent = np.ones(image.size[::-1], bool)  # the first frame is smaller than the picture
        left, upper, right, lower = tile.extents
        absent[upper:lower, left:right] = False
        return absent
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "I;16", "RGB"):
        return None
    stored = tile.args if tile else image.mode
    if stored in ("L;2", "L;4"):  # the key counts in 2 or 4 bits, the pixels have 8
        key *= 255 // (2 ** int(stored[2]) - 1)
    low = _low_bytes(image) if stored == "RGB;16B" else None
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if low is not None:
        pixels = pixels.astype(np.uint16) << 8 | low
    same = pixels == np.array(key)
    return same.all(axis=-1) if same.ndim == 3 else same


def _low_bytes(image: Any) -> np.ndarray:
    """uint8 [h, w, 3] of a PNG with 16 bits a colour, of which Pillow keeps the high bytes."""
    from PIL import Image

    place = image.fp.tell()
    image.fp.seek(0)
    again = Image.open(image.fp)
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    low = np.asarray(again)
    image.fp.seek(place)
    return low


def _tag(image: "Image", tag: int, default: int = 0) -> int:
    """The (first) value of a TIFF file's tag; the default for all other files."""
    found = getattr(image, "tag_v2", {}).get(tag, default)
    return int(found[0]) if isinstance(found, tuple) else int(found)


def _misread(image: Any) -> str:
    """What of a TIFF file Pillow is known to decode to another picture; empty for the others."""
    if image.format != "TIFF":
        return ""
    packed, photometric = _tag(image, _COMPRESSION, 1) != 1, _tag(image, _PHOTOMETRIC)
    if _tag(image, _PLANAR, 1) == 2:
        bytes_in_order = _tag(image, _BITS, 1) == 8 and _tag(image, _FILL_ORDER, 1) == 1
        alone = _tag(image, _SAMPLES, 1) == 1
        if not (photometric in (2, 5) or alone) or not (packed or (bytes_in_order and photometric)):
            return "separate planes of other samples than RGB or CMYK of 8 bits"
    if packed and image.tag_v2.prefix == b"MM" and image.mode in ("I", "F"):
        return "compressed big-endian numbers that are signed or have 32 bits"
    if photometric == 6 and not packed and image.tag_v2.get(_SUBSAMPLING) != (1, 1):
        return "YCbCr colours that are subsampled but not compressed"
    if photometric == 3 and max(image.tag_v2.get(_COLOURS, (0,))) in range(1, 256):
        return "a colour map of 8 bits"
    return ""
