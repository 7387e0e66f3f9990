"""Batches: fixed shapes, every image once, exact resumption, broken images counted and listed."""

import logging
import subprocess
import sys

import numpy as np
import pytest
from picture_files import TURNS, tiff
from PIL import Image

from siamese_jax.data.pipeline import Reading, eval_batches, train_batches
from siamese_jax.data.preprocess import read_image
from siamese_jax.data.samplers import classes
from siamese_jax.data.sources import load_records
from siamese_jax.errors import UserError

AUGMENT = {
    "crop_scale": (0.4, 1.0),
    "flip": True,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "hue": 0.1,
    "greyscale": 0.2,
    "erase": 0.3,
}


def make_folder(root, broken=()):
    noise = np.random.default_rng(0)
    for i in range(23):
        file = root / f"class{i // 3}" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(file)
        if i in broken:
            file.write_text("no picture")
    return load_records("folder", root, fractions=None)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("damaged"), broken=(4, 17))


def sampler(records, size=6):
    return classes(records.label, size, seed=0, per_class=2)


def test_evaluation_gives_every_image_once_in_order(records):
    batches = eval_batches(records, Reading(image_size=(12, 16), batch_size=5))
    assert batches.steps == 5
    seen = list(batches)
    assert len(seen) == 5
    for batch in seen:
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "image": ((5, 12, 16, 3), "uint8"),
            "label": ((5,), "int32"),
            "id": ((5,), "int32"),
            "mask": ((5,), "bool"),
        }
    whole = {k: np.concatenate([b[k] for b in seen]) for k in seen[0]}
    np.testing.assert_array_equal(whole["mask"], np.arange(25) < 23)
    np.testing.assert_array_equal(whole["id"][:23], records.id)
    np.testing.assert_array_equal(whole["label"][:23], records.label)
    assert (whole["id"][23:] == -1).all()
    assert (whole["label"][23:] == -1).all()
    assert not whole["image"][23:].any()
    for path, image in zip(records.path, whole["image"], strict=False):
        np.testing.assert_array_equal(image, read_image(path, (12, 16)))
    assert batches.broken == {}


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_the_fit_reaches_the_reader(records, fit):
    batch = next(eval_batches(records, Reading(image_size=10, batch_size=2, fit=fit)))
    np.testing.assert_array_equal(batch["image"][1], read_image(records.path[1], 10, fit=fit))


def test_multi_hot_labels(records):
    from dataclasses import replace

    hot = replace(records, label=np.eye(8, dtype=bool)[records.label])
    seen = list(eval_batches(hot, Reading(image_size=8, batch_size=15)))
    assert seen[1]["label"].dtype == bool
    assert seen[1]["label"].shape == (15, 8)
    np.testing.assert_array_equal(seen[0]["label"], hot.label[:15])
    assert not seen[1]["label"][8:].any()


def test_a_resumed_run_sees_the_same_batches(records):
    def batches(start, workers):
        return train_batches(
            records,
            sampler(records),
            Reading(image_size=16, augment=AUGMENT, seed=7, workers=workers),
            start_step=start,
        )

    whole, resumed = batches(0, 1), batches(4, 3)
    for _ in range(4):
        next(whole)
    for _ in range(4):
        one, two = next(whole), next(resumed)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
    assert whole.steps is None


def test_steps_bound_the_batches(records):
    batches = train_batches(records, sampler(records), Reading(image_size=8), start_step=3, steps=2)
    expected = [sampler(records)(3), sampler(records)(4)]
    np.testing.assert_array_equal([b["id"] for b in batches], expected)


def test_a_closed_iterator_has_ended(records):
    batches = train_batches(records, sampler(records), Reading(image_size=8))
    next(batches)
    batches.close()
    assert list(batches) == []
    batches.close()  # and may be closed again


def test_one_image_twice_in_a_batch_is_augmented_twice(records):
    batch = next(
        train_batches(
            records, lambda step: np.zeros(4, np.int32), Reading(image_size=16, augment=AUGMENT)
        )
    )
    assert len({image.tobytes() for image in batch["image"]}) == 4


def test_broken_images_are_skipped_listed_and_told_once(damaged, caplog):
    bad = {str(damaged.path[4]), str(damaged.path[17])}
    batches = eval_batches(damaged, Reading(image_size=8, batch_size=10))
    with caplog.at_level(logging.WARNING):
        seen = list(batches)
    mask = np.concatenate([b["mask"] for b in seen])
    assert np.flatnonzero(~mask).tolist() == [4, 17, *range(23, 30)]
    assert set(batches.broken) == bad
    assert all("not an image" in reason for reason in batches.broken.values())
    assert not seen[0]["image"][4].any()
    assert seen[0]["id"][4] == 4  # known by its id, unlike padding
    assert len(caplog.records) == 2


def test_broken_images_in_training_keep_the_shape(damaged, caplog):
    batches = train_batches(
        damaged,
        lambda step: np.arange(23, dtype=np.int32),
        Reading(image_size=8, augment=AUGMENT),
        steps=3,
    )
    for batch in batches:
        assert batch["image"].shape == (23, 8, 8, 3)
        assert np.flatnonzero(~batch["mask"]).tolist() == [4, 17]
        assert not batch["image"][[4, 17]].any()  # zeros, whatever the augmentation
    assert len(batches.broken) == 2
    assert len(caplog.records) == 2  # told once, not once a step


def test_turned_files_give_the_batches_of_upright_ones(tmp_path):
    """Random crops and all that follows see the picture as it is displayed."""
    noise = np.random.default_rng(1)
    pictures = [noise.integers(0, 256, (20, 34, 3)).astype(np.uint8) for _ in range(8)]
    roots = {"upright": tmp_path / "upright", "turned": tmp_path / "turned"}
    for turn, x in enumerate(pictures, 1):
        for name, root in roots.items():
            (root / "one").mkdir(parents=True, exist_ok=True)
            stored = np.ascontiguousarray(TURNS[turn](x)) if name == "turned" else x
            tags = {274: turn} if name == "turned" else {}
            kind = ("L", "RGB")[turn % 2]
            Image.fromarray(stored).convert(kind).save(root / "one" / f"{turn}.tif", tiffinfo=tags)
    batches = [
        next(
            train_batches(
                load_records("folder", root, fractions=None),
                lambda step: np.arange(8, dtype=np.int32),
                Reading(image_size=16, fit="crop", augment=AUGMENT),
                steps=1,
            )
        )
        for root in roots.values()
    ]
    assert batches[0]["mask"].all()
    np.testing.assert_array_equal(batches[0]["image"], batches[1]["image"])


def test_a_picture_that_cannot_be_decoded_rightly_is_listed(tmp_path, caplog):
    x = np.random.default_rng(0).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    (tmp_path / "one").mkdir()
    Image.fromarray(np.uint8(x // 257)).save(tmp_path / "one" / "a.png")
    planes = tiff(x, bits=16, photometric=2, planar=2)
    (tmp_path / "one" / "b.tif").write_bytes(planes)
    batches = eval_batches(
        load_records("folder", tmp_path, fractions=None), Reading(image_size=8, batch_size=2)
    )
    assert next(batches)["mask"].tolist() == [True, False]
    (line,) = batches.broken.values()
    assert "separate planes" in line
    assert line in caplog.text


def test_strict_stops_at_the_first_broken_image(damaged):
    batches = eval_batches(damaged, Reading(image_size=8, batch_size=10, strict=True))
    with pytest.raises(UserError, match=r"04.png: not an image.*mend or remove"):
        list(batches)


def test_a_batch_without_any_good_image_stops_training(damaged):
    batches = train_batches(damaged, lambda step: np.array([4, 17, 4]), Reading(image_size=8))
    with pytest.raises(UserError, match="not one image of a batch of 3 can be read"):
        next(batches)


def test_wrong_options(records):
    for options, message in [
        ({"fit": "zoom"}, "unknown fit"),
        ({"image_size": 0}, "image_size 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"augment": {"blur": 1}}, "no field 'blur'"),
    ]:
        with pytest.raises(UserError, match=message):
            eval_batches(records, Reading(**{"image_size": 8, "batch_size": 2, **options}))


def test_tensorflow_is_blind_to_gpus_and_quiet(records, tmp_path):
    """In a process of its own: the first import, and an end with a pipeline still running."""
    code = f"""
import numpy as np
from siamese_jax.data.pipeline import Reading, train_batches
from siamese_jax.data.sources import load_images
records = load_images({str(records.root)!r})
batches = train_batches(records, lambda step: np.arange(8), Reading(image_size=8))
next(batches)
import tensorflow as tf
print(tf.config.get_visible_devices("GPU"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
    assert "rror" not in done.stderr
