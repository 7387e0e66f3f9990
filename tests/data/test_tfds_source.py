"""TFDS data sets become ordinary files with records."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from siamese_jax.data.preprocess import read_image
from siamese_jax.data.sources import load_records
from siamese_jax.data.tf import tensorflow
from siamese_jax.errors import UserError

pytestmark = [
    # TFDS's own mock calls TensorFlow by names that it has since deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture
def mocked():
    tensorflow()
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=12):
        yield tfds


def test_images_are_copied_as_they_are_encoded(mocked, tmp_path):
    tf = tensorflow()
    records = load_records("tfds:caltech_birds2011", cache_dir=tmp_path, fractions=None)
    assert len(records) == 12
    builder = mocked.builder("caltech_birds2011")
    # The mock draws its examples anew for other features, so ask for these and no others.
    wanted = mocked.decode.PartialDecoding(
        {"image": True, "label": True}, decoders={"image": mocked.decode.SkipDecoding()}
    )
    examples = list(mocked.as_numpy(builder.as_dataset(split="train", decoders=wanted)))
    assert len(examples) == 12
    for i, example in enumerate(examples):
        assert Path(records.path[i]).read_bytes() == bytes(example["image"])
        assert records.class_names[records.label[i]] == str(example["label"])  # the mock's names
        height, width, _ = tf.io.decode_image(example["image"]).shape
        seen = read_image(records.path[i], (height, width))
        np.testing.assert_array_equal(seen, tf.io.decode_image(example["image"]))
    order = [int(name) for name in records.class_names]
    assert order == sorted(order)
    assert (records.split == "").all()


def test_a_second_call_reads_the_files_of_the_first(mocked, tmp_path):
    first = load_records("tfds:cars196", cache_dir=tmp_path)
    assert set(first.split.tolist()) == {"train", "test"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "siamese_jax.data.tfds_source._write", lambda *a: pytest.fail("written twice")
        )
        second = load_records("tfds:cars196", cache_dir=tmp_path)
    np.testing.assert_array_equal(first.path, second.path)
    np.testing.assert_array_equal(first.label, second.label)


def test_features_can_be_named(mocked, tmp_path):
    records = load_records(
        "tfds:stanford_online_products",
        cache_dir=tmp_path,
        fractions=None,
        label_key="class_id",
        super_key="super_class_id",
    )
    assert records.super_label is not None
    assert len(records.super_label) == 12
    with pytest.raises(UserError, match="3 features of the kind ClassLabel"):
        load_records("tfds:stanford_online_products", cache_dir=tmp_path)
    with pytest.raises(UserError, match="no feature 'kind'"):
        load_records("tfds:cars196", cache_dir=tmp_path, label_key="kind")


def test_an_unknown_name_and_a_download_that_fails(mocked, tmp_path):
    with pytest.raises(UserError, match="TFDS knows no data set 'birds'") as caught:
        load_records("tfds:birds", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="TFDS knows no data set ''"):
        load_records("tfds:", cache_dir=tmp_path)

    def unreachable(self, *args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tensorflow_datasets.core.dataset_builder.DatasetBuilder.download_and_prepare",
            unreachable,
        )
        with pytest.raises(UserError, match=r"no route to host\); prepare it where") as caught:
            load_records("tfds:cars196", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("tfds/*"))


def test_official_splits_are_kept_only_when_asked_for(mocked, tmp_path, monkeypatch):
    # The mock knows no splits; a data set that has been prepared names them.
    splits = {name: SimpleNamespace(num_bytes=0) for name in ("train", "test")}
    monkeypatch.setattr(mocked.core.DatasetInfo, "splits", splits)
    joined = load_records("tfds:cars196", cache_dir=tmp_path, fractions=None)
    assert len(joined) == 24
    assert (joined.split == "").all()
    official = load_records("tfds:cars196", cache_dir=tmp_path, split="own")
    assert official.split.tolist() == ["train"] * 12 + ["test"] * 12
    assert all(f"/{s}/" in p for s, p in zip(official.split, official.path, strict=True))
