"""The distance of one pair of rows. All else only saves work.

A distance is computed in float64 from the float32 rows, from their difference where there is one,
and rounded once to float32:

    sqeuclidean  sum_i (x_i - y_i)^2
    euclidean    its root
    cosine       |x/|x| - y/|y||^2 / 2  =  1 - cos(x, y);  1 if either row is zero
    dot          -sum_i x_i y_i

An item is so at distance exactly 0 from its copy. Where many pairs share a query, matrix products
give nearly all of these numbers (`rounded`), and the definition is left to the others.
"""

from collections.abc import Callable

import numpy as np

from siamese_jax.search.order import by_query
from siamese_jax.search.rounded import rounded, rounding
from siamese_jax.search.threads import THREADS, in_threads

# float64 numbers in one call of NumPy: few enough for the cache, and enough for other threads not
# to wait for the interpreter's lock.
_PIECE = 1 << 18
# Most pairs that are rounded together.
_PAIRS = 1 << 15
# Pairs of one query that one small product takes, and how many columns of them. That is little
# enough for OpenBLAS to need no buffer, for which its threads would wait.
_BLOCK = 16
_STRIP = 128

Rows = Callable[[np.ndarray], np.ndarray]


def pair_distances(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str
) -> np.ndarray:
    """The distances of queries[i] from gallery rows j, elementwise.

    Args:
      queries: float32 [q, d].
      rows: gives float32 [n, d] for int [n] gallery rows.
      i: int [n], faster in ascending order.
      j: int [n].
      distance: one of `siamese_jax.distances.DISTANCES`.

    Returns:
      float32 [n]. A value depends on its own two rows alone, so not on how the work is cut.
    """
    found = np.empty(len(i), np.float32)
    if (i[1:] < i[:-1]).any():
        order = by_query(i, len(queries))
        found[order] = pair_distances(queries, rows, i[order], j[order], distance)
        return found
    n, d = len(i), queries.shape[1]
    size = max(_PIECE // (4 * max(1, d)) + 1, min(_PAIRS, n // (4 * THREADS)))
    starts = iter(range(0, n, size))
    squares = _squares(rows, j, d)

    def work() -> None:
        # Each thread takes the next pairs until none are left: cheaper than a task for each.
        for start in starts:
            here = slice(start, start + size)
            found[here] = _distances(queries, rows, i[here], j[here], distance, squares)

    if n < 4 * size:
        work()
    else:
        in_threads(work)
    return found


def _distances(
    queries: np.ndarray,
    rows: Rows,
    i: np.ndarray,
    j: np.ndarray,
    distance: str,
    squares: np.ndarray | None,
) -> np.ndarray:
    """`pair_distances` for ascending i. squares: float64, |y|^2 of all rows, where known."""
    first = np.flatnonzero(np.diff(i, prepend=-1))
    count = np.diff(first, append=len(i))
    blocks = -(-count // _BLOCK)
    if 4 * blocks.sum() * _BLOCK > 5 * len(i):
        return _defined(queries, rows, i, j, distance)
    start = np.cumsum(blocks) - blocks
    slot = np.arange(len(i)) + np.repeat(start * _BLOCK - first, count)
    filled = np.full(blocks.sum() * _BLOCK, j[0])
    filled[slot] = j
    products, x, y = _products(queries, rows, np.repeat(i[first], blocks), filled, squares is None)
    square = y[slot] if squares is None else squares[j]
    a = np.sqrt(x)[slot // _BLOCK]
    c = rounding(queries.shape[1])
    found, unsure = rounded(products[slot], a, np.sqrt(square), c, distance)
    rest = np.flatnonzero(unsure)
    found[rest] = _defined(queries, rows, i[rest], j[rest], distance)
    return found


def _products(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, squared: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 (<x, y> [n * _BLOCK], |x|^2 [n], and, if asked for, |y|^2 [n * _BLOCK]) for queries
    i [n], each with the rows of its block of j [n * _BLOCK]."""
    n, d = len(i), queries.shape[1]
    strips = -(-d // _STRIP)
    wide = d if strips == 1 else strips * _STRIP
    step = max(1, _PIECE // (_BLOCK * max(1, wide)))
    x, y = np.zeros((step, wide)), np.zeros((step * _BLOCK, wide))
    parts, own = np.empty((n, strips, _BLOCK, 1)), np.empty(n)
    other = np.empty((n, _BLOCK) if squared else 0)
    for at in range(0, n, step):
        here = slice(at, min(at + step, n))
        m = here.stop - at
        x[:m, :d] = queries[i[here]]
        y[: m * _BLOCK, :d] = rows(j[at * _BLOCK : here.stop * _BLOCK])
        items = y[: m * _BLOCK].reshape(m, _BLOCK, strips, -1).swapaxes(1, 2)
        np.matmul(items, x[:m].reshape(m, strips, -1, 1), out=parts[here])
        own[here] = np.vecdot(x[:m], x[:m])
        if squared:
            other[here] = np.vecdot(y[: m * _BLOCK], y[: m * _BLOCK]).reshape(m, _BLOCK)
    return parts.sum(axis=1).reshape(-1), own, other.reshape(-1)


def _squares(rows: Rows, j: np.ndarray, d: int) -> np.ndarray | None:
    """float64 [max(j) + 1], |y|^2 of the rows up to the last of j, where many pairs share them."""
    stop = int(j.max(initial=-1)) + 1
    if len(j) < 4 * stop:
        return None
    found = np.empty(stop)
    step = max(1, _PIECE // max(1, d))
    for at in range(0, stop, step):
        y = rows(np.arange(at, min(at + step, stop))).astype(np.float64)
        np.vecdot(y, y, out=found[at : at + step])
    return found


def _defined(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str
) -> np.ndarray:
    """`pair_distances` by the definition."""
    found = np.empty(len(i), np.float32)
    step = max(1, _PIECE // (4 * max(1, queries.shape[1])))
    for at in range(0, len(i), step):
        here = slice(at, at + step)
        x, y = (v.astype(np.float64) for v in (queries[i[here]], rows(j[here])))
        found[here] = _definition(x, y, distance)
    return found


def _definition(x: np.ndarray, y: np.ndarray, distance: str) -> np.ndarray:
    """float64 [n, d] twice -> float32 [n]; overwrites both."""
    if distance == "dot":
        # Adding 0 turns a negative zero into a positive one: they would sort apart.
        return (0.0 - np.vecdot(x, y)).astype(np.float32) + np.float32(0)
    if distance == "cosine":
        zero = ~(unit(x) & unit(y))
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
