"""k-reciprocal re-ranking (Zhong et al. 2017): near are those who are near to each other's friends.

Over queries and gallery together, with N(i, k) the item i and its k nearest others:

    R(i, k)   the j in N(i, k) with i in N(j, k)                          reciprocal neighbours
    R*(i)     R(i, k1), and R(j, k1/2) of every j in it, if more than 2/3 of that lie in R(i, k1)
    V(i, j)   exp(-D(i, j)) for j in R*(i), else 0; divided by the row's sum
    V'(i)     mean of V over N(i, k2 - 1): i and its k2 - 1 nearest others        local expansion
    J(q, g)   1 - sum_j min(V'(q, j), V'(g, j)) / sum_j max(V'(q, j), V'(g, j))   Jaccard distance
    d(q, g)   (1 - w) J(q, g) + w D(q, g)

D(i, j) is |x_i - x_j|^2 of unit rows over the largest such distance of i, as in the authors' code.
Only the at most k2 (k1 + 1)(k1/2 + 2) non-zeros of each row of V' are ever kept.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.names import Codebook, as_ids
from siamese_jax.ranking import MEMORY_LIMIT, Ranking, rank
from siamese_jax.relevance import Groups
from siamese_jax.unit import unit


def k_reciprocal(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Ranking:
    """The k nearest gallery items by the re-ranked distance d.

    Args:
      queries: [q, d] real.
      gallery: [g, d] real.
      k: how many to return, at least 1.
      k1, k2, weight: as above; `weight` in [0, 1] is that of the original distance.
      query_ids, gallery_ids: an item with the query's id is left out of its ranking; both stay in
        everyone's neighbourhoods (an item of equal id is a neighbour like any other).
      memory_limit: bytes of working memory, beyond V' itself.

    Returns:
      A `Ranking` by d; ties in ascending order of the gallery's rows.

    Raises:
      UserError: k1, k2 or weight out of range, or what `siamese_jax.rank` raises.
    """
    if not (k >= 1 and k1 >= 1 and 1 <= k2 <= k1 + 1 and 0 <= weight <= 1):
        raise UserError(
            f"k = {k} and k1 = {k1} must be >= 1, k2 = {k2} in 1..k1 + 1, weight = {weight} in 0..1"
        )
    x, y = unit(queries), unit(gallery)
    q, both = len(x), np.concatenate([x, y])
    near = neighbours(both, min(k1, len(both) - 1), memory_limit)
    # The farthest of i is the nearest to its opposite.
    far = rank(-both, both, 1, distance="cosine", memory_limit=memory_limit).distances[:, 0]
    far = np.maximum(4 - 2 * far, np.finfo(np.float32).tiny)
    rows, columns = _expanded(near, k1, memory_limit)
    squared = ((both[rows] - both[columns]) ** 2).sum(1, dtype=np.float64) if len(rows) else rows
    value = np.exp(-squared / far[rows])
    value /= np.bincount(rows, weights=value, minlength=len(both))[rows]
    rows, columns, value = _averaged(near[:, :k2], rows, columns, value)

    first = np.searchsorted(rows, np.arange(len(both) + 1))
    held = Groups.of(columns[first[q] :], len(both))  # the gallery's entries by column
    held_row, held_value = rows[first[q] :] - q, value[first[q] :]
    own = _own(query_ids, gallery_ids, q, len(y))
    found = Ranking(np.full((q, k), -1, np.int32), np.full((q, k), np.inf, np.float32))
    for i in range(q):
        mine = slice(first[i], first[i + 1])
        of, entry = held.members(columns[mine])
        least = np.minimum(value[mine][of], held_value[entry])
        shared = np.bincount(held_row[entry], weights=least, minlength=len(y))
        distance = (2 - 2 * (y @ x[i]).astype(np.float64)) / far[i]
        distance = (1 - weight) * (1 - shared / (2 - shared)) + weight * distance
        distance[own(i)] = np.inf
        best = np.argsort(distance, kind="stable")[:k]
        best = best[np.isfinite(distance[best])]
        found.indices[i, : len(best)], found.distances[i, : len(best)] = best, distance[best]
    return found


def neighbours(rows: np.ndarray, k: int, memory_limit: int) -> np.ndarray:
    """N(i, k) of every row: itself, then its k nearest others, int64 [n, k + 1]."""
    ids = np.arange(len(rows))
    if k < 1:
        return ids[:, None]
    found = rank(
        rows, rows, k, distance="cosine", query_ids=ids, gallery_ids=ids, memory_limit=memory_limit
    )
    return np.concatenate([ids[:, None], found.indices.astype(np.int64)], axis=1)


def _expanded(near: np.ndarray, k1: int, memory_limit: int) -> tuple[np.ndarray, np.ndarray]:
    """R* of every row as pairs (i, j), both ascending."""
    half = min(round(k1 / 2), near.shape[1] - 1)
    room = 2 * near.shape[1] ** 2 * (half + 1) + 64
    block = max(1, memory_limit // (8 * room))
    whole = _reciprocal(near, near, block)
    halves = _reciprocal(near, near[:, : half + 1], block)
    pairs = []
    for start in range(0, len(near), block):
        base = whole[start : start + block]  # [b, n] with -1 for who isn't reciprocal
        friends = np.where(base[:, :, None] >= 0, halves[base], -1)  # [b, n, h]
        there = friends >= 0
        inside = (friends[..., None] == base[:, None, None, :]).any(-1) & there
        joins = inside.sum(-1) * 3 > there.sum(-1) * 2
        joined = np.where(joins[:, :, None], friends, -1).reshape(len(base), -1)
        everyone = np.sort(np.concatenate([base, joined], axis=1), axis=1)
        new = everyone >= 0
        new[:, 1:] &= everyone[:, 1:] != everyone[:, :-1]
        i, place = np.nonzero(new)
        pairs.append((i + start, everyone[i, place]))
    rows, columns = zip(*pairs, strict=True)
    return np.concatenate(rows), np.concatenate(columns)


def _reciprocal(near: np.ndarray, among: np.ndarray, block: int) -> np.ndarray:
    """R: each row of `among` with -1 in place of those of whom i isn't a neighbour in turn."""
    size = among.shape[1]
    kept = np.empty_like(among)
    for start in range(0, len(near), block):
        i = np.arange(start, min(start + block, len(near)))
        back = near[among[i], :size] == i[:, None, None]
        kept[i] = np.where(back.any(-1), among[i], -1)
    return kept


def _averaged(
    near: np.ndarray, rows: np.ndarray, columns: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V': the mean of the rows of V over each item's nearest, as sorted (row, column, value)."""
    n, k2 = near.shape
    if k2 == 1:
        return rows, columns, value
    by_row = Groups.of(rows, n)
    parts = []
    for start in range(0, n, 1024):
        own = near[start : start + 1024]
        of, entry = by_row.members(own.reshape(-1))
        cell, which = np.unique((of // k2 + start) * n + columns[entry], return_inverse=True)
        parts.append((cell, np.bincount(which, weights=value[entry]) / k2))
    cells, values = zip(*parts, strict=True)
    cell = np.concatenate(cells)
    return cell // n, cell % n, np.concatenate(values)


def _own(
    query_ids: ArrayLike | None, gallery_ids: ArrayLike | None, q: int, g: int
) -> Callable[[int], np.ndarray]:
    """A function from a query to the gallery rows that carry its id."""
    if query_ids is None or gallery_ids is None:
        if query_ids is not gallery_ids:
            raise UserError("give both query_ids and gallery_ids, or neither")
        return lambda i: np.zeros(0, np.int64)
    book = Codebook(as_ids(gallery_ids, g, "gallery_ids"))
    queries = book.of(as_ids(query_ids, q, "query_ids"))
    return lambda i: np.flatnonzero(book.own == queries[i])
