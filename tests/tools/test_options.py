"""Options that are rarely asked for: each does what it says, against plain NumPy where it can."""

import contextlib
import io
import json
import socket

import jax
import numpy as np
import pytest
import tiny
from small_trunk import WIDTH

import siamese_jax as sj
from siamese_jax.__main__ import main
from siamese_jax.data.preprocess import read_image
from siamese_jax.encoder.pooling import POOLS, rmac, rmac_regions
from siamese_jax.errors import UserError
from siamese_jax.metrics.bootstrap import difference, interval
from siamese_jax.metrics.clustering import clustering
from siamese_jax.search import rerank
from siamese_jax.search.gallery import Gallery
from siamese_jax.tools import cli

ENCODER = ("--encoder=resnet18", "--weights=random", "--image-size=32")


@pytest.fixture(scope="module")
def shop(tmp_path_factory, small_trunk):
    """Four classes of three images, hard enough that nothing is perfect; and one broken image."""
    root = tiny.make_folder(tmp_path_factory.mktemp("data") / "shop", 4, 3, noise=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root.parent / "cache"))
        yield root


def run(*argv):
    """Runs a tool in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(argument) for argument in argv]) == 0
    return printed.getvalue()


def embedded(shop, tmp_path, *options):
    run("embed", *ENCODER, *options, f"--images={shop}", f"--out={tmp_path / 'e.npz'}")
    with np.load(tmp_path / "e.npz") as arrays:
        return arrays["vectors"]


def test_stage_and_pool_of_a_trunk(shop, tmp_path):
    """At 64 px the last map is 2 x 2: its largest values are above its means."""
    plain = embedded(shop, tmp_path, "--image-size=64")
    largest = embedded(shop, tmp_path, "--image-size=64", "--pool=max")
    assert plain.shape == largest.shape == (12, WIDTH)
    assert (largest >= plain - 1e-6).all()
    assert (largest > plain + 1e-6).any()
    third = embedded(shop, tmp_path, "--stage=stage3")
    assert third.shape == (12, WIDTH)
    assert not np.allclose(third, embedded(shop, tmp_path))
    several = embedded(shop, tmp_path, "--stage=stage3,stage4", "--pool=max,average")
    assert several.shape == (12, WIDTH + WIDTH)
    np.testing.assert_allclose(np.square(several[:, :WIDTH]).sum(axis=1), 1, atol=1e-5)
    assert not np.allclose(
        several, embedded(shop, tmp_path, "--stage=stage3,stage4", "--signed-sqrt"), atol=1e-2
    )
    with pytest.raises(AssertionError):
        embedded(shop, tmp_path, "--stage=stage9")


def test_a_fallback_is_taken_and_said(shop, tmp_path, monkeypatch):
    def cut(*args, **kwargs):
        raise socket.gaierror("the network is cut")

    monkeypatch.setattr("socket.getaddrinfo", cut)
    out = f"--out={tmp_path / 'e.npz'}"
    options = ["embed", "--encoder=resnet50", "--image-size=32", f"--images={shop}", out]
    assert main(options) == 2
    with pytest.warns(UserWarning, match="efficientnet_lite0"):
        run(*options, "--offline-fallback=efficientnet_lite0")
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["vectors"].shape == (12, 1280)


def test_confidence_of_a_difference(shop, tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, options in zip(files, ((), ("--expand=2", "--alpha=1")), strict=True):
        run("evaluate", *ENCODER, *options, f"--query={shop}", f"--out={file}")
    widths = []
    for confidence in ("0.5", "0.99"):
        out = tmp_path / f"{confidence}.json"
        run("diff", *files, f"--confidence={confidence}", f"--out={out}")
        metric = json.loads(out.read_text())["metrics"]["map"]
        widths.append(metric["high"] - metric["low"])
    assert widths[0] < widths[1]


def test_how_much_is_shown(shop, tmp_path):
    page = tmp_path / "found.html"
    for count in (2, 5):
        options = [f"--query={shop}", f"--gallery={shop}", f"--show={count}", f"--out={page}"]
        run("rank", *ENCODER, *options, "-k", 3)
        assert page.read_text().count('class="card query-row') == count
    for count in (1, 3):
        text = run("evaluate", *ENCODER, f"--query={shop}", f"--worst={count}")
        assert len(text.split("worst classes")[1].splitlines()) == 1 + count


def test_augmented_galleries_by_the_tool(shop, tmp_path):
    """`--augment` and `--alpha` are `augment_gallery` of the same vectors."""
    vectors = embedded(shop, tmp_path)
    labels = np.repeat(np.arange(4), 3)
    for alpha in (0.0, 3.0):
        out = tmp_path / f"{alpha}.json"
        options = ["--augment=2", f"--alpha={alpha}", "--distance=cosine", f"--out={out}"]
        run("evaluate", *ENCODER, f"--query={shop}", *options)
        moved = rerank.augment_gallery(vectors, 2, alpha=alpha, memory_limit=2**20)
        np.testing.assert_array_equal(moved, rerank.augment_gallery(vectors, 2, alpha=alpha))
        ids = np.arange(12)
        expected = sj.evaluate(
            vectors, labels, moved, labels, distance="cosine", query_ids=ids, gallery_ids=ids
        )
        found = json.loads(out.read_text())["metrics"]
        assert found["map"] == pytest.approx(expected["map"], abs=1e-6)


def test_method_and_shrinkage_of_a_whitening(shop, tmp_path):
    def whitened(*options):
        run("whiten", *ENCODER, f"--images={shop}", f"--out={tmp_path / 'w'}", *options)
        run("embed", f"--encoder={tmp_path / 'w'}", f"--images={shop}", f"--out={tmp_path}/w.npz")
        with np.load(tmp_path / "w.npz") as arrays:
            return arrays["vectors"]

    one = whitened("--method=pca", "--dim=3")
    other = whitened("--method=lda", "--dim=3")
    third = whitened("--method=learned", "--dim=3", "--shrinkage=0.1")
    assert one.shape == other.shape == third.shape == (12, 3)
    for a, b in ((one, other), (other, third)):
        assert not np.allclose(a @ a.T, b @ b.T, atol=1e-3)


def test_encoders_in_half_precision_and_strict_folders(shop):
    paths = sorted(shop.glob("*/*.png"))
    images = np.stack([read_image(str(path), (32, 32)) for path in paths])
    with jax.numpy_dtype_promotion("standard"):
        full, half = (
            sj.load_encoder("resnet18", "random", 32, dtype=t)(images)
            for t in ("float32", "bfloat16")
        )
    assert full.dtype == half.dtype == np.float32
    far = np.abs(half - full).max() / np.abs(full).max()
    assert 1e-5 < far < 0.1
    encoder = sj.load_encoder("resnet18", "random", 32)
    broken = shop.parent / "broken"
    tiny.make_folder(broken, 2, 2)
    (broken / "class0" / "0.png").write_text("no picture")
    assert len(sj.embed_folder(encoder, broken).vectors) == 3
    with pytest.raises(UserError, match=r"0\.png"):
        sj.embed_folder(encoder, broken, strict=True)


def test_options_of_measures(rng, tmp_path):
    """What is only about time or memory changes nothing; seeds and groups change what they name."""
    x, labels = rng.normal(size=(1500, 5)), rng.integers(0, 400, 1500)
    ids = rng.permutation(1500)
    plain = sj.evaluate(x, labels, x, labels, query_ids=ids, gallery_ids=ids)
    assert plain == sj.evaluate(x, labels)
    limited = sj.evaluate(x, labels, x, labels, query_ids=ids, gallery_ids=ids, memory_limit=2**21)
    assert limited == plain

    x, labels, ids = x[:60], labels[:60] % 4, ids[:60]
    points = np.repeat(rng.normal(0, 9, (4, 5)), 15, 0) + rng.normal(size=(60, 5))
    named = np.repeat(np.arange(4), 15)
    best = clustering(points, named, seed=1, restarts=4, iterations=50)
    assert best == clustering(points, named, seed=1, restarts=4, iterations=50, memory_limit=2**16)
    assert best["nmi"] == pytest.approx(1)
    hard = [clustering(x, labels, seed=s, restarts=1, iterations=1)["nmi"] for s in range(4)]
    assert len(set(hard)) > 1

    before, after, groups = rng.random(60), rng.random(60), rng.integers(0, 5, 60)
    options = {"resamples": 50, "seed": 3, "groups": groups}
    assert difference(before, after, **options) == interval(after - before, **options)
    assert difference(before, after, **options) != difference(before, after, resamples=50, seed=3)
    assert difference(before, after, resamples=50, seed=3) != difference(before, after, resamples=9)

    Gallery(x.astype(np.float32), ids).save(tmp_path / "gallery")
    kept, lazy = (Gallery.load(tmp_path / "gallery", resident=r) for r in (True, False))
    assert (kept.resident, lazy.resident) == (True, False)
    for a, b in zip(sj.rank(x[:4], kept, 3), sj.rank(x[:4], lazy, 3), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("levels", "overlap"), [(1, 0.4), (2, 0.1), (4, 0.7)])
def test_regions_of_rmac(rng, levels, overlap):
    x = rng.normal(size=(3, 7, 4, 6)).astype(np.float32)
    total = np.zeros((3, 6))
    for top, left, side in rmac_regions(7, 4, levels, overlap):
        peak = x[:, top : top + side, left : left + side].max(axis=(1, 2)).astype(np.float64)
        total += peak / np.linalg.norm(peak, axis=1, keepdims=True)
    np.testing.assert_allclose(rmac(x, levels, overlap), total, atol=1e-5)


def test_every_pooling_of_the_package_is_an_option():
    assert str(cli.POOL("cls,average")) == "cls,average"
    for pool in POOLS:
        assert cli.POOL(pool) == pool
