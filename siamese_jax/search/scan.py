"""Which pairs can be among the answers: one pass over the gallery, in bounded memory.

Queries are taken in chunks, items in blocks. Of each product the best score of every group of
items is kept as an interval; the k-th best lower end so far is a floor that every answer's upper
end must reach, so most groups are never looked at again. What does reach it is scored exactly.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from siamese_jax.search import bounds
from siamese_jax.search.blocks import Item
from siamese_jax.search.bounds import Frame, Side
from siamese_jax.search.threads import in_threads

# Groups that one thread looks at in one go; with fewer, threads are not worth their start.
_GROUPS = 1 << 17
_LOWEST = np.float32(np.finfo(np.float32).min)


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
    d = bounds.padded_width(d)
    share = memory_limit // 4
    # A block: as read, centred, and as the product takes it; its scores twice, as the next
    # product runs while the host looks at the last one.
    block = 32768 if q <= 8 else 4096
    while block > 128 and 16 * block * d > share:
        block //= 2
    block = even(g, block, 512)
    chunk = next((c for c in (1, 8, 64, 256) if c >= q), 1024)
    while chunk > 8 and 8 * chunk * block > share:
        chunk //= 2
    # The floor is the k-th best of the groups seen first: there must be several times k of them.
    while chunk > 64 and share // (8 * chunk) < min(g, 16 * k):
        chunk //= 2
    chunk = even(q, chunk, 256)
    size = 2 if precision == "bfloat16" else 4
    keep_blocks = -(-g // block) * block * d * size <= 2 * share
    hold = max(1, min(share // (8 * chunk * block), -(-g // block)))
    seen = min(g, block * hold if keep_blocks else block)
    # All groups must be many times k for a floor that few more than k reach, and those seen first
    # more than k for one that stops most.
    large = [n for n in (32 if k > 32 else 64, 16) if g >= 16 * k * n and seen >= 2 * k * n]
    group = large[0] if large else 8 if seen >= 32 * k else 1
    state = 2 * chunk if keep_blocks else max(chunk, share // (64 * k + 16) // chunk * chunk)
    pairs = max(1 << 12, share // 16 * chunk // state)
    return Plan(chunk, block, hold, group, keep_blocks, state, pairs)


def even(n: int, most: int, step: int) -> int:
    """The size of equal parts of n, at most `most`, so that little of the last one is padding; a
    multiple of `step`, so that there are few sizes to compile for."""
    if n <= step or most <= step:
        return min(most, step)
    return -(-n // (-(-n // most) * step)) * step


class TooManyError(Exception):
    """The intervals of this precision are so wide that they leave too many candidates."""


class Chunk:
    """Some queries on their way through the gallery.

    Args:
      side: their side of the product.
      queries: float32 [n, d], the same queries.
      k: int [n], how many answers each wants; None to take all above the floor.
      floor: float32 [padded n], the score that an answer's upper end must reach.
      settle: scores pairs exactly and keeps each query's k first.
      limit: how many pairs may wait.
    """

    def __init__(
        self,
        side: Side,
        k: int | None,
        floor: np.ndarray,
        settle: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
        limit: int,
    ):
        self.side, self.k, self.floor, self.settle, self.limit = side, k, floor, settle, limit
        self.best = np.empty((len(floor), 0), np.float32)
        self.i: list[np.ndarray] = []
        self.j: list[np.ndarray] = []
        self.high: list[np.ndarray] = []
        self.waiting = self.taken = 0
        self.lock = threading.Lock()

    def feed(self, starts: Sequence[int], held: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Takes the candidates out of some blocks' (s, low, high)."""
        best: dict[int, np.ndarray] = {}
        n = len(self.floor)
        step = -(-n * _GROUPS // max(n, sum(low.size for _, low, _ in held)))
        slices = iter(range(0, n, step))

        def work() -> None:
            for at in slices:
                here = slice(at, at + step)
                if self.k is not None:
                    lows = [self.best[here], *(low[here] for _, low, _ in held)]
                    best[at] = self._raise(here, np.concatenate(lows, axis=1), self.k)
                for start, (s, low, high) in zip(starts, held, strict=True):
                    self._take(at, start, s[here], low[here], high[here])

        if step >= n:
            work()
        else:
            in_threads(work)
        if best:
            self.best = np.concatenate([best[at] for at in sorted(best)])

    def _raise(self, here: slice, best: np.ndarray, k: int) -> np.ndarray:
        """Raises some queries' floors to their k-th best lower end; returns the k best."""
        if best.shape[1] > k:
            best = np.partition(best, best.shape[1] - k, axis=1)[:, -k:]
        if best.shape[1] == k:
            self.floor[here] = np.maximum(self.floor[here], best.min(axis=1))
        return best

    def _take(
        self, first: int, start: int, s: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> None:
        """Takes the candidates of the queries from `first` on in the block from `start` on."""
        groups = high.shape[1]
        group = s.shape[1] // groups
        floor = self.floor[first : first + len(s)]
        hit = np.flatnonzero(high >= floor[:, None])
        if not len(hit):
            return
        # A million scores at a time, however many there are.
        step = max(1, (1 << 20) // group)
        for at in range(0, len(hit), step):
            some = hit[at : at + step]
            error = (high.reshape(-1)[some] - low.reshape(-1)[some]) / 2
            i = (some // groups).astype(np.int32)
            upper = s.reshape(-1, group)[some] + error[:, None]
            inside = np.flatnonzero(upper >= floor[i][:, None])
            which = inside // group
            j = start + (some % groups)[which] * group + inside % group
            with self.lock:
                self.i.append(first + i[which])
                self.j.append(j.astype(np.int32))
                self.high.append(upper.ravel()[inside])
                self.waiting += len(inside)
                self.taken += len(inside)
                if self.waiting > self.limit:
                    self._thin()

    def _thin(self) -> None:
        """Drops what the floor has passed; if that is not enough, settles what is left."""
        i, j, high = (np.concatenate(v) for v in (self.i, self.j, self.high))
        reach = high >= self.floor[i]
        i, j, high = i[reach], j[reach], high[reach]
        if len(i) > self.limit // 2 and self.k is not None:
            i, j = self.settle(i, j)
            high = np.full(len(i), np.inf, np.float32)
        self.i, self.j, self.high, self.waiting = [i], [j], [high], len(i)
        # Where few can be dropped, wait longer before trying again.
        self.limit = max(self.limit, 2 * len(i))

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """All candidates, as (i, j) int32 [n] each."""
        if not self.i:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        i, j, high = (np.concatenate(v) for v in (self.i, self.j, self.high))
        # In the order of blocks, whose rows so stay in the cache when they are scored exactly.
        reach = high >= self.floor[i]
        return i[reach], j[reach]


def run(
    chunks: Sequence[Chunk],
    blocks: Iterable[Item],
    frame: Frame,
    sizes: Plan,
    *,
    exclude: bool,
    patience: float = np.inf,
) -> None:
    """Leads the chunks past the blocks. The next product runs while the last one is read.

    Raises:
      TooManyError: the first blocks left more than `patience` candidates in a chunk.
    """
    length = np.float32(np.linalg.norm(frame.origin))
    jobs = _jobs(chunks, blocks, sizes)
    ahead: list[tuple[Chunk, list[int], list[tuple[jax.Array, ...]]]] = []
    for chunk, items in jobs:
        held = [
            bounds.scores(
                chunk.side,
                item.side,
                length,
                np.float32(frame.width),
                distance=frame.distance,
                precision=frame.precision,
                group=sizes.group,
                exclude=exclude,
            )
            for item in items
        ]
        ahead.append((chunk, [item.start for item in items], held))
        if len(ahead) == 2:
            read = ahead.pop(0)
            _read(read)
            if read[0].taken > patience:
                raise TooManyError
            patience = np.inf
    while ahead:
        _read(ahead.pop(0))


def _read(job: tuple[Chunk, list[int], list[tuple[jax.Array, ...]]]) -> None:
    chunk, starts, held = job
    chunk.feed(starts, [tuple(np.asarray(a) for a in arrays) for arrays in held])


def _jobs(
    chunks: Sequence[Chunk], blocks: Iterable[Item], sizes: Plan
) -> Iterator[tuple[Chunk, list[Item]]]:
    """(chunk, blocks) for every chunk and block, `hold` blocks at a time."""
    if sizes.keep_blocks:
        items = list(blocks)
        for chunk in chunks:
            for n in range(0, len(items), sizes.hold):
                yield chunk, items[n : n + sizes.hold]
        return
    for item in blocks:
        for chunk in chunks:
            yield chunk, [item]


def lowest(side: Side, count: int) -> np.ndarray:
    """A floor below all scores; above all for padding rows, which so find nothing."""
    floor = np.full(len(side.code), np.inf, np.float32)
    floor[:count] = _LOWEST
    return floor
