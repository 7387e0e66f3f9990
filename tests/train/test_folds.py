"""One fold of the training classes as validation: whole classes, dealt once for all folds."""

from dataclasses import replace

import numpy as np
import pytest
import tiny

from siamese_jax.data.sources import load_records
from siamese_jax.errors import UserError
from siamese_jax.train.folds import take_fold


@pytest.fixture
def records(tmp_path):
    tiny.make_folder(tmp_path / "shop", classes=14, images=3, size=4)
    return load_records("folder", tmp_path / "shop", seed=5, fractions=(0.5, 0.0, 0.5))


def test_the_folds_share_no_class_and_leave_the_test_alone(records):
    asked = []
    for i in (1, 2, 3):
        made = take_fold(records, f"{i}/3", seed=5)
        test = records.split == "test"
        assert (made.split[test] == "test").all()
        parts = {s: {*made.label[made.split == s].tolist()} for s in ("train", "validation")}
        assert not parts["train"] & parts["validation"]
        assert parts["train"] | parts["validation"] == {*records.label[~test].tolist()}
        assert len(parts["validation"]) in (2, 3)
        asked += parts["validation"]
    assert sorted(asked) == sorted({*records.label[records.split == "train"].tolist()})
    other = take_fold(records, "1/3", seed=6)
    assert (other.split != take_fold(records, "1/3", seed=5).split).any()


def test_validation_of_its_own_joins_the_training_classes(tmp_path, caplog):
    tiny.make_folder(tmp_path / "shop", classes=12, images=2, size=4)
    own = load_records("folder", tmp_path / "shop", fractions=(0.25, 0.25, 0.5))
    plain = load_records("folder", tmp_path / "shop", fractions=(0.5, 0.0, 0.5))
    made, same = (take_fold(r, "2/3", seed=0).split for r in (own, plain))
    np.testing.assert_array_equal(made, same)
    assert "the images for validation join the training images" in caplog.text


def test_training_images_without_marks_are_asked(records):
    train = records.split == "train"
    flags = dict.fromkeys(("is_query", "is_gallery"), ~train)
    made = take_fold(replace(records, **flags), "1/3", seed=5)
    held = made.split == "validation"
    assert made.is_query[held].all()
    assert made.is_gallery[held].all()
    marked = replace(records, is_query=np.arange(len(records)) % 2 == 0)
    assert (take_fold(marked, "1/3", seed=5).is_query == marked.is_query).all()


def test_images_of_several_classes_are_held_out_with_each(records):
    """One class an image as before; of two, no class is in training and in validation."""
    hot = np.eye(14, dtype=bool)[records.label]
    for i in (1, 2, 3):
        one, same = (take_fold(r, f"{i}/3", 5) for r in (records, replace(records, label=hot)))
        np.testing.assert_array_equal(same.split, one.split)
        held = same.split == "validation"
        np.testing.assert_array_equal(same.label[held].argmax(axis=1), one.label[held])
    train = np.flatnonzero(records.split == "train")
    more = hot.copy()
    more[train[0]] |= hot[train[-1]]  # of the first class, and of the last
    both = replace(records, label=more)
    asked = []
    for i in (1, 2, 3):
        made = take_fold(both, f"{i}/3", seed=5)
        of = {part: made.label[made.split == part].any(axis=0) for part in ("train", "validation")}
        assert not (of["train"] & of["validation"]).any()
        asked.append(of["validation"])
        held = made.split[train[0]] == "validation"
        assert held == more[train[0]][of["validation"]].any()
        assert made.label[train[0]].sum() == (1 if held else 2)
    np.testing.assert_array_equal(np.sum(asked, axis=0), more[train].any(axis=0))


def test_classes_that_share_too_many_images_are_said(records):
    """One class of all images is in one fold, of which nothing is left to train on."""
    hot = np.eye(14, dtype=bool)[records.label]
    hot[:, records.label[records.split == "train"][0]] = True
    with pytest.raises(UserError, match="1 of the folds leave nothing to train on"):
        take_fold(replace(records, label=hot), "1/3", seed=0)
