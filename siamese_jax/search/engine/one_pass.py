"""Very few queries against a gallery that is not prepared: one pass over it, no copies.

Preparing a gallery pays when many queries share it. For a few, the squares of the differences are
summed in float32, piece by piece in the cache. No sum is further than a factor 1 +- c,
c = (2d + 64) 2^-24, from the true one (see `bounds`), so what can be among the k nearest is known.
"""

from collections.abc import Callable

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import blocks
from siamese_jax.search.engine.parallel import in_threads
from siamese_jax.search.engine.rows import Rows

MOST = 4
# Numbers of rows that are read before the memory map they are in gives its pages back, and those
# that a thread looks at together.
_SLICE = 1 << 25
_PIECE = 1 << 18
_WAITING = 1 << 20

Settle = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def candidates(
    queries: np.ndarray,
    rows: Rows,
    k: int,
    there: np.ndarray | None,
    codes: tuple[np.ndarray, np.ndarray] | None,
    settle: Settle,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that hold all of each query's k nearest by Euclidean distance, int32 [n] twice.

    Args:
      queries: float32 [q, d].
      rows: the gallery.
      k: at most its rows.
      there: bool [g], the rows to be found; None for all.
      codes: int32 [q] and [g]; a pair of equal codes is left out.
      settle: keeps each query's k nearest of some pairs.

    Raises:
      UserError: a row is not finite, or too large.
    """
    check(Rows([queries], "queries"))
    q, d = queries.shape
    room = 1 + 4 * (2 * d + 64) * 2.0**-24
    best = np.empty((q, 0), np.float32)
    limit = np.full(q, np.inf)
    i, j, squares = (np.empty(0, t) for t in (np.int32, np.int32, np.float32))
    step = max(1, _SLICE // max(1, d))
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        s = _squares(queries, rows, start, stop)
        rows.release()
        if there is not None:
            s[:, ~there[start:stop]] = np.inf
        if codes is not None:
            s[codes[0][:, None] == codes[1][None, start:stop]] = np.inf
        best = np.concatenate([best, s], axis=1)
        if best.shape[1] >= k:
            best = np.partition(best, k - 1, axis=1)[:, :k]
            limit = best.max(axis=1) * np.float64(room) + d * 2.0**-122
        near, where = np.nonzero((s <= limit[:, None]) & (s < np.inf))
        old = squares <= limit[i]
        i = np.concatenate([i[old], near.astype(np.int32)])
        j = np.concatenate([j[old], (start + where).astype(np.int32)])
        squares = np.concatenate([squares[old], s[near, where]])
        if len(i) > max(_WAITING, 4 * q * k):
            i, j = settle(i, j)
            squares = np.full(len(i), -np.inf, np.float32)
    last = squares <= limit[i]
    return i[last], j[last]


def _squares(queries: np.ndarray, rows: Rows, start: int, stop: int) -> np.ndarray:
    """float32 [q, stop - start], |query - row|^2."""
    q, d = queries.shape
    found = np.empty((q, stop - start), np.float32)
    size = max(1, _PIECE // max(1, d))
    starts = iter(range(start, stop, size))

    def work() -> None:
        difference = np.empty((size, d), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for at in starts:
                block = blocks.piece(rows, at, min(size, stop - at))
                for n in range(q):
                    e = np.subtract(block, queries[n], out=difference[: len(block)])
                    here = found[n, at - start : at - start + len(block)]
                    np.vecdot(e, e, out=here)

    in_threads(work)
    if q and not np.isfinite(found).all():
        wrong = start + int(np.argmin(np.isfinite(found).all(axis=0)))
        raise UserError(blocks.complaint(rows, wrong))
    return found


def check(rows: Rows) -> None:
    """Refuses a row that is not finite, or whose squared distances could overflow."""
    step = max(1, _SLICE // max(1, rows.width))
    for at in range(0, len(rows), step):
        blocks.check_rows(rows, at, min(step, len(rows) - at))
