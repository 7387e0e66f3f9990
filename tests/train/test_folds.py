"""One fold of the training classes as validation: whole classes, dealt once for all folds."""

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


def test_labels_that_classes_share_are_refused(records):
    from dataclasses import replace

    hot = np.eye(14, dtype=bool)[records.label]
    with pytest.raises(UserError, match="several labels cannot be dealt into folds"):
        take_fold(replace(records, label=hot), "1/3", seed=0)
