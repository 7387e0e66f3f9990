"""Distances that don't cancel: data far from the origin, of any scale, and beside outliers.

Everything is compared with the same data in float64, as given: what a common offset takes from the
digits of float32 is taken before, where a function is given float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn import metrics as sk

from siamese_jax import distances, losses
from siamese_jax.losses import miners
from siamese_jax.metrics import clustering, verification
from siamese_jax.search import rerank

OFFSETS = [0.0, 3.0, 3000.0, 1e6]
PLACES = [(offset, scale) for offset in OFFSETS for scale in (0.1, 1.0, 100.0)]


def clouds(rng, offset, scale, *, classes=6, each=8, d=5, spread=0.8):
    labels = np.repeat(np.arange(classes), each)
    x = rng.normal(size=(classes, d))[labels] + spread * rng.normal(size=(len(labels), d))
    return offset + scale * x, labels


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("outliers", [0, 3])
def test_pairwise_keeps_its_bound(rng, distance, outliers):
    """|d^2 - true| <= (d + 8) 2^-24 (|x - o|^2 + |y - o|^2); unit rows are rounded themselves."""
    found_far = jax.jit(functools.partial(distances.pairwise, distance=distance))
    for offset, scale in PLACES:
        x, _ = clouds(rng, offset, scale, d=16)
        x = x.astype(np.float32)
        x[:outliers] += np.float32(1e4 * scale)
        y = np.concatenate([x, np.zeros((40, 16), np.float32)])  # rows that are masked
        z = x.astype(np.float64)
        ours = np.array(found_far(x, y), np.float64)[outliers:, outliers : len(x)]
        if distance == "cosine":
            z /= np.linalg.norm(z, axis=1, keepdims=True)
        true = cdist(z, z, "sqeuclidean")[outliers:, outliers:]
        reach = np.linalg.norm(z - np.median(z, 0), axis=1)[outliers:].max()
        error = 16 * 2.0**-24 * (2 * reach) ** 2
        if distance == "euclidean":
            assert (np.abs(ours**2 - true) <= error + 2.0**-22 * true).all(), (offset, scale)
        elif distance == "sqeuclidean":
            assert (np.abs(ours - true) <= error).all(), (offset, scale)
        else:  # 2^-23 each, for rows of length 1 in float32
            error = (np.sqrt(true) + 2.0**-22) ** 2 - true + error
            assert (np.abs(2 * ours - true) <= error).all(), (offset, scale)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_gradients_hold_far_from_the_origin(rng, distance):
    """Against the same loss near the origin (or, for cosine, in float64)."""
    weights = rng.normal(size=(48, 48)).astype(np.float32)

    @jax.jit
    def gradient(x):
        w = weights.astype(x.dtype)
        return jax.grad(lambda x: jnp.sum(w * distances.pairwise(x, x, distance)))(x)

    for offset in OFFSETS:
        x = np.round(clouds(rng, 0.0, 64.0)[0]) + offset  # exact in float32
        far = np.asarray(gradient(x.astype(np.float32)))
        if distance == "cosine":
            with jax.enable_x64(True):
                near = np.asarray(gradient(x))
            tolerance = 1e-4 * (1 + offset / 64)  # of rows of length 1 in float32
        else:
            near = np.asarray(gradient((x - offset).astype(np.float32)))
            tolerance = 1e-4
        np.testing.assert_allclose(far, near, rtol=0, atol=tolerance * np.abs(near).max())


@pytest.mark.parametrize("name", ["triplet", "contrastive", "margin", "lifted_structure"])
def test_losses_of_distances_do_not_move_with_the_origin(rng, name):
    loss = losses.LOSSES[name](normalize=False)
    params = loss.init(jax.random.key(0), 5, 6)
    values = []
    for offset in OFFSETS:
        x, labels = clouds(np.random.default_rng(1), 0.0, 64.0)
        x = (np.round(x) + offset).astype(np.float32) / 64  # exact in float32
        values.append(float(losses.mean(loss, params, x, labels.astype(np.int32))))
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize", [False, True])
def test_miners_choose_as_in_float64(rng, distance, normalize):
    """The chosen one is the hardest, but for what rows of length 1 in float32 can't tell apart."""
    miner = miners.MINERS["hard"](distance=distance, normalize=normalize)
    for offset, scale in PLACES:
        x, labels = clouds(rng, offset, scale)
        x = x.astype(np.float32)
        mined = jax.device_get(miner(x, labels.astype(np.int32)))
        z = x.astype(np.float64)
        rounding = 1e-5 * np.linalg.norm(z - z.mean(0), axis=1).max()
        if normalize or distance == "cosine":
            z /= np.linalg.norm(z, axis=1, keepdims=True)
            rounding = 2.0**-21 + 1e-5 * np.linalg.norm(z - z.mean(0), axis=1).max()
        true = cdist(z, z)
        same = labels[:, None] == labels
        far = np.where(same, true, -np.inf).max(1)
        near = np.where(same, np.inf, true).min(1)
        assert mined.mask.all()
        assert (true[mined.anchor, mined.positive] >= far - rounding).all(), (offset, scale)
        assert (true[mined.anchor, mined.negative] <= near + rounding).all(), (offset, scale)


def test_centres_that_have_met_do_not_push_one_another():
    loss = losses.LOSSES["soft_triple"](tau=1.0, centers=3)
    w = np.ones((2, 3, 7), np.float32) / np.float32(7**0.5)
    x, labels = np.eye(7, dtype=np.float32)[:2], np.array([0, 1], np.int32)
    apart, met = (
        float(losses.mean(loss, {"proxies": w + shift}, x, labels))
        for shift in (np.float32(1e-3) * np.eye(3, 7, dtype=np.float32), np.float32(0))
    )
    # |w_j - w_k| = sqrt(2) 1e-3, less what lies along w; twice the mean over 3 pairs, halved.
    expected = np.linalg.norm(
        np.diff([v / np.linalg.norm(v) for v in w[0, :2] + 1e-3 * np.eye(2, 7)], axis=0)
    )
    base = float(
        losses.mean(losses.LOSSES["soft_triple"](tau=0.0, centers=3), {"proxies": w}, x, labels)
    )
    assert met == pytest.approx(base, abs=1e-6)
    assert apart - met == pytest.approx(expected / 2, abs=2e-4)


def test_kmeans_is_the_same_wherever_the_rows_lie(rng):
    from sklearn.cluster import KMeans

    base, labels = clouds(rng, 0.0, 1.0, spread=0.1)
    reference = KMeans(6, n_init=10, random_state=0).fit(base)
    for offset, scale in PLACES:
        for dtype in (np.float64, np.float32):
            x = (offset + scale * base).astype(dtype)
            if dtype == np.float32 and offset > 1e4 * scale:
                continue  # nothing of the clusters is left in such rows
            found = clustering.kmeans(x, 6, restarts=10)
            assert sk.adjusted_rand_score(found.assignment, reference.labels_) == 1
            z = x.astype(np.float64)
            squared = cdist(z, found.centroids, "sqeuclidean")
            np.testing.assert_array_equal(squared.argmin(1), found.assignment)
            assert found.inertia == pytest.approx(squared.min(1).sum(), rel=1e-5)
            scores = clustering.clustering(x, labels, restarts=5)
            assert scores["nmi"] == scores["ami"] == pytest.approx(1, abs=1e-9)


def test_an_outlier_does_not_blur_the_clusters_of_others(rng):
    base, _ = clouds(rng, 0.0, 1.0, spread=0.1)
    x = np.concatenate([base, [[1e6] * 5]])
    found = clustering.kmeans(x, 7, restarts=10)
    squared = cdist(x, found.centroids, "sqeuclidean")
    np.testing.assert_array_equal(squared.argmin(1), found.assignment)
    alone = clustering.kmeans(base, 6, restarts=10)
    assert sk.adjusted_rand_score(found.assignment[:-1], alone.assignment) == 1


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("outliers", [0, 2])
def test_verification_is_that_of_float64_within_its_resolution(rng, distance, outliers):
    for offset, scale in PLACES:
        for dtype in (np.float64, np.float32):
            x, labels = clouds(rng, offset, scale)
            x = x.astype(dtype)
            x[:outliers] += dtype(1e5 * scale)
            i, j = np.nonzero(~np.eye(len(x), dtype=bool))
            same, z = labels[i] == labels[j], x.astype(np.float64)
            true = cdist(z, z, distance)[i, j]
            if distance == "cosine":
                z /= np.linalg.norm(z, axis=1, keepdims=True)
                true = cdist(z, z, "sqeuclidean")[i, j] / 2
            found = verification.verify(x, labels, distance=distance)
            assert found["resolution"] < (1e-4 if offset <= 3000 * scale else 0.05)
            error = abs(found["roc_auc"] - auc(true[same], true[~same]))
            assert error <= found["resolution"] + 1e-12, (offset, scale)
            # A pair or two may be tied in float32.
            few = 4 / same.sum() if found["resolution"] else 1e-9
            exact = verification.roc(true, same)
            assert found["eer"] == pytest.approx(exact.eer(), abs=few)
            whole = verification.all_pairs(x, labels, distance=distance)
            for rate in (0.5, 0.1, 0.01):
                accepted = true.astype(np.float32) <= whole.threshold_at(rate)
                assert accepted[~same].mean() <= rate
                if offset > 3000 * scale:
                    continue  # more than a few are
                assert whole.fnmr_at(rate) == pytest.approx((~accepted)[same].mean(), abs=few)
                assert whole.fnmr_at(rate) == pytest.approx(exact.fnmr_at(rate), abs=few)


def auc(genuine, impostor):
    """By counting."""
    apart = impostor[None, :] - genuine[:, None]
    return (apart > 0).mean() + (apart == 0).mean() / 2


def test_perfect_pairs_beside_an_outlier_are_perfect(rng):
    x = np.repeat(rng.normal(size=(20, 4)), 2, axis=0)
    x = np.concatenate([x, np.full((1, 4), 1e5)])
    labels = np.append(np.repeat(np.arange(20), 2), 20)
    for offset in (0.0, 3000.0):
        found = verification.verify((x + offset).astype(np.float32), labels)
        assert found["roc_auc"] == 1
        assert found["eer"] == found["resolution"] == found["fnmr@0.0001"] == 0


def test_resolution_bounds_what_few_bins_lose(rng, monkeypatch):
    x, labels = clouds(rng, 0.0, 1.0, each=30, spread=1.5)
    i, j = np.nonzero(~np.eye(len(x), dtype=bool))
    same = labels[i] == labels[j]
    z = x.astype(np.float32).astype(np.float64)
    exact = auc(*(np.linalg.norm(z[i[s]] - z[j[s]], axis=1) for s in (same, ~same)))
    wide = []
    for bins in (2**6, 2**10, 2**20):
        monkeypatch.setattr(verification, "BINS", bins)
        found = verification.verify(x, labels, memory_limit=2**20)
        assert abs(found["roc_auc"] - exact) <= found["resolution"] + 1e-12
        wide.append(found["resolution"])
    assert wide[0] > 1e-4 > 1e-5 > wide[2]


def test_thresholds_of_negative_distances(rng):
    """Of "dot", whose bits are in the other order below 0."""
    x, labels = clouds(rng, 0.2, 1.0)
    found = verification.all_pairs(x, labels, distance="dot")
    i, j = np.nonzero(~np.eye(len(x), dtype=bool))
    true = -(x @ x.T)[i, j]
    exact = verification.roc(true, labels[i] == labels[j])
    assert (np.diff(found.threshold) > 0).all()
    assert found.auc() == pytest.approx(exact.auc(), abs=1e-6)
    for t, accepted in zip(
        found.threshold, found.genuine.cumsum() + found.impostor.cumsum(), strict=True
    ):
        assert (true.astype(np.float32) <= t).sum() == accepted


def test_k_reciprocal_tells_a_narrow_cone_apart(rng):
    """Cosines that are all 1 in float32: the order is that of the same angles, made wider."""
    x, _ = clouds(rng, 0.0, 1.0, d=2)
    far = np.concatenate([np.full((len(x), 1), 3000.0), x], axis=1)
    found = rerank.k_reciprocal(far[:10], far[10:], 5, k1=6, k2=2)
    # On a small part of the sphere angles are distances: cosine of 1 - |x - y|^2 / 2.
    wide = np.concatenate([np.full((len(x), 1), 40.0), x], axis=1)
    near = rerank.k_reciprocal(wide[:10], wide[10:], 5, k1=6, k2=2)
    assert (found.indices == near.indices).mean() > 0.95
    np.testing.assert_allclose(found.distances, near.distances, atol=0.02)
