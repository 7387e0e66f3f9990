"""`compare --folds --best-of`: a run of each fold, the best try by validation, both embeddings."""

import contextlib
import csv
import io
import json
import math
import statistics

import jax
import numpy as np
import pytest
import tiny

import siamese_jax as sj
from configs import common
from siamese_jax.__main__ import main
from siamese_jax.data.sources import load_records
from siamese_jax.encoder.embedding import embed_records
from siamese_jax.metrics.bootstrap import difference
from siamese_jax.tools import compare as compare_tool
from siamese_jax.tools import compare_folds, compare_table
from siamese_jax.tools.compare_grid import Cell
from siamese_jax.train import choosing, inputs

GRID = """
from configs import common

def get_config():
    config = common.base()
    config.data.update(source="folder", root={root!r})
    config.trunk.update(name="resnet18", weights="random", image_size=32)
    config.loss = {{"name": "triplet", "margin": 0.3}}
    config.sampler = {{"name": "classes", "batch_size": 8, "per_class": 2}}
    config.train.update(steps=2, log_every=2, eval_every=2, checkpoint_every=2)
    return config

GRID = {{
    "loss": {{"near": {{}}}},
    "rate": {{rate: {{"optim.learning_rate": float(rate)}} for rate in {rates}}},
}}
"""
CLASSES, IMAGES = 16, 4
RATES = ("1e-6", "1e-2")


@pytest.fixture(scope="module")
def compared(tmp_path_factory, small_trunk):
    """The grid in two folds; how many images the trunk saw, and how often it was asked."""
    root = tmp_path_factory.mktemp("folds")
    tiny.make_folder(root / "shop", classes=CLASSES, images=IMAGES, noise=120)
    (root / "grid.py").write_text(GRID.format(root=str(root / "shop"), rates=RATES))
    seen = []

    def run_features(model, variables, images, features=inputs.run_features):
        seen.append(len(images))
        return features(model, variables, images)

    def choose(run, curves):
        """The bare trunk of the first fold, and the head of the second one."""
        return -1 if run.config.data.fold == "1/2" else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        patch.setattr(inputs, "run_features", run_features)
        patch.setattr(choosing, "choose", choose)
        patch.setattr(compare_tool, "images_per_second", lambda encoder: 1.0)
        compare(root)
        yield root, seen


def compare(root):
    options = [f"--config={root / 'grid.py'}", f"--workdir={root / 'runs'}", "--folds=2"]
    head = ["--config.head=linear", "--config.head.layers=8", "--config.head.init=random"]
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        assert main(["compare", *options, *head, "--best-of=rate"]) == 0


def read(root):
    with open(root / "runs" / "compare.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    runs = {p.parent.name: json.loads(p.read_text()) for p in root.glob("runs/*/results.json")}
    return row, runs


def test_the_best_try_is_that_of_validation(compared):
    """Independently of the test classes; each fold is a run, and the trunk ran once for all."""
    root, seen = compared
    row, runs = read(root)
    names = {rate: [f"near-{rate.replace('-', '_')}-{i}of2" for i in (1, 2)] for rate in RATES}
    assert sorted(runs) == sorted(name for folds in names.values() for name in folds)
    means = {
        rate: statistics.mean(runs[name]["validation"]["after"]["map@r"] for name in folds)
        for rate, folds in names.items()
    }
    best = max(means, key=means.get)
    assert (row["rate"], row["tries"], row["loss"]) == (best, "2", "near")
    assert float(row["validation"]) == pytest.approx(means[best])
    a, b = (runs[name]["test"]["after"] for name in names[best])
    for metric in ("recall@1", "map@r"):
        assert float(row[metric]) == pytest.approx((a[metric] + b[metric]) / 2)
        half = math.tan(0.95 * math.pi / 2) * abs(a[metric] - b[metric]) / 2  # t of one degree
        middle = (a[metric] + b[metric]) / 2
        assert float(row[f"{metric} low"]) == pytest.approx(max(0, middle - half))
        assert float(row[f"{metric} high"]) == pytest.approx(min(1, middle + half))
        before = [runs[name]["test"]["before"][metric] for name in names[best]]
        assert float(row[f"{metric} before"]) == pytest.approx(statistics.mean(before))
    for name, results in runs.items():
        assert {s: p["classes"] for s, p in results["split"].items()} == {
            "train": 4, "validation": 4, "test": 8,
        }  # fmt: skip
        config = json.loads((root / "runs" / name / "config.json").read_text())
        assert config["data"]["fold"] == f"{name[-4]}/2"
        assert config["head"]["layers"] == [8]
        assert config["head"]["signed_sqrt"]
    assert sum(seen) < 2 * CLASSES * IMAGES


def test_a_sentence_says_whether_it_is_better_than_before(compared):
    """The first fold's result is the bare trunk, and so what each query got before."""
    root, _ = compared
    row, _ = read(root)
    files = [root / "runs" / run / "report" / "per_query_test.npz" for run in row["runs"].split()]
    before, head = (np.load(file)["map@r"] for file in files)
    gain = (head - before) / 2
    told = difference(np.zeros(len(gain)), gain)
    said = (
        "better than" if told.low > 0 else "worse than" if told.high < 0 else "not told apart from"
    )
    sentence = (
        f"near {row['rate']}: test: {said} the bare trunk (map@r {gain.mean():+.4f}, 95 % interval "
        f"{told.low:+.4f} to {told.high:+.4f}, over {CLASSES // 2 * IMAGES} queries)"
    )
    for page in ("compare.md", "index.html"):
        assert sentence in (root / "runs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(("values", "nothing"), [((0.4, 0.6), True), ((0.5, 0.51), False)])
def test_runs_that_tell_nothing_say_so(tmp_path, values, nothing):
    """Of two runs, the interval reaches 6.35 times as far as they are apart."""
    cells = [Cell({"fold": fold}, common.base()) for fold in ("1of2", "2of2")]
    outcomes = {
        cell.name: {
            "test": {part: {"recall@1": v, "map@r": 0.5} for part in ("before", "after")},
            "validation": {"after": {"map@r": 0.5}},
            "saved": "step 0", "checkpoint_step": 0, "parameters": {"head": 1},
            "embedding_dim": 4, "trunk": {"trunk": "t", "fallback_for": None},
        }
        for cell, v in zip(cells, values, strict=True)
    }  # fmt: skip
    rows = compare_table.table(cells, outcomes, dict.fromkeys(outcomes, 1.0))
    compare_table.write(tmp_path, "two", rows, ["fold"], {})
    said = (tmp_path / "compare.md").read_text()
    assert ("2 runs tell nothing of what others would get" in said) == nothing
    assert (rows[0]["recall@1 low"], rows[0]["recall@1 high"]) == (
        (0, 1) if nothing else pytest.approx((0.4415, 0.5685), abs=1e-4)
    )


def test_concatenated_is_of_the_runs_encoders_side_by_side(compared):
    root, _ = compared
    row, _ = read(root)
    records = load_records("folder", root / "shop", seed=0, fractions=(0.5, 0, 0.5)).where("test")
    parts = []
    with jax.numpy_dtype_promotion("standard"):
        for run in row["runs"].split():
            x = embed_records(sj.load_encoder(root / "runs" / run), records).vectors
            x = x.astype(np.float64)
            parts.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    cosines = sum(part @ part.T for part in parts)
    np.fill_diagonal(cosines, -np.inf)
    recalls, precisions = [], []
    for i, order in enumerate(np.argsort(-cosines, axis=1)):
        hits = records.label[order[: IMAGES - 1]] == records.label[i]
        recalls.append(hits[0])
        at = np.cumsum(hits) / np.arange(1, IMAGES)
        precisions.append((at * hits).sum() / (IMAGES - 1))
    assert float(row["concatenated recall@1"]) == pytest.approx(np.mean(recalls), abs=1e-6)
    assert float(row["concatenated map@r"]) == pytest.approx(np.mean(precisions), abs=1e-3)


def test_a_finished_fold_is_not_run_again(compared):
    root, seen = compared
    before = read(root)
    times = {p: p.stat().st_mtime_ns for p in root.glob("runs/*/results.json")}
    seen.clear()
    compare(root)
    assert {p: p.stat().st_mtime_ns for p in root.glob("runs/*/results.json")} == times
    assert read(root) == before
    assert not seen


def test_intervals_that_tell_nothing_are_said():
    def row(low, high):
        return {"recall@1 low": low, "recall@1 high": high, "runs": ["a", "b"]}

    assert compare_folds.empty_intervals([row(0.2, 0.4)], ["recall@1", "map@r"]) == []
    said = compare_folds.empty_intervals([row(0.5, 0.5), row(0.0, 1.0)], ["recall@1"])
    assert [sentence.split(":")[0] for sentence in said] == [
        "An interval from 0 to 1",
        "An interval of no width",
    ]


def test_a_config_without_a_grid_has_folds_too(tmp_path, capsys):
    path = tmp_path / "alone.py"
    path.write_text(GRID.format(root=str(tmp_path), rates=RATES).partition("GRID")[0])
    assert main(["compare", f"--config={path}", "--folds=3", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["alone-1of3", "alone-2of3", "alone-3of3"]
    assert main(["compare", f"--config={path}", "--list"]) == 2
    assert "--folds=4 compares the folds of a config without one" in capsys.readouterr().err
