"""Several opinions in one: embeddings of several encoders, or rankings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import at_least_one, check_room, finite
from siamese_jax.search.ranking import Ranking, rank


def fuse_rankings(rankings: Sequence[Ranking | ArrayLike], k: int, *, c: float = 60.0) -> Ranking:
    """Reciprocal rank fusion (Cormack et al. 2009): for scores that can't be compared.

        score(g) = sum over rankings that list g of 1 / (c + its position)

    Args:
      rankings: `Ranking`s or indices int [q, n_i] of the same queries and gallery.
      k: how many to return, at least 1; -1 and +inf where fewer were listed.
      c: the larger, the less the first places outweigh the next.

    Returns:
      A `Ranking` whose distances are -score; ties in ascending order of the gallery's rows.

    >>> fuse_rankings([[[0, 1, 2]], [[1, 2, 0]]], k=3).indices.tolist()
    [[1, 0, 2]]
    """
    at_least_one(k=k)
    lists = [np.asarray(r.indices if isinstance(r, Ranking) else r) for r in rankings]
    shapes = [part.shape for part in lists]
    if len({s[0] for s in shapes if len(s) == 2}) != 1 or any(len(s) != 2 for s in shapes):
        raise UserError(f"fusion needs rankings [q, n] of the same queries, not {shapes}")
    if any(part.dtype.kind not in "iu" for part in lists) or not c >= 0:
        raise UserError(f"fusion needs rankings of whole numbers, and c = {c} >= 0")
    position = np.concatenate([np.arange(1, part.shape[1] + 1) for part in lists])
    item = np.concatenate(lists, axis=1)
    check_room(*item.shape, k=k)
    found = Ranking(np.full((len(item), k), -1, np.int32), np.full((len(item), k), np.inf, "f4"))
    for q, row in enumerate(item):
        there = row >= 0
        rows, which = np.unique(row[there], return_inverse=True)
        score = np.bincount(which, weights=1 / (c + position[there]), minlength=len(rows))
        best = np.argsort(-score, kind="stable")[:k]
        found.indices[q, : len(best)] = rows[best]
        found.distances[q, : len(best)] = -score[best]
    return found


def rank_by_each(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    widths: Sequence[int],
    depth: int = 1000,
    c: float = 60.0,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
) -> Ranking:
    """Several encoders' own rankings by cosine, fused by `fuse_rankings`.

    Args:
      queries, gallery: real [q, d], [g, d]: the encoders' embeddings side by side.
      k: how many to return.
      widths: of each encoder's embedding; their sum is d.
      depth: how long each encoder's list is (k, if that is more): what none lists has no place.
      c: of `fuse_rankings`.
      query_ids, gallery_ids: of `siamese_jax.rank`.

    Raises:
      UserError: widths that are not those of the vectors, a depth below 1, or what
        `siamese_jax.rank` raises.

    >>> x, y = np.float32([[1, 0, 0, 1]]), np.float32([[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
    >>> rank_by_each(x, y, 3, widths=[2, 2]).indices.tolist()
    [[1, 0, 2]]
    """
    at_least_one(k=k, depth=depth)
    gallery = finite(gallery, "gallery")
    queries = finite(queries, "queries", gallery)
    if sum(widths) != queries.shape[1]:
        raise UserError(
            f"widths {list(widths)} must add up to the vectors' {queries.shape[1]} dimensions"
        )
    ids: dict[str, Any] = {"query_ids": query_ids, "gallery_ids": gallery_ids}
    ends = np.cumsum(widths)[:-1]
    parts = zip(np.split(queries, ends, axis=1), np.split(gallery, ends, axis=1), strict=True)
    lists = [rank(x, y, max(k, depth), distance="cosine", **ids) for x, y in parts]
    return fuse_rankings(lists, k, c=c)
