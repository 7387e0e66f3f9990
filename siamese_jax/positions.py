"""Where in its ranking each query finds its relevant items: all that a retrieval metric needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from siamese_jax.closer import Space, counted, sorted_
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
    depth = np.iinfo(np.int64).max if ended else indices.shape[1]
    return Positions(rows, relevance.counts[rows], query, column + 1, depth)


FEW = 64  # queries with at most this many relevant items are counted, the others sorted
_CHUNK = 1024  # gallery rows scored at a time


def positions(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevance: Relevance,
    *,
    distance: str,
    memory_limit: int,
) -> Iterator[Positions]:
    """The positions of every relevant item in the whole ranking, some queries at a time.

    Queries are taken in the order of how many relevant items they have, so that a block of them
    needs about the same room for each, however unequal the classes are. Those with none are left
    out.
    """
    space = Space.of(queries, gallery, distance)
    counts = relevance.counts
    order = np.argsort(counts, kind="stable")
    lone, few = np.searchsorted(counts[order], (0, FEW), side="right")
    d, g = queries.shape[1], len(gallery)
    # Bytes that one more query takes: scores and masks of two blocks, its row, its limits.
    ways: tuple[tuple[Callable[..., np.ndarray], np.ndarray, int], ...] = (
        (counted, order[lone:few], 24 * min(_CHUNK, g) + 28 * d + 64 * FEW),
        (sorted_, order[few:], 64 * g + 16 * d),
    )
    for way, chosen, room in ways:
        block = min(4096, max(1, memory_limit // room))
        for start in range(0, len(chosen), block):
            rows = np.sort(chosen[start : start + block])
            query = np.repeat(np.arange(len(rows)), counts[rows])
            position = way(space, relevance, rows, _CHUNK)
            position = position[np.lexsort((position, query))]
            yield Positions(rows, counts[rows], query, position, g)
