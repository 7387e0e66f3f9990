"""`evaluate`, whole: verification, clustering, class tables, graded answers, several labels."""

import csv
import json
import pickle

import numpy as np
import pytest
import tiny
from sklearn import metrics as sk

from siamese_jax.__main__ import main
from siamese_jax.data.landmarks_file import read_ground_truth
from siamese_jax.errors import UserError
from siamese_jax.metrics.landmarks import landmarks

ENCODER = ["--encoder=resnet18", "--weights=random", "--image-size=32"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_trunk):
    root = tmp_path_factory.mktemp("evaluate")
    shop = tiny.make_folder(root / "shop", classes=6, images=5)
    for i in range(4):  # some images are in the wrong class, or every answer would be right
        first, second = shop / f"class{i}" / f"{i}.png", shop / f"class{i + 1}" / "4.png"
        mine, theirs = first.read_bytes(), second.read_bytes()
        first.write_bytes(theirs)
        second.write_bytes(mine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def vectors(world):
    """The images' vectors of length 1, their classes and their paths."""
    assert main(["embed", *ENCODER, f"--images={world}/shop", f"--out={world}/v.npz"]) == 0
    with np.load(world / "v.npz") as arrays:
        x = arrays["vectors"].astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x, arrays["labels"], arrays["paths"]


def evaluate(world, *options):
    out = world / "metrics.json"
    assert main(["evaluate", *ENCODER, *map(str, options), f"--out={out}"]) == 0
    return json.loads(out.read_text())


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_verification_is_that_of_all_pairs(world, vectors):
    x, labels, _ = vectors
    options = ["--verification", "--fmr=0.2,0.05", "--metrics=recall@1"]
    found = evaluate(world, f"--query={world}/shop", *options)["verification"]
    i, j = np.nonzero(~np.eye(len(x), dtype=bool))
    same, near = labels[i] == labels[j], (x[i] * x[j]).sum(1)
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(same, near), abs=1e-5)
    false, true, _ = sk.roc_curve(same, near, drop_intermediate=False)
    for rate in (0.2, 0.05):
        expected = 1 - true[false <= rate].max()
        assert found[f"fnmr@{rate:g}"] == pytest.approx(expected, abs=2e-3)


def test_clustering_and_its_number_of_clusters(world, vectors):
    from siamese_jax.metrics.clustering import clustering

    x, labels, _ = vectors
    found = evaluate(world, f"--query={world}/shop", "--clustering")["clustering"]
    expected = clustering(x, labels)
    assert found["clusters"] == 6
    assert found["nmi"] == pytest.approx(expected["nmi"], abs=0.02)
    assert 0 <= found["ami"] <= found["nmi"] <= 1
    few = evaluate(world, f"--query={world}/shop", "--clustering=2")["clustering"]
    assert few["clusters"] == 2
    # Two clusters hold at most one bit of the six classes' log 6.
    assert few["nmi"] <= 2 * np.log(2) / (np.log(2) + np.log(6)) + 1e-6


def test_the_table_of_classes_and_intervals_over_classes(world, vectors):
    x, labels, _ = vectors
    order = np.argsort(-(x @ x.T - 9 * np.eye(len(x))), axis=1)[:, 0]
    hit = (labels[order] == labels).astype(float)
    table = world / "classes.csv"
    options = ["--metrics=recall@1", f"--per-class={table}", "--interval=0.9"]
    content = evaluate(world, f"--query={world}/shop", *options, "--resample=classes")
    rows = read_csv(table)
    means = {name: hit[labels == name].mean() for name in np.unique(labels)}
    assert {row["class"]: float(row["recall@1"]) for row in rows} == pytest.approx(means)
    assert [float(row["recall@1"]) for row in rows] == sorted(means.values())
    assert [row["label"] for row in content["classes"]] == [row["class"] for row in rows]
    low, high = (content["metrics"][end]["recall@1"] for end in ("low", "high"))
    assert low <= hit.mean() <= high
    queries = evaluate(world, f"--query={world}/shop", *options)["metrics"]
    assert (queries["low"]["recall@1"], queries["high"]["recall@1"]) != (low, high)


def test_images_with_several_labels(world, vectors):
    x, labels, paths = vectors
    hot = np.zeros((len(x), 3), bool)
    hot[:, 0] = np.isin(labels, ["class0", "class1"])
    hot[:, 1] = np.isin(labels, ["class1", "class2", "class3"])
    hot[:, 2] = ~hot[:, :2].any(1)
    names = np.array(["animal", "black", "other"])
    table = world / "several.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        for path, row in zip(paths, hot, strict=True):
            writer.writerow([path, " ; ".join(names[row])])
    same = (hot[:, None] & hot[None]).any(-1)
    away = -(x @ x.T) + 9 * np.eye(len(x))
    order = np.argsort(away, axis=1)[:, :5]
    want = np.take_along_axis(same, order, axis=1).mean()
    options = [f"--query={table}", "--label-separator=;", "--metrics=precision@5"]
    content = evaluate(world, *options)
    assert content["metrics"]["precision@5"] == pytest.approx(want)
    assert sorted(row["label"] for row in content["classes"]) == sorted(names)
    plain = evaluate(world, f"--query={table}", "--metrics=precision@5")
    assert plain["metrics"]["precision@5"] < want  # "animal ; black" is then a name of its own


@pytest.fixture
def truth(vectors):
    """Grades of four queries; names are paths below the folder, without suffix."""
    _, _, paths = vectors
    names = ["/".join(path.split("/")[-2:]).removesuffix(".png") for path in paths]
    rng = np.random.default_rng(1)
    grades = []
    for _ in range(4):
        easy, hard, junk = np.split(rng.permutation(len(names))[:15], [5, 10])
        grades.append({"bbx": [2.2, 3.0, 27.9, 30.0], "easy": easy, "hard": hard, "junk": junk})
    grades[3]["hard"] = np.zeros(0, int)
    return {"imlist": names, "qimlist": [names[i] for i in (0, 7, 14, 21)], "gnd": grades}


def as_lists(truth):
    plain = [{k: np.asarray(v).tolist() for k, v in grade.items()} for grade in truth["gnd"]]
    return truth | {"gnd": plain}


@pytest.mark.parametrize("protocol", [0, 2, 4, pickle.HIGHEST_PROTOCOL, "json", "lists"])
def test_ground_truth_is_read_from_pickles_and_json(truth, tmp_path, protocol):
    path = tmp_path / ("gnd.json" if protocol == "json" else "gnd.pkl")
    if protocol == "json":
        path.write_text(json.dumps(as_lists(truth)))
    else:
        plain = protocol == "lists"
        path.write_bytes(
            pickle.dumps(as_lists(truth) if plain else truth, 2 if plain else protocol)
        )
    found = read_ground_truth(path)
    assert (found.gallery, found.queries) == (truth["imlist"], truth["qimlist"])
    np.testing.assert_array_equal(found.boxes, [[2, 3, 28, 30]] * 4)
    for mine, theirs in zip(found.grades, truth["gnd"], strict=True):
        assert mine == {name: theirs[name].tolist() for name in ("easy", "hard", "junk")}


class Hostile:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "content",
    [Hostile(), {"imlist": []}, [1], {"imlist": ["a"], "qimlist": ["a"], "gnd": []},
     {"imlist": ["a"], "qimlist": ["a"], "gnd": [{"easy": [5], "hard": [], "junk": []}]},
     {"imlist": np.array(["a"], object), "qimlist": [], "gnd": []}],
)  # fmt: skip
def test_other_pickles_are_refused_and_run_nothing(content, tmp_path, capsys):
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError) as error:
        read_ground_truth(tmp_path / "gnd.pkl")
    assert "gnd.pkl" in str(error.value)
    assert capsys.readouterr().out == ""


def test_graded_answers_from_the_ground_truth_file(world, vectors, truth):
    x, _, paths = vectors
    path = world / "gnd.pkl"
    path.write_bytes(pickle.dumps(truth))
    content = evaluate(world, f"--landmarks={path}", f"--gallery={world}/shop", "--ks=1,5")
    # The queries are the boxes cut from their pictures, embedded by hand.
    table = world / "boxes.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "x_1", "y_1", "x_2", "y_2"])
        for i in (0, 7, 14, 21):
            writer.writerow([paths[i], "?", 2, 3, 28, 30])
    assert main(["embed", *ENCODER, f"--images={table}", f"--out={world}/q.npz"]) == 0
    with np.load(world / "q.npz") as arrays:
        q = arrays["vectors"].astype(np.float64)
    order = np.argsort(-(q / np.linalg.norm(q, axis=1, keepdims=True)) @ x.T, axis=1)
    for setting in ("easy", "medium", "hard"):
        expected = landmarks(order, truth["gnd"], setting=setting, ks=(1, 5))
        for name, value in expected.means().items():
            assert content["metrics"][setting][name] == pytest.approx(value)
    assert content["metrics"]["hard"]["lone_queries"] == 1
    assert content["provenance"]["landmarks"] == str(path)
    again = evaluate(
        world, f"--landmarks={path}", f"--gallery={world}/shop", "--rerank=diffusion", "--ks=1,5"
    )
    assert again["metrics"] != content["metrics"]


def test_fused_rankings_are_those_of_a_loop(world, vectors, tmp_path):
    """Reciprocal rank fusion of two encoders, each by its own cosines, counted one by one."""
    x, labels, paths = vectors
    other = ["--encoder=resnet18", "--image-size=32", "--weights=random"]
    assert main(["whiten", *other, f"--images={world}/shop", "--dim=4", f"--out={tmp_path}"]) == 0
    both = [*ENCODER, f"--encoder={tmp_path}", f"--query={world}/shop"]
    out = ["embed", f"--encoder={tmp_path}", f"--images={world}/shop", f"--out={tmp_path}/w.npz"]
    assert main(out) == 0
    with np.load(tmp_path / "w.npz") as arrays:
        y = arrays["vectors"].astype(np.float64)
    c, depth, k, n = 10.0, 8, 5, len(x)
    want = []
    for q in range(n):
        score = np.zeros(n)
        for z in (x, y / np.linalg.norm(y, axis=1, keepdims=True)):
            cosine = z @ z[q]
            cosine[q] = -9
            for place, j in enumerate(np.argsort(-cosine, kind="stable")[:depth], start=1):
                score[j] += 1 / (c + place)
        want.append(np.argsort(-score, kind="stable")[:k])
    fuse = f"--fuse=ranks:c={c},depth={depth}"
    assert main(["rank", *both, fuse, "-k", str(k), f"--out={tmp_path}/found.csv"]) == 0
    found = [row["gallery"] for row in read_csv(tmp_path / "found.csv")]
    assert found == list(paths[np.array(want).ravel()])
    metrics = ["--metrics=recall@1,precision@5", "--ks=1,5", f"--out={tmp_path}/m.json"]
    assert main(["evaluate", *both, fuse, *metrics]) == 0
    content = json.loads((tmp_path / "m.json").read_text())
    right = labels[np.array(want)] == labels[:, None]
    assert content["metrics"]["precision@5"] == pytest.approx(right.mean())
    assert content["metrics"]["recall@1"] == pytest.approx(right[:, 0].mean())
    assert content["provenance"]["fusion"] == {"method": "ranks", "c": c, "depth": depth}
    assert main(["evaluate", *both, "--fuse=scores", *metrics]) == 0
    scores = json.loads((tmp_path / "m.json").read_text())
    assert scores["metrics"] != content["metrics"]


MISTAKES = {
    "one to fuse": (["--query={shop}", "--fuse=ranks"], "give --encoder for each"),
    "fused twice": (
        ["--query={shop}", "--encoder=x", "--fuse=ranks", "--rerank=diffusion"],
        "--rerank has no meaning with --fuse=ranks",
    ),
    "fusion": (["--query={shop}", "--fuse=ranks:k=2"], "no option 'k'; it has: c, depth"),
    "no images": (["--landmarks={gnd}"], "give --gallery=DIR"),
    "no file": (["--landmarks=/no/such.pkl", "--gallery={shop}"], "/no/such.pkl cannot be read"),
    "no meaning": (["--landmarks={gnd}", "--gallery={shop}", "--verification"], "no meaning"),
    "other images": (["--landmarks={gnd}", "--gallery={shop}/class0"], "are not there"),
    "method": (["--query={shop}", "--rerank=magic"], "none of k_reciprocal, diffusion"),
    "option": (["--query={shop}", "--rerank=diffusion:k1=3"], "no option 'k1'"),
    "value": (
        ["--query={shop}", "--rerank=diffusion:alpha=x"],
        "must be a finite number from 0 below 1",
    ),
    "range": (
        ["--query={shop}", "--rerank=diffusion:alpha=2"],
        "must be a finite number from 0 below 1",
    ),
    "weights": (["--query={shop}", "--fuse-weights=1,2"], "2 numbers for 1 encoders"),
    "scale": (["--query={shop}", "--scales=0"], "above 0"),
    "folder": (["--query={shop}", "--encoder=/no/such/run"], "/no/such/run does not exist"),
    "whitening": (["whiten", "--images={shop}"], "give --out=DIR"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(world, truth, capsys, name):
    options, part = MISTAKES[name]
    (world / "wrong.pkl").write_bytes(pickle.dumps(truth))
    filled = [o.format(gnd=world / "wrong.pkl", shop=world / "shop") for o in options]
    tool = filled.pop(0) if filled[0] == "whiten" else "evaluate"
    assert main([tool, *ENCODER, *filled]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert part in lines[0]


def test_rerank_options_are_those_of_the_functions():
    import inspect

    from siamese_jax.tools.reranking import METHODS, Method

    for name, options in METHODS.items():
        known = inspect.signature(Method(name, {}).function).parameters
        for option, kind in options.items():
            assert kind.holds(known[option].default)


def test_an_interrupted_embed_goes_on_with_the_rest(world, vectors, tmp_path, monkeypatch, capsys):
    from siamese_jax.encoder.encoder import Encoder

    seen, whole = [], Encoder.__call__

    def cut_off(encoder, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return whole(encoder, images)

    out = tmp_path / "v.npy"
    options = [f"--images={world}/shop", "--batch-size=5", f"--cache-dir={tmp_path}/cache"]
    monkeypatch.setattr(Encoder, "__call__", cut_off)
    assert main(["embed", *ENCODER, *options, f"--out={out}"]) == 130
    assert "go on: " in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(Encoder, "__call__", whole)
    assert main(["embed", *ENCODER, *options, f"--out={out}"]) == 0
    shown = capsys.readouterr().err
    assert "(15 of 30 known)" in shown
    assert "15/15" in shown
    with np.load(world / "v.npz") as arrays:
        np.testing.assert_allclose(np.load(out), arrays["vectors"], rtol=1e-4, atol=1e-4)


def test_more_neighbours_than_images_are_said(world, vectors, tmp_path, capsys):
    arguments = [f"--query={world}/shop", "-k", "99", f"--out={tmp_path}/found.csv"]
    assert main(["rank", *ENCODER, *arguments]) == 0
    assert "-k 99 is more than the gallery's 30 images" in capsys.readouterr().out
    assert len(read_csv(tmp_path / "found.csv")) == 30 * 29
