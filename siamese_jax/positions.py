"""Where in its ranking each query finds its relevant items: all that a retrieval metric needs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.ranking import rank
from siamese_jax.relevance import Relevance


@dataclass(frozen=True)
class Positions:
    """The positions of relevant items in the rankings of b queries.

    Attributes:
      rows: int64 [b], which queries these are.
      relevant: int64 [b], how many relevant items the gallery holds for each.
      query: int64 [h], ascending; the place in `rows` of the query each hit belongs to.
      position: int64 [h], ascending within a query; 1 is the nearest item.
      depth: positions up to this one are listed; hits beyond it may be missing.
    """

    rows: np.ndarray
    relevant: np.ndarray
    query: np.ndarray
    position: np.ndarray
    depth: int

    def total(self, weights: np.ndarray) -> np.ndarray:
        """Sum of a value per hit [h] over each query's hits, float64 [b]."""
        return np.bincount(self.query, weights=weights, minlength=len(self.rows))

    def found(self) -> np.ndarray:
        """For each hit, how many relevant items lie at or before its position, int64 [h]."""
        sizes = np.bincount(self.query, minlength=len(self.rows))
        return np.arange(len(self.query)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1


def listed_positions(indices: np.ndarray, relevance: Relevance, rows: np.ndarray) -> Positions:
    """Positions read off rankings [b, k] of gallery rows (-1 where a ranking has ended).

    A ranking that holds -1 has come to its end, so nothing beyond it is missing.
    """
    matches = relevance.matches(rows, indices)
    query, column = np.nonzero(matches)
    ended = indices.shape[1] >= len(relevance.gallery_labels) or bool((indices[:, -1:] < 0).all())
    depth = len(relevance.gallery_labels) if ended else indices.shape[1]
    return Positions(rows, relevance.counts[rows], query, column + 1, depth)


def all_positions(
    queries: ArrayLike,
    gallery: ArrayLike,
    relevance: Relevance,
    *,
    distance: str,
    memory_limit: int,
) -> Iterator[Positions]:
    """The positions of every relevant item in the whole ranking, some queries at a time."""
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    block = max(1, memory_limit // (64 * max(1, len(gallery))))
    for start in range(0, len(queries), block):
        rows = np.arange(start, min(start + block, len(queries)))
        ids = {}
        if relevance.query_ids is not None and relevance.gallery_ids is not None:
            ids = {"query_ids": relevance.query_ids[rows], "gallery_ids": relevance.gallery_ids}
        found = rank(queries[rows], gallery, len(gallery), distance=distance, **ids)
        yield listed_positions(np.asarray(found.indices), relevance, rows)
