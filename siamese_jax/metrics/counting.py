"""How many gallery items are closer to a query than its relevant items: exactly, without sorting.

The position of a relevant item is 1 + the number of items before it in the order (distance,
gallery row). Let t be the score of a relevant item, a *limit*, and e the error of scores in float32
(`space.py`). An item of score s < t - e is closer, one of s > t + e is not; the few in between are
compared by the distances that `rank` sorts by. One pass over a block of scores compares it with
every limit.

Where a limit's position matters only down to some depth, it is dropped once that many items are
known to be closer. Rows that search one another need half of the products: <x, y> serves the
query x and the query y.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax import stopping
from siamese_jax.metrics.relevance import Relevance
from siamese_jax.metrics.scores import Space

MISSING = np.iinfo(np.int64).max  # the position of an item too far down to matter
_UNSURE = np.uint8(128)


@dataclass(frozen=True)
class Depths:
    """Down to which position items matter: int [q], of each query's nearest relevant item, and of
    all the others."""

    first: np.ndarray
    every: np.ndarray


def counted(
    space: Space, found: Relevance, rows: np.ndarray, depths: Depths, chunk: int
) -> np.ndarray:
    """Positions of the relevant items of some queries, in the order of `found.lists(rows)`.

    Args:
      rows: int [b], the queries; at most 127 items may be relevant to each.
      chunk: gallery rows to score at a time; a block of scores is [b, chunk].

    Returns:
      int64 [h], 1 is the nearest; MISSING for some or all of those that are too far down to
      matter.
    """
    chunk = _power(min(chunk, len(space.gallery)))
    queries = _Block.of(space, space.queries, rows, _power(len(rows)), found.own(rows))

    def tile(limits: Sequence[_Limits], start: int) -> list[_Count]:
        if not limits[0].known.any():
            return []
        items = np.arange(start, min(start + chunk, len(space.gallery)))
        gallery = _Block.of(space, space.gallery, items, chunk)
        product = _product(queries.x, gallery.x, space.scale)
        return [(0, _closer(space, product, queries, limits[0], gallery), len(items))]

    limits = [_Limits.of(space, found, rows, depths, len(queries.norms))]
    rounds = [[start] for start in range(0, len(space.gallery), chunk)]
    return _tallied(limits, rounds, tile)[0].positions(int(found.counts[rows].sum()))


def counted_within(
    space: Space, found: Relevance, blocks: Sequence[np.ndarray], asking: int, depths: Depths
) -> list[np.ndarray]:
    """The same for rows that search one another, `space.queries` being `space.gallery`.

    Args:
      blocks: every row once, in ascending lists; those of the first `asking` blocks are the
        queries.

    Returns:
      as `counted`, for each of the first `asking` blocks.
    """
    size, n = _power(max(map(len, blocks))), len(blocks)
    sides = [_Block.of(space, space.gallery, rows, size, found.own(rows)) for rows in blocks]

    def tile(limits: Sequence[_Limits], pair: tuple[int, int]) -> list[_Count]:
        i, j = pair
        ways = {i: j, j: i}  # who asks, who answers
        ways = {a: b for a, b in ways.items() if a < asking and limits[a].known.any()}
        if not ways:
            return []
        product = _product(sides[i].x, sides[j].x, space.scale)
        products = {j: product.T, i: product} if j in ways else {i: product}
        return [
            (a, _closer(space, products[a], sides[a], limits[a], sides[b]), len(blocks[b]))
            for a, b in ways.items()
        ]

    # In round r the blocks i and i + r meet: all have seen equally much after each round. Half-way
    # round the circle, i and i + r meet from either side.
    rounds = [
        [(i, (i + r) % n) for i in range(n if 2 * r < n else n // 2)] for r in range(n // 2 + 1)
    ]
    limits = [_Limits.of(space, found, rows, depths, size) for rows in blocks[:asking]]
    return [
        limit.positions(int(found.counts[rows].sum()))
        for limit, rows in zip(_tallied(limits, rounds, tile), blocks, strict=False)
    ]


# The place of a list of limits, how many items were closer than each [r, b], and among how many.
_Count = tuple[int, np.ndarray, int]
_Task = TypeVar("_Task")


def _tallied(
    limits: Sequence["_Limits"],
    rounds: Sequence[Sequence[_Task]],
    tile: Callable[[Sequence["_Limits"], _Task], list[_Count]],
) -> Sequence["_Limits"]:
    """The limits after all rounds of tiles. Those known to be too far down are dropped whenever
    twice as many rounds are done."""
    done = 0
    with ThreadPoolExecutor(2) as pool:  # one counts while the device is busy with the other's
        while done < len(rounds):
            stopping.check("the metrics begin again, and embeddings are kept")
            now = rounds[done : max(1, 2 * done)]
            before, seen = [np.zeros_like(limit.before) for limit in limits], [0] * len(limits)
            for counts in pool.map(partial(tile, limits), [task for one in now for task in one]):
                for place, more, among in counts:
                    before[place] += more
                    seen[place] += among
            limits = [
                limit.counting(more, among)
                for limit, more, among in zip(limits, before, seen, strict=True)
            ]
            done += len(now)
    return limits


@dataclass(frozen=True)
class _Block:
    """Some rows that ask or answer, filled up to a size.

    Attributes:
      rows: int [n], ascending.
      x: float32 [b, d], as scores use them.
      offset: float32 [b], the part of a score that comes from the row alone; +inf beyond n.
      norms: float64 [b].
      own: what to leave out of the answers, pairs (place in the block, gallery row).
    """

    rows: np.ndarray
    x: Array
    offset: Array
    norms: np.ndarray
    own: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(
        cls,
        space: Space,
        side: np.ndarray,
        rows: np.ndarray,
        size: int,
        own: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.int64)),
    ) -> "_Block":
        x = space.rows(side[rows])
        spare = size - len(x)
        offset = np.pad(space.offsets(x), (0, spare), constant_values=np.inf)
        x = np.pad(x, ((0, spare), (0, 0)))
        norms = np.sqrt((x * x).sum(1))
        return cls(rows, jnp.asarray(x, jnp.float32), jnp.asarray(offset, jnp.float32), norms, own)


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
        cls, space: Space, found: Relevance, rows: np.ndarray, depths: Depths, size: int
    ) -> "_Limits":
        owner, item = found.lists(rows)
        exact = space.exact(rows[owner], item)
        count = np.bincount(owner, minlength=size)
        # Each item's place among those of its query, the farthest first.
        farthest = np.lexsort((-item, -exact, owner))
        place = np.empty_like(owner)
        place[farthest] = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        first, every = depths.first[rows][owner], depths.every[rows][owner]
        nearest = place == count[owner] - 1
        depth = np.where(nearest, np.maximum(first, every), every)
        # Sizes are rounded up to powers of two, so that few shapes are ever compiled.
        shape = (_power(count.max()), size)

        def table(values: np.ndarray, empty: float) -> np.ndarray:
            found = np.full(shape, empty, values.dtype)
            found[place, owner] = values
            return found

        none = np.zeros(shape, np.int64)
        hit = np.arange(len(owner))
        limits = cls(
            table(exact, -np.inf), table(item, -1), table(hit, -1), table(depth, 0), none, 0
        )
        return limits.counting(none, 0)

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
            keep(self.item, -1),
            keep(self.hit, -1),
            keep(self.depth, 0),
            keep(before, 0),
            self.seen + among,
        )

    def positions(self, hits: int) -> np.ndarray:
        """Of each of `hits` relevant items, int64; MISSING for what was dropped."""
        position = np.full(hits, MISSING)
        position[self.hit[self.known]] = self.before[self.known] + 1
        return position


def _closer(
    space: Space, product: Array, ask: _Block, limits: _Limits, answer: _Block
) -> np.ndarray:
    """How many answers are closer than each limit, int64 [r, b].

    Args:
      product: scale <x, y>, [who asks, who answers].
    """
    squared = space.squared(limits.distance)
    squared[~limits.known] = -np.inf
    middle = squared - space.shift(ask.norms)
    rounding = np.where(limits.known, 2.0**-23 * np.abs(squared), 0)
    e = space.error(ask.norms, float(answer.norms.max()), 2.0**-24) + rounding
    low, high = (middle - e).astype(np.float32), (middle + e).astype(np.float32)
    codes = np.array(jax.block_until_ready(_codes(product, answer.offset, low, high)))

    b, own = ask.own
    at = np.searchsorted(answer.rows, own)
    mine = answer.rows[np.minimum(at, len(answer.rows) - 1)] == own
    codes[b[mine], at[mine]] = 0

    few, flat = limits.few_before, codes.reshape(-1)
    marked = _flatnonzero(codes if few else codes & _UNSURE)
    unsure = flat[marked] >= _UNSURE
    if few:
        sure = marked[~unsure]
        before = _listed(flat[sure], sure // codes.shape[1], low.shape)
    else:
        flat[marked] = 0
        before = _totals(codes, len(low))
    b, j = np.divmod(marked[unsure], codes.shape[1])
    item = answer.rows[j]
    exact = space.exact(ask.rows[b], item)
    distance, limit = limits.distance[:, b], limits.item[:, b]
    nearer = (exact < distance) | ((exact == distance) & (item < limit))
    return before + _listed(nearer.sum(0), b, low.shape)


@partial(jax.jit, static_argnames="scale")
def _product(x: Array, y: Array, scale: int) -> Array:
    return scale * jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)


@jax.jit
def _codes(product: Array, offset: Array, low: Array, high: Array) -> Array:
    """Below how many of its query's limits [r, b] each score is, uint8; plus 128 if near one.

    The limits descend, so a score below n of them is below the first n.
    """
    scores = offset[None, :] - product
    below = inside = jnp.zeros(scores.shape, jnp.int32)  # as wide as scores: one pass, no packing
    for r in range(len(low)):
        below += (scores < low[r][:, None]).astype(jnp.int32)
        inside += (scores <= high[r][:, None]).astype(jnp.int32)
    return (below | ((below != inside).astype(jnp.int32) << 7)).astype(jnp.uint8)


def _listed(n: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pairs counted, int64 [r, b]: each is below the first n limits of its query b."""
    there = n > 0
    last = (n[there].astype(np.int64) - 1) * shape[1] + b[there]
    counts = np.bincount(last, minlength=shape[0] * shape[1]).reshape(shape)
    return counts[::-1].cumsum(0)[::-1]


def _totals(codes: np.ndarray, limits: int) -> np.ndarray:
    """How many codes of each row are above r, for each r < `limits`, int64 [limits, b].

    Eight bytes are added as one number: sums of up to 128 ones fit a byte.
    """
    totals = np.zeros((limits, len(codes)), np.int64)
    for start in range(0, codes.shape[1], 1024):
        part = codes[:, start : start + 1024]
        for r in range(limits):
            above = (part > r).view(np.uint8)
            if above.shape[1] % 8 == 0:
                above = above.view(np.uint64).sum(1, keepdims=True).view(np.uint8)
            totals[r] += above.sum(1, dtype=np.int64)
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
