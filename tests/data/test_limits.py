"""Pictures beyond the limit of pixels: broken like others, wherever the limit is set."""

import io
import logging

import numpy as np
import pytest
from PIL import Image

from siamese_jax.__main__ import main
from siamese_jax.data.preprocess import MAX_PIXELS, limit_pixels, read_image, whole_image
from siamese_jax.errors import UserError


@pytest.fixture(autouse=True)
def as_before():
    before = Image.MAX_IMAGE_PIXELS
    yield
    limit_pixels(None)
    Image.MAX_IMAGE_PIXELS = before


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a", 40), ("b", 20), ("c", 20)):
        pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_picture_of_more_pixels_is_refused(folder):
    limit_pixels(1599)
    for read in (lambda path: read_image(path, 8), whole_image):
        with pytest.raises(UserError, match=r"a\.png: more than 1,599 pixels; .*max_pixels") as e:
            read(folder / "a.png")
        assert "\n" not in str(e.value)
        read(folder / "b.png")
    limit_pixels(1600)
    read_image(folder / "a.png", 8)


def test_a_higher_limit_reads_what_pillow_would_refuse(folder):
    """Pillow refuses at twice its own number, which the limit moves; and warns from there on."""
    Image.MAX_IMAGE_PIXELS = 100
    with pytest.raises(UserError, match="more than"):
        read_image(folder / "a.png", 8)
    limit_pixels(2000)
    read_image(folder / "a.png", 8)
    limit_pixels(None)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_tools_skip_count_and_say_it(folder, caplog):
    options = [f"--images={folder}", "--labels=none", "--image-size=32", "--batch-size=4"]
    options += [f"--cache-dir={folder / '.cache'}", f"--out={folder / 'v.npz'}"]
    argv = ["embed", "--encoder=efficientnet_lite0", "--weights=random", *options]
    with caplog.at_level(logging.WARNING):
        assert main([*argv, "--max-pixels=1000"]) == 0
    assert np.load(folder / "v.npz")["vectors"].shape[0] == 2
    assert "more than 1,000 pixels" in caplog.text


def test_only_the_first_frame_is_read():
    """However many follow, and whatever they hold."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        file = io.BytesIO()
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
        found = read_image(Image.open(file), 4)
        np.testing.assert_array_equal(found, np.broadcast_to([255, 0, 0], (4, 4, 3)))


def test_a_program_in_postscript_is_not_run(tmp_path):
    (tmp_path / "a.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    )
    with pytest.raises(UserError, match="PostScript, which is not run"):
        read_image(tmp_path / "a.eps", 8)
