"""Every public function on inputs that are empty, of other widths, too few, or no numbers at all.

Each gives an answer whose shape is known, or one line that says what is wrong and where.
"""

import numpy as np
import pytest

import siamese_jax as sj
from siamese_jax.errors import UserError
from siamese_jax.metrics import clustering, retrieval, verification
from siamese_jax.search import ranking, rerank
from siamese_jax.search.rerank import fusion

D = 3


def classes(rows):
    return np.arange(len(rows)) % 2


def sides(x, y):
    return x, classes(x), y, classes(y)


def both(x, y):
    return {"query_ids": np.arange(len(x)), "gallery_ids": np.arange(len(y))}


def rankings(x, y, k):
    """Of any function that ranks: the shape, and -1 and inf beyond the gallery."""

    def check(found, ids):
        there = found.indices >= 0
        assert found.indices.shape == found.distances.shape == (len(x), k)
        assert found.indices.dtype == np.int32
        assert found.distances.dtype == np.float32
        assert (np.isfinite(found.distances) == there).all()
        others = len(y) - (np.arange(len(x)) < len(y)) * ids
        assert (there.sum(1) == np.minimum(k, others)).all()

    return check


# Function of (queries, gallery, k): answers a ranking. "self" takes the gallery alone.
RANKINGS = {
    "rank": sj.rank,
    "k_reciprocal": rerank.k_reciprocal,
    "diffuse": rerank.diffuse,
    "rank_by_each": lambda x, y, k, **ids: fusion.rank_by_each(x, y, k, widths=[1, 2], **ids),
    "fuse_rankings": lambda x, y, k, **ids: rerank.fuse_rankings([sj.rank(x, y, k, **ids)] * 2, k),
}
VECTORS = {
    "expand_queries": (lambda x, y, k: rerank.expand_queries(x, y, k), lambda x, y: x.shape),
    "augment_gallery": (lambda x, y, k: rerank.augment_gallery(y, k), lambda x, y: y.shape),
    "concatenate": (lambda x, y, k: rerank.concatenate([y, y]), lambda x, y: (len(y), 2 * D)),
    "Whitening": (
        lambda x, y, k: rerank.Whitening(np.zeros(D), np.eye(D))(y),
        lambda x, y: y.shape,
    ),
    "pairwise_distances": (
        lambda x, y, k: ranking.pairwise_distances(x, y),
        lambda x, y: (len(x), len(y)),
    ),
    "range_search": (
        lambda x, y, k: sj.range_search(x, y, 1.0).limits,
        lambda x, y: (len(x) + 1,),
    ),
    "per_query": (
        lambda x, y, k: retrieval.per_query(*sides(x, y), ks=[k]).relevant,
        lambda x, y: (len(x),),
    ),
    "of_ranking": (
        lambda x, y, k: (
            retrieval.of_ranking(
                sj.rank(x, y, k, **both(x, y)), classes(x), classes(y), ks=[k], **both(x, y)
            ).relevant
        ),
        lambda x, y: (len(x),),
    ),
}
# Means, which have no value without an answer.
MEANS = {
    "evaluate": lambda x, y, k: sj.evaluate(*sides(x, y), ks=[k]),
    "verify": lambda x, y, k: verification.verify(*sides(x, y)),
    "kmeans": lambda x, y, k: clustering.kmeans(y, min(k, 2)),
    "clustering": lambda x, y, k: clustering.clustering(y, classes(y)),
    "fit_whitening": lambda x, y, k: rerank.fit_whitening(y),
    "learned whitening": lambda x, y, k: rerank.fit_whitening(y, classes(y)),
}
GALLERY_ALONE = ("augment_gallery", "concatenate", "Whitening", *list(MEANS)[2:])
FUNCTIONS = {
    **RANKINGS,
    **{name: function for name, (function, _) in VECTORS.items()},
    **MEANS,
}


def rows(rng, n, d=D):
    return rng.normal(size=(n, d)).astype(np.float32)


SIZES = [(4, 6, 3), (4, 6, 99), (4, 1, 3), (1, 1, 1), (4, 0, 3), (0, 6, 3), (0, 0, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_end_with_the_gallery(rng, name, size):
    q, g, k = size
    x, y = rows(rng, q), rows(rng, g)
    check = rankings(x, y, k)
    check(RANKINGS[name](x, y, k), ids=False)
    check(RANKINGS[name](x, y, k, **both(x, y)), ids=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_other_answers_have_their_shape(rng, name, size):
    q, g, k = size
    function, shape = VECTORS[name]
    x, y = rows(rng, q), rows(rng, g)
    found = function(x, y, k)
    assert found.shape == shape(x, y)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MEANS)
def test_means_of_nothing_are_refused(rng, name, size):
    q, g, k = size
    x, y = rows(rng, q), rows(rng, g)
    alone = name in GALLERY_ALONE
    if g >= 6 and (q or alone):
        MEANS[name](x, y, k)
    elif not g or not (q or alone):
        refuses(lambda: MEANS[name](x, y, k))


def refuses(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_that_are_not_finite_are_named(rng, name):
    alone = name in GALLERY_ALONE
    for value in (np.nan, np.inf, -np.inf):
        for dtype in (np.float32, np.float64):
            x, y = rows(rng, 4).astype(dtype), rows(rng, 6).astype(dtype)
            y[5, 1] = value
            refuses(lambda x=x, y=y: FUNCTIONS[name](x, y, 2), "row 5 is not finite")
            if not alone:
                x[2, 0], y[5, 1] = value, 0
                refuses(lambda x=x, y=y: FUNCTIONS[name](x, y, 2), "queries row 2 is not finite")
    x, y = rows(rng, 4), rows(rng, 6)
    y[3] = 1e30
    refuses(lambda: FUNCTIONS[name](x, y, 2), "row 3 is longer than")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_shapes_widths_and_kinds_are_named(rng, name):
    x, y = rows(rng, 4), rows(rng, 6)
    refuses(lambda: FUNCTIONS[name](x, y[0], 2), "(3,)")
    refuses(lambda: FUNCTIONS[name](x, np.array([["a", "b", "c"]] * 6), 2), "real numbers")
    if name not in GALLERY_ALONE or name == "Whitening":
        refuses(lambda: FUNCTIONS[name](x, rows(rng, 6, 4), 2), "4")


@pytest.mark.parametrize("k", [0, -1, 1.5, "3"])
def test_numbers_of_neighbours_are_whole_and_above_zero(rng, k):
    x, y = rows(rng, 4), rows(rng, 6)
    for function in (*RANKINGS.values(), rerank.expand_queries):
        refuses(lambda f=function: f(x, y, k), "k")
    for name in ("k1", "k2"):
        refuses(lambda n=name: rerank.k_reciprocal(x, y, 2, **{n: k}), f"{name} = ")
    for name in ("graph_k", "query_k", "iterations"):
        refuses(lambda n=name: rerank.diffuse(x, y, 2, **{n: k}), f"{name} = ")
    for name in ("k", "restarts"):
        refuses(lambda n=name: clustering.kmeans(y, **{"k": 2, n: k}), f"{name} = ")


@pytest.mark.parametrize(
    "lists", [[], [[0, 1]], [[[0, 1]], [[1, 0], [0, 1]]], [[[0.5, 1.0]]], [[[0]], [0]]]
)
def test_lists_that_are_no_rankings(lists):
    refuses(lambda: rerank.fuse_rankings(lists, 2), "rankings")


def test_what_is_no_matrix_or_no_number_of_bytes():
    rows = np.eye(D, dtype=np.float32)
    with pytest.raises(UserError, match=r"queries must be \[n, d\]"):
        sj.rank([[1.0, 2.0], [3.0]], rows, 1)
    for limit in (0, np.nan, "x", None):
        with pytest.raises(UserError, match=r"memory_limit=.* is less than 1 MiB"):
            sj.rank(rows, rows, 1, memory_limit=limit)
