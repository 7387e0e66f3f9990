"""How many gallery items are closer to a query than its relevant items: exactly, without sorting.

The position of a relevant item is 1 + the number of items before it in the order (distance,
gallery row). Two ways to it, the same answer:

counted   for queries with few relevant items. A matrix product gives scores in float32,

              s(x, y) = |y|^2 - 2 <x, y>      (or -<x, y> where the distance is a product),

          whose error is at most e. An item with s < t - e is closer than a relevant item of score
          t, one with s > t + e is not; the few in between are compared by the distances that
          `rank` sorts by. One pass over a block of scores compares it with every t.
sorted    for queries with many: the same scores in float64, sorted. Runs of items whose scores
          differ by less than their error are put in order by their distances.

The error. With u half the spacing of floats at 1, x and y rounded from the centred rows, and
Y the largest |y|: the product errs by (d + 2) u |x| Y, the norm by 3 u Y^2, and subtracting,
and rounding t, by u (Y^2 + 2 |x| Y) each (Higham 2002, section 3.1: any order of summation).
Centring by c, norms and distances in float64 add their own, with v = 2^-53; so does underflow, and
distances D are rounded to float32, which makes ties of what lies within 2^-23 of them. So

    e = 1.01 (u ((2 d + 16) |x| Y + 8 Y^2) + v (2 d + 16) (|x| + Y + |c|)^2) + d 2^-140 + 2^-23 D.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax.relevance import Relevance
from siamese_jax.search.exact import pair_distances


@dataclass(frozen=True)
class Space:
    """Rows to compare, and how.

    Attributes:
      queries: float32 [q, d].
      gallery: float32 [g, d]; may be a memory map.
      distance: one of `siamese_jax.distances.DISTANCES`.
      origin: float64 [d], subtracted from all rows where that changes no distance.
    """

    queries: np.ndarray
    gallery: np.ndarray
    distance: str
    origin: np.ndarray

    @classmethod
    def of(cls, queries: np.ndarray, gallery: np.ndarray, distance: str) -> "Space":
        origin = np.zeros(gallery.shape[1])
        if distance in ("euclidean", "sqeuclidean") and len(gallery):
            origin = np.asarray(gallery[:: -(-len(gallery) // 4096)], np.float64).mean(0)
        return cls(
            queries.astype(np.float32, copy=False),
            gallery.astype(np.float32, copy=False),
            distance,
            origin,
        )

    @property
    def scale(self) -> int:
        """The factor of <x, y> in the score."""
        return 2 if self.distance in ("euclidean", "sqeuclidean") else 1

    def rows(self, raw: np.ndarray) -> np.ndarray:
        """Rows as scores use them, float64: centred, or for cosine of unit length."""
        rows = np.asarray(raw, np.float64)
        return _unit(rows) if self.distance == "cosine" else rows - self.origin

    def offsets(self, rows: np.ndarray) -> np.ndarray:
        """The part of a score that comes from the gallery's row alone."""
        return (rows**2).sum(1) if self.scale == 2 else np.zeros(len(rows))

    def error(self, query_norms: np.ndarray, largest: float, unit: float) -> np.ndarray:
        """e of every query [b] without its last term, from |x|, Y and u."""
        terms = 2 * self.gallery.shape[1] + 16
        whole = query_norms + largest + np.sqrt((self.origin**2).sum())
        scores = unit * (terms * query_norms * largest + 8 * largest**2)
        return 1.01 * (scores + 2.0**-53 * terms * whole**2) + terms * 2.0**-140

    def squared(self, distances: np.ndarray) -> np.ndarray:
        """Distances as they stand in scores: squared, where they are Euclidean."""
        return distances**2 if self.distance == "euclidean" else distances

    def shift(self, query_norms: np.ndarray) -> np.ndarray:
        """What the squared distances of a query have above its scores, [b]."""
        constant = {"dot": 0.0, "cosine": 1.0}.get(self.distance)
        return query_norms**2 if constant is None else np.full(len(query_norms), constant)

    def exact(self, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Distances of pairs, the very ones that `rank` sorts by, float64 [n]."""
        rows = partial(np.take, self.gallery, axis=0)
        found = pair_distances(self.queries, rows, query, item, self.distance)
        return found.astype(np.float64)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)


MISSING = np.iinfo(np.int64).max  # the position of an item too far down to matter
_UNSURE = np.uint8(128)


def counted(
    space: Space,
    found: Relevance,
    rows: np.ndarray,
    first: np.ndarray,
    every: np.ndarray,
    chunk: int,
) -> np.ndarray:
    """Positions of the relevant items of some queries, in the order of `found.lists(rows)`.

    Args:
      first: int [b], down to which position the nearest relevant item of each query matters.
      every: int [b], down to which position all the others do.
      chunk: gallery rows to score at a time; a block of scores is [chunk, len(rows)].

    Returns:
      int64 [h], 1 is the nearest; MISSING for some or all of those that are too far down to
      matter. At most 127 items may be relevant to a query.
    """
    chunk = _power(min(chunk, len(space.gallery)))
    queries = _Queries.of(space, found, rows, _power(len(rows)))
    limits = _Limits.of(space, found, rows, first, every, len(queries.norms))
    position = np.full(int(found.counts[rows].sum()), MISSING)
    starts = range(0, len(space.gallery), chunk)
    done = 0
    with ThreadPoolExecutor(2) as pool:  # one counts while the device is busy with the other's
        while done < len(starts):
            # After each doubling of what was seen, items known to be too far down are dropped.
            todo = starts[done : max(1, 2 * done)]
            scored = partial(_closer, space, queries, limits, chunk)
            limits = limits.counting(reduce(np.add, pool.map(scored, todo)), len(todo) * chunk)
            done += len(todo)
            if not limits.known.any():
                break
    position[limits.hit[limits.known]] = limits.before[limits.known] + 1
    return position


@dataclass(frozen=True)
class _Queries:
    """A block of queries: rows as scores use them, in float32 on the device, and their norms [b];
    `own` are the gallery rows to leave out, as pairs (place in the block, gallery row)."""

    x: Array
    raw: np.ndarray
    norms: np.ndarray
    own: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, space: Space, found: Relevance, rows: np.ndarray, size: int) -> "_Queries":
        x = np.zeros((size, space.gallery.shape[1]))
        x[: len(rows)] = space.rows(space.queries[rows])
        norms = np.sqrt((x * x).sum(1))
        return cls(jnp.asarray(x, jnp.float32), rows, norms, found.own(rows))


@dataclass(frozen=True)
class _Limits:
    """Each query's relevant items, the farthest first, in a column; all [r, b].

    Attributes:
      distance: float64, of the item; -inf where there is none.
      item: gallery row, -1 where there is none.
      hit: place of the item in `found.lists`.
      depth: the last position at which the item matters.
      before: how many gallery items were found closer so far.
      seen: how many gallery items these were found among.
    """

    distance: np.ndarray
    item: np.ndarray
    hit: np.ndarray
    depth: np.ndarray
    before: np.ndarray
    seen: int

    @classmethod
    def of(
        cls,
        space: Space,
        found: Relevance,
        rows: np.ndarray,
        first: np.ndarray,
        every: np.ndarray,
        size: int,
    ) -> "_Limits":
        owner, item = found.lists(rows)
        exact = space.exact(rows[owner], item)
        farthest = np.lexsort((-item, -exact, owner))
        count = np.bincount(owner, minlength=size)
        place = np.empty_like(owner)
        place[farthest] = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        shape = (_power(count.max()), size)
        limits = cls(
            np.full(shape, -np.inf),
            np.full(shape, -1),
            np.full(shape, -1),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            0,
        )
        limits.distance[place, owner] = exact
        limits.item[place, owner] = item
        limits.hit[place, owner] = np.arange(len(owner))
        nearest = place == count[owner] - 1
        limits.depth[place, owner] = np.where(
            nearest, np.maximum(first, every)[owner], every[owner]
        )
        return limits.counting(limits.before, 0)

    @property
    def known(self) -> np.ndarray:
        return self.item >= 0

    @property
    def few_before(self) -> bool:
        """Is so little of the gallery closer than even the farthest that pairs can be listed?"""
        return self.seen > 0 and bool(self.before[0].mean() < 0.02 * self.seen)

    def counting(self, more: np.ndarray, among: int) -> "_Limits":
        """With `more` [r, b] of `among` items before each; those beyond their depth are dropped."""
        before = self.before + more
        live = self.known & (before < self.depth)
        order = np.argsort(~live, axis=0, kind="stable")[: _power(max(1, live.sum(0).max()))]
        still = np.take_along_axis(live, order, 0)

        def keep(values: np.ndarray, empty: float) -> np.ndarray:
            return np.where(still, np.take_along_axis(values, order, 0), empty)

        return _Limits(
            keep(self.distance, -np.inf),
            keep(self.item, -1).astype(np.int64),
            keep(self.hit, -1).astype(np.int64),
            keep(self.depth, 0).astype(np.int64),
            keep(before, 0).astype(np.int64),
            self.seen + among,
        )


def _closer(space: Space, queries: _Queries, limits: _Limits, chunk: int, start: int) -> np.ndarray:
    """How many of gallery rows start:start + chunk are closer than each limit, int64 [r, b]."""
    squared = space.squared(limits.distance)
    squared[~limits.known] = -np.inf
    middle = squared - space.shift(queries.norms)
    rounding = np.where(limits.known, 2.0**-23 * np.abs(squared), 0)
    y = space.rows(space.gallery[start : start + chunk])
    e = space.error(queries.norms, float(np.sqrt((y * y).sum(1).max())), 2.0**-24) + rounding
    low, high = (middle - e).astype(np.float32), (middle + e).astype(np.float32)
    spare, few = chunk - len(y), limits.few_before
    scores, found = _compare(
        queries.x,
        jnp.asarray(np.pad(y, ((0, spare), (0, 0))), jnp.float32),
        jnp.asarray(np.pad(space.offsets(y), (0, spare), constant_values=np.inf), jnp.float32),
        high[:1] if few else low,
        high[:1] if few else high,
        space.scale,
    )
    codes = np.array(jax.block_until_ready(found))
    query, own = queries.own
    mine = (own >= start) & (own < start + chunk)
    codes[own[mine] - start, query[mine]] = 0
    if few:  # the codes mark what is closer than the farthest: it alone is compared with the others
        j, b = np.divmod(_flatnonzero(codes), codes.shape[1])
        s = np.asarray(scores)[j, b]
        below = s < low[:, b]
        before = _tally(below, b, low.shape)
        near = (below != (s <= high[:, b])).any(0)
        j, b, s = j[near], b[near], s[near]
    else:
        j, b = np.divmod(_flatnonzero(codes & _UNSURE), codes.shape[1])
        s = np.asarray(scores)[j, b]
        before = _totals(codes & ~_UNSURE, len(low))
    exact = space.exact(queries.raw[b], start + j)
    distance, item = limits.distance[:, b], limits.item[:, b]
    nearer = (exact < distance) | ((exact == distance) & (start + j < item))
    return before + _tally(nearer & (low[:, b] <= s) & (s <= high[:, b]), b, low.shape)


def _tally(pairs: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How many pairs [r, n] of columns b [n] are true for each limit, int64 [r, b]."""
    r, pair = np.nonzero(pairs)
    return np.bincount(r * shape[1] + b[pair], minlength=shape[0] * shape[1]).reshape(shape)


@partial(jax.jit, static_argnames="scale")
def _compare(
    x: Array, y: Array, offset: Array, low: Array, high: Array, scale: int
) -> tuple[Array, Array]:
    """Scores [c, b], and below how many limits each lies, uint8; plus 128 if it is near one.

    The limits [r, b] descend, so a score below n of them is below the first n.
    """
    scores = offset[:, None] - scale * jnp.matmul(y, x.T, precision=lax.Precision.HIGHEST)
    below = inside = jnp.zeros(scores.shape, jnp.int32)  # as wide as scores: one pass, no packing
    for r in range(len(low)):
        below += (scores < low[r][None, :]).astype(jnp.int32)
        inside += (scores <= high[r][None, :]).astype(jnp.int32)
    return scores, (below | ((below != inside).astype(jnp.int32) << 7)).astype(jnp.uint8)


def _totals(codes: np.ndarray, limits: int) -> np.ndarray:
    """How many scores of each column [c, b] lie below each limit, int64 [limits, b].

    Sums of up to 128 ones fit a byte, which NumPy adds by the vector; 128 rows fit a cache.
    """
    totals = np.zeros((limits, codes.shape[1]), np.int64)
    for start in range(0, len(codes), 128):
        for r in range(limits):
            below = (codes[start : start + 128] > r).view(np.uint8)
            totals[r] += below.sum(0, dtype=np.uint8)
    return totals


def _flatnonzero(codes: np.ndarray) -> np.ndarray:
    """np.flatnonzero of bytes that are almost all zero: skips eight at a time."""
    flat = codes.reshape(-1)
    if flat.size % 8:
        return np.flatnonzero(flat)
    eights = np.flatnonzero(flat.view(np.uint64))
    return (eights[:, None] * 8 + np.arange(8))[flat.reshape(-1, 8)[eights] > 0]


def _power(n: int) -> int:
    """The least power of two that isn't below n."""
    return 1 << (int(n) - 1).bit_length()


def sorted_(space: Space, found: Relevance, rows: np.ndarray, chunk: int) -> np.ndarray:
    """The same positions by sorting [len(rows), g] scores; `chunk` gallery rows at a time."""
    owner, item = found.lists(rows)
    x = space.rows(space.queries[rows])
    norms, largest = np.sqrt((x * x).sum(1)), 0.0
    scores = np.empty((len(rows), len(space.gallery)))
    for start in range(0, len(space.gallery), chunk):
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
