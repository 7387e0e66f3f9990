"""Where in its ranking each query finds its relevant items: all that a retrieval metric needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.metrics.counting import MISSING, Depths, counted, counted_within
from siamese_jax.metrics.relevance import Relevance
from siamese_jax.metrics.scores import Space
from siamese_jax.metrics.sorting import sorted_
from siamese_jax.search.ranking import rank


@dataclass(frozen=True)
class Positions:
    """The positions of relevant items in the rankings of b queries.

    Attributes:
      rows: int64 [b], which queries these are.
      relevant: int64 [b], how many relevant items the gallery holds for each.
      query: int64 [h], ascending; the place in `rows` of the query each hit belongs to.
      position: int64 [h], ascending within a query; 1 is the nearest item.
      depth: positions up to this one are known; hits beyond it may be missing.
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


SHALLOW = 64  # down to this depth a ranking costs less than counting does
FEW = 64  # queries with at most this many relevant items are counted, the others sorted
_CHUNK = 1024  # gallery rows scored at a time
_BLOCK = 2048  # rows that meet as many others, where they search one another


def positions(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevance: Relevance,
    *,
    distance: str,
    depths: Depths,
    memory_limit: int,
) -> Iterator[Positions]:
    """The positions of relevant items, some queries at a time.

    Args:
      depths: the nearest relevant item of a query is listed if its position is at most `first` or
        `every`, all the others down to `every`. More may be missing.

    Where only few positions matter they are read off a ranking. Otherwise the items closer than
    each relevant item are counted, or all are sorted where many are relevant; queries are then
    taken in the order of how many relevant items they have, so that a block of them needs about
    the same room for each, however unequal the classes are. Those with none are left out.
    """
    depth = int(np.maximum(depths.first, depths.every).max(initial=1))
    if depth <= SHALLOW:
        if memory_limit < 1 << 21:  # a half of it is the search's, which needs 1 MiB
            raise UserError(f"memory_limit={memory_limit} is less than 2 MiB (2**21 bytes)")
        yield from _ranked(queries, gallery, relevance, distance, depth, memory_limit)
        return
    space, counts = Space.of(queries, gallery, distance), relevance.counts
    order = np.argsort(counts, kind="stable")
    lone, few = np.searchsorted(counts[order], (0, FEW), side="right")
    for rows, position in chain(
        _counted(space, relevance, order, slice(lone, few), depths, memory_limit),
        _sorted(space, relevance, order[few:], memory_limit),
    ):
        query = np.repeat(np.arange(len(rows)), counts[rows])
        there = position != MISSING
        query, position = query[there], position[there]
        position = position[np.lexsort((position, query))]
        yield Positions(rows, counts[rows], query, position, int(depths.every[rows].min()))


def _counted(
    space: Space,
    relevance: Relevance,
    order: np.ndarray,
    chosen: slice,
    depths: Depths,
    memory_limit: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (rows, their positions) for queries with few relevant items."""
    rows, (g, d) = order[chosen], space.gallery.shape
    # Bytes for rows that search one another: rows and limits of all, scores of two blocks.
    limits = 96 * int(relevance.counts[rows].sum()) + 100 * len(rows)
    if space.within and 4 * g * d + limits + 16 * min(_BLOCK, g) ** 2 <= memory_limit:
        asking, others = _cut(rows, _BLOCK), _cut(np.delete(order, chosen), _BLOCK)
        found = counted_within(space, relevance, asking + others, len(asking), depths)
        yield from zip(asking, found, strict=True)
        return
    # Bytes for each query: scores and masks of two blocks, its row, its limits.
    room = 24 * min(_CHUNK, g) + 28 * d + 96 * FEW
    for block in _cut(rows, min(4096, max(1, memory_limit // room))):
        yield block, counted(space, relevance, block, depths, _CHUNK)


def _sorted(
    space: Space, relevance: Relevance, rows: np.ndarray, memory_limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same for queries with many."""
    g, d = space.gallery.shape
    for block in _cut(rows, max(1, memory_limit // (64 * g + 16 * d))):
        yield block, sorted_(space, relevance, block, _CHUNK)


def _cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [np.sort(rows[start : start + size]) for start in range(0, len(rows), size)]


def _ranked(
    queries: np.ndarray,
    gallery: np.ndarray,
    relevance: Relevance,
    distance: str,
    depth: int,
    memory_limit: int,
) -> Iterator[Positions]:
    """The same by the first `depth` items of each ranking; half of the memory is for those."""
    own, other = relevance.query_ids, relevance.gallery_ids
    classes = 1 if relevance.by_label is not None else relevance.query_labels.shape[1]
    block = max(1, memory_limit // 2 // ((64 + 3 * classes) * depth))
    for start in range(0, len(queries), block):
        rows = np.arange(start, min(start + block, len(queries)))
        ranking = rank(
            queries[rows],
            gallery,
            depth,
            distance=distance,
            query_ids=None if own is None else own[rows],
            gallery_ids=other,
            memory_limit=memory_limit // 2,
        )
        yield listed_positions(ranking.indices, relevance, rows)
