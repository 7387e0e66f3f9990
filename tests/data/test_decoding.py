"""Every (format, mode, orientation, fit) shows the pixels that were written, or is refused."""

import numpy as np
import pytest
from picture_files import TURNS, gif, orientation_note, png, tiff
from PIL import Image, features

from siamese_jax.data.preprocess import read_image, whole_image
from siamese_jax.errors import UserError

H, W = 18, 22
NOISE = np.random.default_rng(0)


def noise(channels, top=256, dtype=np.uint8, shape=(H, W)):
    return NOISE.integers(0, top, (*shape, channels)).astype(dtype)


def smooth(channels):
    """Waves that lossy formats keep within a few levels."""
    y, x, c = np.ogrid[:H, :W, :channels]
    return (128 + 50 * np.sin(x / 7 + c) + 50 * np.cos(y / 6 - c)).astype(np.uint8)


# What people see of samples [h, w, n], by the definitions of the modes: float64 [h, w, 3].


def grey(x, white=255):
    return np.repeat(255 / white * x[..., :1].astype(np.float64), 3, axis=-1)


def on_white(colour, alpha, white=255):
    share = alpha[..., None] / white
    return colour * share + 255 * (1 - share)


def cmyk(x):
    x = x / 255.0
    return 255 * (1 - x[..., :3]) * (1 - x[..., 3:])


def ycbcr(x):  # JFIF
    y, cb, cr = np.moveaxis(x.astype(np.float64), -1, 0) - np.array([0, 128, 128])[:, None, None]
    rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    return np.clip(np.stack(rgb, axis=-1), 0, 255)


def lab(x):
    """CIE L*a*b* of the D50 white to sRGB; x uint8: L 0 .. 100 in 255, a and b as signed bytes."""
    lightness = x[..., 0] / 255 * 100
    a, b = (x[..., i].astype(np.uint8).view(np.int8).astype(np.float64) for i in (1, 2))
    f = (lightness + 16) / 116
    f = np.stack([f + a / 500, f, f - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1, 0.82521]
    from_d50 = [  # Bradford to D65, then the primaries of IEC 61966-2-1
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.transpose(from_d50), 0, 1)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return 255 * curve


PALETTE = noise(3, shape=(1, 256))[0]
SEEN = {  # mode -> what people see of its samples
    "1": lambda x: grey(x, 1),
    "L": grey,
    "P": lambda x: PALETTE[x[..., 0]].astype(np.float64),
    "LA": lambda x: on_white(grey(x), x[..., 1]),
    "PA": lambda x: on_white(PALETTE[x[..., 0]], x[..., 1]),
    "RGB": lambda x: x.astype(np.float64),
    "RGBA": lambda x: on_white(x[..., :3], x[..., 3]),
    "RGBX": lambda x: x[..., :3].astype(np.float64),
    "CMYK": cmyk,
    "YCbCr": ycbcr,
    "LAB": lab,
    "I;16": lambda x: grey(x, 65535),
    "I;16B": lambda x: grey(x, 65535),
    "I": lambda x: grey(x, 65535),
    "F": lambda x: grey(x, 1),
}
CHANNELS = {"LA": 2, "PA": 2, "RGB": 3, "RGBA": 4, "RGBX": 4, "CMYK": 4, "YCbCr": 3, "LAB": 3}
TYPES = {"1": (2, np.uint8), "I;16": (65536, "<u2"), "I;16B": (65536, ">u2"), "I": (65536, "<i4")}


def samples(mode):
    if mode == "F":
        return NOISE.random((H, W, 1)).astype(np.float32)
    if mode == "LAB":  # colours of sRGB: elsewhere the nearest one is a matter of taste
        parts = [
            NOISE.integers(low, high, (H, W)) for low, high in ((90, 180), (-15, 15), (-15, 15))
        ]
        return (np.stack(parts, axis=-1) % 256).astype(np.uint8)
    top, dtype = TYPES.get(mode, (256, np.uint8))
    x = noise(CHANNELS.get(mode, 1), top, dtype)
    x.flat[0] = top - 1  # for modes whose scale is taken from their largest number
    return x


def pillow(x, mode):
    x = np.ascontiguousarray(x)
    if mode == "1":
        return Image.fromarray(x[..., 0] > 0)
    image = Image.frombytes(mode, x.shape[1::-1], x.tobytes())
    if mode in ("P", "PA"):
        image.putpalette(PALETTE.tobytes())
    return image


def near(seen, expected, most, mean=None):
    off = np.abs(seen.astype(np.float64) - expected)
    assert off.max() <= most
    assert off.mean() <= (most if mean is None else mean)


def check(path, upright, most, mean=None):
    """Under each fit, a box and a random crop, at sizes that keep every pixel as it is."""
    h, w = upright.shape[:2]
    near(read_image(path, (h, w)), upright, most, mean)
    near(read_image(path, (h, w - 6), fit="crop"), upright[:, 3:-3], most, mean)
    near(read_image(path, (h - 4, w), fit="crop"), upright[2:-2], most, mean)
    padded = np.pad(upright, [(2, 2), (0, 0), (0, 0)], constant_values=255)
    near(read_image(path, (h + 4, w), fit="pad"), padded, most, mean)
    box = [3, 2, w - 1, h - 5]
    part = upright[2 : h - 5, 3 : w - 1]
    near(read_image(path, part.shape[:2], box=box), part, most, mean)
    crop = read_image(path, (5, 9), box=box, region=lambda wide, high: (wide - 12, 1, wide - 3, 6))
    near(crop, part[1:6, -12:-3], most, mean)
    with Image.open(path) as image:  # given in memory, and again once it is upright
        near(read_image(image, (h, w)), upright, most, mean)
    with Image.open(path) as image:
        near(read_image(whole_image(image), (h, w)), upright, most, mean)


# Lossless: format -> modes, options of Pillow, and whether it holds an orientation.
LOSSLESS = [
    ("PNG", "1 L P LA RGB RGBA I;16 I;16B", {}, True),
    ("TIFF", "1 L P LA PA RGB RGBA RGBX CMYK YCbCr LAB I;16 I;16B I F", {}, True),
    ("TIFF", "1", {"compression": "group4"}, True),
    ("TIFF", "1", {"compression": "group3"}, True),
    ("TIFF", "1 L P LA RGB RGBA CMYK LAB I;16 I F", {"compression": "tiff_lzw"}, True),
    ("TIFF", "L RGB I;16 F", {"compression": "tiff_adobe_deflate"}, True),
    ("TIFF", "L RGB RGBA I;16 I", {"compression": "tiff_lzw", "tiffinfo": {317: 2}}, True),
    ("TIFF", "F", {"compression": "tiff_lzw", "tiffinfo": {317: 3}}, True),
    ("TIFF", "1 P CMYK", {"compression": "packbits"}, True),
    ("WEBP", "RGB RGBA", {"lossless": True, "exact": True}, True),
    ("JPEG2000", "L LA RGB RGBA CMYK I;16", {}, False),
    ("BMP", "1 L P RGB", {}, False),
    ("GIF", "L P", {}, False),
    ("ICO", "1 L P LA RGB RGBA", {"sizes": [(W, H)]}, False),
    ("PPM", "1 L RGB I I;16 F", {}, False),
    ("TGA", "1 L P LA RGB RGBA", {}, False),
    ("TGA", "L P RGB RGBA", {"compression": "tga_rle"}, False),
    ("SGI", "L RGB RGBA", {}, False),
    ("PCX", "1 L P RGB", {}, False),
    ("DDS", "L LA RGB RGBA", {}, False),
    ("QOI", "RGB RGBA", {}, False),
    ("IM", "1 L P LA PA RGB RGBA RGBX CMYK YCbCr I;16 I F", {}, False),
    ("MSP", "1", {}, False),
    ("XBM", "1", {}, False),
    ("SPIDER", "F", {}, False),
    ("DIB", "L RGB", {}, False),
]
CASES = [
    pytest.param(
        kind, mode, options, turn, id=f"{kind}-{mode}-{turn}-{'-'.join(map(str, options.values()))}"
    )
    for kind, modes, options, turns in LOSSLESS
    for mode in modes.split()
    for turn in (TURNS if turns else [1])
]


@pytest.mark.filterwarnings("ignore:IM image format")  # leaves Pillow in 2028
@pytest.mark.parametrize(("kind", "mode", "options", "turn"), CASES)
def test_lossless(tmp_path, kind, mode, options, turn):
    x = samples(mode)
    options = dict(options)
    if kind == "TIFF":
        options["tiffinfo"] = {**options.get("tiffinfo", {}), 274: turn}
    elif turn > 1:
        options["exif"] = b"Exif\0\0" + orientation_note(turn)
    pillow(TURNS[turn](x), mode).save(tmp_path / "a", kind, **options)
    # Pillow's fixed point arithmetic: half a level of rounding, and one more in these modes.
    most = {"YCbCr": 2, "LAB": 5, "PA": 1.01, "LA": 1.01, "RGBA": 1.01, "CMYK": 1.01}.get(
        mode, 0.51
    )
    deep = kind == "JPEG2000" and mode == "I;16"
    check(tmp_path / "a", SEEN[mode](x), 1.01 if deep else most)


LOSSY = [
    ("JPEG", "L RGB CMYK", {"quality": 100, "subsampling": 0}, 3),
    ("JPEG", "RGB", {"quality": 100, "subsampling": 0, "progressive": True}, 3),
    ("JPEG", "RGB", {"quality": 100, "keep_rgb": True}, 2),
    ("MPO", "L RGB CMYK", {"quality": 100, "subsampling": 0}, 3),
    ("TIFF", "L RGB CMYK YCbCr", {"compression": "jpeg", "quality": 100}, 12),
    ("WEBP", "RGB RGBA", {"quality": 100}, 12),
]
if features.check("avif"):
    LOSSY.append(("AVIF", "RGB RGBA", {"quality": 100, "subsampling": "4:4:4"}, 4))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("kind", "mode", "options", "most"),
    [(k, mode, options, most) for k, modes, options, most in LOSSY for mode in modes.split()],
)
def test_lossy(tmp_path, kind, mode, options, most, turn):
    x = smooth(CHANNELS.get(mode, 1))
    options = dict(options)
    if kind == "TIFF":
        options["tiffinfo"] = {274: turn}
    else:
        options["exif"] = b"Exif\0\0" + orientation_note(turn)
    pillow(TURNS[turn](x), mode).save(tmp_path / "a", kind, **options)
    check(tmp_path / "a", SEEN[mode](x), most, mean=most / 4)


def test_icons_of_apple(tmp_path):
    x = noise(4, shape=(2, 2)).repeat(16, axis=0).repeat(16, axis=1)
    pillow(x, "RGBA").save(tmp_path / "a", "ICNS")  # in many sizes, by a filter of Pillow's
    inside = np.ix_([8, 24], [8, 24])
    near(read_image(tmp_path / "a", 32)[inside], SEEN["RGBA"](x)[inside], 1.51)


# TIFF by the letter: samples that Pillow cannot write, in all layouts.

KINDS = {  # photometric, bits, type, values of ExtraSamples
    "white is zero": [(0, bits, np.uint8, ()) for bits in (1, 2, 4, 8)],
    "grey": [(1, bits, np.uint8, ()) for bits in (1, 2, 4, 8)],
    "grey and more": [(1, 8, np.uint8, (extra,)) for extra in (0, 1, 2)],
    "colour": [(2, 8, np.uint8, extra) for extra in ((), (0,), (1,), (2,), (2, 0), (0, 0))],
    "ink": [(5, 8, np.uint8, extra) for extra in ((), (0,))] + [(5, 16, np.uint16, ())],
    "deep": [(p, 16, np.uint16, ()) for p in (0, 1)] + [(1, 12, np.uint16, ())],
    "deep colour": [(2, 16, np.uint16, extra) for extra in ((), (0,), (1,), (2,))],
    "integers": [(1, 8, np.int8, ()), (1, 16, np.int16, ()), (1, 32, np.int32, ())],
    "more numbers": [(1, 32, np.uint32, ()), (0, 32, np.float32, ()), (1, 32, np.float32, ())],
}


def tiff_samples(photometric, bits, dtype, extra):
    channels = {2: 3, 5: 4}.get(photometric, 1) + len(extra)
    if dtype == np.float32:
        return NOISE.random((H, W, channels)).astype(dtype)
    low = -(2 ** (bits - 1)) if np.dtype(dtype).kind == "i" else 0
    x = NOISE.integers(low, low + 2**bits, (H, W, channels)).astype(dtype)
    x.flat[:2] = low, low + 2**bits - 1
    return np.minimum(x, x[..., -1:]) if extra == (1,) else x  # multiplied by its alpha


def tiff_seen(x, photometric, bits, extra):
    x = x.astype(np.float64)
    if x.min() < 0:
        x = (x - x.min()) / (x.max() - x.min())
    elif x.max() > 1 or bits < 32:
        x = x / (2.0**bits - 1)
    n = {2: 3, 5: 4}.get(photometric, 1)
    rgb = cmyk(255 * x[..., :4]) if n == 4 else np.broadcast_to(255 * x[..., :n], (H, W, 3))
    rgb = 255 - rgb if photometric == 0 else rgb
    if extra[:1] == (1,):
        return rgb + 255 * (1 - x[..., n : n + 1])
    return on_white(rgb, x[..., n], 1) if extra[:1] == (2,) else rgb


LAYOUTS = [
    {"compression": compression, "planar": planar, **more}
    for compression in (1, 8, 32773)
    for planar in (1, 2)
    for more in ({}, {"tile": (16, 16)}, {"tile": (32, 32)}, {"t266": [2]})
]


def seen_or_reason(path):
    try:
        return read_image(path, (H, W))
    except UserError as e:
        reason = str(e)
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", KINDS)
def test_tiff_is_right_or_refused(tmp_path, kind, order):
    refused = []
    for photometric, bits, dtype, extra in KINDS[kind]:
        for layout in LAYOUTS:
            x = tiff_samples(photometric, bits, dtype, extra)
            tags = {"t338": extra} if extra else {}
            file = tiff(x, order=order, bits=bits, photometric=photometric, **layout, **tags)
            (tmp_path / "a").write_bytes(file)
            seen = seen_or_reason(tmp_path / "a")
            if isinstance(seen, str):
                usual = layout["planar"] == 1 and "t266" not in layout and order == "<"
                refused += [(photometric, bits, layout)] * usual
                continue
            # Pillow cuts 16 bits to 8, rounds, and divides by alpha: a level each.
            near(seen, tiff_seen(x, photometric, bits, extra), 3 if bits == 16 else 1.51)
    assert not refused


@pytest.mark.parametrize(
    ("x", "options", "reason"),
    [
        (
            noise(3, 65536, np.uint16),
            {"bits": 16, "photometric": 2, "planar": 2},
            "separate planes",
        ),
        (noise(3), {"photometric": 8, "planar": 2}, "separate planes"),
        (noise(1), {"photometric": 0, "planar": 2}, "separate planes"),
        (noise(2), {"t338": [2], "planar": 2, "compression": 8}, "separate planes"),
        (
            NOISE.random((H, W, 1)).astype("f4"),
            {"bits": 32, "order": ">", "compression": 8},
            "big-end",
        ),
        (noise(1, 99, np.int16), {"bits": 16, "order": ">", "compression": 8}, "big-endian"),
        (noise(3), {"photometric": 6}, "subsampled"),  # as is usual where the file is silent
        (noise(1), {"photometric": 3, "t320": [9] * 768}, "colour map"),
        (NOISE.random((H, W, 1)), {"bits": 64}, "not an image in a format or of a kind known"),
        (NOISE.random((H, W, 3)).astype("f4"), {"bits": 32, "photometric": 2}, "of a kind known"),
    ],
)
def test_what_pillow_decodes_wrongly_is_refused(tmp_path, x, options, reason):
    (tmp_path / "a").write_bytes(tiff(x, **options))
    for read in (lambda path: read_image(path, 8), whole_image):
        with pytest.raises(UserError, match=reason) as caught:
            read(tmp_path / "a")
        assert str(tmp_path / "a") in str(caught.value)
        assert "\n" not in str(caught.value)


RULES = [  # numbers, what they look like
    (np.float32([0, 0.25, 0.5, 1]), [0, 64, 128, 255]),
    (np.float32([0.1, 0.2, 0.3, 0.4]), [26, 51, 76, 102]),  # within 0 .. 1: as it is
    (np.float32([0, 100, 200, 255]), [0, 100, 200, 255]),  # 8 bits, kept as floats
    (np.float32([0, 257, 25700, 65535]), [0, 1, 100, 255]),
    (np.float32([0, 0.5, 1, 1.02]), [0, 125, 250, 255]),
    (np.float32([1000, 1100, 1200, 1400]), [0, 64, 128, 255]),
    (np.float32([-1, 0, 0.5, 1]), [0, 128, 191, 255]),
    (np.float32([np.nan, np.inf, -np.inf, 0.5]), [255, 255, 0, 128]),
    (np.float32([np.nan, 10, 20, 30]), [255, 0, 128, 255]),
    (np.float32([7, 7, 7, 7]), [0, 0, 0, 0]),
    (np.float32([3e38, -3e38, 0, 0]), [255, 0, 128, 128]),
    (np.int32([0, 100, 200, 255]), [0, 100, 200, 255]),
    (np.int32([0, 257, 25700, 65535]), [0, 1, 100, 255]),
    (np.int32([0, 1, 1, 0]), [0, 255, 255, 0]),
    (np.int32([-100, 0, 50, 100]), [0, 128, 191, 255]),
    (np.int32([0, 2**23, 2**30, 2**31 - 1]), [0, 1, 128, 255]),
    (np.uint32([0, 2**24, 2**31, 2**32 - 1]), [0, 1, 128, 255]),
    (np.uint32([0, 2**24, 100 * 2**24, 200 * 2**24]), [0, 1, 100, 200]),
    (np.int16([-32768, 0, 16384, 32767]), [0, 128, 191, 255]),
    (np.int16([0, 100, 200, 255]), [0, 100, 200, 255]),
    (np.int8([-128, 0, 64, 127]), [0, 128, 192, 255]),
    (np.uint16([0, 257, 2570, 25700]), [0, 1, 10, 100]),  # by depth: whatever the largest
]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("numbers", "looks"), RULES)
def test_the_rule_for_other_numbers(tmp_path, numbers, looks, order):
    x = numbers[None, :, None].repeat(2, axis=0)
    expected = np.array(looks, np.float64)
    (tmp_path / "a").write_bytes(tiff(x, order=order, bits=8 * numbers.itemsize))
    if order == ">" and numbers.dtype == np.uint32:  # Pillow has no reader
        with pytest.raises(UserError, match="of a kind known"):
            read_image(tmp_path / "a", (2, 4))
        return
    near(read_image(tmp_path / "a", (2, 4)), grey(expected[None, :, None].repeat(2, axis=0)), 1)
    if numbers.dtype == np.float32:  # where white is zero; NaN stays white
        (tmp_path / "a").write_bytes(tiff(x, order=order, bits=32, photometric=0))
        expected = np.where(np.isnan(numbers), 255, 255 - expected)
        near(read_image(tmp_path / "a", (2, 4)), grey(expected[None, :, None].repeat(2, axis=0)), 1)


def test_without_a_finite_number(tmp_path):
    (tmp_path / "a").write_bytes(tiff(np.full((H, W, 1), np.nan, np.float32), bits=32))
    with pytest.raises(UserError, match="finite"):
        read_image(tmp_path / "a", 8)


def test_a_dark_picture_of_16_bits_in_pgm(tmp_path):
    x = noise(1, 5000, "<i4")
    pillow(x, "I").save(tmp_path / "a", "PPM")
    near(read_image(tmp_path / "a", (H, W)), grey(x, 65535), 0.51)


# PNG by the letter


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("bits", "colour"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2)]
)
def test_the_transparent_colour_of_png(tmp_path, bits, colour, turn):
    x = noise(3 if colour else 1, 2**bits, np.uint16)
    key = x[3, 4].copy()
    x[5:9, 5:9] = key
    x[10, 10] = key ^ 1  # another colour, if only by the last of 16 bits
    rgb = np.broadcast_to(255 / (2**bits - 1) * x.astype(np.float64), (H, W, 3))
    expected = np.where((x == key).all(axis=-1, keepdims=True), 255, rgb)
    stored = np.ascontiguousarray(TURNS[turn](x))
    note = [(b"eXIf", orientation_note(turn, "<>"[turn % 2]))]
    for chunks in ({"before": note}, {"after": note}):
        before = [(b"tRNS", key.astype(">u2").tobytes()), *chunks.get("before", ())]
        file = png(stored, bits=bits, colour=colour, before=before, after=chunks.get("after", ()))
        (tmp_path / "a").write_bytes(file)
        check(tmp_path / "a", expected, 1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_entries_of_a_palette(tmp_path, bits):
    x = noise(1, 2**bits)
    alpha = noise(1, shape=(1, 2**bits))[0, :, 0]
    before = [(b"PLTE", PALETTE[: 2**bits].tobytes()), (b"tRNS", alpha[:-1].tobytes())]
    (tmp_path / "a").write_bytes(png(x, bits=bits, colour=3, before=before))
    alpha[-1] = 255  # entries without a value are opaque
    check(tmp_path / "a", on_white(PALETTE[x[..., 0]], alpha[x[..., 0]]), 1.01)


@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_of_png(tmp_path, bits):
    top, x = 2**bits - 1, noise(4, 2**bits, np.uint16)
    (tmp_path / "a").write_bytes(png(x, bits=bits, colour=6))
    check(tmp_path / "a", on_white(x[..., :3] * (255 / top), x[..., 3], top), 2)
    (tmp_path / "a").write_bytes(png(x[..., ::3], bits=bits, colour=4))
    check(tmp_path / "a", on_white(grey(x, top), x[..., 3], top), 2)


# Frames


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_counts(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    first, other = (Image.new("RGB", (W, H), colour) for colour in ((200, 30, 40), (20, 60, 220)))
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100}, "AVIF": {"quality": 100}}
    frames = {"save_all": True, "append_images": [other, first]}
    first.save(tmp_path / "a", kind, **frames, **options.get(kind, {}))
    with Image.open(tmp_path / "a") as image:
        assert image.n_frames == 3
    near(read_image(tmp_path / "a", 8), np.full((8, 8, 3), (200, 30, 40)), 3)


def test_where_the_first_frame_of_a_gif_does_not_reach_is_white(tmp_path):
    x = noise(1, 128, shape=(6, 9))
    (tmp_path / "a").write_bytes(gif(x[..., 0], PALETTE[:128], (W, H), (3, 4)))
    expected = np.full((H, W, 3), 255.0)
    expected[4:10, 3:12] = PALETTE[x[..., 0]]
    check(tmp_path / "a", expected, 0)


# JPEG decoded at a fraction of its size


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("shape", [(803, 601), (600, 809), (1001, 333)])
def test_a_jpeg_decoded_at_a_fraction_keeps_its_place(tmp_path, shape, turn):
    """Sides that 8 does not divide: seen as the waves that were stored, to the last column."""
    h, w = shape
    x, y = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h

    def wave(x, y):
        parts = [np.sin(18 * x)[None] + np.cos(15 * y)[:, None], np.sin(20 * y)[:, None] + 0 * x]
        return np.stack([127 + 60 * parts[0], 127 + 100 * parts[1], 127 - 60 * parts[0]], axis=-1)

    note = b"Exif\0\0" + orientation_note(turn)
    stored = np.ascontiguousarray(TURNS[turn](wave(x, y).round().astype(np.uint8)))
    Image.fromarray(stored).save(tmp_path / "a", "JPEG", quality=95, subsampling=0, exif=note)
    middles = (np.arange(40) + 0.5) / 40
    inner = slice(1, -1)  # at the rim the filter has one side only
    seen = read_image(tmp_path / "a", 40)
    near(seen[inner, inner], wave(middles, middles)[inner, inner], 5, mean=1.2)
    box = [w // 5, h // 7, w - 3, h - 2]
    seen = read_image(tmp_path / "a", 40, box=box, region=lambda w, h: (w / 4, h / 3, w, h))
    left, upper = box[0] + (box[2] - box[0]) / 4, box[1] + (box[3] - box[1]) / 3
    inside = wave((left + middles * (box[2] - left)) / w, (upper + middles * (box[3] - upper)) / h)
    near(seen[inner, inner], inside[inner, inner], 5, mean=1.2)


# Damage


CUT = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("PPM", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("JPEG2000", {}),
    ("TGA", {"compression": "tga_rle"}),
    *[
        ("TIFF", {"compression": c})
        for c in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ],
    ("ICO", {"sizes": [(22, 18)]}),
    ("SGI", {}),
    ("QOI", {}),
    ("DDS", {}),
]


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize(("kind", "options"), CUT)
def test_a_file_that_was_cut_is_whole_or_refused(tmp_path, kind, options):
    pillow(samples("RGB"), "RGB").save(tmp_path / "a", kind, **options)
    whole, data = read_image(tmp_path / "a", (H, W)), (tmp_path / "a").read_bytes()
    refused = 0
    for share in np.linspace(0.05, 0.99, 20):
        (tmp_path / "a").write_bytes(data[: int(share * len(data))])
        seen = seen_or_reason(tmp_path / "a")
        refused += isinstance(seen, str)
        assert isinstance(seen, str) or (seen == whole).all()
    assert refused > 15
