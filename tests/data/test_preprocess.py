"""Every kind of image comes out as people see it; every damaged one as a clear error."""

import io

import numpy as np
import pytest
from PIL import Image

from siamese_jax.data.preprocess import read_image
from siamese_jax.errors import UserError

RED, BLUE = (200, 30, 40), (20, 60, 220)


def picture(width=24, height=16):
    """Left half red, right half blue, a white corner at the upper left."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    pixels[: height // 4, : width // 4] = 255
    return pixels


def mode_of(path):
    with Image.open(path) as image:
        return image.mode


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "webp", "jpg", "ppm"])
def test_formats(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(picture()).save(file, **options.get(suffix, {}))
    seen = read_image(file, (16, 24))
    assert seen.dtype == np.uint8
    assert seen.shape == (16, 24, 3)
    off = np.abs(seen.astype(int) - picture().astype(int))
    assert off.mean() < (2 if suffix == "jpg" else 0.01)


def test_the_content_counts_and_not_the_suffix(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", (16, 24)), picture())


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(picture()).quantize(8)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", (16, 24)), picture())
    red = image.getpixel((2, 10))
    image.save(tmp_path / "b.png", transparency=red)
    seen = read_image(tmp_path / "b.png", (16, 24))
    assert (seen[:, :12] == 255).all()
    np.testing.assert_array_equal(seen[:, 12:], picture()[:, 12:])
    alphas = bytes(100 if i == red else 255 for i in range(8))  # a partly transparent palette
    image.save(tmp_path / "c.png", transparency=alphas)
    mixed = np.array(RED) * (100 / 255) + 155
    assert np.abs(read_image(tmp_path / "c.png", (16, 24))[10, 2] - mixed).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    alpha = np.full((16, 24), 255, np.uint8)
    alpha[8:] = 64
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    seen = read_image(tmp_path / "a.png", (16, 24)).astype(float)
    plain = np.asarray(Image.fromarray(picture()).convert(mode).convert("RGB")).astype(float)
    np.testing.assert_allclose(seen[:8], plain[:8])
    np.testing.assert_allclose(seen[8:], plain[8:] * (64 / 255) + 255 * (191 / 255), atol=1)


def test_hidden_colours_of_transparent_pixels_do_not_bleed(tmp_path):
    """Where all is transparent, shrinking must see white, not the colour under the alpha."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", 8) == 255).all()


def test_16_bit_grey_and_colour(tmp_path):
    ramp = np.linspace(0, 65535, 24).astype(np.uint16)[None].repeat(16, axis=0)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    assert mode_of(tmp_path / "grey.png").startswith("I")
    seen = read_image(tmp_path / "grey.png", (16, 24))
    np.testing.assert_allclose(seen[..., 0], np.round(ramp / 257.0), atol=1)
    (tmp_path / "rgb.png").write_bytes(png_16_bit(picture().astype(np.uint16) * 257))
    np.testing.assert_allclose(read_image(tmp_path / "rgb.png", (16, 24)), picture(), atol=1)


def png_16_bit(pixels):
    """A PNG of 16 bits a channel: Pillow cannot write one, the format's specification is short."""
    import struct
    import zlib

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_one_bit_and_grey(tmp_path):
    Image.fromarray(picture()).convert("1", dither=Image.Dither.NONE).save(tmp_path / "a.png")
    assert set(np.unique(read_image(tmp_path / "a.png", (16, 24)))) == {0, 255}
    Image.fromarray(picture()).convert("L").save(tmp_path / "b.jpg", quality=100)
    seen = read_image(tmp_path / "b.jpg", (16, 24))
    assert (seen[..., 0] == seen[..., 2]).all()
    assert abs(int(seen[10, 2, 0]) - (0.299 * 200 + 0.587 * 30 + 0.114 * 40)) < 3


def test_the_first_frame_of_an_animation(tmp_path):
    first, second = Image.new("RGB", (24, 16), RED), Image.new("RGB", (24, 16), BLUE)
    for name in ("a.gif", "a.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
        assert (read_image(tmp_path / name, 8) == RED).all()


def test_cmyk(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert mode_of(tmp_path / "a.jpg") == "CMYK"
    seen = read_image(tmp_path / "a.jpg", (16, 24)).astype(int)
    assert np.abs(seen[8:, 1:9] - RED).max() < 12
    assert np.abs(seen[8:, 15:] - BLUE).max() < 12


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, 1),  # stored so that a quarter turn clockwise puts it upright
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(TURNS[orientation](picture(240, 160)))
    Image.fromarray(stored).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    seen = read_image(tmp_path / f"a.{suffix}", (16, 24)).astype(int)
    # Antialiasing mixes the pixels beside an edge.
    away = np.ones((16, 24), bool)
    away[2:6], away[:, 4:8], away[:, 10:14] = False, False, False
    assert np.abs(seen - picture())[away].max() < 8


def test_a_large_photograph_shrinks_as_the_mean_of_its_pixels(tmp_path, rng):
    coarse = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    large = coarse.repeat(100, axis=0).repeat(100, axis=1)
    noise = rng.integers(-30, 31, large.shape)
    large = np.clip(large.astype(int) + noise, 0, 255).astype(np.uint8)
    Image.fromarray(large).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    seen = read_image(tmp_path / "a.jpg", 80).astype(float)  # decoded at a fraction of its size
    means = large.reshape(80, 10, 80, 10, 3).mean(axis=(1, 3))
    inside = np.arange(80) % 10
    inside = (inside > 1) & (inside < 8)
    assert np.abs(seen - means)[np.ix_(inside, inside)].mean() < 4


def test_fits(tmp_path):
    Image.fromarray(picture(40, 20)).save(tmp_path / "a.png")
    squashed = read_image(tmp_path / "a.png", 20)
    assert (squashed[15, 2] == RED).all()
    assert (squashed[15, 17] == BLUE).all()
    cropped = read_image(tmp_path / "a.png", 20, fit="crop")
    np.testing.assert_array_equal(cropped, picture(40, 20)[:, 10:30])
    padded = read_image(tmp_path / "a.png", 20, fit="pad")
    assert (padded[:5] == 255).all()
    assert (padded[15:] == 255).all()
    assert (padded[12, 2] == RED).all()
    with pytest.raises(UserError, match="unknown fit 'zoom'"):
        read_image(tmp_path / "a.png", 20, fit="zoom")


def test_boxes_and_regions(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    seen = read_image(tmp_path / "a.png", (4, 6), box=[12, 4, 24, 16])
    assert (seen == BLUE).all()
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", (16, 24), box=[0, 0, 0, 0]), picture()
    )
    # A region is relative to the box.
    seen = read_image(tmp_path / "a.png", 4, box=[6, 4, 24, 16], region=lambda w, h: (0, 0, 6, h))
    assert (seen[:, :3] == RED).all()
    assert np.abs(seen[:, 3].astype(int) - RED).max() < 30  # the filter reaches over by a pixel
    with pytest.raises(UserError, match="lies outside of 24 x 16"):
        read_image(tmp_path / "a.png", 4, box=[30, 0, 40, 9])


def test_broken_files(tmp_path, rng):
    encoded = io.BytesIO()
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(encoded, "JPEG")
    cases = {
        "text.jpg": b"not a picture at all",
        "empty.png": b"",
        "cut.jpg": encoded.getvalue()[: len(encoded.getvalue()) // 2],
        "cut.png": png_16_bit(noise.astype(np.uint16))[:300],
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_image(tmp_path / name, 32)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "nowhere.jpg", 32)
    with pytest.raises(UserError, match="unreadable"):
        read_image(tmp_path, 32)


def test_a_sound_picture_with_damaged_exif_is_seen(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(picture()).save(encoded, "JPEG", quality=100, subsampling=0)
    note = b"Exif\x00\x00XXbroken"  # no byte order mark where one belongs
    segment = b"\xff\xe1" + (len(note) + 2).to_bytes(2, "big") + note
    data = encoded.getvalue()
    (tmp_path / "a.jpg").write_bytes(data[:2] + segment + data[2:])
    seen = read_image(tmp_path / "a.jpg", (16, 24)).astype(int)
    assert np.abs(seen - picture()).mean() < 2


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_damage_of_any_kind_is_a_picture_or_one_line(tmp_path, kind):
    noise = np.random.default_rng(0)
    encoded = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(encoded, kind)
    refused = []
    for _ in range(60):
        data = np.frombuffer(encoded.getvalue(), np.uint8).copy()
        where = noise.integers(0, min(len(data), noise.choice([60, len(data)])), 4)
        data[where] = noise.integers(0, 256, 4)
        (tmp_path / "a").write_bytes(data.tobytes())
        try:
            assert read_image(tmp_path / "a", 8).shape == (8, 8, 3)
        except UserError as e:
            refused.append(str(e))
    assert refused
    assert not any("\n" in line for line in refused)
