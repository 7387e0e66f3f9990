"""The command line, used as people use it: folders of images in, files and lines out."""

import contextlib
import csv
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import warm
from PIL import Image
from small_trunk import PARAMETERS, WIDTH

from siamese_jax import __main__ as command_line
from siamese_jax.__main__ import main
from siamese_jax.errors import UserError
from siamese_jax.metrics.bootstrap import difference
from siamese_jax.search import export
from siamese_jax.search.lance import LanceTable
from siamese_jax.search.ranking import rank
from siamese_jax.tools import embed
from siamese_jax.tools.compare import images_per_second, run_all
from siamese_jax.tools.compare_grid import Cell, cells, read_grid
from siamese_jax.tools.compare_table import table, write
from siamese_jax.tools.configs import base_config, override, set_field
from siamese_jax.weights.download import Unavailable

ROOT = Path(__file__).parents[2]
ENCODER = ["--encoder=resnet18", "--weights=random", "--image-size=32"]
CLASSES = ("ash", "birch", "cedar", "elm")

GRID = """
from configs import common

def get_config():
    config = common.base()
    config.data.source = "folder"
    config.data.root = {root!r}
    config.trunk.name = "resnet18"
    config.trunk.weights = "random"
    config.trunk.image_size = 32
    config.head = common.linear_head(4)
    config.cache.views = 0
    config.sampler = {{"name": "classes", "batch_size": 4, "per_class": 2}}
    config.train.update(steps=9, log_every=1, eval_every=3, checkpoint_every=3, rehearse=False)
    config.eval.ks = (1, 2)
    return config

GRID = {{
    "trunk": {{"resnet18": {{}}, "gone": {{"trunk.weights": "/no/such.npz"}}}},
    "loss": {{"near": {{"loss": {{"name": "triplet", "margin": 0.1}}}},
              "far": {{"loss": {{"name": "triplet", "margin": 0.5}}}}}},
}}
PUBLISHED = {{("resnet18", "near"): 0.625}}
"""


def draw(path, colour, rng):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.asarray(colour) + rng.normal(0, 60, (24, 32, 3)), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_trunk):
    """query/ and gallery/ of four classes, a flat folder, and a broken image in the gallery."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (len(CLASSES), 3))
    for name, colour in zip(CLASSES, colours, strict=True):
        for i in range(2):
            draw(root / "set" / "query" / name / f"q{i}.png", colour, rng)
        for i in range(3):
            draw(root / "set" / "gallery" / name / f"g{i}.png", colour, rng)
        draw(root / "flat" / f"{name}.png", colour, rng)
    shutil.copytree(root / "set", root / "sound")
    (root / "set" / "gallery" / "ash" / "broken.jpg").write_text("not an image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


def run(*argv):
    """Runs a tool in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(argument) for argument in argv]) == 0
    return printed.getvalue()


def run_process(*argv):
    """Runs a tool in a process of its own, from the checkout, as by a user; what it printed."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [warm.python(), tiny.SMALL, *map(str, argv)],
        cwd=ROOT,
        env={**own, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def vectors(world):
    """Both sides embedded by the tool, in float64 with their classes."""
    out = {}
    for side in ("query", "gallery"):
        path = world / f"{side}.npz"
        run("embed", *ENCODER, f"--images={world}/set/{side}", f"--out={path}")
        with np.load(path) as arrays:
            out[side] = {name: arrays[name] for name in arrays.files}
    return out


def cosine_distances(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    return 1 - x @ y.T


def test_embed_leaves_out_the_broken_image_and_says_so(vectors):
    query, gallery = vectors["query"], vectors["gallery"]
    assert query["vectors"].shape == (8, WIDTH)
    assert gallery["vectors"].shape == (12, WIDTH)
    assert sorted(query["labels"]) == sorted(CLASSES * 2)
    assert [Path(p).parent.name for p in gallery["paths"]] == list(gallery["labels"])
    facts = json.loads(str(gallery["provenance"]))
    assert facts["data"]["unreadable"] == 1
    assert facts["data"]["images"] == 12
    assert facts["encoder"]["source"] == "random"
    assert facts["versions"]["jax"]


def test_rank_agrees_with_numpy(world, vectors):
    out = [world / f"found{suffix}" for suffix in (".csv", ".json", ".jsonl", ".html")]
    sides = [f"--query={world}/set/query", f"--gallery={world}/set/gallery"]
    printed = run_process("rank", *ENCODER, *sides, "-k", 5, *(f"--out={path}" for path in out))
    rows = read_csv(out[0])
    query, gallery = vectors["query"], vectors["gallery"]
    want = cosine_distances(query["vectors"], gallery["vectors"])
    assert len(rows) == 8 * 5
    for i, path in enumerate(query["paths"]):
        mine = [row for row in rows if row["query"] == path]
        order = np.argsort(want[i], kind="stable")[:5]
        assert [row["gallery"] for row in mine] == list(gallery["paths"][order])
        assert [row["rank"] for row in mine] == ["1", "2", "3", "4", "5"]
        got = [float(row["distance"]) for row in mine]
        np.testing.assert_allclose(got, want[i, order], atol=2e-6)
        hits = gallery["labels"][order] == query["labels"][i]
        assert [row["correct"] for row in mine] == ["1" if hit else "0" for hit in hits]

    content = json.loads(out[1].read_text())
    lines = [json.loads(line) for line in out[2].read_text().splitlines()]
    assert content["queries"] == lines
    assert [n["path"] for q in lines for n in q["neighbours"]] == [r["gallery"] for r in rows]
    first = [r["correct"] == "1" for r in rows if r["rank"] == "1"]
    assert content["metrics"]["recall@1"] == pytest.approx(np.mean(first))
    assert content["provenance"]["data"]["gallery"]["unreadable"] == 1
    lines = [line.split() for line in printed.splitlines()]
    assert ["recall@1", f"{np.mean(first):.4f}"] in lines
    beside = json.loads((world / "found.csv.run.json").read_text())
    assert beside["encoder"] == content["provenance"]["encoder"]
    page = out[3].read_text()
    assert page.count('<li class="right">') == sum(r["correct"] == "1" for r in rows)
    assert page.count('<li class="wrong">') == sum(r["correct"] == "0" for r in rows)


def test_evaluate_equals_a_loop(world, vectors, capsys):
    out, per_query = world / "metrics.json", world / "per_query.csv"
    options = ["--metrics=recall@2,map@r,mrr", "--interval=0.9", f"--per-query={per_query}"]
    # One folder with query/ and gallery/ inside is both sides.
    assert main(["evaluate", *ENCODER, f"--query={world}/set", f"--out={out}", *options]) == 0
    printed = capsys.readouterr().out
    query, gallery = vectors["query"], vectors["gallery"]
    order = np.argsort(cosine_distances(query["vectors"], gallery["vectors"]), axis=1)
    hits = gallery["labels"][order] == query["labels"][:, None]
    recall = hits[:, :2].any(1)
    precisions = np.cumsum(hits, axis=1) / np.arange(1, 13)
    map_r = (precisions * hits)[:, :3].sum(1) / 3
    mrr = 1 / (hits.argmax(1) + 1)
    content = json.loads(out.read_text())
    for name, want in (("recall@2", recall), ("map@r", map_r), ("mrr", mrr)):
        assert content["metrics"]["value"][name] == pytest.approx(want.mean())
        low, high = (content["metrics"][end][name] for end in ("low", "high"))
        assert low <= want.mean() <= high
        assert f"{want.mean():.4f}" in printed
    rows = {row["query"]: row for row in read_csv(per_query)}
    for path, r, m in zip(query["paths"], recall, map_r, strict=True):
        assert float(rows[path]["recall@2"]) == r
        assert float(rows[path]["map@r"]) == pytest.approx(m)
        assert rows[path]["relevant"] == "3"
    worst = min(CLASSES, key=lambda c: (recall[query["labels"] == c].mean(), c))
    listed = [line.split()[0] for line in printed.split("worst classes")[1].splitlines()[1:]]
    assert listed[0] == worst


def test_a_folder_that_searches_itself_never_finds_the_query(world, tmp_path, capsys):
    out = tmp_path / "self.csv"
    assert main(["rank", *ENCODER, f"--query={world}/set/query", "-k", "20", f"--out={out}"]) == 0
    rows = read_csv(out)
    assert len(rows) == 8 * 7  # fewer than k others: no padding is written
    assert all(row["query"] != row["gallery"] for row in rows)


def test_csv_with_splits_and_parts(world, vectors, tmp_path, capsys):
    """The columns is_query and is_gallery decide; --split is for the side that has splits."""
    query, gallery = (vectors[side] for side in ("query", "gallery"))
    table = tmp_path / "set.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "path", "split", "is_query", "is_gallery"])
        for side, asked in ((query, True), (gallery, False)):
            for label, path in zip(side["labels"], side["paths"], strict=True):
                split = "train" if label == "ash" else "validation"
                writer.writerow([label, path, split, asked, not asked])
    out = tmp_path / "m.json"
    arguments = ["evaluate", *ENCODER, "--metrics=recall@1", f"--out={out}", "--split=validation"]

    def counts(*places):
        assert main([*arguments, *places]) == 0
        metrics = json.loads(out.read_text())["metrics"]
        return metrics["queries"], metrics["lone_queries"], metrics["gallery"]

    assert counts(f"--query={table}") == (6, 0, 9)
    # The two images of ash have no answer in the gallery's validation split.
    assert counts(f"--query={world}/set/query", f"--gallery={table}") == (6, 2, 9)
    assert main([*arguments, f"--query={world}/set/query"]) == 2
    assert "no images in the split 'validation'" in capsys.readouterr().err


def test_one_image_against_an_overlapping_gallery(world, tmp_path, capsys):
    out = tmp_path / "one.csv"
    image = world / "set" / "query" / "elm" / "q0.png"
    sides = [f"--query={image}", f"--gallery={world}/set/query"]
    assert main(["rank", *ENCODER, *sides, "-k", "3", f"--out={out}"]) == 0
    rows = read_csv(out)
    assert len(rows) == 3
    assert str(image) not in [row["gallery"] for row in rows]
    assert {row["correct"] for row in rows} == {""}
    assert "recall" not in capsys.readouterr().out


def test_reranking_reorders_and_is_measured(world, vectors, tmp_path, capsys):
    """Average query expansion by hand; k-reciprocal ranks as siamese_jax.search.rerank does."""
    from siamese_jax.search.rerank import k_reciprocal

    sides = [f"--query={world}/set/query", f"--gallery={world}/set/gallery"]
    out = tmp_path / "expanded.csv"
    assert main(["rank", *ENCODER, *sides, "-k", "4", "--expand=2", f"--out={out}"]) == 0
    x, y = (
        side["vectors"] / np.linalg.norm(side["vectors"].astype(np.float64), axis=1, keepdims=True)
        for side in (vectors["query"], vectors["gallery"])
    )
    moved = x + y[np.argsort(1 - x @ y.T, axis=1)[:, :2]].sum(axis=1)
    want = np.sort(cosine_distances(moved, y), axis=1)[:, :4]
    got = np.array([float(row["distance"]) for row in read_csv(out)]).reshape(8, 4)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert json.loads((tmp_path / "expanded.csv.run.json").read_text())["reranking"]["expand"] == 2

    out = tmp_path / "reranked.csv"
    assert main(["rank", *ENCODER, *sides, "-k", "4", "--rerank=k_reciprocal", f"--out={out}"]) == 0
    names = vectors["gallery"]["paths"]
    found = k_reciprocal(vectors["query"]["vectors"], vectors["gallery"]["vectors"], 4)
    order = [row["gallery"] for row in read_csv(out)]
    assert order == [names[j] for j in found.indices.reshape(-1)]
    out = tmp_path / "m.json"
    arguments = [*sides, "--rerank=diffusion", "--metrics=recall@1,map@r", f"--out={out}"]
    assert main(["evaluate", *ENCODER, *arguments]) == 0
    assert 0 <= json.loads(out.read_text())["metrics"]["map@r"] <= 1
    # The mean reciprocal rank looks through the whole gallery; the options change the ranking.
    scores = []
    for way in ("diffusion", "diffusion:graph_k=2,query_k=1,alpha=0.5"):
        arguments = [*sides, f"--rerank={way}", "--metrics=mrr,map", f"--out={out}"]
        assert main(["evaluate", *ENCODER, *arguments]) == 0
        scores.append(json.loads(out.read_text()))
    assert scores[0]["metrics"] != scores[1]["metrics"]
    told = scores[1]["provenance"]["reranking"]
    assert told["method"] == "diffusion"
    assert (told["graph_k"], told["gamma"]) == (2, 3.0)  # asked for, and left at its default


def test_labels_by_stem_and_none(world, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(world / "flat", other)
    sides = [f"--query={world}/flat", f"--gallery={other}"]
    out = tmp_path / "m.json"
    stem = ["--labels=stem", "--metrics=recall@1", f"--out={out}"]
    assert main(["evaluate", *ENCODER, *sides, *stem]) == 0
    assert json.loads(out.read_text())["metrics"]["recall@1"] == 1.0  # copies of the queries
    assert main(["evaluate", *ENCODER, *sides]) == 2
    assert "no labels" in capsys.readouterr().err


def test_ten_new_images_cost_ten(world, tmp_path, capsys):
    folder = tmp_path / "grown"
    shutil.copytree(world / "flat", folder)
    arguments = ["embed", *ENCODER, f"--images={folder}", f"--out={tmp_path}/v.npy"]
    assert main(arguments) == 0
    assert "embedding" not in capsys.readouterr().err  # the same contents were embedded before
    draw(folder / "new.png", (9, 9, 9), np.random.default_rng(5))
    assert main(arguments) == 0
    assert "1/1" in capsys.readouterr().err
    vectors = np.load(tmp_path / "v.npy")
    table = read_csv(tmp_path / "v.npy.csv")
    assert len(vectors) == len(table) == 5
    assert [Path(row["path"]).stem for row in table] == sorted([*CLASSES, "new"])


def test_csv_of_embeddings_reads_back_exactly(world, tmp_path, capsys):
    outs = [f"--out={tmp_path}/v.csv", f"--out={tmp_path}/v.npy"]
    assert main(["embed", *ENCODER, f"--images={world}/flat", *outs]) == 0
    rows = read_csv(tmp_path / "v.csv")
    read = np.array([[row[f"v{i}"] for i in range(WIDTH)] for row in rows], np.float32)
    np.testing.assert_array_equal(read, np.load(tmp_path / "v.npy"))


def test_embed_writes_what_others_serve_from(world, tmp_path, capsys):
    """Each file read by its own library holds the vectors of the .npz, its paths and its labels."""
    for module in ("faiss", "usearch", "duckdb", "lancedb"):
        pytest.importorskip(module)
    import duckdb
    import faiss
    from usearch.index import Index

    outs = ["npz", *(suffix.removeprefix(".") for suffix in export.SUFFIXES)]
    assert set(embed.SERVED) == {Path(f"x{suffix}").suffix for suffix in export.SUFFIXES}
    outs = {name: tmp_path / f"v.{name}" for name in outs}
    argv = ["embed", *ENCODER, f"--images={world}/set/gallery"]
    assert main([*argv, *(f"--out={path}" for path in outs.values())]) == 0
    assert capsys.readouterr().out.count("; recall@10 1.0000 of exact search") == 3
    held = np.load(outs["npz"])
    unit = held["vectors"] / np.linalg.norm(held["vectors"], axis=1, keepdims=True)
    rows = duckdb.execute(f"SELECT path, label, vector FROM '{outs['parquet']}' ORDER BY row")
    paths, labels, vectors = zip(*rows.fetchall(), strict=True)
    assert (list(paths), list(labels)) == (held["paths"].tolist(), held["labels"].tolist())
    np.testing.assert_array_equal(np.array(vectors, np.float32), held["vectors"])
    for name in ("faiss", "ivf.faiss"):
        found = faiss.read_index(str(outs[name])).search(unit, 1)[1]
        assert found.ravel().tolist() == list(range(12))
    found = Index.restore(str(outs["usearch"])).search(held["vectors"], 1).keys
    assert found.ravel().tolist() == list(range(12))
    beside = read_csv(f"{outs['usearch']}.csv")
    assert [row["path"] for row in beside] == list(paths)
    found = rank(held["vectors"], f"lance://{outs['lance']}", 3)
    want = rank(held["vectors"], held["vectors"], 3, distance="cosine")
    assert LanceTable(outs["lance"]).column("path").tolist() == list(paths)
    np.testing.assert_array_equal(found.indices, want.indices)
    assert json.loads(Path(f"{outs['lance']}.run.json").read_text())["encoder"]["fingerprint"]
    assert main([*argv, f"--out={outs['lance']}"]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_library_that_is_not_installed_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert main(["embed", *ENCODER, "--images=/no/such", f"--out={tmp_path}/v.faiss"]) == 2
    assert capsys.readouterr().err.endswith("faiss-cpu: pip install faiss-cpu\n")


MISTAKES = {
    "no tool": ([], 2, ""),
    "unknown tool": (["frobnicate"], 2, "choose from embed"),
    "no encoder": (["rank", "--query=x"], 2, "--encoder"),
    "unknown option": (["rank", "--encoder=resnet18", "--frob"], 2, "--frob"),
    "no such place": (["rank", *ENCODER, "--query=/no/such"], 2, "/no/such does not exist"),
    "no query": (["evaluate", *ENCODER], 2, "--query"),
    "distance": (["rank", *ENCODER, "--query=/", "--distance=l7"], 2, "l7"),
    "k": (["rank", *ENCODER, "--query=x", "-k", "0"], 2, "from 1 to"),
    "metric": (["evaluate", *ENCODER, "--query=x", "--metrics=f1"], 2, "f1"),
    "suffix": (["rank", *ENCODER, "--query=x", "--out=x.xlsx"], 2, ".csv, .html"),
    "no output": (["embed", *ENCODER, "--images=x"], 2, "--out"),
    "interval": (["evaluate", *ENCODER, "--query=x", "--interval=95"], 2, "above 0 below 1"),
    "no run": (["diff", "/no/such", "/"], 2, "/no/such"),
    "no result": (["diff", "/", "/"], 2, "not a finished run"),
    "no config": (["compare", "--config=/no/such.py"], 2, "/no/such.py"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_code_2(name, capsys):
    argv, code, part = MISTAKES[name]
    assert main(argv) == code
    shown = capsys.readouterr()
    assert part in shown.err
    assert len(shown.err.splitlines()) == (1 if argv else 0)


def test_help_needs_neither_jax_nor_tensorflow():
    code = (
        "import sys\nfrom siamese_jax.__main__ import main\n"
        "assert main(['--help']) == 0\n"
        "try: main(['rank', '--help'])\nexcept SystemExit as done: assert done.code == 0\n"
        "print(sorted({'jax', 'tensorflow', 'flax'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--gallery" in done.stdout


# Compare and diff ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(world):
    config, workdir = world / "grid.py", world / "compared"
    config.write_text(GRID.format(root=str(world / "sound")))
    printed = run_process(
        "compare", f"--config={config}", f"--workdir={workdir}", "--config.train.steps=3"
    )
    return config, workdir, printed


def test_compiled_programs_are_kept(world, compared):
    """By a process of its own: JAX keeps the first folder that a process names."""
    assert list((world / "cache" / "xla").iterdir())


def test_compare_writes_one_table_three_times(compared):
    _, workdir, printed = compared
    rows = read_csv(workdir / "compare.csv")
    assert sorted(row["loss"] for row in rows) == ["far", "near"]
    for row in rows:
        results = json.loads((workdir / row["runs"] / "results.json").read_text())
        assert float(row["recall@1"]) == results["test"]["after"]["recall@1"]
        assert float(row["map@r"]) == results["test"]["after"]["map@r"]
        assert int(row["parameters"]) == PARAMETERS + WIDTH * 4 + 4  # the last are the layer's
        assert int(row["width"]) == 4
        assert float(row["images/s"]) > 0
        assert row["published"] == ("0.625" if row["loss"] == "near" else "nan")
        assert (
            json.loads((workdir / row["runs"] / "config.json").read_text())["train"]["steps"] == 3
        )
    text = (workdir / "compare.md").read_text()
    assert text in printed
    assert text.count("\n| resnet18 |") == 2
    assert "Not run: gone-near and 1 more: there is no weights file" in text
    assert "| published |" in text
    assert "| 0.6250 |" in text
    assert printed.splitlines()[-1] == "2 of 4 cells are done; not run: gone-near, gone-far"
    page = (workdir / "index.html").read_text()
    assert page.count("<circle") == 2
    assert "/no/such.npz" in page
    for row in rows:
        assert f'href="{row["runs"]}/report/index.html"' in page
        assert (workdir / row["runs"] / "report" / "index.html").exists()


def test_compare_does_not_run_finished_cells_again(compared, capsys):
    config, workdir, _ = compared
    files = [*workdir.glob("*/results.json"), workdir / "speed.json"]
    assert len(files) == 3
    before = {path: path.stat().st_mtime_ns for path in files}
    arguments = [f"--config={config}", f"--workdir={workdir}", "--config.train.steps=3"]
    assert main(["compare", *arguments]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert main(["compare", *arguments, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()[-4:]
    assert listed == ["resnet18-near", "resnet18-far", "gone-near", "gone-far"]


def test_diff_is_paired_over_the_same_queries(compared, tmp_path, capsys):
    _, workdir, _ = compared
    a, b = (workdir / f"resnet18-{name}" for name in ("near", "far"))
    out = tmp_path / "diff.json"
    assert main(["diff", str(a), str(b), f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "loss.margin: 0.1 -> 0.5" in printed
    content = json.loads(out.read_text())
    with (
        np.load(a / "report" / "per_query_test.npz") as x,
        np.load(b / "report" / "per_query_test.npz") as y,
    ):
        for name, row in content["metrics"].items():
            assert row["difference"] == pytest.approx(np.nanmean(y[name] - x[name]))
            assert row["low"] <= row["difference"] <= row["high"]
    results = json.loads((b / "results.json").read_text())["test"]["after"]
    assert content["metrics"]["recall@1"]["b"] == pytest.approx(results["recall@1"])
    assert main(["diff", str(a), str(a)]) == 0
    assert "is better" not in capsys.readouterr().out


def test_diff_refuses_other_data(compared, tmp_path, capsys):
    _, workdir, _ = compared
    other = tmp_path / "other"
    shutil.copytree(workdir / "resnet18-far", other)
    facts = json.loads((other / "run.json").read_text())
    facts["data"]["fingerprint"] = "0" * 32
    (other / "run.json").write_text(json.dumps(facts))
    assert main(["diff", str(workdir / "resnet18-near"), str(other)]) == 2
    assert "cannot be compared" in capsys.readouterr().err


def test_diff_of_evaluations_and_a_run(compared, tmp_path, capsys):
    """A run, and what `evaluate` wrote of its test split; of another split it is refused."""
    _, workdir, _ = compared
    run_dir = workdir / "resnet18-near"
    own, other = tmp_path / "own.json", tmp_path / "other.csv"
    options = [f"--encoder={run_dir}", "--metrics=recall@1,mrr"]
    assert main(["evaluate", *options, f"--out={own}"]) == 0
    assert main(["evaluate", *options, "--distance=cosine", f"--out={other}"]) == 0
    out = tmp_path / "diff.json"

    def diff(a, b, *more):
        assert main(["diff", str(a), str(b), f"--out={out}", *more]) == 0
        return json.loads(out.read_text())

    for pair in ((run_dir, own), (own, run_dir)):
        same = diff(*pair)
        assert same["split"] == "test"
        assert set(same["metrics"]) == {"recall@1", "mrr"}
        for row in same["metrics"].values():
            assert (row["difference"], row["low"], row["high"]) == (0, 0, 0)
    for a in (own, run_dir):
        found = diff(a, other)
        assert found["config"]["distance"] == ["euclidean", "cosine"]
        assert found["metrics"]["mrr"]["queries"] == 4
    capsys.readouterr()
    assert main(["diff", str(own), str(run_dir), "--split=validation"]) == 2
    assert "different splits, test and validation" in capsys.readouterr().err
    train = tmp_path / "train.json"
    assert main(["evaluate", *options, "--split=train", f"--out={train}"]) == 0
    assert main(["diff", str(own), str(train)]) == 2
    assert "different splits, test and train" in capsys.readouterr().err
    train.with_name("train.json.per_query.npz").unlink()
    assert main(["diff", str(own), str(train)]) == 2
    assert "train.json.per_query.npz is not beside it" in capsys.readouterr().err


def test_diff_pairs_by_what_was_asked(world, vectors, tmp_path, capsys):
    """The order of a CSV's rows says nothing; another class, image or gallery is refused."""
    rng, rows = np.random.default_rng(1), []
    for side in ("query", "gallery"):
        marks = {"is_query": side == "query", "is_gallery": side == "gallery"}
        # Labels by chance: metrics then differ from query to query.
        labels = rng.permutation(vectors[side]["labels"])
        paths = vectors[side]["paths"]
        rows += [{"label": n, "path": p, **marks} for n, p in zip(labels, paths, strict=True)]

    def evaluate(name, rows, *options):
        table, out = tmp_path / f"{name}.csv", tmp_path / f"{name}.json"
        with open(table, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        assert main(["evaluate", *ENCODER, f"--query={table}", *options, f"--out={out}"]) == 0
        return out

    plain = evaluate("plain", rows)
    back = evaluate("back", rows[::-1], "--rerank=diffusion:graph_k=2", "--metrics=map")
    assert main(["diff", str(plain), str(back), f"--out={tmp_path}/d.json"]) == 0
    row = json.loads((tmp_path / "d.json").read_text())["metrics"]["map"]
    x, y = (json.loads(path.read_text())["metrics"]["map"] for path in (plain, back))
    assert (row["a"], row["b"]) == (pytest.approx(x), pytest.approx(y))
    with np.load(f"{plain}.per_query.npz") as a, np.load(f"{back}.per_query.npz") as b:
        np.testing.assert_array_equal(a["query"], b["query"][::-1])
        order = np.argsort(a["query"])
        paired = difference(a["map"][order], b["map"][::-1][order])
        scattered = difference(a["map"], b["map"])
    assert (row["low"], row["high"]) == (paired.low, paired.high)
    assert (row["low"], row["high"]) != (scattered.low, scattered.high)
    others = {
        "moved": [rows[0] | {"label": "elm" if rows[0]["label"] == "ash" else "ash"}, *rows[1:]],
        "fewer": rows[1:],
        "gallery": rows[:-1],
    }
    for name, other in others.items():
        capsys.readouterr()
        assert main(["diff", str(plain), str(evaluate(name, other))]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert ("searched other images" if name == "gallery" else "asked different queries") in said
        assert f"({2 if name == 'moved' else 1} are in one alone)" in said


def test_a_run_that_is_not_finished(compared, tmp_path, capsys, caplog):
    """It has no numbers to compare yet; its newest checkpoint embeds, and that is said."""
    _, workdir, _ = compared
    other = tmp_path / "unfinished"
    shutil.copytree(workdir / "resnet18-far", other)
    step = json.loads((other / "results.json").read_text())["checkpoint_step"]
    (other / "results.json").unlink()
    assert main(["diff", str(workdir / "resnet18-near"), str(other)]) == 2
    assert "not a finished run: results.json is missing" in capsys.readouterr().err
    assert main(["evaluate", f"--encoder={other}", "--metrics=recall@1"]) == 0
    assert f"is not finished: its checkpoint of step {step} is used" in caplog.text


def test_a_run_is_whitened_in_its_own_folder(compared, tmp_path, capsys):
    _, workdir, _ = compared
    run_dir = tmp_path / "run"
    shutil.copytree(workdir / "resnet18-near", run_dir)
    assert main(["whiten", f"--encoder={run_dir}", "--dim=3"]) == 0
    told = f"4 -> 3 dimensions, shrinkage 0.5, fitted to 10 images of {run_dir} (train)"
    assert told in capsys.readouterr().out
    out = tmp_path / "m.json"
    assert main(["evaluate", f"--encoder={run_dir}", "--metrics=recall@1", f"--out={out}"]) == 0
    facts = json.loads(out.read_text())["provenance"]
    assert facts["encoder"]["whitening"]["dim"] == 3
    assert facts["distance"] == "cosine"
    assert not (run_dir / "encoder.json").exists()
    # Beside it, from another place: the folder points to the run, and stands for its data too.
    beside = tmp_path / "beside"
    assert main(["whiten", f"--encoder={run_dir}", "--dim=3", f"--out={beside}"]) == 0
    assert main(["evaluate", f"--encoder={beside}", "--metrics=recall@1", f"--out={out}"]) == 0
    assert json.loads(out.read_text())["provenance"]["encoder"]["whitening"]["dim"] == 3


def test_evaluate_of_a_run_gives_its_own_results_again(compared, tmp_path, capsys):
    _, workdir, _ = compared
    out, run_dir = tmp_path / "m.json", workdir / "resnet18-near"
    options = [f"--encoder={run_dir}", "--metrics=recall@k,map@r", "--ks=1,2", f"--out={out}"]
    assert main(["evaluate", *options]) == 0
    again = json.loads(out.read_text())["metrics"]
    results = json.loads((run_dir / "results.json").read_text())["test"]["after"]
    for name in ("recall@1", "recall@2", "map@r", "queries", "gallery"):
        assert again[name] == pytest.approx(results[name])


def test_grid_cells_are_every_combination():
    from ml_collections import ConfigDict

    base = ConfigDict({"a": 1, "b": {"c": 0.5, "d": "x"}})
    grid = {"one": {"p": {"a": 2}, "q": {}}, "two": {"r": {"b.c": 1}, "s": {"b": {"e": 3}}}}
    found = {cell.name: cell.config.to_dict() for cell in cells(base, grid)}
    assert found == {
        "p-r": {"a": 2, "b": {"c": 1.0, "d": "x"}},
        "p-s": {"a": 2, "b": {"e": 3}},
        "q-r": {"a": 1, "b": {"c": 1.0, "d": "x"}},
        "q-s": {"a": 1, "b": {"e": 3}},
    }
    assert base.to_dict() == {"a": 1, "b": {"c": 0.5, "d": "x"}}
    with pytest.raises(UserError, match=r"no field b\.z"):
        set_field(base, "b.z", 1)
    with pytest.raises(UserError, match="float"):
        set_field(base, "b.c", "text")
    with pytest.raises(UserError, match="share a folder"):
        cells(base, {"one": {"a/b": {}, "a b": {}}})
    with pytest.raises(UserError, match="--confg"):
        override(base, ["--confg.a=1"])


def outcome(recall):
    metrics = {"recall@1": recall, "map@r": recall / 2}
    return {
        "test": {"before": {"recall@1": 0.25, "map@r": 0.125}, "after": metrics},
        "parameters": {"trunk": 10, "head": 5},
        "embedding_dim": 4,
        "trunk": {"trunk": "t", "fallback_for": None},
    }


def test_weights_that_cannot_be_had_are_asked_for_once_and_before_the_data(tmp_path, monkeypatch):
    asked = []

    def obtain(source, cache_dir):
        asked.append(source)
        raise Unavailable("no way there")

    monkeypatch.setattr(sys.modules["siamese_jax.weights.load"], "obtain", obtain)
    config = base_config()
    config.data.update(source="folder", root="/no/such/folder")
    rates = {f"rate {i}": {"optim.learning_rate": 10.0**-i} for i in range(3)}
    trunks = {"a": {"trunk.name": "resnet50"}, "b": {"trunk.name": "vgg16"}}
    outcomes, failures = run_all(cells(config, {"rate": rates, "trunk": trunks}), tmp_path)
    assert not outcomes
    assert len(asked) == 2
    for name, why in failures.items():
        trunk = "resnet50" if name.endswith("a") else "vgg16"
        assert f"'imagenet' of {trunk} can't be had here: no way there" in why


def test_a_published_score_is_of_a_row(tmp_path):
    path = tmp_path / "grid.py"
    text = GRID.format(root="/r") + "PUBLISHED = "
    for wrong in (
        '{("resnet18", "far"): 56.6}',
        '{("resnet18",): 0.5}',
        '{"far": 0.5}',
        "[0.5]",
    ):
        path.write_text(text + wrong)
        with pytest.raises(UserError, match="PUBLISHED") as e:
            read_grid(str(path))
        assert "\n" not in str(e.value)


def test_a_published_score_of_no_row_is_said(tmp_path, caplog):
    """A grid may be cut, and keep the scores."""
    path = tmp_path / "grid.py"
    path.write_text(GRID.format(root="/r") + 'PUBLISHED = {("absent", "far"): 0.5}')
    caplog.set_level("INFO", "siamese_jax")
    read_grid(str(path))
    assert "PUBLISHED has what GRID has not: absent far" in caplog.text


def test_seeds_are_averaged_with_their_deviation():
    chosen = [Cell({"loss": x, "seed": s}, None) for x in "ab" for s in "012"]
    recalls = {"a-0": 0.5, "a-1": 0.6, "a-2": 0.7, "b-0": 0.9, "b-2": 0.7}
    speeds = {"a-0": 10.0, "a-1": 20.0, "a-2": 30.0, "b-0": 1.0, "b-2": 1.0}
    rows = table(chosen, {name: outcome(r) for name, r in recalls.items()}, speeds)
    assert [row["loss"] for row in rows] == ["b", "a"]
    assert rows[1]["recall@1"] == pytest.approx(0.6)
    assert rows[1]["recall@1 sd"] == pytest.approx(0.1)
    assert rows[1]["images/s"] == pytest.approx(20)
    assert rows[0]["recall@1"] == pytest.approx(0.8)
    assert rows[0]["parameters"] == 15
    assert rows[0]["runs"] == ["b-0", "b-2"]


def test_a_grid_of_seeds_alone_is_one_row(tmp_path):
    recalls = {"0": 0.5, "1": 0.7}
    chosen = [Cell({"seed": s}, None) for s in recalls]
    rows = table(chosen, {n: outcome(r) for n, r in recalls.items()}, dict.fromkeys(recalls, 2.0))
    write(tmp_path, "seeds", rows, ["seed"], {})
    assert read_csv(tmp_path / "compare.csv")[0]["recall@1"] == "0.6"
    assert (tmp_path / "compare.md").read_text().count("\n") == 3
    assert "seeds: recall@1 0.6" in (tmp_path / "index.html").read_text()


def test_images_per_second_is_the_median_pass():
    ticks = iter([0, 1, 10, 12, 20, 30])  # passes of 1, 2 and 10 seconds
    calls = []

    class Fake:
        image_size = 8

        def __call__(self, images):
            calls.append(images.shape)

    assert images_per_second(Fake(), repeats=3, clock=lambda: next(ticks)) == 64 / 2
    assert calls == [(64, 8, 8, 3)] * 4  # the first one, which compiles, is not timed


def test_a_warning_is_given_once_on_the_command_line():
    """Every pass over the images meets the same broken one; other lines are not held back."""

    def new(level, text, name="siamese_jax.data.pipeline"):
        return command_line._is_new(
            logging.makeLogRecord({"levelno": level, "msg": text, "name": name})
        )

    command_line._said.clear()
    assert new(logging.WARNING, "skipped a.png")
    assert not new(logging.WARNING, "skipped a.png")
    assert new(logging.WARNING, "skipped b.png")
    assert new(logging.INFO, "step 1")
    assert new(logging.INFO, "step 1")
    assert new(logging.WARNING, "skipped a.png", "jax")
