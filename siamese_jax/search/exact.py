"""The distance of one pair of rows, and the order of the answers. All else only saves work.

A distance is computed in float64 from the float32 rows, from their difference where there is one,
and rounded once to float32:

    sqeuclidean  sum_i (x_i - y_i)^2
    euclidean    its root
    cosine       |x/|x| - y/|y||^2 / 2  =  1 - cos(x, y);  1 if either row is zero
    dot          -sum_i x_i y_i

An item is so at distance exactly 0 from its copy. Answers are in the order (distance, row).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# float64 numbers in one piece of work: two such buffers stay in a core's second-level cache.
_PIECE = 1 << 16
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

Rows = Callable[[np.ndarray], np.ndarray]


def pair_distances(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str
) -> np.ndarray:
    """The distances of queries[i] from gallery rows j, elementwise.

    Args:
      queries: float32 [q, d].
      rows: gives float32 [n, d] for int [n] gallery rows.
      i: int [n].
      j: int [n].
      distance: one of `siamese_jax.distances.DISTANCES`.

    Returns:
      float32 [n]. A value depends on its own two rows alone, so not on how the work is cut.
    """
    n, d = len(i), queries.shape[1]
    piece = max(1, _PIECE // max(1, d))
    found = np.empty(n, np.float32)
    # Making unit rows is work per query, not per pair, where pairs share queries.
    shared = len(queries) * 2 < n
    x = queries.astype(np.float64) if shared else queries
    if shared and distance == "cosine":
        unit(x)
    starts = iter(range(0, n, piece))

    def work() -> None:
        # Each thread takes the next piece until none is left: cheaper than a task for each.
        own, other = np.empty((2, min(piece, n), d))
        for start in starts:
            here = slice(start, min(start + piece, n))
            a, b = own[: here.stop - start], other[: here.stop - start]
            a[:] = x[i[here]]
            b[:] = rows(j[here])
            if distance == "cosine" and not shared:
                unit(a)
            found[here] = _distances(a, b, distance)

    if n < 8 * piece:
        work()
    else:
        in_threads(work)
    return found


def in_threads(work: Callable[[], None]) -> None:
    """Runs `work` on every core; it takes its pieces from a common iterator until none is left."""
    if THREADS == 1:
        work()
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for task in [pool.submit(work) for _ in range(THREADS)]:
            task.result()


def _distances(x: np.ndarray, y: np.ndarray, distance: str) -> np.ndarray:
    """float64 [n, d] twice -> float32 [n]; overwrites y. For cosine, rows of x are of length 1."""
    if distance == "dot":
        # Adding 0 turns a negative zero into a positive one: they would sort apart.
        return (0.0 - np.vecdot(x, y)).astype(np.float32) + np.float32(0)
    if distance == "cosine":
        zero = ~(unit(y) & x.any(axis=1))
    np.subtract(y, x, out=y)
    squared = np.vecdot(y, y)
    if distance == "sqeuclidean":
        return squared.astype(np.float32)
    if distance == "euclidean":
        return np.sqrt(squared).astype(np.float32)
    # Each unit row is (d + 4) / 2^53 accurate. What lies below that squared is the rounding of
    # two parallel rows, such as x and 3x.
    squared[squared < ((x.shape[1] + 4) / 2.0**52) ** 2] = 0
    squared[zero] = 2
    return (squared / 2).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """Makes float64 rows of length 1 in place; says which are not zero. No square over- or
    underflows, as the rows come from float32."""
    norm = np.sqrt(np.vecdot(x, x))
    x /= np.where(norm > 0, norm, 1)[:, None]
    return norm > 0


def first(
    i: np.ndarray, j: np.ndarray, distance: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The k[i] first pairs of every query in the order (distance, row).

    Args:
      i: int [n], the pair's query.
      j: int [n], the pair's gallery row.
      distance: float32 [n], no NaN.
      k: int [q].

    Returns:
      (i, place, j, distance): the answers, `place` counted from 0 for each query; in the order of
      i, then place.
    """
    key = _sortable(distance) << np.uint64(32) | j.astype(np.uint64)
    if (i[1:] < i[:-1]).any():
        order = by_query(i, len(k))
        i, key = i[order], key[order]
    count = np.bincount(i, minlength=len(k))
    start = np.cumsum(count) - count
    for at, n in zip(start.tolist(), count.tolist(), strict=True):
        if n > 1:
            key[at : at + n].sort()
    place = np.arange(len(i)) - np.repeat(start, count)
    keep = place < k[i]
    i, place, key = i[keep], place[keep], key[keep]
    return i, place, (key & np.uint64(0xFFFFFFFF)).astype(j.dtype), _unsortable(key)


def by_query(i: np.ndarray, q: int) -> np.ndarray:
    """The order of pairs by their query, stable."""
    # A stable sort of 16-bit integers is a radix sort.
    return np.argsort(i.astype(np.uint16 if q <= 1 << 16 else np.int32), kind="stable")


def _sortable(distance: np.ndarray) -> np.ndarray:
    """float32 -> uint64 in the same order: the bits of a float, with those of negatives turned."""
    bits = distance.view(np.int32)
    return (bits ^ (bits >> 31 | np.int32(-(2**31)))).view(np.uint32).astype(np.uint64)


def _unsortable(key: np.ndarray) -> np.ndarray:
    """The distance in the upper half of a key."""
    bits = (key >> np.uint64(32)).astype(np.uint32).view(np.int32)
    return (bits ^ (~bits >> 31 | np.int32(-(2**31)))).view(np.float32)
