"""The distance of one pair of rows. All else only saves work.

A distance is computed in float64 from the float32 rows, from their difference where there is one,
and rounded once to float32:

    sqeuclidean  sum_i (x_i - y_i)^2
    euclidean    its root
    cosine       |x/|x| - y/|y||^2 / 2  =  1 - cos(x, y);  1 if either row is zero
    dot          -sum_i x_i y_i

An item is so at distance exactly 0 from its copy. Many pairs are taken from products <x, y>, which
read every number once; `rounding` tells where those give the same float32 for certain, which is
nearly everywhere, and the definition is left to the others.
"""

import numpy as np

from siamese_jax.search.engine import reused_memory, rounding
from siamese_jax.search.engine.order import by_query, of_equal_length
from siamese_jax.search.engine.parallel import THREADS, in_threads, rows_at_once
from siamese_jax.search.engine.rows import Rows, as_rows

# Numbers that are worth products, and pairs that are rounded together.
_FEW = 1 << 15
_PAIRS = 1 << 14


def pair_distances(
    queries: np.ndarray | Rows,
    rows: Rows,
    i: np.ndarray,
    j: np.ndarray,
    distance: str,
    memory: int = 1 << 26,
) -> np.ndarray:
    """The distances of queries[i] from gallery rows j, elementwise.

    Args:
      queries: float32 [q, d]; as `Rows`, their squares are computed once for all calls.
      rows: the gallery.
      i: int [n], faster in ascending order.
      j: int [n].
      distance: one of `siamese_jax.distances.DISTANCES`.
      memory: bytes that the rows which all threads look at may take.

    Returns:
      float32 [n]. A value depends on its own two rows alone, so not on how the work is cut.
    """
    asked, d = as_rows(queries, "queries"), rows.width
    if len(i) * d < _FEW:
        return _defined(asked, rows, i, j, distance)
    if (i[1:] < i[:-1]).any():
        found = np.empty(len(i), np.float32)
        order = by_query(i, len(asked))
        found[order] = pair_distances(asked, rows, i[order], j[order], distance, memory)
        return found
    # The items' own squares are worth a pass where there are more pairs than items.
    squares = rows.squares if len(j) >= len(rows) else None
    length = np.sqrt(asked.squares)
    # One shape for all searches of this width, for memory that was used before.
    shape = max(1, min(rows_at_once(d), memory // (12 * max(1, d) * THREADS))), d
    matrices = iter(list(of_equal_length(i, shape[0], min(_PAIRS, -(-len(i) // THREADS)))))
    # The last one is for what fills the matrices up.
    found = np.empty(len(i) + 1, np.float32)

    def work() -> None:
        with (
            reused_memory.borrowed(shape, np.float32) as single,
            reused_memory.borrowed(shape, np.float64) as double,
        ):
            for pairs in matrices:
                own, items = i[pairs[:, 0]], np.take(j, pairs, mode="clip")
                product, square = _products(asked.take(own), rows, items, squares, single, double)
                lengths = length[own][:, None], np.sqrt(square)
                found[pairs], unsure = rounding.from_product(
                    product, *lengths, rounding.rounding(d), distance
                )
                if unsure.any():
                    rest = pairs[unsure & (pairs < len(i))]
                    found[rest] = _defined(asked, rows, i[rest], j[rest], distance)

    in_threads(work)
    return found[:-1]


def _products(
    queries: np.ndarray,
    rows: Rows,
    items: np.ndarray,
    squares: np.ndarray | None,
    single: np.ndarray,
    double: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(<x, y>, |y|^2) of queries [n, d] and their items int [n, m], float64 [n, m] twice.

    Args:
      squares: |y|^2 of all rows, if that is known.
      single, double: [s, d], memory for s rows; s >= m.
    """
    product = np.empty(items.shape)
    square = np.empty(items.shape) if squares is None else squares[items]
    step = len(single) // items.shape[1]
    for at in range(0, len(items), step):
        here = slice(at, at + step)
        count = items[here].size
        y32, y = single[:count], double[:count]
        rows.take(items[here].ravel(), out=y32)
        y[:] = y32
        y = y.reshape(*items[here].shape, -1)
        x = queries[here].astype(np.float64)
        np.vecdot(y, x[:, None, :], out=product[here])
        if squares is None:
            np.vecdot(y, y, out=square[here])
    return product, square


def _defined(
    queries: np.ndarray | Rows, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str
) -> np.ndarray:
    """`pair_distances` by the definition."""
    asked = as_rows(queries, "queries")
    found = np.empty(len(i), np.float32)
    step = rows_at_once(rows.width)
    starts = iter(range(0, len(i), step))

    def work() -> None:
        for at in starts:
            here = slice(at, at + step)
            x, y = (v.astype(np.float64) for v in (asked.take(i[here]), rows.take(j[here])))
            found[here] = definition(x, y, distance)

    in_threads(work, len(i) > step)
    return found


def definition(x: np.ndarray, y: np.ndarray, distance: str) -> np.ndarray:
    """Of each row of x from the same of y, float64 [n, d] twice -> float32 [n]; overwrites both."""
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
