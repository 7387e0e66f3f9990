"""An approximate search: a graph index proposes, and what it proposes is measured exactly."""

from collections.abc import Iterator

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.engine import approximate_index, order
from siamese_jax.search.engine.blocks import check_all
from siamese_jax.search.engine.request import Search


def nearest_proposed(search: Search, library: str, wanted: np.ndarray, k: int) -> Iterator[tuple]:
    """As `ways.nearest`, among what a graph index proposes."""
    q, g = len(search.queries), len(search.gallery.rows)
    if library not in approximate_index.INDEXES:
        raise UserError(
            f"approximate={library!r} is unknown: use one of {list(approximate_index.INDEXES)}"
        )
    if not q or not g:
        return
    check_all(search.rows)
    index = search.gallery.index(library, search.distance)
    # Some of what is proposed may not be allowed: ask for more by the same share.
    allowed = g if search.there is None else max(1, int(search.there.sum()))
    own = 0
    if search.codes is not None:
        own = int(np.unique(search.codes[1], return_counts=True)[1].max())
    n = min(g, (min(k, g) + own) * -(-g // allowed))
    for at in range(0, q, 1024):
        here = slice(at, at + 1024)
        j = index(search.queries[here], n).ravel()
        i = np.repeat(np.arange(len(j) // n, dtype=np.int32), n)
        fine = j >= 0
        if search.there is not None:
            fine &= search.there[j]
        if search.codes is not None:
            fine &= search.codes[0][here][i] != search.codes[1][j]
        i, j = i[fine], j[fine].astype(np.int32)
        away = search.away(at, i, j)
        i, place, j, away = order.first(i, j, away, wanted[here])
        yield i + at, place, j, away
