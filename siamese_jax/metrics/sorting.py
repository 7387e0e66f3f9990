"""Positions of relevant items by sorting whole rankings: for queries with many of them.

Scores in float64 are sorted; runs of items whose scores differ by less than their error are put in
order by the distances that `rank` sorts by.
"""

import numpy as np

from siamese_jax import stopping
from siamese_jax.metrics.relevance import Relevance
from siamese_jax.metrics.scores import Space


def sorted_(space: Space, found: Relevance, rows: np.ndarray, chunk: int) -> np.ndarray:
    """Positions of the relevant items of some queries, in the order of `found.lists(rows)`.

    int64 [h], 1 is the nearest. Takes [len(rows), g] scores, made `chunk` gallery rows at a time.
    """
    owner, item = found.lists(rows)
    x = space.rows(space.queries[rows])
    norms, largest = np.sqrt((x * x).sum(1)), 0.0
    scores = np.empty((len(rows), len(space.gallery)))
    for start in range(0, len(space.gallery), chunk):
        stopping.check("the metrics begin again, and embeddings are kept")
        y = space.rows(space.gallery[start : start + chunk])
        largest = max(largest, float(np.sqrt((y * y).sum(1).max())))
        scores[:, start : start + chunk] = space.offsets(y) - space.scale * (x @ y.T)
    scores[found.own(rows)] = np.inf
    order = np.argsort(scores, axis=1)
    scores = np.take_along_axis(scores, order, axis=1)
    error = 2 * space.error(norms, largest, 2.0**-53)[:, None]
    rounding = 2.0**-22 * np.abs(scores + space.shift(norms)[:, None])
    with np.errstate(invalid="ignore"):
        joined = np.diff(scores, axis=1) <= error + rounding[:, 1:]
    joined &= np.isfinite(scores[:, 1:])  # the query itself stays last
    _settle(order, joined, space, rows)
    positions = np.empty_like(order)
    np.put_along_axis(positions, order, np.arange(1, order.shape[1] + 1)[None], axis=1)
    return positions[owner, item]


def _settle(order: np.ndarray, joined: np.ndarray, space: Space, rows: np.ndarray) -> None:
    """Puts runs of items that their scores can't tell apart in order by (distance, row)."""
    edge = np.zeros((len(order), 1), bool)
    after, before = np.hstack([edge, joined]), np.hstack([joined, edge])
    b, column = np.nonzero(after | before)
    run = np.cumsum(~after[b, column])
    item = order[b, column]
    order[b, column] = item[np.lexsort((item, space.exact(rows[b], item), run))]
