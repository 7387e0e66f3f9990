"""Vectors moved towards their nearest neighbours: query expansion and gallery augmentation."""

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import values
from siamese_jax.search.engine.checked_rows import unit_rows
from siamese_jax.search.ranking import MEMORY_LIMIT, Ranking, rank


def expand_queries(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int = 3,
    *,
    alpha: float = 0.0,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> np.ndarray:
    """Query expansion: each query plus its k nearest gallery items, to search with again.

        q' = unit( q + sum_i w_i g_i ),   w_i = max(cos(q, g_i), 0)^alpha

    alpha = 0 is average query expansion (Chum et al. 2007), all weights 1; alpha = 3 or so trusts
    near neighbours more (Radenovic et al. 2018, section 3.4).

    Args:
      queries: [q, d] real.
      gallery: [g, d] real; may be empty.
      k: neighbours to add, at least 1; where fewer remain, those.
      query_ids, gallery_ids, memory_limit: as for `siamese_jax.rank`.

    Returns:
      float32 [q, d], rows of length 1.

    >>> expand_queries([[1.0, 0.0]], [[0.0, 2.0], [-1.0, 0.0]], k=1).round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377]]
    """
    values.check("alpha", alpha, values.EXPONENT)
    y = unit_rows(gallery, "gallery")
    x = unit_rows(queries, "queries", y)
    found = rank(
        x,
        y,
        k,
        distance="cosine",
        query_ids=query_ids,
        gallery_ids=gallery_ids,
        memory_limit=memory_limit,
    )
    return _towards(x, y, found, alpha, memory_limit)


def augment_gallery(
    gallery: ArrayLike, k: int = 3, *, alpha: float = 0.0, memory_limit: int = MEMORY_LIMIT
) -> np.ndarray:
    """Database-side augmentation: each gallery item plus its k nearest others, done once.

    The same sum as `expand_queries`, of each item with its neighbours in the gallery itself
    (Turcot & Lowe 2009; weights as Gordo et al. 2017 give them for alpha > 0).

    Returns:
      float32 [g, d], rows of length 1.
    """
    ids = np.arange(len(np.asarray(gallery)))
    return expand_queries(
        gallery,
        gallery,
        k,
        alpha=alpha,
        query_ids=ids,
        gallery_ids=ids,
        memory_limit=memory_limit,
    )


def _towards(
    x: np.ndarray, y: np.ndarray, found: Ranking, alpha: float, memory_limit: int
) -> np.ndarray:
    if not len(y):
        return x
    moved = np.empty_like(x)
    block = max(1, memory_limit // (8 * max(1, found.indices.shape[1] * x.shape[1])))
    for i in range(0, len(x), block):
        part = slice(i, i + block)
        there = found.indices[part] >= 0
        cosine = 1 - np.where(there, found.distances[part], 1)
        weight = there * np.maximum(cosine, 0) ** np.float32(alpha)
        moved[part] = x[part] + np.einsum("bk,bkd->bd", weight, y[found.indices[part]])
    return unit_rows(moved)
