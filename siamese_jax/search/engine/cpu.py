"""The ways to answer a search on the CPU, and which is taken when.

one_pass       very few queries: no copies, no preparation
all_distances  k is a large share of the gallery: all distances
candidates     otherwise: candidates from one cheap product
"""

import functools
from collections.abc import Iterator

import numpy as np

from siamese_jax.search.engine import all_distances, bounds, candidates, one_pass, order
from siamese_jax.search.engine.blocks import Blocks
from siamese_jax.search.engine.operands import Frame
from siamese_jax.search.engine.request import Search


def nearest(
    search: Search, wanted: np.ndarray, k: int, precision: str, adaptive: bool
) -> Iterator[tuple]:
    """The k first of every query, in another precision where that is adaptive.

    Yields (i, place, j, distance) arrays, in parts that are whole queries."""
    g = len(search.gallery.rows)
    if adaptive and g and 0 < len(search.queries) <= one_pass.MOST and search.gallery.at_hand:
        try:
            i, j = one_pass.candidates(search, min(k, g))
            yield order.first(i, j, search.away(0, i, j), wanted)
            return
        except candidates.TooManyError:
            pass  # Raised before anything was yielded, here as below.
    sizes = all_distances.plan(len(search.queries), g, search.rows.width, k, search.memory_limit)
    # A product in float64 does more than "float32" asks for.
    if (adaptive or precision == "float32") and g and sizes is not None:
        try:
            yield from all_distances.nearest_of_all(search, wanted, sizes)
            return
        except candidates.TooManyError:
            pass
    if adaptive and precision == "bfloat16":
        try:
            yield from _nearest_scan(search, wanted, k, precision, patience=8 * k)
            return
        except candidates.TooManyError:
            precision = "float32"
    yield from _nearest_scan(search, wanted, k, precision, patience=np.inf)


def _nearest_scan(
    search: Search, wanted: np.ndarray, k: int, precision: str, patience: float
) -> Iterator[tuple]:
    q, g = len(search.queries), len(search.gallery.rows)
    k = min(k, g)
    if not q or not k:
        return
    frame, sizes, blocks = _prepare(search, precision, k)

    def settle(at: int, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return search.settle(at, wanted[at:], i, j)

    def chunks(start: int) -> Iterator[candidates.Chunk]:
        for at, count, side in search.sides(frame, sizes.chunk, start, start + sizes.state):
            floor = candidates.lowest(side, count)
            yield candidates.Chunk(at, side, k, floor, settle, sizes.pairs)

    def answers(part: candidates.Slice) -> tuple:
        own = wanted[part.at : part.at + len(part.floor)]
        i, j, away = _measured(search, part, len(own), frame)
        i, place, j, away = order.first(i, j, away, own)
        return i + part.at, place, j, away

    for start in range(0, q, sizes.state):
        for chunk in candidates.run(
            chunks(start), blocks, frame, sizes, exclude=search.codes is not None, patience=patience
        ):
            yield from chunk.each(answers)
        patience = np.inf


def _measured(
    search: Search, part: candidates.Slice, count: int, frame: Frame
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, distance) of pairs with all of each query's k first.

    The k best lower ends belong to pairs that are measured at once. The k-th of these distances
    is exact, and so a sharper limit for the other candidates than the floor.
    """
    pairs, k = part.reaching(), part.k
    first = pairs.low >= part.floor[pairs.i]
    away = np.full(len(first), np.inf, np.float32)
    i = pairs.i[first]
    away[first] = near = search.away(part.at, i, pairs.j[first])
    starts = np.flatnonzero(np.diff(i, prepend=-1))
    limit = np.full(count, np.inf)
    enough = np.diff(starts, append=len(i)) >= k
    limit[i[starts][enough]] = np.maximum.reduceat(near, starts)[enough] if len(i) else []
    square = bounds.true_square(search.rows, slice(part.at, part.at + count), frame)
    least = bounds.score_of(limit, square, search.distance)
    rest = np.flatnonzero(~first & (pairs.high >= bounds.below(least)[pairs.i]))
    away[rest] = search.away(part.at, pairs.i[rest], pairs.j[rest])
    measured = np.flatnonzero(away < np.inf)
    return pairs.i[measured], pairs.j[measured], away[measured]


def within(search: Search, reach: np.ndarray, precision: str) -> Iterator[tuple]:
    """Yields (i, j, distance) arrays in the order (i, distance, j)."""
    if not len(search.queries) or not len(search.gallery.rows):
        return
    frame, sizes, blocks = _prepare(search, precision, 1)
    for at, count, side in search.sides(frame, sizes.chunk):
        here = slice(at, at + count)
        square = bounds.true_square(search.rows, here, frame)
        least = bounds.score_of(reach[here], square, search.distance)
        floor = candidates.lowest(side, count)
        floor[:count] = bounds.below(least)
        if search.distance == "euclidean":
            floor[:count][reach[here] < 0] = np.inf
        floor[:count] = np.maximum(floor[:count], np.finfo(np.float32).min)
        chunk = candidates.Chunk(at, side, None, floor, lambda _, i, j: (i, j), sizes.pairs)
        list(candidates.run([chunk], blocks, frame, sizes, exclude=search.codes is not None))
        yield from chunk.each(functools.partial(_reached, search, reach))


def _reached(
    search: Search, reach: np.ndarray, part: candidates.Slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, distance) of the items within the reach of a slice's queries."""
    reach, g = reach[part.at : part.at + len(part.floor)], len(search.gallery.rows)
    i, j = part.reaching()[:2]
    away = search.away(part.at, i, j)
    near = away <= reach[i]
    i, _, j, away = order.first(i[near], j[near], away[near], np.full(len(reach), g))
    return i + part.at, j, away


def _prepare(search: Search, precision: str, k: int) -> tuple[Frame, candidates.Plan, Blocks]:
    q, (g, d) = len(search.queries), (len(search.gallery.rows), search.rows.width)
    frame = search.frame(precision)
    sizes = candidates.plan(q, g, d, k, precision, search.memory_limit)
    if search.gallery.keeps(frame):
        sizes = sizes._replace(keep_blocks=True, state=q)
    blocks = search.gallery.blocks(frame, search.there, sizes.block, search.codes is not None)
    return frame, sizes, blocks.keep() if sizes.keep_blocks else blocks
