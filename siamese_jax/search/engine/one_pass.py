"""Very few queries: one pass over the gallery as it is, without copies.

Preparing a gallery pays when many queries share it. For a few, <x, y> and |y|^2 are summed in
float32, piece by piece in the cache. With X = |x|, Y = |y| and c of `rounding`, u = 2^-24,

    s = |y|^2 - 2 <x, y>   is within c (X + Y)^2       euclidean, sqeuclidean
    s = -<x, y>            is within c X Y             dot
    s = -<x, y> / Y        is within c X               cosine; 8 c for the definition's own rounding

of what orders the items, so what can be among the k nearest is known.
"""

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import blocks, operands
from siamese_jax.search.engine.candidates import TooManyError
from siamese_jax.search.engine.parallel import in_threads
from siamese_jax.search.engine.request import Search
from siamese_jax.search.engine.rounding import SINGLE, rounding
from siamese_jax.search.engine.rows import Rows

MOST = 4
# Numbers of rows that are read before the memory map they are in gives its pages back, and those
# that a thread looks at together.
_SLICE = 1 << 25
_PIECE = 1 << 18
# So many candidates are another way's: of a gallery far from the origin, or of one with no order.
_MANY = 1 << 14
# Rows shorter than this have a cosine that float32 may not tell.
_SHORT = np.float32(2.0**-60)


def candidates(search: Search, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that hold all of each query's k nearest, int32 [n] twice; k at most the rows.

    Raises:
      UserError: a row is not finite, or too large.
      TooManyError: so many that this is no way to go.
    """
    asked, rows = search.rows, search.gallery.rows
    there, codes = search.there, search.codes
    blocks.check_all(asked)
    # |y|^2 of a gallery that is searched again are computed once.
    squares = None if search.gallery.resident is False else rows.squares
    q, d = search.queries.shape
    best = np.empty((q, 0), np.float32)
    limit = np.full(q, np.inf, np.float32)
    i, j, lows = (np.empty(0, t) for t in (np.int32, np.int32, np.float32))
    # 64 bytes a pair: products, both ends and what they are made with.
    step = max(1, min(_SLICE // max(1, d), search.memory_limit // (64 * q)))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        product, square = _products(search.queries, rows, start, stop, squares)
        low, high = _ends(asked, product, square, search.distance)
        rows.release()
        if there is not None:
            low[:, ~there[start:stop]] = high[:, ~there[start:stop]] = np.inf
        if codes is not None:
            own = codes[0][:, None] == codes[1][None, start:stop]
            low[own] = high[own] = np.inf
        best = np.concatenate([best, high], axis=1)
        if best.shape[1] >= k:
            best = np.partition(best, k - 1, axis=1)[:, :k]
            limit = best.max(axis=1)
        near, where = np.nonzero((low <= limit[:, None]) & (low < np.inf))
        old = lows <= limit[i]
        i = np.concatenate([i[old], near.astype(np.int32)])
        j = np.concatenate([j[old], (start + where).astype(np.int32)])
        lows = np.concatenate([lows[old], low[near, where]])
        if len(i) > max(_MANY, 4 * q * k):
            raise TooManyError
    last = lows <= limit[i]
    return i[last], j[last]


def _products(
    queries: np.ndarray, rows: Rows, start: int, stop: int, squares: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(<x, y> [q, stop - start], |y|^2 [stop - start]), float32, of rows that are fine."""
    product = np.empty((len(queries), stop - start), np.float32)
    square = np.empty(stop - start, np.float32)
    size = max(1, _PIECE // max(1, rows.width))
    starts = iter(range(start, stop, size))
    with np.errstate(over="ignore"):
        if squares is not None:
            square[:] = squares[start:stop]

    def work() -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            for at in starts:
                block = blocks.piece(rows, at, min(size, stop - at))
                here = slice(at - start, at - start + len(block))
                if squares is None:
                    np.vecdot(block, block, out=square[here])
                for n, query in enumerate(queries):
                    np.vecdot(block, query, out=product[n, here])

    in_threads(work)
    fine = square <= operands.LONGEST**2
    if not fine.all():
        raise UserError(blocks.complaint(rows, start + int(np.argmin(fine))))
    return product, square


def _ends(
    asked: Rows, product: np.ndarray, square: np.ndarray, distance: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the intervals around s, float32 [q, n], from <x, y> [q, n] and |y|^2 [n]."""
    d = asked.width
    c = np.float32(rounding(d, SINGLE))
    x, y = np.sqrt(asked.squares).astype(np.float32)[:, None], np.sqrt(square)
    tiny = np.float32(d * 2.0**-90)
    if distance == "dot":
        s, e = -product, c * x * y
    elif distance == "cosine":
        short = (y < _SHORT) | (x < _SHORT)
        s = -product / np.maximum(y, _SHORT)
        e = np.where(short, np.float32(np.inf), 8 * c * x)
    else:
        s, e = square - 2 * product, c * (x + y) ** 2
        tiny = np.float32(d * 2.0**-122)
    e = e + tiny
    return s - e, s + e
