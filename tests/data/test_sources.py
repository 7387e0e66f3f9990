"""Every source becomes the same records; every mistake is one line."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siamese_jax.data.records import make_records, told_copies
from siamese_jax.data.sources import (
    content_keys,
    fingerprint,
    load_images,
    load_records,
    split_by_class,
)
from siamese_jax.errors import UserError


def fill(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(root / name)
    return root


def names_of(records):
    return [records.class_names[label] for label in records.label]


def test_a_folder_of_class_folders(tmp_path):
    fill(tmp_path, "cat/1.jpg", "cat/deep/2.PNG", "dog/1.jpg", "dog/2.webp", "owl/1.bmp")
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / ".hidden.jpg").touch()
    (tmp_path / ".cache").mkdir()
    records = load_records("folder", tmp_path, fractions=None)
    assert records.class_names == ("cat", "dog", "owl")
    assert names_of(records) == ["cat", "cat", "dog", "dog", "owl"]
    assert (records.split == "").all()
    assert records.is_gallery.all()
    np.testing.assert_array_equal(records.id, np.arange(5))
    # The rule for a class of one image: a distractor that is not asked, and it is said.
    assert records.is_query.tolist() == [True] * 4 + [False]
    other, lonely = records.notes
    assert "1 files are no pictures" in other
    assert "(1 .txt; the first is 'cat/notes.txt')" in other
    assert "1 queries" in lonely
    assert "owl" in lonely


def test_query_and_gallery_by_folder_and_by_name(tmp_path):
    by_folder = fill(tmp_path / "a", "query/x/1.jpg", "query/y/1.jpg", "gallery/x/7.jpg")
    by_name = fill(tmp_path / "b", "query/x.jpg", "query/y.png", "gallery/x.png", "gallery/z.jpg")
    mixed = fill(tmp_path / "c", "query/x/1.jpg", "query/x/2.jpg", "gallery/x.png")
    for root, classes, asked in [
        (by_folder, ["x", "y", "x"], [True, False, False]),
        (by_name, ["x", "y", "x", "z"], [True, False, False, False]),
        (mixed, ["x", "x", "x"], [True, True, False]),
    ]:
        for source in ("folder", "query_gallery"):
            records = load_records(source, root, fractions=None)
            assert names_of(records) == classes
            assert records.is_query.tolist() == asked
            np.testing.assert_array_equal(
                records.is_gallery, ["/gallery/" in p.replace(os.sep, "/") for p in records.path]
            )
            np.testing.assert_array_equal(records.side, records.is_gallery)


def test_anchor_and_positive(tmp_path):
    fill(tmp_path, *(f"{side}/{i}.png" for side in ("anchor", "positive") for i in range(4)))
    for source in ("folder", "anchor_positive"):
        records = load_records(source, tmp_path, seed=3)
        assert names_of(records) == ["0", "1", "2", "3"] * 2
        assert records.is_query.tolist() == [True] * 4 + [False] * 4
        assert sorted(records.split) == ["test"] * 4 + ["train"] * 4
    fill(tmp_path, "positive/5.png")
    with pytest.raises(UserError, match="'5'; every anchor needs"):
        load_records("folder", tmp_path)


def test_train_and_test_folders_keep_their_split(tmp_path):
    fill(tmp_path, "train/a/1.png", "train/a/2.png", "val/b/1.png", "val/b/2.png", "test/c/1.png")
    records = load_records("folder", tmp_path)
    assert records.split.tolist() == ["test"] + ["train"] * 2 + ["validation"] * 2
    assert names_of(records) == ["c", "a", "a", "b", "b"]
    again = load_records("folder", tmp_path, split="classes", fractions=(1 / 3, 1 / 3, 1 / 3))
    assert len(set(again.split.tolist())) == 3
    with pytest.raises(UserError, match="choose own or classes"):
        load_records("folder", tmp_path, split="mine")
    with pytest.raises(UserError, match="train brings no split; take classes"):
        load_records("folder", tmp_path / "train", split="own")


def test_what_is_left_out_or_shared_is_said(tmp_path):
    fill(tmp_path / "a", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "loose.png")
    (tmp_path / "a" / "owl").mkdir()
    records = load_records("folder", tmp_path / "a")
    assert len(records) == 4
    assert any("1 class folders hold no image, the first is 'owl'" in n for n in records.notes)
    assert any("'loose.png'" in n for n in records.notes)
    fill(
        tmp_path / "b", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "xy" for i in "12")
    )
    notes = load_records("folder", tmp_path / "b").notes
    assert any("2 classes are in both train and test (the first is 'x')" in n for n in notes)
    again = load_records("folder", tmp_path / "b", split="classes")
    np.testing.assert_array_equal(
        load_records("folder", tmp_path / "b", split="own").split[:2], "test"
    )
    assert not any("both" in n for n in again.notes)


CSV = """,label,path,split,is_query,is_gallery,category,x_1,y_1,x_2,y_2
0,10,a/1.png,train,,,shoes,,,,
1,10,a/2.png,train,nan,,shoes,1,2,5.0,6
2,9,b/1.png,validation,True,False,hats,,,,
3,9,b/2.png,validation,False,True,hats,,,,
4,9,b/3.png,test,1,0,hats,,,,
5,9,b/4.png,test,0,1.0,hats,0,0,8,8
"""


def test_a_csv_of_open_metric_learning(tmp_path):
    fill(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png", "b/4.png")
    (tmp_path / "df.csv").write_text(CSV)
    records = load_records("csv", tmp_path / "df.csv")
    assert records.class_names == ("9", "10")  # numbers in the order of numbers
    assert records.label.tolist() == [1, 1, 0, 0, 0, 0]
    assert records.split.tolist() == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert records.is_query.tolist() == [False, False, True, False, True, False]
    assert records.is_gallery.tolist() == [False, False, False, True, False, True]
    assert records.box.tolist()[1] == [1, 2, 5, 6]
    assert not records.box[[0, 2, 3, 4]].any()
    assert records.super_label.tolist() == [1, 1, 0, 0, 0, 0]
    assert all(os.path.isfile(p) for p in records.path)
    part = records.where("train")
    assert part.id.tolist() == [0, 1]
    assert part.box.tolist() == [[0, 0, 0, 0], [1, 2, 5, 6]]


def test_a_short_csv_with_a_byte_order_mark_and_its_images_elsewhere(tmp_path):
    fill(tmp_path / "images", "1.png", "2.png", "3.png", "4.png")
    (tmp_path / "a.csv").write_text(
        "path, label\n1.png, x\n2.png, x\n\n3.png, y\n4.png, y\n", encoding="utf-8-sig"
    )
    records = load_records("csv", tmp_path / "a.csv", images=str(tmp_path / "images"))
    assert names_of(records) == ["x", "x", "y", "y"]
    assert sorted(records.split) == ["test", "test", "train", "train"]
    assert records.is_query.all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'label'"),
        ("label,file\nx,1.png\n", r"no column 'path' \(it has: label, file\)"),
        ("label,path\n", "no rows"),
        ("label,path\nx,1.png\nx,no.png\n", r"1 of 2 images do not exist.*no.png \(line 3\)"),
        ("label,path\n,1.png\n", "line 2: the label is empty"),
        ("label,path,split\nx,1.png,trian\n", "line 2: split 'trian' is none of train"),
        ("label,path,is_query\nx,1.png,maybe\n", "line 2: is_query 'maybe'"),
        ("label,path\nx,1.png,3\n", "line 2: 3 values under a header of 2"),
        ("label,path,x_1\nx,1.png,3\n", "a box needs x_1, y_1, x_2, y_2"),
        ("label,path,x_1,y_1,x_2,y_2\nx,1.png,3,1,2,8\n", "line 2: the box"),
        ("label,path,x_1,y_1,x_2,y_2\nx,1.png,a,1,2,8\n", "is not numbers"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, text, message):
    fill(tmp_path, "1.png")
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_records("csv", tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_messages_name_the_csv_and_not_the_folder_that_its_paths_start_from(tmp_path, monkeypatch):
    fill(tmp_path, "1.png", "2.png")
    (tmp_path / "a.csv").write_text("path,label\n1.png,u;v\n2.png,u\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^a\.csv: images with several labels cannot be split"):
        load_records("csv", "a.csv", separator=";")
    records = load_records("csv", "a.csv", separator=";", fractions=None)
    with pytest.raises(UserError, match=r"^a\.csv: no images in the split 'test'"):
        records.where("test")


def test_a_csv_that_is_none(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not a CSV file in UTF-8"):
        load_records("csv", tmp_path / "a.csv")
    with pytest.raises(UserError, match="must name the file"):
        load_records("csv", tmp_path)


def test_mistakes_in_folders(tmp_path):
    flat = fill(tmp_path / "flat", "1.jpg", "2.jpg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "half" / "gallery").mkdir(parents=True)
    fill(tmp_path / "half", "query/1.jpg")
    apart = fill(tmp_path / "apart", "query/1.jpg", "gallery/2.jpg")
    twice = fill(tmp_path / "twice", "anchor/1.jpg", "anchor/1.png", "positive/1.jpg")
    one = fill(tmp_path / "one", "cat/1.jpg", "cat/2.jpg")
    for root, message in [
        (tmp_path / "nowhere", "does not exist"),
        (flat / "1.jpg", "is a file, not a folder"),
        (tmp_path / "empty", "neither images nor folders"),
        (flat, "images but no class folders"),
        (tmp_path / "hollow", "holds no image"),
        (tmp_path / "half", "gallery holds no image"),
        (apart, "share no class"),
        (twice, "two files are named '1'"),
        (one, "1 classes are too few for 50% (test|train)"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_records("folder", root)
        assert "\n" not in str(caught.value)


def test_mistakes_in_the_call(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    for arguments, options, message in [
        (("photos", tmp_path), {}, "unknown data source 'photos'; known: folder"),
        (("folder",), {}, "needs data.root"),
        (("emoji", tmp_path), {}, "no data.root"),
        (("folder", tmp_path), {"shuffle": True}, "has no option 'shuffle'"),
        (("folder", tmp_path), {"fractions": (0.5, 0.5)}, "three for train"),
        (("folder", tmp_path), {"fractions": (0.5, 0.4, 0.3)}, "the sum 1"),
    ]:
        with pytest.raises(UserError, match=message):
            load_records(*arguments, **options)
    with pytest.raises(
        UserError, match=r"no images in the split 'validation' \(splits: test, train"
    ):
        load_records("folder", tmp_path).where("validation")


def test_load_images_takes_what_there_is(tmp_path):
    flat = fill(tmp_path / "flat", "1.jpg", "deep/.no.jpg")
    classes = fill(tmp_path / "classes", "x/1.jpg", "y/1.jpg")
    (tmp_path / "a.csv").write_text("path,label\nflat/1.jpg,u\n")
    assert load_images(flat).label.tolist() == [-1]
    assert load_images(flat / "1.jpg").label.tolist() == [-1]
    assert names_of(load_images(classes)) == ["x", "y"]
    assert names_of(load_images(tmp_path / "a.csv")) == ["u"]
    assert all((load_images(p).split == "").all() for p in (flat, classes, tmp_path / "a.csv"))
    assert load_records("images", flat).label.tolist() == [-1]


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 99), st.sampled_from([0.2, 0.5, 0.8]))
def test_a_split_by_class_shares_no_class(classes, seed, test_share):
    rng = np.random.default_rng(seed)
    labels = [str(i) for i in rng.permutation(np.repeat(np.arange(classes), 3))]
    records = make_records([f"{i}.jpg" for i in range(len(labels))], labels, root="")
    n_test = round(test_share * classes)
    if n_test in (0, classes):
        with pytest.raises(UserError, match="too few"):
            split_by_class(records, seed=seed, fractions=(1 - test_share, 0, test_share))
        return
    split = split_by_class(records, seed=seed, fractions=(1 - test_share, 0, test_share)).split
    parts = {s: set(records.label[split == s].tolist()) for s in ("train", "test")}
    assert not parts["train"] & parts["test"]
    assert len(parts["test"]) == n_test
    assert len(parts["train"]) == classes - n_test
    again = split_by_class(records, seed=seed, fractions=(1 - test_share, 0, test_share)).split
    np.testing.assert_array_equal(split, again)


def test_a_validation_share_comes_from_the_training_classes():
    records = make_records([str(i) for i in range(40)], [str(i) for i in range(40)], root="")
    without = split_by_class(records, seed=1, fractions=(0.5, 0.0, 0.5)).split
    split = split_by_class(records, seed=1, fractions=(0.4, 0.1, 0.5)).split
    np.testing.assert_array_equal(split == "test", without == "test")
    assert (split == "validation").sum() == 4


def test_fingerprints_notice_what_matters_and_nothing_else(tmp_path):
    names = [f"{c}/{i}.png" for c in "abcd" for i in range(2)]
    root = fill(tmp_path / "one", *names)
    print_of = fingerprint(load_records("folder", root))
    assert len(print_of) == 32
    int(print_of, 16)
    copy = fill(tmp_path / "elsewhere" / "two", *names)
    assert fingerprint(load_records("folder", copy)) == print_of  # the place does not matter
    records = load_records("folder", root)
    assert fingerprint(records.select(np.arange(8)[::-1])) == print_of  # nor the order
    assert fingerprint(load_records("folder", root, seed=5)) != print_of  # the split does
    (copy / "a" / "0.png").rename(copy / "a" / "9.png")
    assert fingerprint(load_records("folder", copy)) != print_of

    file = root / "a" / "0.png"
    before, keys = os.stat(file), content_keys(records)
    assert len(keys) == 8
    assert len(set(keys)) == 8
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # one bit, the size and the time stamp as they were
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = content_keys(records)
    assert [a != b for a, b in zip(keys, after, strict=True)] == [True] + [False] * 7
    assert fingerprint(records) != print_of
    assert fingerprint(records, keys) == print_of
    file.unlink()
    (root / "a" / "1.png").unlink()
    gone = content_keys(records)
    assert len(set(gone) | set(keys)) == 10  # unreadable files share no key, and have no content's
    assert gone[2:] == after[2:]
    assert content_keys(load_records("folder", root)) == gone[2:]


def test_a_box_is_part_of_the_content(tmp_path):
    fill(tmp_path, "1.png")
    keys = []
    for i, box in enumerate((",,,", "0,0,4,4", "0,0,4,5")):
        (tmp_path / f"{i}.csv").write_text(f"path,label,x_1,y_1,x_2,y_2\n1.png,a,{box}\n")
        keys += content_keys(load_images(tmp_path / f"{i}.csv"))
    assert len(set(keys)) == 3
    assert content_keys(load_images(tmp_path / "1.png")) == keys[:1]


def test_pictures_in_two_splits_or_two_classes_are_told(tmp_path):
    """By content: the file's name and folder say nothing of it."""
    fill(
        tmp_path, "train/u/1.png", "train/u/2.png", "train/v/1.png", "test/w/1.png", "test/w/2.png"
    )
    records = load_records("folder", tmp_path)
    assert told_copies(records, content_keys(records)) == []
    (tmp_path / "test" / "w" / "1.png").write_bytes((tmp_path / "train/u/2.png").read_bytes())
    split, label = told_copies(records, content_keys(records))
    assert "1 pictures of test are in train as well" in split
    assert "1 pictures are in several classes" in label
    for line in (split, label):
        assert str(tmp_path / "train" / "u" / "2.png") in line
        assert str(tmp_path / "test" / "w" / "1.png") in line
    (tmp_path / "train" / "v" / "copy.png").write_bytes((tmp_path / "train/v/1.png").read_bytes())
    records = load_records("folder", tmp_path)
    *_, twice = told_copies(records, content_keys(records))
    assert "1 pictures are copies of another of their class and split" in twice
    assert "copy.png" in twice
