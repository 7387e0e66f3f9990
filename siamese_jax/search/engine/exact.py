"""The distance of one pair of rows. All else only saves work.

A distance is computed in float64 from the float32 rows, from their difference where there is one,
and rounded once to float32:

    sqeuclidean  sum_i (x_i - y_i)^2
    euclidean    its root
    cosine       |x/|x| - y/|y||^2 / 2  =  1 - cos(x, y);  1 if either row is zero
    dot          -sum_i x_i y_i

An item is so at distance exactly 0 from its copy. Many pairs are added up by a compiled program,
in an order of its own; `rounded` tells where that gives the same float32 for certain, which is
nearly everywhere, and the definition is left to the others.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from siamese_jax.search.engine import operands, reused_memory, rounding
from siamese_jax.search.engine.order import by_query
from siamese_jax.search.engine.parallel import THREADS, in_threads
from siamese_jax.search.engine.rows import Rows

_DIFFERENCES = ("euclidean", "sqeuclidean")
# Numbers in one call of NumPy: few enough for the cache.
_SMALL = 1 << 16
# Numbers that are worth a program, and most in one call of it.
_FEW = 1 << 19
_MANY = 1 << 22
# Pairs that are rounded together.
_PAIRS = 1 << 17
# Pairs of one query that are next to one another in such a call: it reads the query once for them.
_BLOCKS = (16, 4, 1)


def pair_distances(
    queries: np.ndarray,
    rows: Rows,
    i: np.ndarray,
    j: np.ndarray,
    distance: str,
    memory: int = 4 * _MANY,
) -> np.ndarray:
    """The distances of queries[i] from gallery rows j, elementwise.

    Args:
      queries: float32 [q, d].
      rows: the gallery.
      i: int [n], faster in ascending order.
      j: int [n].
      distance: one of `siamese_jax.distances.DISTANCES`.
      memory: bytes that gallery rows may take.

    Returns:
      float32 [n]. A value depends on its own two rows alone, so not on how the work is cut.
    """
    if (i[1:] < i[:-1]).any():
        found = np.empty(len(i), np.float32)
        order = by_query(i, len(queries))
        found[order] = pair_distances(queries, rows, i[order], j[order], distance, memory)
        return found
    found = np.empty(len(i), np.float32)
    for at in range(0, len(i), _PAIRS):
        here = slice(at, at + _PAIRS)
        numbers = len(i[here]) * queries.shape[1]
        if numbers < _FEW or jax.default_backend() != "cpu":
            found[here] = _defined(queries, rows, i[here], j[here], distance)
            continue
        # Powers of two, so that there are few programs; the last piece may be nearly empty.
        piece = 1 << max(min(numbers // 3, memory // 4, _MANY), _SMALL).bit_length() - 1
        found[here] = _added_up(queries, rows, i[here], j[here], distance, piece)
    return found


def _added_up(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str, piece: int
) -> np.ndarray:
    """`pair_distances` for ascending i, `piece` numbers at a time."""
    d = queries.shape[1]
    first = np.flatnonzero(np.diff(i, prepend=-1))
    count = np.diff(first, append=len(i))
    # The longest blocks that are mostly full.
    block = next(b for b in _BLOCKS if b == 1 or 4 * b * (-(-count // b)).sum() <= 5 * len(i))
    blocks = -(-count // block)
    start = np.cumsum(blocks) - blocks
    slot = np.arange(len(i), dtype=np.int32) + np.repeat(
        (start * block - first).astype(np.int32), count
    )
    padded = np.full(blocks.sum() * block, j[0], np.int32)
    padded[slot] = j
    sums = _sums(
        queries, rows, np.repeat(i[first], blocks), padded.reshape(-1, block), distance, piece
    )
    sums = [v.reshape(-1)[slot] for v in sums]
    if distance in _DIFFERENCES:
        found, unsure = rounding.of_square(sums[0], rounding.rounding(d), distance)
    else:
        x = queries[i[first]]
        a = np.repeat(np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64)), count)
        found, unsure = rounding.of_product(
            sums[0], a, np.sqrt(sums[1]), rounding.rounding(d), distance
        )
    rest = np.flatnonzero(unsure)
    found[rest] = _defined(queries, rows, i[rest], j[rest], distance)
    return found


def _sums(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str, piece: int
) -> list[np.ndarray]:
    """`_program` for queries i [n], each with its block of rows j [n, block]."""
    n, block = j.shape
    wide = operands.padded_width(queries.shape[1])
    step = max(1, piece // (block * wide))
    asked = Rows([queries], "queries")
    found = [np.empty((n, block)) for _ in range(1 if distance in _DIFFERENCES else 2)]
    with (
        jax.enable_x64(True),
        reused_memory.borrowed((step, 1, wide), np.float32) as x,
        reused_memory.borrowed((step, block, wide), np.float32) as y,
    ):
        for at in range(0, n, step):
            here = slice(at, min(at + step, n))
            _gather(asked, i[here], x)
            _gather(rows, j[here].reshape(-1), y)
            for out, part in zip(found, _program(x, y, distance=distance), strict=True):
                out[here] = np.asarray(part)[: here.stop - at]
    return found


def _gather(rows: Rows, where: np.ndarray, out: np.ndarray) -> None:
    """Copies rows into the first of out [n, m, padded d]."""
    out = out.reshape(-1, out.shape[-1])
    step = -(-len(where) // (2 * THREADS))
    starts = iter(range(0, len(where), step))

    def work() -> None:
        for at in starts:
            part = where[at : at + step]
            if rows.width == out.shape[1]:
                rows.take(part, out=out[at : at + len(part)])
            else:
                out[at : at + len(part), : rows.width] = rows.take(part)

    if rows.width < out.shape[1]:
        out[:, rows.width :] = 0
    in_threads(work, len(where) * rows.width > _SMALL)


@partial(jax.jit, static_argnames="distance")
def _program(x: Array, y: Array, *, distance: str) -> tuple[Array, ...]:
    """|x - y|^2, or <x, y> and |y|^2, float64 [n, m], for float32 x [n, 1, d] and y [n, m, d]."""
    a, b = x.astype(jnp.float64), y.astype(jnp.float64)
    if distance in _DIFFERENCES:
        return (jnp.sum((b - a) ** 2, axis=2),)
    return jnp.sum(b * a, axis=2), jnp.sum(b * b, axis=2)


def _defined(
    queries: np.ndarray, rows: Rows, i: np.ndarray, j: np.ndarray, distance: str
) -> np.ndarray:
    """`pair_distances` by the definition."""
    found = np.empty(len(i), np.float32)
    step = max(1, _SMALL // max(1, queries.shape[1]))
    starts = iter(range(0, len(i), step))

    def work() -> None:
        for at in starts:
            here = slice(at, at + step)
            x, y = (v.astype(np.float64) for v in (queries[i[here]], rows.take(j[here])))
            found[here] = definition(x, y, distance)

    in_threads(work, len(i) > 8 * step)
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
