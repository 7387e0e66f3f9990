"""k-reciprocal re-ranking (Zhong et al. 2017): near are those who are near to each other's friends.

Over queries and gallery together, each picture once, with N(i, k) the item i and its k nearest
others:

    R(i, k)   the j in N(i, k) with i in N(j, k)                          reciprocal neighbours
    R*(i)     R(i, k1), and R(j, k1/2) of every j in it, if more than 2/3 of that lie in R(i, k1)
    V(i, j)   exp(-D(i, j)) for j in R*(i), else 0; divided by the row's sum
    V'(i)     mean of V over N(i, k2 - 1): i and its k2 - 1 nearest others        local expansion
    J(q, g)   1 - sum_j min(V'(q, j), V'(g, j)) / sum_j max(V'(q, j), V'(g, j))   Jaccard distance
    d(q, g)   (1 - w) J(q, g) + w D(q, g)

D(i, j) is |x_i - x_j|^2 of unit rows over the largest such distance of i, as in the authors' code.
A query that is also in the gallery (same id, same vector) is one picture, not two: it would be its
own nearest neighbour, and take a place in every neighbourhood twice.

Only the at most k2 (k1 + 1)(k1/2 + 2) non-zeros of each row of V' are ever kept.
"""

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import values
from siamese_jax.data.labels import Codebook, Groups, as_ids, joined
from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import amid, at_least_one, check_room, moved, unit_rows
from siamese_jax.search.ranking import MEMORY_LIMIT, Ranking, rank


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
      query_ids, gallery_ids: an item with the query's id is left out of its ranking, but stays in
        everyone's neighbourhoods. Where their directions differ by less than 0.01 the two are one
        picture there, else two. So are queries of one id.
      memory_limit: bytes of working memory, beyond V' itself.

    Returns:
      A `Ranking` by d; ties in ascending order of the gallery's rows, of which there may be none.

    Raises:
      UserError: k1, k2 or weight out of range, or what `siamese_jax.rank` raises.
    """
    at_least_one(k=k, k1=k1, k2=k2)
    values.check("weight", weight, values.number(0, 1))
    if k2 > k1 + 1:
        raise UserError(f"k2 = {k2} must be at most k1 + 1 = {k1 + 1}")
    y = unit_rows(gallery, "gallery")
    x = unit_rows(queries, "queries", y)
    check_room(len(x), len(y), k=k)
    ids = identities(query_ids, gallery_ids, len(x), len(y))
    found = Ranking(np.full((len(x), k), -1, np.int32), np.full((len(x), k), np.inf, np.float32))
    if not len(x) or not len(y):
        return found
    g, (everyone, place) = len(y), _pictures(x, y, ids)
    near = neighbours(everyone, min(k1, len(everyone) - 1), memory_limit)
    rows, columns = _expanded(near, k1, memory_limit)
    centred = moved(everyone, amid(everyone))
    norms = np.vecdot(centred, centred)
    far = _farthest(centred, norms, memory_limit)
    value = np.exp(-_squared(centred, rows, columns) / far[rows])
    value /= np.bincount(rows, weights=value, minlength=len(everyone))[rows]
    rows, columns, value = _averaged(near[:, :k2], rows, columns, value)

    first = np.searchsorted(rows, np.arange(len(everyone) + 1))
    held = Groups.of(columns[: first[g]], len(everyone))  # the gallery's entries by column
    for i, own in enumerate(place):
        mine = slice(first[own], first[own + 1])
        of, entry = held.members(columns[mine])
        least = np.minimum(value[mine][of], value[entry])
        shared = np.bincount(rows[entry], weights=least, minlength=g)
        squared = norms[:g] + norms[own] - 2 * (centred[:g] @ centred[own])
        distance = np.maximum(squared, 0).astype(np.float64) / far[own]
        distance = (1 - weight) * (1 - shared / (2 - shared)) + weight * distance
        distance[ids[: len(y)] == ids[len(y) + i]] = np.inf
        best = np.argsort(distance, kind="stable")[:k]
        best = best[np.isfinite(distance[best])]
        found.indices[i, : len(best)], found.distances[i, : len(best)] = best, distance[best]
    return found


def _pictures(x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The gallery's rows and those of the queries that are not among them, each once, [n, d]; and
    which of these rows each query is, [q]."""
    g, both, row = len(y), np.concatenate([y, x]), np.arange(len(ids))
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    leader = first[which]  # the first row of the same id
    kept = leader == row
    kept[:g] = True
    kept[g:] |= ((x - both[leader[g:]]) ** 2).sum(1) >= 1e-4
    number = np.cumsum(kept) - 1
    return both[kept], np.where(kept, number, number[leader])[g:]


def identities(
    query_ids: ArrayLike | None, gallery_ids: ArrayLike | None, q: int, g: int
) -> np.ndarray:
    """Numbers of the gallery's ids and then of the queries' [g + q], equal where the ids are."""
    if query_ids is None or gallery_ids is None:
        if query_ids is not gallery_ids:
            raise UserError("give both query_ids and gallery_ids, or neither")
        return np.arange(g + q)
    held, asked = as_ids(gallery_ids, g, "gallery_ids"), as_ids(query_ids, q, "query_ids")
    Codebook(held).of(asked)  # Refuses ids of another kind.
    return Codebook(joined(held, asked)).own


def _farthest(rows: np.ndarray, norms: np.ndarray, memory_limit: int) -> np.ndarray:
    """The largest squared distance of each row from any other, above 0, float64 [n]."""
    far = np.empty(len(rows))
    block = max(1, memory_limit // (12 * len(rows)))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        far[part] = norms[part] + (norms - 2 * (rows[part] @ rows.T)).max(1)
    return np.maximum(far, np.finfo(np.float32).tiny)


def _squared(rows: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The squared distances of pairs of rows, float64 [n]."""
    found = np.empty(len(i))
    block = max(1, 2**22 // max(1, rows.shape[1]))
    for start in range(0, len(i), block):
        part = slice(start, start + block)
        found[part] = ((rows[i[part]] - rows[j[part]]) ** 2).sum(1, dtype=np.float64)
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
