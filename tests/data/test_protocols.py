"""The standard protocols, on miniatures of the original downloads; other counts are refused."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from siamese_jax.data.protocols import PROTOCOLS, Counts, load_protocol
from siamese_jax.data.sources import load_records
from siamese_jax.data.tf import tensorflow
from siamese_jax.errors import UserError


def touch(root, paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / path)


def cub(root):
    """Four classes of three images, in no order of the classes."""
    names = {i: f"{i % 4 + 1:03d}.Bird_{'dcba'[i % 4]}/B_{i}.jpg" for i in range(12)}
    touch(root / "images", names.values())
    (root / "images.txt").write_text("".join(f"{i} {n}\n" for i, n in names.items()))
    (root / "image_class_labels.txt").write_text("".join(f"{i} {i % 4 + 1}\n" for i in names))
    return Counts(6, 2, 6, 6, 2)


def cars(root):
    kinds = np.array([(f"car_ims/{i:06d}.jpg", i % 5 + 1) for i in range(15)], dtype=object)
    touch(root, kinds[:, 0])
    rows = np.zeros(15, dtype=[("relative_im_path", object), ("class", object), ("test", object)])
    rows["relative_im_path"], rows["class"], rows["test"] = kinds[:, 0], kinds[:, 1], 0
    savemat(root / "cars_annos.mat", {"annotations": rows})
    return Counts(9, 3, 6, 6, 2)


def sop(root):
    number = 0
    for split, products in (("train", range(1, 4)), ("test", range(4, 9))):
        lines = ["image_id class_id super_class_id path"]
        for product in products:
            for view in range(2):
                number += 1
                path = f"chair_final/{product}_{view}.JPG"
                touch(root, [path])
                lines.append(f"{number} {product} {product % 2 + 1} {path}")
        (root / f"Ebay_{split}.txt").write_text("\n".join(lines) + "\n")
    return Counts(6, 3, 10, 10, 5)


def inshop(root):
    kinds = ("Dresses", "Skirts", "Tees_Tanks")
    rows = [("train", i // 2, f"img/WOMEN/{kinds[i // 2]}/id_0{i // 2}/{i}.jpg") for i in range(6)]
    rows += [("query", 10 + i, f"img/MEN/Denim/id_{10 + i}/q{i}.jpg") for i in range(2)]
    rows += [("gallery", 10 + i % 2, f"img/MEN/Denim/id_{10 + i % 2}/g{i}.jpg") for i in range(4)]
    rows = [(role, f"id_{item:02d}", path) for role, item, path in rows]
    touch(root, [path for *_, path in rows])
    (root / "Eval").mkdir()
    head = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    lines = "".join(f"{path}      {item}   {role}\n" for role, item, path in rows)
    (root / "Eval" / "list_eval_partition.txt").write_text(head + lines)
    return Counts(6, 3, 2, 4, 2)


LAYOUTS = {"cub": cub, "cars": cars, "sop": sop, "inshop": inshop}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_original_layout(tmp_path, name):
    counts = LAYOUTS[name](tmp_path)
    records = load_protocol(name, tmp_path, counts=counts)
    train, test = records.where("train"), records.where("test")
    assert len(train) == counts.train
    assert len(np.unique(train.label)) == counts.train_classes
    assert test.is_query.sum() == counts.queries
    assert test.is_gallery.sum() == counts.gallery
    assert not np.intersect1d(train.label, test.label).size
    asked = load_records(name, tmp_path, counts=counts)  # the same by the one door
    np.testing.assert_array_equal(asked.split, records.split)
    np.testing.assert_array_equal(asked.is_query, records.is_query)


def test_the_first_classes_by_their_number_train(tmp_path):
    records = load_protocol("cub", tmp_path, counts=cub(tmp_path))
    for split, classes in (("train", {"001", "002"}), ("test", {"003", "004"})):
        assert {p.split("images/")[1][:3] for p in records.where(split).path} == classes


def test_super_classes_and_roles(tmp_path):
    (tmp_path / "sop").mkdir()
    records = load_protocol("sop", tmp_path / "sop", counts=sop(tmp_path / "sop"))
    product = np.array([int(records.class_names[label]) for label in records.label])
    np.testing.assert_array_equal(records.super_label, product % 2)
    (tmp_path / "inshop").mkdir()
    records = load_protocol("inshop", tmp_path / "inshop", counts=inshop(tmp_path / "inshop"))
    assert records.super_label.tolist() == [1, 1, 2, 2, 3, 3] + [0] * 6  # MEN/Denim comes first
    test = records.where("test")
    assert (test.is_query ^ test.is_gallery).all()
    assert {p.split("/")[-1][0] for p in test.path[test.is_query]} == {"q"}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_other_counts_are_refused(tmp_path, name):
    counts = LAYOUTS[name](tmp_path)
    with pytest.raises(UserError, match=r"train \d+ instead of \d+,\d+"):
        load_protocol(name, tmp_path)  # a miniature is not the protocol's
    for field, value in zip(Counts._fields, counts, strict=True):
        wrong = counts._replace(**{field: value + 1})
        with pytest.raises(UserError, match="instead of"):
            load_protocol(name, tmp_path, counts=wrong)


def test_the_counts_of_the_field():
    assert {n: (c.train, c.queries, c.gallery) for n, c in PROTOCOLS.items()} == {
        "cub": (5864, 5924, 5924),
        "cars": (8054, 8131, 8131),
        "sop": (59551, 60502, 60502),
        "inshop": (25882, 14218, 12612),
    }
    assert {n: (c.train_classes, c.test_classes) for n, c in PROTOCOLS.items()} == {
        "cub": (100, 100),
        "cars": (98, 98),
        "sop": (11318, 11316),
        "inshop": (3997, 3985),
    }


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match=r"images\.txt does not exist"):
        load_protocol("cub", tmp_path)
    with pytest.raises(UserError, match="not in TFDS"):
        load_protocol("inshop")
    with pytest.raises(UserError, match="unknown protocol 'imagenet'"):
        load_protocol("imagenet", tmp_path)
    counts = cub(tmp_path)
    (tmp_path / "images" / "001.Bird_d" / "B_0.jpg").unlink()
    with pytest.raises(UserError, match="1 listed images do not exist"):
        load_protocol("cub", tmp_path, counts=counts)
    (tmp_path / "images.txt").write_text("1 a b\n")
    with pytest.raises(UserError, match="line 1: 3 values, not 2"):
        load_protocol("cub", tmp_path, counts=counts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["cub", "cars"])
def test_from_tfds(tmp_path, name):
    tensorflow()
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=40):
        with pytest.raises(UserError, match="instead of"):
            load_protocol(name, cache_dir=tmp_path)
        records = load_records(
            {"cub": "tfds:caltech_birds2011", "cars": "tfds:cars196"}[name],
            cache_dir=tmp_path,
            fractions=None,
        )
        classes = len(records.class_names)
        train = records.label < classes // 2
        counts = Counts(
            int(train.sum()),
            classes // 2,
            int((~train).sum()),
            int((~train).sum()),
            classes - classes // 2,
        )
        found = load_protocol(name, cache_dir=tmp_path, counts=counts)
        np.testing.assert_array_equal(found.split == "train", train)
        np.testing.assert_array_equal(found.split == "test", ~train)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sop_from_tfds_keeps_its_official_split(tmp_path):
    tensorflow()
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=9), pytest.raises(UserError, match="instead of"):
        load_protocol("sop", cache_dir=tmp_path)
    assert list(tmp_path.glob("tfds/stanford_online_products-*class_id-super_class_id/*.csv"))
