"""What a folder, a list and a CSV file of pictures mean, on folders as people have them."""

import io
import os
import shutil
import sys
import unicodedata

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from siamese_jax.data.pictures import scan
from siamese_jax.data.records import content_keys, fingerprint, make_records, marks, split_by_class
from siamese_jax.data.sources import load_images, load_records
from siamese_jax.errors import UserError
from siamese_jax.train.from_config import make_sampler


def fill(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(root / name)
    return root


def listed(records, root):
    """{path: class or None} of records with one label."""
    names = [*records.class_names, None]
    paths = [os.path.relpath(path, root).replace(os.sep, "/") for path in records.path]
    return {path: names[label] for path, label in zip(paths, records.label, strict=True)}


def said(records, text):
    return sum(text in note for note in records.notes)


def both(names, *suffixes):
    return [f"{name}/{suffix}" for name in names for suffix in suffixes]


# Which files are pictures --------------------------------------------------------------------


def test_pictures_are_known_by_suffix_or_content(tmp_path):
    """Whatever Pillow writes and reads again, in any case of its suffix and without one."""
    fill(tmp_path, "a.png")
    written = []
    Image.init()
    for suffix in (
        ".avif",
        ".jp2",
        ".tif",
        ".TIFF",
        ".JPG",
        ".jfif",
        ".ppm",
        ".tga",
        ".ico",
        ".qoi",
    ):
        if suffix.lower() in Image.registered_extensions():
            Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / f"x{suffix}")
            written.append(f"x{suffix}")
    for name in ("without", "photo.jpg~", "IMG_1.JPG.part", "a.xyz"):
        shutil.copy(tmp_path / "a.png", tmp_path / name)
        written.append(name)
    others = {
        "notes.txt": b"BM is how bitmaps begin",
        "labels.h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "film.mpg": b"\0\0\1\xb3" + bytes(64),
        "photo.heic": b"\0\0\0\x18ftypheic" + bytes(64),
        "manual.pdf": b"%PDF-1.7",
        "weights": bytes(1000),
        "empty": b"",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    records = load_images(tmp_path)
    assert set(listed(records, tmp_path)) == {"a.png", *written}
    (note,) = records.notes
    assert note.startswith(f"{tmp_path}: 8 files are no pictures that Pillow can open")
    assert "(2 no suffix, 1 .h5, 1 .heic, 1 .mpg, 1 .pdf, ...; the first is 'empty')" in note


def test_hidden_pictures_are_counted(tmp_path):
    hidden = (".a.png", ".cache/b.png", "x/@eaDir/1.png/THUMB.jpg", ".ipynb_checkpoints/c.png")
    fill(tmp_path, "x/1.png", "y/1.png", *hidden)
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "._1.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")  # no picture
    records = load_images(tmp_path)
    assert listed(records, tmp_path) == {"x/1.png": "x", "y/1.png": "y"}
    assert said(records, "4 pictures are hidden") == len(records.notes) == 1
    assert len(load_images(tmp_path / ".cache")) == 1  # a folder that is named is looked into


def test_links_are_followed_and_loops_survived(tmp_path):
    other = fill(tmp_path / "elsewhere", "1.png", "deep/2.png")
    root = fill(tmp_path / "shop", "a/1.png", "b/2.png")
    links = {"c": other, "a/up": "..", "b/top": "/", "a/me": "me", "gone.png": "nowhere.png"}
    links |= {"a/x": "../b", "b/y": "../a"}  # round and round
    for name, target in links.items():
        os.symlink(target, root / name)
    records = load_images(root, labels="none")
    found = set(listed(records, root))
    assert {"c/1.png", "c/deep/2.png"} < found
    assert len(found) == 4  # the others are these again
    assert {os.path.realpath(path) for path in records.path} == {
        os.path.realpath(path)
        for path in (root / "a/1.png", root / "b/2.png", other / "1.png", other / "deep/2.png")
    }
    assert said(records, "links lead back to a folder that holds them")
    assert said(records, "links lead nowhere (the first is 'a/me')")
    assert said(records, "are reached by several links and count once")


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_names_that_are_no_utf8(tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/cl\xffass")
    fill(tmp_path, "plain/1.png", "plain/2.png")
    os.mkdir(odd)
    for name in (b"\xfe.png", b"\xfd.png"):
        shutil.copy(tmp_path / "plain" / "1.png", os.path.join(odd, os.fsdecode(name)))
    records = load_records("folder", tmp_path)
    assert len(records) == 4
    assert len(fingerprint(records)) == 32
    assert len(marks(records, content_keys(records))) == 4
    (tmp_path / "list.txt").write_bytes(b"cl\xffass/\xfe.png\n")
    assert listed(load_images(tmp_path / "list.txt"), tmp_path).keys() == {
        os.fsdecode(b"cl\xffass/\xfe.png")
    }


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    """macOS writes accents apart; a CSV, or a folder from elsewhere, together."""
    apart, together = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    assert apart != together
    fill(tmp_path, f"query/{apart}/1.png", f"gallery/{together}/1.png", "gallery/tea/1.png")
    records = load_records("folder", tmp_path, fractions=None)
    assert records.class_names == (together, "tea")
    fill(tmp_path / "one", f"{apart}/1.png", f"{together}/2.png", "tea/1.png")
    if len(os.listdir(tmp_path / "one")) == 3:  # not on a file system that takes them for one
        one = load_images(tmp_path / "one")
        assert one.class_names == (together, "tea")
        assert said(one, f"2 folders are named {together!r}") == 1
    (tmp_path / "a.csv").write_text(
        f"path,label\none/tea/1.png,{apart}\none/tea/1.png,{together};x\n", encoding="utf-8"
    )
    assert load_images(tmp_path / "a.csv").class_names == (together, f"{together};x")
    assert load_images(tmp_path / "a.csv", separator=";").class_names == (together, "x")


def test_labels_that_look_like_several_are_said(tmp_path):
    fill(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "a.csv").write_text("path,label\n0.png,cat;black\n1.png,cat\n2.png,dog;black\n")
    note = "2 labels hold ';', and each is taken as one class: where they are several, give "
    note += "--label-separator=';' (in a config, data.separator)"
    records = load_images(tmp_path / "a.csv")
    assert said(records, note) == 1
    assert len(records.class_names) == 3
    for options in ({"separator": ";"}, {"separator": ","}, {"labels": "none"}):
        assert not said(load_images(tmp_path / "a.csv", **options), "labels hold")


# What folders mean -----------------------------------------------------------------------------


def test_no_picture_is_lost_where_labels_are_not_needed(tmp_path):
    """Loose ones beside subfolders, at any depth; with labels it is an error that asks."""
    names = [*(f"{i}.png" for i in range(5)), "thumbs/4.png", "thumbs/small/very/4.png"]
    fill(tmp_path, *names)
    for labels in ("known", "none"):
        records = load_images(tmp_path, labels=labels)
        assert listed(records, tmp_path) == dict.fromkeys(sorted(names))
    assert said(load_images(tmp_path), "no labels are read") == 1
    for read in (
        lambda: load_images(tmp_path, labels="needed"),
        lambda: load_records("folder", tmp_path),
    ):
        with pytest.raises(UserError, match=r"5 images lie beside 1 folders with 2 images") as e:
            read()
        assert all(f"layout={way}" in str(e.value) for way in ("classes", "images"))
        assert "\n" not in str(e.value)
    told = load_images(tmp_path, layout="classes", labels="needed")
    assert listed(told, tmp_path) == dict.fromkeys(names[5:], "thumbs")


def test_a_stray_picture_has_no_class(tmp_path):
    fill(tmp_path, *both("abc", "1.png", "2.png"), "contact_sheet.png")
    known, needed = load_images(tmp_path), load_images(tmp_path, labels="needed")
    assert listed(known, tmp_path)["contact_sheet.png"] is None
    assert said(known, "1 images lie beside the class folders and have no label") == 1
    assert len(needed) == 6
    assert said(needed, "1 images lie beside the class folders and are left out") == 1


BESIDE = ("__MACOSX", "annotations", ".ipynb_checkpoints", "@eaDir", "empty")


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Train", "Test"), ("TRAINING", "testing"), ("train2017", "test_set")],
)
def test_split_names_are_never_classes(tmp_path, train, test):
    fill(tmp_path, *both([f"{train}/{c}" for c in "ab"], "1.png", "2.png"))
    fill(tmp_path, *both([f"{test}/{c}" for c in "cd"], "1.png", "2.png"))
    for name in BESIDE:
        (tmp_path / name).mkdir()
    (tmp_path / "annotations" / "a.json").write_text("{}")
    fill(tmp_path, "@eaDir/1.png", ".ipynb_checkpoints/2.png")
    for read in (load_images, lambda root: load_records("folder", root)):
        records = read(tmp_path)
        assert records.class_names == ("a", "b", "c", "d")
        for split, classes in (("train", {"a", "b"}), ("test", {"c", "d"})):
            assert set(listed(records.where(split), tmp_path).values()) == classes
        assert said(records, "2 pictures are hidden") == 1
    val = fill(tmp_path, *both(["Valid/e", "validation/f"], "1.png", "2.png"))
    assert len(load_records("folder", val).where("validation")) == 4


def test_split_folders_that_could_be_something_else(tmp_path):
    """Each is an error where labels are needed, and all its pictures, unlabelled, where not."""
    cases = {
        "no class folders": ["train/1.png", "test/1.png"],
        "beside test/, train/ stand 1 folders with 1 images": [
            "train/a/1.png",
            "test/b/1.png",
            "more/1.png",
        ],
        "images lie two folders deep": both(["train/s/a", "train/s/b", "test/c/d"], "1.png"),
        "images lie beside 2 folders": ["train/a/1.png", "test/b/1.png", "1.png", "2.png"],
        "folder 'query' without the other": ["query/a.png", "database/a.png"],
        "a split holds folders named as splits": both(["train/train/a", "train/test/b"], "1.png"),
    }
    for i, (message, names) in enumerate(cases.items()):
        root = fill(tmp_path / str(i), *names)
        for read in (
            lambda root: load_records("folder", root),
            lambda root: load_images(root, labels="needed"),
        ):
            with pytest.raises(UserError, match=message) as caught:
                read(root)
            assert "\n" not in str(caught.value)
        records = load_images(root)
        assert listed(records, root) == dict.fromkeys(names), message
        assert said(records, "no labels are read") == 1
        if i not in (0, 5):
            assert "layout=images" in str(caught.value)
    root = tmp_path / "1"
    splits = load_records("folder", root, layout="splits", fractions=None)
    assert listed(splits, root) == {"test/b/1.png": "b", "train/a/1.png": "a"}
    assert said(splits, "1 images lie beside the known folders and are left out") == 1
    assert load_images(tmp_path / "0").split.tolist() == ["test", "train"]


CHAINS = {
    "splits within": both([f"x/data/{c}" for c in ("train/a", "train/b", "test/c")], "1.png"),
    "versions": both(["v1/images/cat", "v1/images/dog", "v2/images/cat"], "1.png"),
    "the download's folder": both([f"CUB/images/{c}" for c in ("001.a", "002.b")], "1.png"),
    "long": both(["x/y/z/a", "x/y/z/b"], "1.png"),
    "loose beside": [*both(["x/a", "x/b", "y/a", "y/b"], "1.png"), "x/0.png", "y/0.png"],
    "in a split": both(["train/s/imgs2/a", "train/s/imgs2/b", "test/c"], "1.png"),
    "no class beside": both(["train", "annotations", "masks"], "1.png"),
}


@pytest.mark.parametrize("names", CHAINS.values(), ids=CHAINS)
def test_classes_at_another_depth_are_asked_for(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(UserError, match="say what is meant"):
        load_records("folder", tmp_path)
    records = load_images(tmp_path)
    assert listed(records, tmp_path) == dict.fromkeys(names)
    assert said(records, "no labels are read") == 1


def test_trains_and_anchors_are_things_too(tmp_path):
    for name in ("train", "anchor"):
        root = fill(tmp_path / name, *both(["bus", "car", name], "1.png", "2.png"))
        records = load_records("folder", root)
        assert records.class_names == tuple(sorted(("bus", "car", name)))
        assert said(records, f"the folder {name!r} is read as a class") == 1
    with pytest.raises(UserError, match=r"beside test/ stand 2 folders with 4 images \('a', 'b'\)"):
        load_records("folder", fill(tmp_path / "t", *both(["a", "b", "test"], "1.png", "2.png")))


def test_one_split_alone_is_divided(tmp_path):
    """A download of train/ only; of train/ and val/ each keeps its part."""
    fill(tmp_path, *both([f"train/{c}" for c in "abcd"], "1.png", "2.png"))
    records = load_records("folder", tmp_path)
    assert sorted(set(records.split)) == ["test", "train"]
    assert said(records, "only the split 'train' is there") == 1
    assert (load_images(tmp_path).split == "train").all()
    fill(tmp_path, *both(["val/e"], "1.png", "2.png"))
    assert sorted(set(load_records("folder", tmp_path).split)) == ["train", "validation"]


def test_nested_class_folders_are_asked_about(tmp_path):
    nested = both(["shoes/nike", "shoes/vans", "hats/cap", "hats/fez"], "1.png", "2.png")
    fill(tmp_path, *nested)
    with pytest.raises(UserError, match=r"layout=classes \(the 2 outer.*layout=leaves \(the 4"):
        load_records("folder", tmp_path)
    assert listed(load_images(tmp_path), tmp_path) == dict.fromkeys(sorted(nested))
    outer = load_records("folder", tmp_path, layout="classes", fractions=None)
    inner = load_records("folder", tmp_path, layout="leaves", fractions=None)
    assert outer.class_names == ("hats", "shoes")
    assert inner.class_names == ("hats/cap", "hats/fez", "shoes/nike", "shoes/vans")
    # One folder inside, or pictures beside it, leave one way to take them.
    sure = fill(tmp_path / "sure", "a/images/1.png", "a/images/2.png", "b/1.png", "b/more/x/2.png")
    assert load_images(sure, labels="needed").class_names == ("a", "b")


def test_a_folder_around_everything_is_no_class(tmp_path):
    fill(tmp_path, *both(["images/a", "images/b"], "1.png", "2.png"))
    (tmp_path / "labels.txt").write_text("a\nb\n")
    records = load_images(tmp_path, labels="needed")
    assert records.class_names == ("a", "b")
    assert said(records, "is read as if it were") == 1
    flat = fill(tmp_path / "flat", "images/1.png", "images/2.png")
    assert (load_images(flat).label == -1).all()


def test_pairs_in_any_case_and_beside_training_folders(tmp_path):
    fill(tmp_path, "Query/x/1.png", "GALLERY/x/2.png", "GALLERY/y/1.png", "GALLERY/y/2.png")
    records = load_records("folder", tmp_path, fractions=None)
    assert records.side.tolist() == [0, 1, 1, 1]
    assert records.is_query.tolist() == [True, False, False, False]
    assert said(records, "query/ has 1 classes and gallery/ 2, of which 1 are in both") == 1
    fill(tmp_path, "train/z/1.png", "train/z/2.png", "train/w/1.png", "train/w/2.png")
    records = load_records("folder", tmp_path)
    assert records.split.tolist() == ["test"] * 4 + ["train"] * 4
    assert records.is_query.tolist() == [True] + [False] * 3 + [True] * 4
    split = fill(tmp_path / "split", *both(["train/anchor", "train/positive"], "1.png", "2.png"))
    fill(split, *both(["test/anchor", "test/positive"], "3.png"))
    records = load_records("folder", split)
    assert records.side.tolist() == [0, 1, 0, 0, 1, 1]
    assert records.split.tolist() == ["test"] * 2 + ["train"] * 4
    triplets = fill(tmp_path / "t", *both(["anchor", "positive", "negative"], "1.png", "2.png"))
    with pytest.raises(UserError, match="'negative'"):
        load_records("folder", triplets)
    assert len(load_images(triplets)) == 6
    named = load_records("anchor_positive", triplets, fractions=None)
    assert len(named) == 4
    assert said(named, "2 images lie beside the known folders and are left out") == 1


def test_mistakes_about_layouts(tmp_path):
    fill(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a.csv").write_text("path,label\na/1.png,x\n")
    for read, message in [
        (lambda: load_images(tmp_path, layout="tree"), "no layout 'tree'; known: query_gallery"),
        (lambda: load_images(tmp_path, layout="splits"), "no folder of images called train"),
        (lambda: load_images(tmp_path, layout="query_gallery"), "query holds no image"),
        (lambda: load_images(tmp_path / "a.csv", layout="leaves"), "is said of a folder"),
        (lambda: load_images(tmp_path, labels="maybe"), "labels='maybe': use needed, known"),
    ]:
        with pytest.raises(UserError, match=message):
            read()


# Lists and CSV files ----------------------------------------------------------------------------


def test_lists_of_pictures(tmp_path, monkeypatch):
    fill(tmp_path, "0.png", "1.png", "in/2.png", "in/deep/3.png")
    want = ["1.png", "0.png", "1.png", "in/2.png", "in/deep/3.png"]
    (tmp_path / "list.txt").write_bytes("\ufeff1.png\r\n0.png\n\n1.png\nin\n".encode())
    entries = ["1.png", "0.png", "1.png", "in"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(tmp_path / "list.txt", elsewhere)
    monkeypatch.chdir(tmp_path)

    def paths(place):
        records = load_images(place)
        assert (records.label == -1).all()
        assert records.is_query.all()
        assert records.is_gallery.all()
        return [os.path.relpath(path, tmp_path) for path in records.path], records

    assert paths("list.txt")[0] == paths([tmp_path / e for e in entries])[0] == want
    assert paths(iter(entries))[0] == want
    found, records = paths(elsewhere / "list.txt")
    assert found == want
    assert said(records, "paths start from the current folder") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/2.png\n0.png\n")))
    assert paths("-")[0] == ["in/2.png", "0.png"]
    (tmp_path / "notes.md").write_text("no picture")
    found, records = paths("*.*")  # ... but elsewhere/, which holds none, is not named .something
    assert found == ["0.png", "1.png"]
    assert said(records, "2 files are no pictures") == 1
    deep = ["0.png", "1.png", "in/2.png", "in/deep/3.png"]
    assert paths("**/*.png")[0] == paths("**")[0] == deep  # a folder and what is in it: once
    fill(tmp_path, "odd[1].png")
    assert paths("odd[1].png")[0] == ["odd[1].png"]  # a name that is there is no pattern
    stems = load_images("list.txt", labels="stem")
    assert [stems.class_names[label] for label in stems.label] == ["1", "0", "1", "2", "3"]


def test_comments_and_dead_paths_of_a_list_are_left_out(tmp_path, monkeypatch):
    fill(tmp_path, "0.png", "1.png")
    (tmp_path / "list.txt").write_text("# mine\n0.png\nno.png\n#1.png\n1.png\n")
    found = load_images(tmp_path / "list.txt")
    assert [os.path.basename(path) for path in found.path] == ["0.png", "1.png"]
    said = f"1 of 3 images do not exist, the first is {tmp_path}/no.png (line 3); they are left out"
    assert len(found.notes) == 1
    assert said in found.notes[0]
    # From the current folder, where more of them are.
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text("0.png\nno.png\n")
    monkeypatch.chdir(tmp_path)
    found = load_images("lists/list.txt")
    assert (list(found.path), len(found.notes)) == (["0.png"], 1)
    assert len(load_images([tmp_path / "0.png", tmp_path / "no.png"])) == 1


def test_mistakes_in_lists(tmp_path, monkeypatch):
    fill(tmp_path, "0.png")
    texts = {
        "gone.txt": b"# a list\nyes.png\nno.png\n",
        "empty.txt": b"\n\n",
        "binary.bin": b"\0\1\2",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text)
    for place, message in [
        ("gone.txt", r"2 of 2 images do not exist, the first is .*yes.png \(line 2\)"),
        ("empty.txt", "is empty: a list of pictures has one path a line"),
        ("binary.bin", "neither a picture that Pillow can open nor a folder"),
        ("nowhere", "does not exist; give a folder, a picture, a list"),
        ("*.gif", "matches 0 files"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_images(tmp_path / place)
        assert "\n" not in str(caught.value)
    for empty in ([], ()):
        with pytest.raises(UserError, match="holds no picture"):
            load_images(empty)
    with pytest.raises(UserError, match="there are no labels"):
        load_images([tmp_path / "0.png"], labels="needed")


def test_a_csv_without_some_or_all_labels(tmp_path):
    fill(tmp_path, *(f"{i}.png" for i in range(6)))
    alone, some = tmp_path / "alone.csv", tmp_path / "some.csv"
    alone.write_text("path\n0.png\n1.png\n")
    cells = ("x", "", "NaN", "none", "x", "y")
    some.write_text("path,label\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(cells)))
    assert load_images(alone).label.tolist() == [-1, -1]
    for labels in ("known", "needed"):
        records = load_images(some, labels=labels)
        assert list(listed(records, tmp_path).values()) == ["x", None, None, None, "x", "y"]
        assert said(records, "3 of 6 images have no label") == 1
    assert (load_images(some, labels="none").label == -1).all()
    hot = load_images(some, separator=";")
    assert hot.label.tolist() == [[1, 0], [0, 0], [0, 0], [0, 0], [1, 0], [0, 1]]
    with pytest.raises(UserError, match=r"line 3: the label is empty \(3 of 6 are\)"):
        load_records("csv", some)
    for read in (lambda: load_records("csv", alone), lambda: load_images(alone, labels="needed")):
        with pytest.raises(UserError, match=r"no column 'label' \(it has: path\)"):
            read()
    (tmp_path / "bare.csv").write_text("path,label\n0.png,\n")
    with pytest.raises(UserError, match="there are no labels"):
        load_images(tmp_path / "bare.csv", labels="needed")


# Sides, lone classes and order -------------------------------------------------------------------


def sampler_of(records, **options):
    config = ConfigDict({"seed": 0, "sampler": {"name": "classes", **options}})
    return make_sampler(config, records)


def test_a_class_of_one_picture_stops_nothing(tmp_path, caplog):
    """Two sides are a fact of the source: who happens to be asked says nothing about them."""
    fill(tmp_path, *both([f"train/{c}" for c in range(9)], "1.png", "2.png"), "train/lone/1.png")
    fill(tmp_path, *both([f"test/t{c}" for c in range(3)], "1.png", "2.png"))
    records = load_records("folder", tmp_path)
    assert records.side is None
    assert not records.is_query.all()
    sample = sampler_of(records, batch_size=16, per_class=2)
    assert "1 of 10 training classes are in no batch: they have fewer than 2 images" in caplog.text
    train = records.where("train")
    drawn = np.unique(np.concatenate([train.label[sample(step)] for step in range(20)]))
    assert [train.class_names[label] for label in drawn] == [str(c) for c in range(9)]


def test_sides_come_from_the_source(tmp_path, caplog):
    """Positives are of the other side where a class has both; a CSV may say `side` itself."""
    rows = [f"{i}.png,{i // 4},{'shop' if i % 4 < 3 else 'street'}" for i in range(16)]
    rows += [f"{i}.png,{i // 4},shop" for i in range(16, 20)]  # one side alone
    fill(tmp_path, *(f"{i}.png" for i in range(20)))
    (tmp_path / "a.csv").write_text(
        "path,label,side,split\n" + "".join(f"{r},train\n" for r in rows)
    )
    records = load_records("csv", tmp_path / "a.csv", fractions=None)
    assert records.side.tolist() == [0, 0, 0, 1] * 4 + [0] * 4
    sample = sampler_of(records, batch_size=16, per_class=2)
    assert "1 of 5 training classes are in no batch" in caplog.text
    assert "or images of one side" in caplog.text
    for step in range(10):
        sides, labels = records.side[sample(step)], records.label[sample(step)]
        assert (labels < 4).all()
        for label in range(4):
            assert set(sides[labels == label]) == {0, 1}
    (tmp_path / "a.csv").write_text("path,label,side\n0.png,x,\n")
    with pytest.raises(UserError, match="line 2: the side is empty"):
        load_records("csv", tmp_path / "a.csv")
    # No class has both sides: they are left alone, and it is said.
    one = make_records(list("abcd"), list("xxyy"), root="", split=["train"] * 4, side=[0, 0, 1, 1])
    assert len(sampler_of(one, batch_size=4, per_class=2)(0)) == 4
    assert "no training class has images of two sides" in caplog.text


def test_classes_that_share_a_number_are_in_one_order():
    names = ["1", "01", "001", "2", "10"]
    rng = np.random.default_rng(0)
    orders = set()
    for _ in range(20):
        records = make_records(list("abcde"), list(rng.permutation(names)), root="")
        orders.add(records.class_names)
    assert orders == {("001", "01", "1", "2", "10")}
    split = split_by_class(records, seed=0, fractions=(0.6, 0, 0.4))
    assert (split.split == "test").sum() == 2


def test_a_listing_of_many_files_is_not_opened(tmp_path, monkeypatch):
    fill(tmp_path, "a/1.png", "a/2.JPG", "b/3.webp")

    def refuse(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    assert len(scan(tmp_path).pictures) == 3


def test_the_order_of_a_listing_does_not_matter(tmp_path, monkeypatch):
    fill(tmp_path, *both(["a", "a b", "a/c", "é"], "1.png", "10.png"), "0.png", ".x.png")
    (tmp_path / "n.txt").touch()
    want = scan(tmp_path)
    listing = os.scandir

    def shuffled(path):
        return iter(np.random.default_rng(1).permutation(list(listing(path))))

    monkeypatch.setattr(os, "scandir", shuffled)
    assert scan(tmp_path) == want
    assert want.pictures == [
        "0.png",
        *("a/1.png", "a/10.png", "a/c/1.png", "a/c/10.png"),
        *("a b/1.png", "a b/10.png", "é/1.png", "é/10.png"),
    ]
