"""Config fields that reach samplers and sources: each changes what it says it changes."""

import csv
import json

import numpy as np
import pytest
import tiny

from configs import common
from siamese_jax.data.sources import load_records
from siamese_jax.errors import UserError
from siamese_jax.train.experiment import load_data
from siamese_jax.train.from_config import idle_options, make_sampler


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Twelve classes of three images; class c is of the kind c % 3."""
    return tiny.make_folder(tmp_path_factory.mktemp("data") / "shop", classes=12, images=3)


def write_csv(path, shop, kinds, *, header="category"):
    rows = [["path", "label", "split", header]]
    for c, kind in enumerate(kinds):
        split = "train" if c < 9 else "test"
        rows += [[f"class{c}/{i}.png", f"class{c}", split, kind] for i in range(3)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def hierarchical(table, shop, **options):
    config = common.base()
    config.data.update(source="csv", root=str(table), images=str(shop))
    config.sampler = {"name": "hierarchical", "batch_size": 8, "per_class": 2, **options}
    return config


def test_a_clip_radius_that_cuts_nothing_is_said():
    config = common.base()
    assert idle_options(config) == []
    config.loss = {"name": "hyperbolic"}
    (line,) = idle_options(config)
    assert "loss.clip_radius=2.3 cuts none" in line
    config.loss = {"name": "hyperbolic", "clip_radius": 0.9}
    assert idle_options(config) == []
    config.loss = {"name": "hyperbolic"}
    config.head.normalize = False
    assert idle_options(config) == []


def test_hierarchical_batches_come_from_few_super_classes(shop, tmp_path):
    table = write_csv(tmp_path / "table.csv", shop, [f"kind{c % 3}" for c in range(12)])
    config = hierarchical(table, shop, per_super=2)
    records, _ = load_data(config, {})
    train = records.where("train")
    sample = make_sampler(config, records)
    seen = set()
    for step in range(30):
        rows = sample(step).reshape(2, 2, 2)  # super-classes, classes, images
        classes = np.vectorize(lambda row: train.class_names[train.label[row]])(rows)
        kinds = np.vectorize(lambda name: int(name.removeprefix("class")) % 3)(classes)
        assert (classes == classes[:, :, :1]).all()
        assert (classes[:, 0, 0] != classes[:, 1, 0]).all()
        assert (kinds == kinds[:, :1, :1]).all()
        assert kinds[0, 0, 0] != kinds[1, 0, 0]
        assert (rows[..., 0] != rows[..., 1]).all()
        seen |= set(kinds.ravel().tolist())
    assert seen == {0, 1, 2}


def test_hierarchical_without_super_classes_says_so(shop, tmp_path):
    def sampler(table):
        config = hierarchical(table, shop)
        return make_sampler(config, load_data(config, {})[0])

    kinds = ["bag", "", "shoe", *["bag"] * 9]
    with pytest.raises(UserError, match=r"needs super-classes, and .*plain\.csv has none"):
        sampler(write_csv(tmp_path / "plain.csv", shop, kinds, header="colour"))
    with pytest.raises(UserError, match=r"3 training images .* first is .*class1/0.png; fill in"):
        sampler(write_csv(tmp_path / "some.csv", shop, kinds))
    config = hierarchical(tmp_path / "some.csv", shop)
    del config.sampler.batch_size
    records = load_records("folder", shop)
    with pytest.raises(UserError, match="has none"):
        make_sampler(config, records)
    config.sampler.name = "classes"
    with pytest.raises(UserError, match=r"sampler\.name=classes needs sampler\.batch_size"):
        make_sampler(config, records)
    config.sampler = {"batch_size": 12}
    with pytest.raises(UserError, match=r"sampler\.name=None; choose one of classes"):
        make_sampler(config, records)
    config.sampler.name = "classes"
    assert len(make_sampler(config, records)(0)) == 12


def test_hierarchical_from_the_command_line(shop, tmp_path):
    """A section is set whole, because another name has other options."""
    table = write_csv(tmp_path / "table.csv", shop, [f"kind{c % 3}" for c in range(12)])
    options = [
        *(option for option in tiny.TINY if "sampler" not in option),
        "--config.data.source=csv",
        f"--config.data.root={table}",
        f"--config.data.images={shop}",
        "--config.train.steps=2",
    ]
    section = "{'name': 'hierarchical', 'batch_size': 12, 'per_class': 2, 'per_super': 3}"
    run = tmp_path / "run"
    done = tiny.run(
        tmp_path, *options, f"--config.sampler={section}", f"--workdir={run}", script=tiny.SMALL
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "config.json").read_text())["sampler"]["per_super"] == 3
    named = tiny.run(
        tmp_path, *options, "--config.sampler.name=hierarchical", f"--workdir={tmp_path / 'b'}"
    )
    assert named.returncode == 2
    assert "a batch of 256 needs 32 super-classes with 4 classes each" in named.stderr
    wrong = tiny.run(
        tmp_path, *options, "--config.sampler.name=shuffled", f"--workdir={tmp_path / 'c'}"
    )
    assert wrong.returncode == 2
    last = wrong.stderr.strip().splitlines()[-1]
    assert last.startswith("error: sampler.per_class: shuffled has no such option")
    assert last.endswith("per_class is one of classes, hierarchical")
    unknown = tiny.run(tmp_path, *options, "--config.sampler.per_super=3")
    assert unknown.returncode == 2
    assert "per_super is one of hierarchical" in unknown.stderr


def test_every_option_of_a_source_is_a_field(shop, tmp_path):
    """split and split_seed of any; the three keys of tfds:NAME."""
    config = common.base()
    config.data.update(source="folder", root=str(shop))
    parts = {}
    for seed, split_seed in ((0, -1), (0, 1), (1, -1), (5, 1)):
        config.seed, config.data.split_seed = seed, split_seed
        records, _ = load_data(config, {})
        parts[seed, split_seed] = tuple(
            sorted(set(records.label[records.split == "test"].tolist()))
        )
    assert parts[0, 1] == parts[1, -1] == parts[5, 1] != parts[0, -1]
    config.data.split = "own"
    with pytest.raises(UserError, match="brings no split"):
        load_data(config, {})
    table = write_csv(tmp_path / "table.csv", shop, ["kind"] * 12)
    config.data.update(source="csv", root=str(table), images=str(shop), split="classes")
    assert (load_data(config, {})[0].split == "test").sum() == 18  # 9 in the CSV


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in TFDS's own mock
def test_the_features_of_a_tfds_data_set_are_fields(tmp_path):
    from siamese_jax.data.tf import tensorflow

    tensorflow()
    import tensorflow_datasets as tfds

    config = common.base()
    config.data.update(source="tfds:stanford_online_products", cache_dir=str(tmp_path))
    with tfds.testing.mock_data(num_examples=9):
        with pytest.raises(UserError, match=r"ClassLabel .* as data\.label_key"):
            load_data(config, {})
        config.data.update(label_key="super_class_id", super_key="super_class_id")
        records, _ = load_data(config, {})
        assert len(set(records.label.tolist())) == len(set(records.super_label.tolist()))
        config.data.image_key = "picture"
        with pytest.raises(UserError, match="no feature 'picture'"):
            load_data(config, {})
        config.data.image_key = "image"
        np.testing.assert_array_equal(load_data(config, {})[0].label, records.label)
