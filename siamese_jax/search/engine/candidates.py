"""Which pairs can be among the answers: one pass over the gallery, in bounded memory.

Queries are taken in chunks, items in blocks. Of each product the best score of every group of
items is kept as an interval; the k-th best lower end so far is a floor that every answer's upper
end must reach, so most groups are never looked at again. What does reach it is scored exactly.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax.search.engine import bounds, operands, reused_memory
from siamese_jax.search.engine.blocks import Blocks, Item
from siamese_jax.search.engine.operands import Frame, Side
from siamese_jax.search.engine.order import by_query
from siamese_jax.search.engine.parallel import THREADS, in_threads

Settle = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

# Groups that are worth threads, and answers that a thread puts in order together.
_GROUPS = 1 << 15
_ANSWERS = 1 << 14
# Scores that a thread copies in one go: few enough for its cache.
_COPIED = 1 << 18
# Below every score, by more than the widest interval.
_LOWEST = np.float32(-(2.0**127))


class Plan(NamedTuple):
    """The sizes of a search, from the sizes of the problem and the memory limit.

    Attributes:
      chunk: queries at a time.
      block: gallery rows at a time.
      hold: how many blocks' scores are kept until candidates are taken from them.
      group: items in a group.
      keep_blocks: whether the prepared gallery stays in memory.
      state: how many queries are carried through one pass over the gallery.
      pairs: how many candidate pairs may wait to be scored exactly.
    """

    chunk: int
    block: int
    hold: int
    group: int
    keep_blocks: bool
    state: int
    pairs: int


def plan(q: int, g: int, d: int, k: int, precision: str, memory_limit: int) -> Plan:
    """Sizes from a few fixed steps, so that other shapes find their programs compiled."""
    share = memory_limit // 4
    row = operands.row_bytes(d, precision)
    # Whatever the queries, for a gallery keeps the blocks that it was asked for.
    block = 16384
    while block > 128 and 2 * row * block > share:
        block //= 2
    block = even(g, block, 512)
    chunk = next((c for c in (1, 8, 64, 256) if c >= q), 1024)
    while chunk > 8 and 4 * chunk * block > share:
        chunk //= 2
    # The floor is the k-th best of the groups seen first: there must be several times k of them.
    while chunk > 64 and share // (4 * chunk) < min(g, 16 * k):
        chunk //= 2
    chunk = even(q, chunk, 128)
    blocks = -(-g // block)
    keep_blocks = blocks * block * row <= 2 * share
    hold = max(1, min(share // (4 * chunk * block), blocks))
    seen = min(g, block * hold if keep_blocks else block)
    # All groups must be many times k for a floor that few more than k reach, and those seen first
    # more than k for one that stops most.
    large = [n for n in (32 if k > 32 else 64, 16) if g >= 16 * k * n and seen >= 2 * k * n]
    group = large[0] if large else 8 if seen >= 32 * k else 1
    state = q if keep_blocks else max(chunk, share // (64 * k + 16) // chunk * chunk)
    pairs = max(1 << 12, share // 16 if keep_blocks else share // 16 * chunk // state)
    return Plan(chunk, block, hold, group, keep_blocks, state, pairs)


def even(n: int, most: int, step: int) -> int:
    """The size of equal parts of n, at most `most`, so that little of the last one is padding; a
    multiple of `step`, so that there are few sizes to compile for."""
    if n <= step or most <= step:
        return min(most, step)
    return -(-n // (-(-n // most) * step)) * step


class TooManyError(Exception):
    """The intervals of this precision are so wide that they leave too many candidates."""


class Pairs(NamedTuple):
    """Candidates: int32 [n] queries and gallery rows, float32 [n] ends of their scores, which are
    +inf where the pair is known to be among the first of those seen."""

    i: np.ndarray
    j: np.ndarray
    high: np.ndarray
    low: np.ndarray


class Chunk:
    """Some queries on their way through the gallery, cut into slices for the threads.

    Args:
      at: the first of them.
      side: their side of the product.
      k: how many answers each wants at most; None to take all above the floor.
      floor: float32 [padded n], the score that an answer's upper end must reach.
      settle: as for `Slice`.
      limit: how many pairs may wait.
    """

    def __init__(
        self, at: int, side: Side, k: int | None, floor: np.ndarray, settle: Settle, limit: int
    ):
        self.at, self.side, self.size = at, side, len(floor)
        # As many queries as have a cache full of answers, but something for every thread.
        step = min(max(_ANSWERS // (k or 1), 32), -(-self.size // (2 * THREADS)))
        starts = range(0, self.size, step)
        self.slices = [
            Slice(
                at,
                slice(start, start + step),
                floor[start : start + step],
                k,
                settle,
                limit // len(starts),
            )
            for start in starts
        ]

    def feed(self, starts: Sequence[int], held: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Takes the candidates out of some blocks' (s, low, high)."""
        self.each(
            lambda part: part.feed(starts, [tuple(v[part.rows] for v in block) for block in held]),
            sum(low.size for _, low, _ in held) >= _GROUPS,
        )

    @property
    def taken(self) -> int:
        """How many pairs have been candidates so far."""
        return sum(part.taken for part in self.slices)

    def each(self, work: Callable[["Slice"], Any], worthwhile: bool = True) -> list[Any]:
        """What `work` makes of each slice."""
        found: list[Any] = [None] * len(self.slices)
        places = iter(range(len(found)))

        def some() -> None:
            for n in places:
                found[n] = work(self.slices[n])

        in_threads(some, worthwhile)
        return found


class Slice:
    """Some queries of a chunk: their floors, and the candidates that wait.

    Args:
      at: the first query of the chunk.
      rows: which of the chunk's queries these are.
      floor: float32 [n], what an answer's upper end must reach by now.
      k, limit: as for `Chunk`.
      settle: given (first query, i, j), scores pairs exactly and keeps each query's k first.
    """

    def __init__(
        self, at: int, rows: slice, floor: np.ndarray, k: int | None, settle: Settle, limit: int
    ):
        self.at, self.rows, self.floor, self.k, self.settle = (
            at + rows.start,
            rows,
            floor,
            k,
            settle,
        )
        self.limit = max(1, limit)
        self.best = np.empty((len(floor), 0), np.float32)
        # Candidates, i counted from the slice's first query.
        self.found: list[Pairs] = []
        self.waiting = self.taken = 0

    def feed(self, starts: Sequence[int], held: Sequence[tuple[np.ndarray, ...]]) -> None:
        """As `Chunk.feed`, with these queries' rows alone."""
        if self.k is not None:
            self._raise([low for _, low, _ in held], self.k)
        for start, (s, low, high) in zip(starts, held, strict=True):
            self._take(start, s, low, high)

    def _raise(self, lows: list[np.ndarray], k: int) -> None:
        """Raises the floors to the k-th best lower end."""
        best = np.concatenate([self.best, *lows], axis=1)
        if best.shape[1] > k:
            best.partition(best.shape[1] - k, axis=1)
            best = best[:, -k:].copy()
        if best.shape[1] == k:
            np.maximum(self.floor, best.min(axis=1), out=self.floor)
        self.best = best

    def _take(self, start: int, s: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Takes the candidates in the block from `start` on."""
        groups = high.shape[1]
        group = s.shape[1] // groups
        # The groups that reach the floor, numbered through, and their queries and first items.
        hit = np.flatnonzero(high >= self.floor[:, None])
        if not len(hit):
            return
        i = hit // groups
        first = (start + (hit - i * groups) * group).astype(np.int32)
        i = i.astype(np.int32)
        error = (high.reshape(-1)[hit] - low.reshape(-1)[hit]) / 2
        # A step down, lest the difference was rounded up.
        least = np.nextafter(self.floor[i] - error, -np.float32(np.inf))
        step = max(1, _COPIED // group)
        copy = np.empty((min(step, len(hit)), group), np.float32)
        for at in range(0, len(hit), step):
            some = slice(at, at + step)
            # Any mode but "raise" lets NumPy write into `out` directly.
            scores = np.take(
                s.reshape(-1, group), hit[some], 0, out=copy[: len(hit) - at], mode="clip"
            )
            inside = np.flatnonzero(scores >= least[some, None])
            which = inside // group
            j = first[some][which] + (inside - which * group).astype(np.int32)
            found, e = scores.reshape(-1)[inside], error[some][which]
            self.found.append(Pairs(i[some][which], j, found + e, found - e))
            self.waiting += len(inside)
            self.taken += len(inside)
            if self.waiting > self.limit:
                self._thin()

    def _thin(self) -> None:
        """Drops what the floor has passed; if that is not enough, settles what is left."""
        left = self.reaching()
        if len(left.i) > self.limit // 2 and self.k is not None:
            i, j = self.settle(self.at, left.i, left.j)
            high, low = (np.full(len(i), np.inf, np.float32) for _ in range(2))
            left = Pairs(i, j, high, low)
        self.found, self.waiting = [left], len(left.i)
        # Where few can be dropped, wait longer before trying again.
        self.limit = max(self.limit, 2 * self.waiting)

    def reaching(self) -> Pairs:
        """The candidates that the floor has not passed, in the order of i."""
        nothing = [np.empty(0, t) for t in (np.int32, np.int32, np.float32, np.float32)]
        left = Pairs(*map(np.concatenate, zip(nothing, *self.found, strict=True)))
        reach = left.high >= self.floor[left.i]
        if not reach.all():
            left = Pairs(*(v[reach] for v in left))
        if (left.i[1:] < left.i[:-1]).any():
            order = by_query(left.i, len(self.floor))
            left = Pairs(*(v[order] for v in left))
        return left


def run(
    chunks: Iterable[Chunk],
    blocks: Blocks,
    frame: Frame,
    sizes: Plan,
    *,
    exclude: bool,
    patience: float = np.inf,
) -> Iterator[Chunk]:
    """Leads the chunks past the blocks, and yields those that have seen all.

    Products and their reading take turns: each uses all cores.

    Raises:
      TooManyError: the first blocks left more than `patience` candidates for a query on average;
        before the first yield.
    """
    length, width = np.float32(np.linalg.norm(frame.origin)), np.float32(frame.width)

    def scored(chunk: Chunk, item: Item) -> tuple[jax.Array, ...]:
        shape = chunk.size, sizes.block
        return bounds.scores_into(
            reused_memory.take(("scores", shape), lambda: jnp.empty(shape, jnp.float32)),
            chunk.side,
            item.side,
            length,
            width,
            distance=frame.distance,
            precision=frame.precision,
            group=sizes.group,
            exclude=exclude,
        )

    for chunk, items, last in _jobs(chunks, blocks, sizes):
        held = [scored(chunk, item) for item in items]
        chunk.feed([item.start for item in items], [tuple(map(np.asarray, v)) for v in held])
        for s, _, _ in held:
            reused_memory.give(("scores", s.shape), s)
        if chunk.taken > patience * chunk.size:
            raise TooManyError
        patience = np.inf
        if last:
            yield chunk


def _jobs(
    chunks: Iterable[Chunk], blocks: Blocks, sizes: Plan
) -> Iterator[tuple[Chunk, list[Item], bool]]:
    """(chunk, blocks, whether they are its last), `hold` blocks at a time."""
    if sizes.keep_blocks:
        items = list(blocks)
        for chunk in chunks:
            for n in range(0, len(items), sizes.hold):
                yield chunk, items[n : n + sizes.hold], n + sizes.hold >= len(items)
        return
    chunks = list(chunks)
    for n, item in enumerate(blocks, 1):
        for chunk in chunks:
            yield chunk, [item], n == len(blocks)


def lowest(side: Side, count: int) -> np.ndarray:
    """A floor below all scores; above all for padding rows, which so find nothing."""
    floor = np.full(len(side.code), np.inf, np.float32)
    floor[:count] = _LOWEST
    return floor
