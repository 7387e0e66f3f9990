"""Each augmentation changes what it says, as its formula says, and nothing by default."""

import colorsys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_jax.data.augment import (
    Augment,
    change_pixels,
    colour,
    crop_region,
    erase_box,
    make_augment,
    uniforms,
)
from siamese_jax.data.pipeline import Reading, eval_batches, train_batches
from siamese_jax.data.sources import load_images
from siamese_jax.errors import UserError

HALF = np.full((1, 16), 0.5)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for i in range(6):
        coarse = noise.integers(60, 190, (6, 8, 3)).astype(np.uint8)
        Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(folder / f"{i}.png")
    return load_images(folder)


def images(records, augment, **options):
    def sample(step):
        return np.arange(6)

    return next(
        train_batches(records, sample, Reading(image_size=32, augment=augment, **options), steps=1)
    )["image"]


CHANGES = {
    "crop_scale": (0.2, 0.5),
    "flip": True,
    "brightness": 0.5,
    "contrast": 0.5,
    "saturation": 0.9,
    "hue": 0.3,
    "greyscale": 0.7,
    "erase": 0.7,
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_changes_pixels_and_repeats_exactly(records, name):
    plain = images(records, None)
    one, again = (images(records, {name: CHANGES[name]}, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    changed = (one != plain).any(axis=(1, 2, 3))
    assert changed.any()
    other = images(records, {name: CHANGES[name]}, seed=4)
    assert (other != one).any()


def test_the_shape_options_change_their_crop_and_rectangle(records):
    wide = {"crop_scale": (0.3, 0.3), "crop_ratio": (2.0, 2.0)}
    high = {"crop_scale": (0.3, 0.3), "crop_ratio": (0.5, 0.5)}
    assert (images(records, wide) != images(records, high)).any()
    small, large = ({"erase": 1.0, "erase_area": (a, a)} for a in (0.05, 0.4))
    plain = images(records, None)
    shares = [
        (images(records, e) != plain).any(axis=-1).mean(axis=(1, 2)).mean() for e in (small, large)
    ]
    np.testing.assert_allclose(shares, [0.05, 0.4], atol=0.02)


def test_the_defaults_change_nothing(records):
    np.testing.assert_array_equal(images(records, Augment()), images(records, None))
    assert crop_region(Augment(), HALF[0]) is None
    matrix, k = colour(Augment(), HALF)
    np.testing.assert_allclose(matrix[0], np.eye(3), atol=1e-6)
    assert k[0] == 0


def test_flip_mirrors_about_half_of_the_images(records):
    plain = images(records, None)
    mirrored = []
    for seed in range(20):
        flipped = images(records, {"flip": True}, seed=seed)
        same = (flipped == plain).all(axis=(1, 2, 3))
        assert (same | (flipped == plain[:, :, ::-1]).all(axis=(1, 2, 3))).all()
        mirrored += [~same]
    assert 0.3 < np.mean(mirrored) < 0.7


def numbers(**at):
    """u with one row: 0.5 changes nothing, 1 is the upper end."""
    names = {"brightness": 5, "contrast": 6, "saturation": 7, "hue": 8, "greyscale": 9}
    u = HALF.copy()
    for name, value in at.items():
        u[0, names[name]] = value
    return u


def recoloured(augment, u, pixels):
    matrix, k = colour(augment, u)
    luma = pixels @ [0.299, 0.587, 0.114]
    return pixels @ matrix[0].T + k[0] * luma.mean()


def test_colour_by_its_definitions(rng):
    x = rng.uniform(0, 255, (50, 3))
    luma = x @ [0.299, 0.587, 0.114]
    grey = luma[:, None].repeat(3, axis=1)
    for augment, u, expected in [
        (Augment(brightness=0.4), numbers(brightness=1.0), 1.4 * x),
        (Augment(brightness=0.4), numbers(brightness=0.0), 0.6 * x),
        (Augment(contrast=0.4), numbers(contrast=1.0), 1.4 * (x - luma.mean()) + luma.mean()),
        (Augment(saturation=0.4), numbers(saturation=0.0), 0.6 * x + 0.4 * grey),
        (Augment(greyscale=0.2), numbers(greyscale=0.1), grey),
        (Augment(greyscale=0.2), numbers(greyscale=0.3), x),
    ]:
        np.testing.assert_allclose(recoloured(augment, u, x), expected, rtol=1e-4, atol=1e-3)


def test_pixels_are_what_the_matrices_say(rng):
    augment = Augment(
        flip=True, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, greyscale=0.2, erase=0.5
    )
    u = uniforms(0, 0, 0, 30)
    matrix, k = colour(augment, u)
    boxes = erase_box(augment, u, 20, 30)
    for i in range(30):
        image = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
        before = image.copy()
        changed = change_pixels(augment, image, bool(i % 2), matrix[i], k[i], boxes[i])
        np.testing.assert_array_equal(image, before)  # the input is left alone
        x = (image[:, ::-1] if i % 2 else image).astype(np.float64)
        luma = (x @ [0.299, 0.587, 0.114]).mean()
        expected = np.clip(np.round(x @ matrix[i].T + k[i] * luma), 0, 255)
        upper, left, lower, right, grey = boxes[i]
        expected[upper:lower, left:right] = grey
        assert changed.dtype == np.uint8
        np.testing.assert_allclose(changed, expected, atol=1)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.01, 0.5))
def test_hue_turns_colours_and_leaves_luma_and_greys(at, hue):
    x = np.random.default_rng(0).uniform(0, 255, (20, 3))
    x[:5] = x[:5, :1]
    turned = recoloured(Augment(hue=hue), numbers(hue=at), x)
    np.testing.assert_allclose(turned[:5], x[:5], atol=0.05)
    luma = np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(turned @ luma, x @ luma, rtol=1e-4)


def test_a_third_of_a_turn_brings_red_to_another_primary():
    red = np.array([[200.0, 60.0, 60.0]])
    turned = recoloured(Augment(hue=0.5), numbers(hue=0.5 + 1 / 3), red)[0]
    hue = colorsys.rgb_to_hsv(*np.clip(turned / 255, 0, 1))[0]
    assert min(abs(hue - 1 / 3), abs(hue - 2 / 3)) < 0.12


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 500), st.integers(1, 500))
def test_crops_lie_inside_and_keep_the_wanted_area(seed, width, height):
    augment = Augment(crop_scale=(0.3, 0.6), crop_ratio=(0.8, 1.25))
    left, upper, right, lower = crop_region(augment, uniforms(seed, 0, 0, 1)[0])(width, height)
    assert -1e-9 <= left < right <= width + 1e-9
    assert -1e-9 <= upper < lower <= height + 1e-9
    share = (right - left) * (lower - upper) / (width * height)
    assert share < 0.6 + 1e-9
    cut = right - left > width - 1e-6 or lower - upper > height - 1e-6
    assert cut or (
        share > 0.3 - 1e-9 and 0.8 - 1e-9 < (right - left) / (lower - upper) < 1.25 + 1e-9
    )


def test_erased_rectangles():
    augment = Augment(erase=0.5, erase_area=(0.1, 0.3))
    box = erase_box(augment, uniforms(0, 0, 0, 4000), 40, 60)
    erased = box[:, 2] > 0
    assert 0.45 < erased.mean() < 0.55
    upper, left, lower, right, grey = box[erased].T
    assert (upper >= 0).all()
    assert (left >= 0).all()
    assert (lower <= 40).all()
    assert (right <= 60).all()
    share = (lower - upper) * (right - left) / 2400
    assert 0.08 < share.min() < 0.12
    assert 0.28 < share.max() < 0.32
    assert upper.min() == 0
    assert lower.max() == 40
    assert grey.min() < 5
    assert grey.max() > 250


def test_uniform_numbers_are_a_table():
    table = uniforms(5, 9, 0, 50)
    for first, count in ((0, 7), (13, 1), (49, 1), (20, 30)):
        np.testing.assert_array_equal(uniforms(5, 9, first, count), table[first : first + count])
    for other in (uniforms(6, 9, 0, 50), uniforms(5, 10, 0, 50), uniforms(-5, 9, 0, 50)):
        assert not (other == table).any()
    assert abs(table.mean() - 0.5) < 0.05
    assert 0 <= table.min() < table.max() < 1


def test_a_view_depends_on_the_image_alone(records):
    """A cache of features may embed any part of a data set, in any order of batches."""
    augment = {"crop_scale": (0.2, 0.6), "brightness": 0.3}

    def view(part, batch_size, view):
        batches = eval_batches(
            part, Reading(image_size=32, batch_size=batch_size, augment=augment, seed=1), view=view
        )
        found = [(b["id"][i], b["image"][i]) for b in batches for i in np.flatnonzero(b["mask"])]
        return {int(i): image for i, image in found}

    whole = view(records, 4, 0)
    part = view(records.select(np.array([5, 2])), 3, 0)
    assert set(part) == {5, 2}
    for i, image in part.items():
        np.testing.assert_array_equal(image, whole[i])
    assert (view(records, 4, 1)[2] != whole[2]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flipp": True}, "no field 'flipp'"),
        ({"crop_scale": (0.0, 1.0)}, "augment.crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "augment.crop_scale"),
        ({"erase_area": (0.5, 1.5)}, "augment.erase_area"),
        ({"brightness": -0.1}, "augment.brightness"),
        ({"greyscale": 1.1}, "augment.greyscale"),
        ({"hue": 0.6}, "augment.hue"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        make_augment(options)
    assert make_augment(None) == Augment()
    assert make_augment(replace(Augment(), hue=0.1)).hue == 0.1
