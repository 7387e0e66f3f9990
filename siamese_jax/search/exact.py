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
    d = queries.shape[1]
    piece = max(1, _PIECE // max(1, d))
    x = queries.astype(np.float64) if len(queries) * 2 < len(i) else None
    found = np.empty(len(i), np.float32)

    starts = iter(range(0, len(i), piece))

    def work() -> None:
        # Each thread takes the next piece until none is left: cheaper than a task for each.
        for start in starts:
            here = slice(start, start + piece)
            own = queries[i[here]].astype(np.float64) if x is None else x[i[here]]
            other = rows(j[here]).astype(np.float64)
            found[here] = _distances(own, other, distance)

    if len(i) < 8 * piece:
        work()
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            for task in [pool.submit(work) for _ in range(THREADS)]:
                task.result()
    return found


def _distances(x: np.ndarray, y: np.ndarray, distance: str) -> np.ndarray:
    """float64 [n, d] twice -> float32 [n]; overwrites both."""
    if distance == "dot":
        # Adding 0 turns a negative zero into a positive one: they would sort apart.
        return (0.0 - np.einsum("nd,nd->n", x, y)).astype(np.float32) + np.float32(0)
    if distance == "cosine":
        zero = ~(_normalise(x) & _normalise(y))
    np.subtract(y, x, out=y)
    squared = np.einsum("nd,nd->n", y, y)
    if distance == "sqeuclidean":
        return squared.astype(np.float32)
    if distance == "euclidean":
        return np.sqrt(squared).astype(np.float32)
    # Each unit row is (d + 4) / 2^53 accurate. What lies below that squared is the rounding of
    # two parallel rows, such as x and 3x.
    squared[squared < ((x.shape[1] + 4) / 2.0**52) ** 2] = 0
    squared[zero] = 2
    return (squared / 2).astype(np.float32)


def _normalise(x: np.ndarray) -> np.ndarray:
    """Makes rows of length 1 in place; says which are not zero. No square over- or underflows,
    as the rows come from float32."""
    norm = np.sqrt(np.einsum("nd,nd->n", x, x))
    x /= np.where(norm > 0, norm, 1)[:, None]
    return norm > 0


def first(
    i: np.ndarray, j: np.ndarray, distance: np.ndarray, k: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k[i] first pairs of every query in the order (distance, row).

    Args:
      i: int [n], the pair's query.
      j: int [n], the pair's gallery row.
      distance: float32 [n], no NaN.
      k: int [q].

    Returns:
      (i, place, which): the pair `which` is number `place` of the answers of query i; in the order
      of i, then place.
    """
    order = np.argsort(_sortable(distance) << np.uint64(32) | j.astype(np.uint64))
    # A stable sort of 16-bit integers is a radix sort.
    kind = np.uint16 if len(k) <= 1 << 16 else np.int32
    order = order[np.argsort(i[order].astype(kind), kind="stable")]
    i = i[order]
    count = np.bincount(i, minlength=len(k))
    place = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)
    keep = place < k[i]
    return i[keep], place[keep], order[keep]


def _sortable(distance: np.ndarray) -> np.ndarray:
    """float32 -> uint64 in the same order: the bits of a float, with those of negatives turned."""
    bits = distance.view(np.uint32)
    turned = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return turned.astype(np.uint64)
