"""The tools on places as people give them: they rank whatever there is, and say what they saw."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from siamese_jax.__main__ import main

ENCODER = ["--encoder=resnet18", "--weights=random", "--image-size=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_trunk):
    """photos/ of five pictures; shop/ of the same five, loose beside a folder of thumbnails."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (3, 3, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
        for folder in ("photos", "shop", "shop/thumbs" if i == 4 else "shop"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / f"{i}.png")
    (root / "shop" / "prices.txt").write_text("0 1.20")
    for i, name in enumerate(("q/2024-05", "q/2024-06", "g/dairy", "g/fruit")):
        (root / name).mkdir(parents=True)
        for j in range(2):
            shutil.copy(root / "photos" / f"{(i + j) % 5}.png", root / name / f"{j}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


def rank(world, *options, encoder=ENCODER):
    """[(query, gallery, query_label, correct)] as the CSV has them."""
    out = world / "out.csv"
    assert main(["rank", *encoder, *map(str, options), f"--out={out}"]) == 0
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    keys = ("query", "gallery", "query_label", "correct")
    return [tuple(row[key] for key in keys) for row in rows]


def test_loose_pictures_are_found(world, caplog):
    rows = rank(world, f"--query={world}/photos", f"--gallery={world}/shop", "-k1")
    assert [Path(query).name for query, *_ in rows] == [f"{i}.png" for i in range(5)]
    for query, gallery, label, correct in rows:
        assert Path(query).read_bytes() == Path(gallery).read_bytes()
        assert label == correct == ""
    assert "5 images lie beside 1 folders with 1 images ('thumbs')" in caplog.text
    assert "1 files are no pictures that Pillow can open" in caplog.text


def test_a_list_is_taken_wherever_a_folder_is(world, tmp_path, monkeypatch, caplog):
    gallery = f"--gallery={world}/shop"
    want = rank(world, f"--query={world}/photos", gallery, "-k3")
    paths = [str(world / "photos" / f"{i}.png") for i in range(5)]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    (tmp_path / "alone.csv").write_text("path\n" + "\n".join(paths))
    (tmp_path / "some.csv").write_text("path,label\n" + "".join(f"{p},nan\n" for p in paths))
    places = [tmp_path / "list.txt", tmp_path / "alone.csv", tmp_path / "some.csv"]
    for place in (*places, f"{world}/photos/*.png"):
        assert rank(world, f"--query={place}", gallery, "-k3") == want
    monkeypatch.chdir(world / "photos")
    (world / "near.csv").write_text("path\n" + "".join(f"photos/{i}.png\n" for i in range(5)))
    near = rank(world, "--query=../near.csv", gallery, "-k3")
    assert [(Path(q).name, *rest) for q, *rest in near] == [
        (Path(q).name, *rest) for q, *rest in want
    ]
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(paths).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert rank(world, "--query=-", gallery, "-k3") == want
    out = tmp_path / "v.npz"
    assert main(["embed", *ENCODER, f"--images={tmp_path}/list.txt", f"--out={out}"]) == 0
    with np.load(out) as arrays:
        assert arrays["paths"].tolist() == paths
        assert (arrays["labels"] == "").all()
    assert main(["rank", *ENCODER, "--query=-", "--gallery=-"]) == 2


def test_embeddings_of_before_are_taken_as_they_are(world, tmp_path, capsys):
    photos, shop = tmp_path / "photos.npz", tmp_path / "shop.npz"
    for where, out in ((world / "photos", photos), (world / "shop", shop)):
        assert main(["embed", *ENCODER, f"--images={where}", f"--out={out}"]) == 0
    want = rank(world, f"--query={world}/photos", f"--gallery={world}/shop", "-k4")
    pairs = [(photos, shop), (photos, world / "shop"), (world / "photos", shop)]
    for query, gallery in pairs:
        assert rank(world, f"--query={query}", f"--gallery={gallery}", "-k4") == want
    without = [f"--query={photos}", f"--gallery={shop}", "-k4"]
    assert rank(world, *without, encoder=[]) == want
    facts = json.loads((world / "out.csv.run.json").read_text())
    assert facts["encoder"]["trunk"] == "resnet18"
    assert facts["distance"] == "cosine"
    # Vectors are the file's: moved ones give other neighbours, and no image is read.
    with np.load(shop) as arrays:
        columns = dict(arrays)
    columns["vectors"] = columns["vectors"][::-1]
    columns["paths"] = np.array([f"/gone/{i}.png" for i in range(6)])
    np.savez(tmp_path / "moved.npz", **columns)
    moved = rank(world, f"--query={photos}", f"--gallery={tmp_path}/moved.npz", "-k1", encoder=[])
    # The last picture is there twice, and of equal distances the first in the gallery comes first.
    assert [Path(gallery).stem for _, gallery, *_ in moved] == ["5", "4", "3", "2", "0"]
    # By stem everything has an answer; the numbers are those of the pictures.
    out = tmp_path / "m.json"
    scores = []
    for query, gallery in ((world / "photos", world / "shop"), (photos, shop)):
        places = [f"--query={query}", f"--gallery={gallery}", "--labels=stem", f"--out={out}"]
        assert main(["evaluate", *ENCODER, *places]) == 0
        scores.append(json.loads(out.read_text())["metrics"])
    assert scores[0] == scores[1]
    assert scores[0]["recall@1"] == 1.0

    other = ["--encoder=resnet18", "--weights=random", "--image-size=48"]
    np.savez(tmp_path / "other.npz", vectors=np.eye(3))
    for argv, message in [
        (["rank", *other, f"--query={photos}", f"--gallery={world}/shop"], "of another encoder"),
        (
            ["rank", f"--query={photos}", f"--gallery={world}/shop"],
            "give --encoder; it may be left",
        ),
        (["rank", f"--query={world}/photos"], "give --encoder"),
        (["embed", *ENCODER, f"--images={photos}", "--out=x.npz"], "holds embeddings already"),
        (["rank", *ENCODER, f"--query={tmp_path}/other.npz"], "no file of embeddings"),
    ]:
        capsys.readouterr()
        assert main(argv) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_rank_always_ranks(world, tmp_path, caplog, capsys):
    """Sides whose classes have nothing in common are unlabelled; evaluate refuses them."""
    sides = [f"--query={world}/q", f"--gallery={world}/g"]
    rows = rank(world, *sides, "-k2")
    assert len(rows) == 8
    assert {correct for *_, correct in rows} == {""}
    line = (
        "classes of the queries ('2024-05', '2024-06') and the 2 of the gallery ('dairy', 'fruit')"
    )
    assert line in caplog.text
    assert "both sides are taken as unlabelled" in caplog.text
    assert main(["evaluate", *ENCODER, *sides]) == 2
    assert line in capsys.readouterr().err
    # One picture a class, searched among themselves: classes match, and no query has an answer.
    for i in range(3):
        (tmp_path / "lone" / str(i)).mkdir(parents=True)
        shutil.copy(world / "photos" / f"{i}.png", tmp_path / "lone" / str(i) / "1.png")
    assert len(rank(world, f"--query={tmp_path}/lone", "-k2")) == 6
    assert "nothing is measured" in capsys.readouterr().out
    # Several labels an image against one: nothing to compare either.
    table = tmp_path / "several.csv"
    table.write_text("path,label\n" + "".join(f"{world}/photos/{i}.png,a;b\n" for i in range(5)))
    mixed = [f"--query={world}/q", f"--gallery={table}", "--label-separator=;"]
    assert len(rank(world, *mixed, "-k2")) == 8
    assert "one side has several labels an image" in caplog.text
    # Some classes in common: how many is said, and they are measured.
    shutil.copytree(world / "q" / "2024-05", tmp_path / "some" / "dairy")
    shutil.copytree(world / "q" / "2024-06", tmp_path / "some" / "tools")
    places = [f"--query={tmp_path}/some", f"--gallery={world}/g", "-k2"]
    assert {correct for *_, correct in rank(world, *places)} == {"0", "1"}
    assert "1 of the 2 classes of the queries are in the gallery, which has 2" in caplog.text


def test_every_tool_says_what_it_left_out(world, tmp_path, caplog):
    root = tmp_path / "set"
    for name in ("a", "b"):
        shutil.copytree(world / "photos", root / name)
    (root / "a" / "notes.txt").write_text("no picture")
    (root / "empty").mkdir()
    said = ("1 files are no pictures", "1 class folders hold no image, the first is 'empty'")
    out = tmp_path / "out"
    for argv in (
        ["embed", f"--images={root}", f"--out={out}.npz"],
        ["rank", f"--query={root}"],
        ["evaluate", f"--query={root}", "--metrics=recall@1"],
        ["whiten", f"--images={root}", "--method=pca", "--dim=2", f"--out={out}"],
    ):
        caplog.clear()
        assert main([argv[0], *ENCODER, *argv[1:]]) == 0
        for text in said:
            assert caplog.text.count(text) == 1, argv[0]


def test_layouts_are_said(world, tmp_path, capsys):
    for outer in ("x", "y"):
        for inner in ("1", "2"):
            shutil.copytree(world / "photos", tmp_path / "nest" / outer / inner)
    place = f"--query={tmp_path}/nest"
    assert main(["evaluate", *ENCODER, place]) == 2
    assert "layout=leaves (the 4 inner ones are)" in capsys.readouterr().err
    counts = []
    for layout in ("classes", "leaves"):
        out = tmp_path / f"{layout}.json"
        options = ["--metrics=recall@1", f"--layout={layout}", f"--out={out}"]
        assert main(["evaluate", *ENCODER, place, *options]) == 0
        counts.append(json.loads(out.read_text())["provenance"]["data"]["query"]["classes"])
    assert counts == [2, 4]
    assert main(["rank", *ENCODER, f"--query={world}/photos/0.png", "--layout=leaves"]) == 2
    assert "is said of a folder" in capsys.readouterr().err


def test_a_lone_picture_does_not_stop_the_main_job(tmp_path):
    """train/ and Test/ as they come: a class of one picture, a system's folder, an odd name."""
    source, root = tiny.make_folder(tmp_path / "source", classes=7), tmp_path / "data"
    for i, folder in enumerate(sorted(source.iterdir())):
        shutil.copytree(folder, root / ("train" if i < 4 else "Test") / folder.name)
    for image in sorted((root / "train" / "class0").iterdir())[1:]:
        image.unlink()
    (root / "__MACOSX").mkdir()
    (root / "train" / "class1" / "0.png").rename(root / "train" / "class1" / "\udcff.png")
    done = tiny.run(
        tmp_path / "cache",
        *tiny.TINY,
        f"--config.data.root={root}",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=3",
        script=tiny.SMALL,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["split"]["train"] == {"images": 13, "classes": 4, "queries": 12, "gallery": 13}
    assert results["split"]["test"] == {"images": 12, "classes": 3, "queries": 12, "gallery": 12}
    assert "1 of 4 training classes are in no batch" in done.stderr


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["a/1.png", "b/1.png"], ["--config.data.source=images"], "no labels to train on"),
        (
            ["train/a/1.png", "train/a/2.png", "test/b/1.png", "test/c/1.png"],
            [],
            "no image of the test split has another of its class to find",
        ),
    ],
)
def test_data_that_can_teach_or_measure_nothing(tmp_path, names, options, said):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    where = [f"--config.data.root={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    done = tiny.run(tmp_path / "cache", *tiny.TINY, *where, *options, script=tiny.SMALL)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


STEADY = """
import json, sys
from pathlib import Path
from ml_collections import ConfigDict
from siamese_jax.__main__ import main
from siamese_jax.data.records import as_text
from siamese_jax.data.sources import load_records
from siamese_jax.train.experiment import train
root, work = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/tests"]
import small_trunk
small_trunk.installed().__enter__()
from configs import resnet_triplet
config = resnet_triplet.get_config()
config.data.update(source="folder", root=str(root))
config.trunk.update(name="resnet18", weights="random", image_size=32)
config.head.layers = (8,)
config.sampler.batch_size = 8
config.cache.views = 0
config.train.update(steps=3, log_every=1, eval_every=3, checkpoint_every=3)
results = train(config, work)
records = load_records("folder", root)
assert main(["rank", f"--encoder={work}", f"--query={root}", "-k3", f"--out={work}/r.csv"]) == 0
print(json.dumps({
    "split": [[as_text(p), str(s)] for p, s in zip(records.path, records.split)],
    "classes": records.class_names,
    "fingerprint": results["data"]["fingerprint"],
    "test": results["test"],
    "losses": (work / "metrics.jsonl").read_text(),
    "ranking": (work / "r.csv").read_bytes().hex(),
}))
"""


@pytest.mark.long
def test_nothing_depends_on_hash_seed_or_locale(tmp_path):
    """The split, a training and a ranking, under four hash seeds and two locales."""
    plain, root = tiny.make_folder(tmp_path / "plain"), tmp_path / "shop"
    # Names that share a number, and files that an ASCII locale has no letters for.
    for source, name in zip(
        sorted(plain.iterdir()), ("1", "01", "001", "2", "10", "0002"), strict=True
    ):
        for image in source.iterdir():
            (root / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, root / name / f"é{image.name}")
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def start(seed):
        return subprocess.Popen(
            [sys.executable, "-c", STEADY, root, tmp_path / f"run{seed}", tiny.ROOT],
            cwd=tmp_path,
            env=tiny.environment(tmp_path / "cache")
            | {"PYTHONPATH": str(tiny.ROOT), "PYTHONHASHSEED": str(seed)}
            | (ascii_only if seed % 2 else {"LC_ALL": "C.UTF-8"}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def result(process):
        printed, complaints = process.communicate(timeout=300)
        assert process.returncode == 0, complaints
        return json.loads(printed.splitlines()[-1])

    results = [result(start(0))]  # which leaves its compiled programs to the others
    results += map(result, [start(seed) for seed in (1, 2, 3)])
    assert results[0]["classes"] == ["001", "01", "1", "0002", "2", "10"]
    assert "é".encode().hex() in results[0]["ranking"]
    for other in results[1:]:
        assert other == results[0]
