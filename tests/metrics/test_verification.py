"""Verification, clustering, intervals, class tables and landmarks against independent sources."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from siamese_jax.errors import UserError
from siamese_jax.metrics import bootstrap, clustering, verification
from siamese_jax.metrics.by_class import by_class
from siamese_jax.metrics.landmarks import landmarks
from siamese_jax.metrics.retrieval import of_ranking, per_query


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(4, 60), steps=st.integers(2, 50))
def test_roc_of_pairs_agrees_with_scikit_learn_and_with_counting(seed, n, steps):
    rng = np.random.default_rng(seed)
    same = rng.random(n) < 0.4
    same[:2] = True, False
    distances = rng.integers(0, steps, n) / steps - 0.2 * same  # many ties
    found = verification.roc(distances, same)
    np.testing.assert_allclose(found.auc(), sk.roc_auc_score(same, -distances), atol=1e-12)
    for f in (0.0, 0.1, 0.5, 1.0):
        rates = [
            (np.mean(distances[~same] <= t), np.mean(distances[same] > t))
            for t in [-np.inf, *distances]
        ]
        expected = min(fnmr for fmr, fnmr in rates if fmr <= f)
        assert found.fnmr_at(f) == pytest.approx(expected, abs=1e-12)
        assert np.mean(distances[~same] <= found.threshold_at(f)) <= f
    # At the equal error rate the polygon through scikit-learn's points crosses FMR = FNMR.
    fpr, tpr, _ = sk.roc_curve(same, -distances, drop_intermediate=False)
    fine = np.linspace(0, 1, 200_001)
    along = np.arange(len(fpr)) / (len(fpr) - 1)
    gap = np.interp(fine, along, fpr) - (1 - np.interp(fine, along, tpr))
    crossing = np.interp(fine, along, fpr)[np.argmax(gap >= 0)]
    assert found.eer() == pytest.approx(crossing, abs=1e-3)
    assert all(0 <= value <= 1 for value in found.summary().values())


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("multi", [False, True])
def test_all_pairs_agree_with_the_pairs_one_by_one(rng, distance, multi):
    x = rng.normal(size=(37, 5)).astype(np.float32) + 2
    y = rng.normal(size=(53, 5)).astype(np.float32) + 2
    if multi:
        a, b = rng.random((37, 4)) < 0.3, rng.random((53, 4)) < 0.3
        same = (a[:, None] & b[None]).any(-1)
    else:
        a, b = rng.integers(0, 4, 37), rng.integers(0, 4, 53)
        same = a[:, None] == b[None]
    ids, own = rng.integers(0, 30, 37), rng.integers(0, 30, 53)
    kept = ids[:, None] != own[None]
    u, v = x.astype(np.float64), y.astype(np.float64)
    if distance == "cosine":
        u, v = (r / np.linalg.norm(r, axis=1, keepdims=True) for r in (u, v))
    d = -(u @ v.T) if distance == "dot" else ((u[:, None] - v[None]) ** 2).sum(-1)
    expected = verification.roc(d[kept], same[kept])
    found = verification.verify(
        x, a, y, b, distance=distance, query_ids=ids, gallery_ids=own, memory_limit=2**18
    )
    assert found["resolution"] < 1e-3
    assert found["roc_auc"] == pytest.approx(expected.auc(), abs=found["resolution"] + 1e-4)
    assert found["eer"] == pytest.approx(expected.eer(), abs=2e-3)
    whole = verification.all_pairs(x, a, y, b, distance=distance, query_ids=ids, gallery_ids=own)
    assert whole.genuine.sum() == same[kept].sum()
    assert whole.impostor.sum() == (~same)[kept].sum()


def test_verification_refuses_pairs_of_one_kind_and_nan():
    with pytest.raises(UserError, match="both kinds"):
        verification.roc([0.1, 0.2], [True, True])
    with pytest.raises(UserError, match="pair 1 is NaN"):
        verification.roc([0.1, np.nan], [True, False])
    with pytest.raises(UserError, match="same bool"):
        verification.roc([0.1, 0.2], [1, 0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 80),
    a=st.integers(1, 12),
    b=st.integers(1, 12),
    copy=st.booleans(),
)
def test_mutual_information_agrees_with_scikit_learn(seed, n, a, b, copy):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, a, n) * 3
    second = first % 5 if copy else rng.integers(0, b, n)
    # scikit-learn calls two labellings without any information 0 or 1 by version; we say 1.
    trivial = len(set(first)) == len(set(second)) == 1
    expected = 1.0 if trivial else sk.normalized_mutual_info_score(first, second)
    assert clustering.nmi(first, second) == pytest.approx(expected, abs=1e-9)
    expected = sk.adjusted_mutual_info_score(first, second)
    if abs(expected) < 100:  # where nothing is left to adjust, scikit-learn divides by an epsilon
        assert clustering.ami(first, second) == pytest.approx(expected, abs=1e-6)


def test_kmeans_finds_what_scikit_learn_finds(rng):
    from sklearn.cluster import KMeans

    centres = rng.normal(size=(7, 6)) * 4
    labels = rng.integers(0, 7, 400)
    rows = (centres[labels] + 0.5 * rng.normal(size=(400, 6))).astype(np.float32)
    ours = clustering.kmeans(rows, 7, seed=1, restarts=5)
    theirs = KMeans(7, n_init=5, random_state=0).fit(rows)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    assert clustering.nmi(ours.assignment, theirs.labels_) == pytest.approx(1)
    again = clustering.kmeans(rows, 7, seed=1, restarts=5, memory_limit=10_000)
    np.testing.assert_array_equal(ours.assignment, again.assignment)
    nearest = ((rows[:, None] - ours.centroids[None]) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(ours.assignment, nearest)
    found = clustering.clustering(rows, labels, restarts=3)
    assert 0.9 < found["ami"] <= found["nmi"] <= 1


def test_kmeans_fills_empty_clusters_and_refuses_too_many():
    rows = np.zeros((6, 2), np.float32)
    rows[5] = 1
    found = clustering.kmeans(rows, 2)
    assert found.inertia == 0
    assert len(set(found.assignment)) == 2
    with pytest.raises(UserError, match="k = 7"):
        clustering.kmeans(rows, 7)


def test_interval_covers_the_true_mean_about_as_often_as_it_says(rng):
    hits = 0
    for trial in range(200):
        drawn = rng.binomial(1, 0.3, 120).astype(float)
        found = bootstrap.interval(drawn, confidence=0.9, resamples=200, seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 165 <= hits <= 196  # 0.9 of 200, give or take four standard deviations


def test_paired_difference_is_narrower_and_grouped_is_wider(rng):
    hard = rng.normal(size=400)
    before = hard + 0.1 * rng.normal(size=400)
    after = hard + 0.05 + 0.1 * rng.normal(size=400)
    before[3] = after[3] = np.nan
    paired = bootstrap.difference(before, after)
    assert paired.low > 0
    assert paired.queries == 399
    alone = bootstrap.interval(after)
    assert paired.high - paired.low < (alone.high - alone.low) / 3
    group = np.repeat(np.arange(20), 20)
    values = group / 20 + 0.01 * rng.normal(size=400)
    wide, narrow = bootstrap.interval(values, groups=group), bootstrap.interval(values)
    assert wide.mean == pytest.approx(narrow.mean)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert bootstrap.interval(values, seed=5) == bootstrap.interval(values, seed=5)


def test_bootstrap_refuses_other_queries_and_empty_values():
    with pytest.raises(UserError, match="same queries"):
        bootstrap.difference([1.0, np.nan], [np.nan, 1.0])
    with pytest.raises(UserError, match="not NaN"):
        bootstrap.interval([np.nan])
    with pytest.raises(UserError, match="confidence"):
        bootstrap.interval([1.0], confidence=95)


def test_class_table_is_the_mean_of_each_class_worst_first(rng):
    x, labels = rng.normal(size=(60, 3)), rng.integers(0, 6, 60)
    labels[0] = 99  # a class of its own: lone
    found = per_query(x, labels, metrics=["map@r", "recall@1"])
    table = by_class(found, labels, order="map@r")
    assert table[-1] == (99, 0, 1, {})
    scores = [row.means["map@r"] for row in table[:-1]]
    assert scores == sorted(scores)
    for row in table[:-1]:
        mine = labels == row.label
        assert row.queries == mine.sum()
        assert row.means["map@r"] == pytest.approx(found.values["map@r"][mine].mean())
    hot = np.zeros((60, 2), bool)
    hot[:, 0], hot[:5, 1] = True, True
    rows = {r.label: r for r in by_class(found, hot, names=["all", "five"])}
    assert rows["five"].queries + rows["five"].lone == 5
    assert rows["all"].means["recall@1"] == pytest.approx(found.means()["recall@1"])


def trapezoids(ranking, positive, ignored, ks):
    """The protocol in the words of its definition, item by item."""
    seen, area, kept = 0, 0.0, 0
    ranks = []
    for item in ranking:
        if item in ignored or item < 0:
            continue
        before = 1.0 if kept == 0 else seen / kept
        kept += 1
        if item in positive:
            seen += 1
            ranks.append(kept)
            area += (before + seen / kept) / 2
    out = {"map": area / len(positive)}
    for k in ks:
        depth = min(max(ranks), k) if len(ranks) == len(positive) else k
        out[f"precision@{k}"] = sum(r <= depth for r in ranks) / depth
    return out


@pytest.mark.parametrize(
    ("setting", "positive", "ignored"),
    [
        ("easy", ["easy"], ["hard", "junk"]),
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["easy", "junk"]),
    ],
)
def test_landmarks_follow_the_protocol(rng, setting, positive, ignored):
    ranking = np.stack([rng.permutation(40) for _ in range(12)])
    ranking[:, -3:] = -1  # ended early: whoever is not listed is not found
    grades = []
    for _ in range(12):
        parts = np.split(rng.permutation(40)[:18], sorted(rng.integers(0, 19, 2)))
        grades.append(dict(zip(("easy", "hard", "junk"), (p.tolist() for p in parts), strict=True)))
    grades[4] = {"easy": [], "hard": [], "junk": [1, 2]}
    found = landmarks(ranking, grades, setting=setting, ks=(1, 5))
    assert found.lone >= 1
    for i, grade in enumerate(grades):
        wanted = [r for name in positive for r in grade[name]]
        assert found.relevant[i] == len(wanted)
        if not wanted:
            assert np.isnan(found.values["map"][i])
            continue
        dropped = [r for name in ignored for r in grade[name]]
        for name, value in trapezoids(ranking[i], wanted, dropped, (1, 5)).items():
            assert found.values[name][i] == pytest.approx(value, abs=1e-12)
    assert all(0 <= value <= 1 for value in found.means().values())


def test_landmarks_refuse_unknown_settings():
    with pytest.raises(UserError, match="easy, medium, hard"):
        landmarks([[0]], [{"easy": [0]}], setting="expert")


def test_the_breakdown_names_what_it_has(rng):
    found = of_ranking([[1], [0]], [3, 3], ks=[1])
    with pytest.raises(UserError, match="recall@1"):
        by_class(found, [3, 3], order="ndcg@7")
