"""Re-ranking against float64 loops and dense matrices written from the papers."""

import numpy as np
import pytest

from siamese_jax.errors import UserError
from siamese_jax.metrics import retrieval
from siamese_jax.search import rerank
from siamese_jax.search.ranking import Ranking


def clouds(rng, classes, each, d, spread=0.6):
    centres = rng.normal(size=(classes, d))
    labels = np.repeat(np.arange(classes), each)
    return (centres[labels] + spread * rng.normal(size=(len(labels), d))).astype(np.float32), labels


def normal(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("ids", [False, True])
def test_query_expansion_is_the_weighted_sum_of_the_nearest(rng, alpha, ids):
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(25, 4))
    own = {"query_ids": np.arange(9), "gallery_ids": np.arange(25) % 12} if ids else {}
    found = rerank.expand_queries(x, y, 6, alpha=alpha, **own)
    for i, query in enumerate(normal(x)):
        order = sorted(
            (-query @ item, j) for j, item in enumerate(normal(y)) if not (ids and j % 12 == i)
        )[:6]
        total = query + sum(max(-c, 0) ** alpha * normal(y)[j] for c, j in order)
        np.testing.assert_allclose(found[i], total / np.linalg.norm(total), atol=2e-6)
    assert found.dtype == np.float32


def test_augmenting_the_gallery_leaves_each_item_out_of_its_own_neighbours(rng):
    y = rng.normal(size=(20, 4))
    found, unit = rerank.augment_gallery(y, 2), normal(y)
    for i in range(20):
        others = [j for j in np.argsort(-(unit @ unit[i])) if j != i][:2]
        np.testing.assert_allclose(found[i], normal(unit[i] + unit[others].sum(0)), atol=2e-6)


def test_expansion_with_more_neighbours_than_items_takes_all(rng):
    x, y = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    np.testing.assert_allclose(
        rerank.expand_queries(x, y, 99), normal(normal(x) + normal(y).sum(0)), atol=2e-6
    )


def reciprocal_oracle(x, y, k1, k2, weight, places=None):
    """Zhong et al. with whole matrices and Python sets, of x and y, or y and the queries in it."""
    z = normal(np.concatenate([x, y]))
    squared = ((z[:, None] - z[None]) ** 2).sum(-1)
    relative = squared / squared.max(1, keepdims=True)
    n = len(z)
    order = [[i, *(j for j in np.argsort(squared[i], kind="stable") if j != i)] for i in range(n)]

    def mutual(i, k):
        return {j for j in order[i][: k + 1] if i in order[j][: k + 1]}

    v = np.zeros((n, n))
    for i in range(n):
        base = mutual(i, k1)
        whole = set(base)
        for j in base:
            friends = mutual(j, round(k1 / 2))
            if len(friends & base) > 2 / 3 * len(friends):
                whole |= friends
        for j in whole:
            v[i, j] = np.exp(-relative[i, j])
    v /= v.sum(1, keepdims=True)
    v = np.stack([v[order[i][:k2]].mean(0) for i in range(n)])
    q = len(x)
    places = np.arange(q) if places is None else places
    jaccard = np.zeros((len(places), n - q))
    for i, place in enumerate(places):
        for j in range(n - q):
            low = np.minimum(v[place], v[q + j]).sum()
            jaccard[i, j] = 1 - low / np.maximum(v[place], v[q + j]).sum()
    return (1 - weight) * jaccard + weight * relative[places, q:]


@pytest.mark.parametrize(
    ("k1", "k2", "weight"), [(20, 6, 0.3), (7, 1, 0.0), (5, 4, 0.7), (90, 3, 0.3)]
)
@pytest.mark.parametrize("memory_limit", [2**20, 2**28])
def test_k_reciprocal_is_the_paper_s(rng, k1, k2, weight, memory_limit):
    data, _ = clouds(rng, 6, 10, 5)
    data = data[rng.permutation(60)]
    x, y = data[:12], data[12:]
    expected = reciprocal_oracle(x, y, min(k1, 59), k2, weight)
    found = rerank.k_reciprocal(x, y, 48, k1=k1, k2=k2, weight=weight, memory_limit=memory_limit)
    order = found.indices.astype(int)
    assert (np.sort(order, axis=1) == np.arange(48)).all()
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(expected, order, axis=1), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory_limit", [2**20, 2**28])
@pytest.mark.parametrize("dtype", [int, str])
def test_k_reciprocal_counts_each_picture_once(rng, memory_limit, dtype):
    """Queries 0 to 8 are gallery items, 9 and 10 one other picture; item 47 has the id of query 8
    but is another picture; query 11 has no equal."""
    data, _ = clouds(rng, 6, 10, 5)
    data = data[rng.permutation(60)]
    y, own = data[:48], np.array([*range(40, 48), 3, 48, 48, 49])
    x = data[own]
    gallery_ids = (np.arange(48) + 100).astype(dtype)
    query_ids = (own + 100).astype(dtype)
    gallery_ids[47] = query_ids[8]
    query_ids[7] = dtype(47 + 100)  # of nobody else now: one more picture
    pool = np.concatenate([y, data[[47, 48, 49]]])
    places = np.array([*range(40, 47), 48, 3, 49, 49, 50])
    expected = reciprocal_oracle(pool[:0], pool, 7, 3, 0.3, places)
    found = rerank.k_reciprocal(
        x, y, 48, k1=7, k2=3, query_ids=query_ids, gallery_ids=gallery_ids,
        memory_limit=memory_limit,
    )  # fmt: skip
    for i, order in enumerate(found.indices):
        left_out = np.flatnonzero(gallery_ids == query_ids[i])
        listed = order[order >= 0]
        assert sorted(listed) == [j for j in range(48) if j not in left_out]
        np.testing.assert_allclose(
            found.distances[i, : len(listed)], expected[i, listed], rtol=0, atol=1e-5
        )


def test_k_reciprocal_of_five_points_that_search_themselves():
    x = np.array([[1, 0], [0.96, 0.28], [0.8, 0.6], [0, 1], [-0.28, 0.96]])
    ids = {"query_ids": np.arange(5), "gallery_ids": np.arange(5)}
    found = rerank.k_reciprocal(x, x, 1, k1=2, k2=1, **ids)
    expected = [0.040, 0.043, 0.103, 0.036, 0.034]
    np.testing.assert_allclose(found.distances.ravel(), expected, atol=5e-4)


def test_k_reciprocal_leaves_the_query_itself_out_and_lifts_map(rng):
    x, labels = clouds(rng, 20, 12, 12, spread=0.9)
    ids = np.arange(len(x))
    found = rerank.k_reciprocal(x, x, 60, query_ids=ids, gallery_ids=ids)
    assert not (found.indices == ids[:, None]).any()
    after = retrieval.of_ranking(found, labels, metrics=["map@r"]).means()["map@r"]
    before = retrieval.evaluate(x, labels, metrics=["map@r"], distance="cosine")["map@r"]
    assert after > before + 0.03


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("iterations", [300, 5000, None])
def test_diffusion_solves_its_linear_system(rng, alpha, iterations):
    data, _ = clouds(rng, 5, 12, 4)
    x, y = data[::6], data
    unit = normal(y)
    cosine = unit @ unit.T
    affinity = np.zeros((60, 60))
    near = [[j for j in np.argsort(-cosine[i]) if j != i][:8] for i in range(60)]
    for i in range(60):
        for j in near[i]:
            if i in near[j]:
                affinity[i, j] = max(cosine[i, j], 0) ** 2
    degree = affinity.sum(1)
    root = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1e-30)), 0)
    system = np.eye(60) - alpha * root[:, None] * affinity * root[None]
    ids = {"query_ids": np.arange(60)[::6], "gallery_ids": np.arange(60)}
    found = rerank.diffuse(
        x,
        y,
        60,
        graph_k=8,
        query_k=4,
        alpha=alpha,
        gamma=2,
        **({"iterations": iterations} if iterations else {}),
        **ids,
    )
    for i, query in enumerate(normal(x)):
        away = unit @ query
        start = [j for j in np.argsort(-away) if j != 6 * i][:4]
        y0 = np.zeros(60)
        y0[start] = np.maximum(away[start], 0) ** 2
        f = np.linalg.solve(system, y0)
        order = found.indices[i]
        assert order[-1] == -1  # the query itself isn't an answer
        assert sorted(order[:-1]) == [j for j in range(60) if j != 6 * i]
        scale = np.abs(f).max()
        np.testing.assert_allclose(-found.distances[i, :-1], f[order[:-1]], atol=1e-5 * scale)
        unreached = [j for j in order[:-1] if f[j] == 0]
        np.testing.assert_array_equal(unreached, sorted(unreached, key=lambda j: -away[j]))


def test_pca_whitening_leaves_unit_covariance_before_normalising(rng):
    x = rng.normal(size=(800, 6)) @ rng.normal(size=(6, 6)) + 5
    white = rerank.fit_whitening(x, shrinkage=0)
    flat = (x - white.mean) @ white.projection.T
    np.testing.assert_allclose(flat.T @ flat / 800, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(white(x), normal(flat), atol=1e-5)
    # The first dimensions are the principal ones: the same rows as of the full map.
    np.testing.assert_allclose(rerank.fit_whitening(x, dim=2)(x).shape, (800, 2))
    narrow = rerank.fit_whitening(x, dim=2, shrinkage=0)
    np.testing.assert_allclose(narrow.projection, white.projection[:2], atol=1e-9)
    principal = np.linalg.svd(x - x.mean(0), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs(normal(white.projection) @ principal.T), np.eye(6), atol=1e-6)


def test_learned_whitening_makes_matching_pairs_white_and_others_stand_out(rng):
    labels = np.concatenate([np.repeat(np.arange(40), 5), np.repeat(np.arange(40, 50), 9)])
    noise = np.array([6, 3, 0.3, 0.3, 0.3, 0.3])  # the loudest directions say nothing of the class
    x = rng.normal(size=(50, 6))[labels] + noise * rng.normal(size=(len(labels), 6))
    white = rerank.fit_whitening(x, labels, shrinkage=0)
    flat = (x - white.mean) @ white.projection.T
    pairs = np.array([(i, j) for i in range(len(x)) for j in range(i) if labels[i] == labels[j]])
    gap = flat[pairs[:, 0]] - flat[pairs[:, 1]]
    np.testing.assert_allclose(gap.T @ gap / len(pairs), np.eye(6), atol=1e-6)
    spread = flat.T @ flat / len(x)
    np.testing.assert_allclose(spread - np.diag(np.diag(spread)), 0, atol=1e-6 * spread.max())
    assert (np.diff(np.diag(spread)) <= 0).all()
    unseen = np.repeat(np.arange(30), 6)
    y = rng.normal(size=(30, 6))[unseen] + noise * rng.normal(size=(180, 6))
    plain = retrieval.evaluate(y, unseen, metrics=["map@r"], distance="cosine")["map@r"]
    better = retrieval.evaluate(white(y), unseen, metrics=["map@r"])["map@r"]
    assert better > 2 * plain


def test_a_whitening_is_saved_and_loaded(rng, tmp_path):
    x = rng.normal(size=(50, 4))
    white = rerank.fit_whitening(x, dim=3)
    white.save(tmp_path / "white.npz")
    again = rerank.Whitening.load(tmp_path / "white.npz")
    np.testing.assert_array_equal(again(x), white(x))
    assert again.digest == white.digest != rerank.fit_whitening(x, dim=2).digest
    (tmp_path / "bad.npz").write_text("nothing")
    with pytest.raises(UserError, match="not a whitening"):
        rerank.Whitening.load(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="no such file"):
        rerank.Whitening.load(tmp_path / "none.npz")


def test_fused_embeddings_have_the_weighted_mean_of_the_cosines(rng):
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))
    found = rerank.concatenate([a, b], weights=[1, 3]).astype(np.float64)
    expected = (normal(a) @ normal(a).T + 3 * normal(b) @ normal(b).T) / 4
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-6)


def test_fused_rankings_add_reciprocal_positions(rng):
    lists = [np.stack([rng.permutation(12)[:8] for _ in range(5)]) for _ in range(3)]
    lists[1][:, 6:] = -1
    found = rerank.fuse_rankings(lists, 12, c=10)
    for q in range(5):
        score = dict.fromkeys(range(12), 0.0)
        for part in lists:
            for place, item in enumerate(part[q]):
                if item >= 0:
                    score[int(item)] += 1 / (10 + place + 1)
        listed = [j for j in sorted(score, key=lambda j: (-score[j], j)) if score[j] > 0]
        assert found.indices[q, : len(listed)].tolist() == listed
        assert (found.indices[q, len(listed) :] == -1).all()
    one = Ranking(lists[0].astype(np.int32), np.zeros((5, 8), np.float32))
    np.testing.assert_array_equal(rerank.fuse_rankings([one], 8).indices, lists[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rerank.expand_queries(x, x, alpha=-1), "alpha=-1: must be"),
        (lambda x: rerank.k_reciprocal(x, x, 3, k2=99), "k2 = 99"),
        (lambda x: rerank.k_reciprocal(x, x, 3, query_ids=np.arange(4)), "both"),
        (lambda x: rerank.diffuse(x, x, 3, alpha=1.0), "alpha"),
        (lambda x: rerank.fit_whitening(x, dim=9), "dim=9"),
        (lambda x: rerank.fit_whitening(x, np.arange(4)), "single"),
        (lambda x: rerank.fit_whitening(np.ones((4, 2))), "differ"),
        (lambda x: rerank.fit_whitening(x)(np.ones((2, 7))), "fitted to"),
        (lambda x: rerank.concatenate([x, x[:2]]), "same images"),
        (lambda x: rerank.concatenate([x], weights=[-1]), r"weights=\[-1\]"),
        (lambda x: rerank.fuse_rankings([], 3), "same queries"),
        (lambda x: rerank.augmented(None, scales=()), r"scales=\[\]: must be 1 or more"),
        (lambda x: rerank.augment_gallery(x[0]), "must be"),
    ],
)
def test_mistakes_are_said_in_one_line(rng, call, message):
    with pytest.raises(UserError, match=message):
        call(rng.normal(size=(4, 3)))


def test_diffusion_says_where_it_stopped_before_the_end(rng, caplog):
    data, _ = clouds(rng, 6, 12, 4)
    few, many = (rerank.diffuse(data[:9], data, 20, graph_k=6, iterations=n) for n in (2, 400))
    assert len(caplog.messages) == 1
    assert "stopped after 2 iterations" in caplog.text
    assert np.abs(few.distances - many.distances).max() > 1e-3


def test_diffusion_grows_no_rounding():
    """Where 200 iterations of float32 gave 1191.7."""
    rng = np.random.default_rng([0, 9])
    m = rng.normal(size=(12, 10))
    x, y = (
        (m[rng.integers(0, 12, n)] + 0.5 * rng.normal(size=(n, 10))).astype("f4") for n in (25, 80)
    )
    options = {"graph_k": 10, "query_k": 5, "alpha": 0.9}
    first, second = (rerank.diffuse(x, y, 80, **options, iterations=n) for n in (60, 2000))
    np.testing.assert_array_equal(first.indices, second.indices)
    np.testing.assert_array_equal(first.distances, second.distances)
    assert -first.distances.min() == pytest.approx(4.1614, abs=1e-4)


def test_a_small_memory_limit_changes_no_answer(rng):
    data, _ = clouds(rng, 20, 20, 64)
    few, many = (
        (
            rerank.expand_queries(data, data, 50, memory_limit=limit),
            rerank.diffuse(data[:100], data, 30, graph_k=9, memory_limit=limit).indices,
        )
        for limit in (2**20, 2**28)
    )
    np.testing.assert_allclose(few[0], many[0], atol=1e-6)
    assert (few[1] == many[1]).mean() > 0.99  # sums in another order may swap near-ties
