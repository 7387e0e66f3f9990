"""rank(): the exact k nearest gallery items of every query, in bounded memory.

How: `siamese_jax.search`. What is promised: `siamese_jax.search.exact`.
"""

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.gallery import Gallery, Predicate
from siamese_jax.search import ann, bounds, dense, exact, few, order, scan, sharded
from siamese_jax.search.bounds import Frame
from siamese_jax.search.sources import Rows, as_rows

MEMORY_LIMIT = 256 * 2**20


class Ranking(NamedTuple):
    """The gallery items found for each query, nearest first.

    Attributes:
      indices: int32 [q, k], rows of the gallery; -1 where fewer than k items remain.
      distances: float32 [q, k], ascending; +inf where the index is -1.
    """

    indices: np.ndarray
    distances: np.ndarray


class Neighbours(NamedTuple):
    """The gallery items within a radius, nearest first, of all queries one after another.

    Those of query i are at limits[i] : limits[i + 1].

    Attributes:
      limits: int64 [q + 1].
      indices: int32 [limits[-1]], rows of the gallery.
      distances: float32 [limits[-1]].
    """

    limits: np.ndarray
    indices: np.ndarray
    distances: np.ndarray


def rank(
    queries: ArrayLike,
    gallery: Any,
    k: int | ArrayLike,
    *,
    distance: str = "euclidean",
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    keep: ArrayLike | Predicate | None = None,
    memory_limit: int = MEMORY_LIMIT,
    precision: str = "auto",
    devices: Sequence[jax.Device] | None = None,
    approximate: str | None = None,
) -> Ranking:
    """The k nearest gallery items of every query, exactly.

    Distances are correctly rounded from the float32 vectors (`siamese_jax.search.exact`), and
    equal ones are in ascending order of the gallery's rows. Neither `memory_limit` nor
    `precision` nor how queries are batched changes an answer.

    Args:
      queries: [q, d] real; taken as float32.
      gallery: [g, d] real: a NumPy array, a memory map, a JAX array, a list of such shards
        (rows are numbered through), or a `Gallery`.
      k: how many items to return, at least 1; or int [q], one number for each query, whose row
        then ends in -1 and +inf.
      distance: "euclidean", "sqeuclidean", "cosine" (1 - cos; 1 for a zero vector) or "dot"
        (negated).
      query_ids: int or str [q]; a gallery item with the query's own id is left out before the
        k nearest are taken.
      gallery_ids: int or str [g]; needed with `query_ids`, unless `gallery` is a `Gallery`.
      keep: bool [g], or a function from the gallery's ids to that; other items are left out.
      memory_limit: bytes of working memory, beyond the arguments and the answer.
      precision: of the matrix product that finds candidates: "float32", "tf32", "bfloat16", or
        "auto": bfloat16 on processors that have it, else float32.
      devices: split the gallery over these. By default all accelerators, if there are any.
        `memory_limit` then holds for the memory of each.
      approximate: None for the exact answer; "usearch" or "faiss" to let a graph index of that
        library propose candidates (`siamese_jax.search.ann`). Distances are still exact, but
        items may be missing. The index is built by the first search of a `Gallery`, and kept.

    Returns:
      A `Ranking` of q rows and max(k) columns.

    Raises:
      UserError: an unknown name, shapes that do not match, or a row that is not finite.

    >>> rank([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]], k=2)
    Ranking(indices=array([[1, 2]], dtype=int32), distances=array([[1., 1.]], dtype=float32))
    """
    search = _Search(queries, gallery, distance, query_ids, gallery_ids, keep, memory_limit)
    wanted = _counts(k, len(search.queries))
    columns = int(wanted.max(initial=0)) if np.ndim(k) else int(np.max(k))
    found = Ranking(
        np.full((len(wanted), columns), -1, np.int32),
        np.full((len(wanted), columns), np.inf, np.float32),
    )
    precision = _precision(precision, search)
    if devices is None and jax.default_backend() != "cpu":
        devices = jax.devices()
    if approximate is not None:
        parts = search.nearest_about(approximate, wanted, columns)
    elif devices is None:
        parts = search.nearest(wanted, columns, precision)
    else:
        parts = search.nearest_on(devices, wanted, columns, precision)
    for i, place, j, away in parts:
        at = i.astype(np.int64) * columns + place
        found.indices.reshape(-1)[at] = j
        found.distances.reshape(-1)[at] = away
    return found


def range_search(
    queries: ArrayLike,
    gallery: Any,
    radius: float | ArrayLike,
    *,
    distance: str = "euclidean",
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    keep: ArrayLike | Predicate | None = None,
    memory_limit: int = MEMORY_LIMIT,
    precision: str = "auto",
) -> Neighbours:
    """All gallery items at most `radius` away from each query, exactly, nearest first.

    Args:
      radius: in units of the distance; one number, or float [q].
      Others: as for `rank`. The memory limit does not hold for the answer, which can be any size.

    >>> found = range_search([[0.0], [9.0]], [[1.0], [0.0], [2.0]], radius=1.0)
    >>> found.limits.tolist(), found.indices.tolist(), found.distances.tolist()
    ([0, 2, 2], [1, 0], [0.0, 1.0])
    """
    search = _Search(queries, gallery, distance, query_ids, gallery_ids, keep, memory_limit)
    q = len(search.queries)
    reach = np.asarray(radius, np.float64)
    if reach.shape not in ((), (q,)) or np.isnan(reach).any():
        raise UserError(f"radius must be a number or [{q}] of them, without NaN")
    reach = np.broadcast_to(reach, (q,))
    count = np.zeros(q + 1, np.int64)
    parts = []
    for i, j, away in search.within(reach, _precision(precision, search)):
        count[1:] += np.bincount(i, minlength=q)
        parts.append((j, away))
    indices = [j for j, _ in parts] or [np.empty(0, np.int32)]
    distances = [away for _, away in parts] or [np.empty(0, np.float32)]
    return Neighbours(np.cumsum(count), np.concatenate(indices), np.concatenate(distances))


def pairwise_distances(
    queries: ArrayLike, gallery: Any, *, distance: str = "euclidean"
) -> np.ndarray:
    """Every query's distance from every gallery item, float32 [q, g]: the values `rank` returns.

    >>> pairwise_distances([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0]])
    array([[5., 1.]], dtype=float32)
    """
    search = _Search(queries, gallery, distance, None, None, None, MEMORY_LIMIT)
    x, rows = search.queries, search.gallery.rows
    frame = search.frame("float32")
    list(search.sides(frame, 1024))
    for _ in scan.Blocks(rows, None, None, frame, 4096):
        pass
    found = np.empty((len(x), len(rows)), np.float32)
    every = np.arange(len(rows), dtype=np.int32)
    for i in range(len(x)):
        own = np.zeros(len(rows), np.int32)
        found[i] = exact.pair_distances(x[i : i + 1], rows.take, own, every, distance)
    return found


class _Search:
    """The arguments of a search, checked, and the ways to carry it out."""

    def __init__(
        self,
        queries: ArrayLike,
        gallery: Any,
        distance: str,
        query_ids: ArrayLike | None,
        gallery_ids: ArrayLike | None,
        keep: ArrayLike | Predicate | None,
        memory_limit: int,
    ):
        self.distance = check(distance)
        self.rows = as_rows(queries, "queries")
        if isinstance(gallery, Gallery):
            if gallery_ids is not None:
                raise UserError("a Gallery has its own ids: leave gallery_ids out")
            self.gallery = gallery
        else:
            if query_ids is not None and gallery_ids is None:
                raise UserError("query_ids need gallery_ids to compare with")
            self.gallery = Gallery(gallery, gallery_ids, resident=False)
        if self.rows.width != self.gallery.rows.width:
            raise UserError(
                f"queries have {self.rows.width} columns, the gallery {self.gallery.rows.width}"
            )
        if memory_limit < 1 << 20:
            raise UserError(f"memory_limit={memory_limit} is less than 1 MiB (2**20 bytes)")
        self.memory_limit = memory_limit
        # Whether another precision may be taken than the one asked for.
        self.adaptive = False
        self.codes = self.gallery.codes(query_ids, len(self.rows))
        self.there = _kept(keep, self.gallery)

    @functools.cached_property
    def queries(self) -> np.ndarray:
        """float32 [q, d]."""
        whole = self.rows.view(0, len(self.rows)) if len(self.rows) else None
        if whole is None:
            whole = np.zeros((len(self.rows), self.rows.width), np.float32)
            with np.errstate(over="ignore"):
                self.rows.read(0, whole)
        return whole

    def frame(self, precision: str) -> Frame:
        return self.gallery.frame(self.distance, precision)

    def sides(self, frame: Frame, size: int, start: int = 0, stop: int | None = None) -> Iterator:
        """(first query, how many, their side of the product), a chunk at a time."""
        stop = len(self.queries) if stop is None else stop
        rows = Rows([self.queries], "queries")
        code = None if self.codes is None else self.codes[0]
        for at in range(start, stop, size):
            yield (
                at,
                min(size, stop - at),
                scan.prepare_rows(rows, at, size, None, code, frame, is_query=True),
            )

    def nearest(self, wanted: np.ndarray, k: int, precision: str) -> Iterator[tuple]:
        """Yields (i, place, j, distance) arrays, in parts that are whole queries."""
        euclidean = self.distance in ("euclidean", "sqeuclidean")
        some = 0 < len(self.queries) <= few.MOST and len(self.gallery.rows) > 0
        if some and euclidean and self.adaptive and self.gallery.resident is False:
            yield from self._nearest_few(wanted, k)
            return
        g = len(self.gallery.rows)
        sizes = dense.plan(len(self.queries), g, self.rows.width, k, self.memory_limit)
        # A product in float64 does more than "float32" asks for.
        if (self.adaptive or precision == "float32") and g and sizes is not None:
            try:
                yield from self._nearest_dense(wanted, sizes)
                return
            except scan.TooManyError:
                pass  # Raised before anything was yielded, here as below.
        if self.adaptive and precision == "bfloat16":
            try:
                yield from self._nearest(wanted, k, precision, patience=8 * k)
                return
            except scan.TooManyError:
                precision = "float32"
        yield from self._nearest(wanted, k, precision, patience=np.inf)

    def _nearest_few(self, wanted: np.ndarray, k: int) -> Iterator[tuple]:
        i, j = few.candidates(
            self.queries,
            self.gallery.rows,
            min(k, len(self.gallery.rows)),
            self.there,
            self.codes,
            functools.partial(self._settle, 0, wanted),
        )
        away = self._away(0, i, j)
        yield order.first(i, j, away, wanted)

    def _nearest_dense(self, wanted: np.ndarray, sizes: dense.Plan) -> Iterator[tuple]:
        return dense.nearest(
            self.queries,
            self.gallery.rows,
            wanted,
            sizes,
            there=self.there,
            codes=self.codes,
            distance=self.distance,
        )

    def _nearest(
        self, wanted: np.ndarray, k: int, precision: str, patience: float
    ) -> Iterator[tuple]:
        q, g = len(self.queries), len(self.gallery.rows)
        k = min(k, g)
        if not q or not k:
            return
        frame, sizes, blocks = self._prepare(precision, k)
        for start in range(0, q, sizes.state):
            stop = min(q, start + sizes.state)
            chunks = []
            for at, count, side in self.sides(frame, sizes.chunk, start, stop):
                settle = functools.partial(self._settle, at, wanted[at : at + count])
                floor = scan.lowest(side, count)
                floor[np.asarray(side.zero)] = np.inf
                chunks.append((at, count, side, scan.Chunk(side, k, floor, settle, sizes.pairs)))
            scan.run(
                [chunk for *_, chunk in chunks],
                blocks,
                frame,
                sizes,
                exclude=self.codes is not None,
                patience=patience * chunks[0][1],
            )
            patience = np.inf
            for at, count, side, chunk in chunks:
                i, j = self._with_zeros(at, count, side, blocks.zeros, k, *chunk.pairs())
                away = self._away(at, i, j)
                i, place, j, away = order.first(i, j, away, wanted[at : at + count])
                yield i + at, place, j, away

    def nearest_on(
        self, devices: Sequence[jax.Device], wanted: np.ndarray, k: int, precision: str
    ) -> Iterator[tuple]:
        """As `nearest`, the gallery split over devices, a slab of rows at a time."""
        q, (g, d) = len(self.queries), (len(self.gallery.rows), self.rows.width)
        k = min(k, g)
        if not q or not k:
            return
        frame, mesh = self.frame(precision), sharded.mesh_of(devices)
        size = sharded.sizes(q, g, bounds.padded_width(d), k, len(devices), self.memory_limit)
        found: list[list[tuple]] = [[] for _ in range(0, q, size.chunk)]
        sure = np.ones(q, bool)
        zeros = [np.empty(0, np.int64)]
        for start in range(0, g, size.slab):
            slab = self.gallery.slab(mesh, start, size.slab, self.there)
            for c, (at, count, rows, code) in enumerate(self._plain_chunks(size.chunk)):
                with jax.enable_x64(True):
                    answer = sharded.search(
                        rows,
                        code,
                        *slab,
                        frame.origin,
                        np.float32(d),
                        mesh=mesh,
                        k=min(k, size.slab // len(devices)),
                        block=size.block,
                        distance=self.distance,
                        precision=precision,
                        exclude=self.codes is not None,
                    )
                    answer = {name: np.asarray(value) for name, value in answer.items()}
                self._complain(answer["bad"], start, size.slab // len(devices))
                if c == 0:
                    zero = start + np.flatnonzero(answer["zero"])
                    zero = zero[zero < g]
                    zeros.append(zero if self.there is None else zero[self.there[zero]])
                sure[at : at + count] &= sharded.certain(answer["low"], answer["ceiling"], k)[
                    :count
                ]
                row, away = (answer[v][:, :count] for v in ("row", "distance"))
                there = row >= 0
                _, i, _ = np.nonzero(there)
                found[c].append((i.astype(np.int32), start + row[there], away[there]))
        for c, (at, count, side) in enumerate(self.sides(frame, size.chunk)):
            i, j, away = (np.concatenate(v) for v in zip(*found[c], strict=True))
            # A zero query's distances are all 1 under cosine, whatever the scores said.
            lost = np.asarray(side.zero)
            i, j, away = (v[~lost[i]] for v in (i, j, away))
            more = self._with_zeros(at, count, side, zeros, k, i[:0], j[:0])
            i, j = np.concatenate([i, more[0]]), np.concatenate([j, more[1]])
            away = np.concatenate([away, np.ones(len(more[0]), np.float32)])
            sure[at : at + count] |= lost[:count]
            i, place, j, away = order.first(i, j, away, wanted[at : at + count])
            good = sure[at + i]
            yield i[good] + at, place[good], j[good], away[good]
        again = np.flatnonzero(~sure)
        if len(again):
            rest = self._only(again)
            for i, place, j, away in rest.nearest(wanted[again], k, "float32"):
                yield again[i], place, j, away

    def nearest_about(self, library: str, wanted: np.ndarray, k: int) -> Iterator[tuple]:
        """As `nearest`, among what a graph index proposes."""
        q, g = len(self.queries), len(self.gallery.rows)
        if library not in ann.INDEXES:
            raise UserError(f"approximate={library!r} is unknown: use one of {list(ann.INDEXES)}")
        if not q or not g:
            return
        for _ in self.sides(self.frame("float32"), 1024):
            pass  # Refuses queries that are not finite.
        index = self.gallery.index(library, self.distance)
        # Some of what is proposed may not be allowed: ask for more by the same share.
        allowed = g if self.there is None else max(1, int(self.there.sum()))
        own = 0
        if self.codes is not None:
            own = int(np.unique(self.codes[1], return_counts=True)[1].max())
        n = min(g, (min(k, g) + own) * -(-g // allowed))
        for at in range(0, q, 1024):
            here = slice(at, at + 1024)
            j = index(self.queries[here], n).ravel()
            i = np.repeat(np.arange(len(j) // n, dtype=np.int32), n)
            fine = j >= 0
            if self.there is not None:
                fine &= self.there[j]
            if self.codes is not None:
                fine &= self.codes[0][here][i] != self.codes[1][j]
            i, j = i[fine], j[fine].astype(np.int32)
            away = self._away(at, i, j)
            i, place, j, away = order.first(i, j, away, wanted[here])
            yield i + at, place, j, away

    def _only(self, which: np.ndarray) -> "_Search":
        """The same search for some of the queries."""
        rest = copy.copy(self)
        rest.__dict__["queries"] = self.queries[which]
        rest.codes = None if self.codes is None else (self.codes[0][which], self.codes[1])
        return rest

    def _plain_chunks(self, size: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """(first query, how many, float32 [size, padded d], codes int32 [size])."""
        q, d = self.queries.shape
        for at in range(0, q, size):
            count = min(size, q - at)
            rows = np.zeros((size, bounds.padded_width(d)), np.float32)
            rows[:count, :d] = self.queries[at : at + count]
            code = np.full(size, -2, np.int32)
            if self.codes is not None:
                code[:count] = self.codes[0][at : at + count]
            yield at, count, rows, code

    def _complain(self, bad: np.ndarray, start: int, size: int) -> None:
        for n in np.flatnonzero(bad < size)[:1]:
            row = start + int(n) * size + int(bad[n])
            raise UserError(scan.complaint(self.gallery.rows, row))

    def within(self, reach: np.ndarray, precision: str) -> Iterator[tuple]:
        """Yields (i, j, distance) arrays in the order (i, distance, j)."""
        if not len(self.queries) or not len(self.gallery.rows):
            return
        frame, sizes, blocks = self._prepare(precision, 1)
        for at, count, side in self.sides(frame, sizes.chunk):
            here = slice(at, at + count)
            square = bounds.true_square(self.queries[here], frame)
            least = bounds.score_of(reach[here], square, self.distance)
            floor = scan.lowest(side, count)
            # The interval of a score has room for the rounding of its floor, a step downwards.
            low, high = np.finfo(np.float32).min, np.finfo(np.float32).max
            floor[:count] = np.nextafter(
                np.clip(least, low, high).astype(np.float32), np.float32(-np.inf)
            )
            if self.distance == "euclidean":
                floor[:count][reach[here] < 0] = np.inf
            floor[:count] = np.maximum(floor[:count], low)
            floor[np.asarray(side.zero)] = np.inf
            chunk = scan.Chunk(side, None, floor, lambda i, j: (i, j), sizes.pairs)
            scan.run([chunk], blocks, frame, sizes, exclude=self.codes is not None)
            i, j = self._with_zeros(
                at, count, side, blocks.zeros, len(self.gallery.rows), *chunk.pairs()
            )
            away = self._away(at, i, j)
            near = away <= reach[here][i]
            i, j, away = i[near], j[near], away[near]
            whole = np.full(count, len(self.gallery.rows))
            i, _, j, away = order.first(i, j, away, whole)
            yield i + at, j, away

    def _prepare(self, precision: str, k: int) -> tuple[Frame, scan.Plan, scan.Blocks]:
        q, (g, d) = len(self.queries), (len(self.gallery.rows), self.rows.width)
        frame = self.frame(precision)
        sizes = scan.plan(q, g, d, k, precision, self.memory_limit)
        if self.gallery.keeps(frame):
            sizes = sizes._replace(keep_blocks=True, state=2 * sizes.chunk)
        blocks = self.gallery.blocks(frame, self.there, sizes.block, self.codes is not None)
        return frame, sizes, blocks.keep() if sizes.keep_blocks else blocks

    def _away(self, at: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        own = self.queries[at : at + int(i.max(initial=0)) + 1]
        away = exact.pair_distances(own, self.gallery.rows.take, i, j, self.distance)
        self.gallery.rows.release()
        return away

    def _settle(
        self, at: int, wanted: np.ndarray, i: np.ndarray, j: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each query's first pairs among (i, j)."""
        i, _, j, _ = order.first(i, j, self._away(at, i, j), wanted)
        return i.astype(np.int32), j

    def _with_zeros(
        self,
        at: int,
        count: int,
        side: bounds.Side,
        zeros: Sequence[np.ndarray],
        k: int,
        i: np.ndarray,
        j: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds the pairs of zero rows under cosine, which are all at distance 1 and so in the
        order of their rows: a zero item's with every query, a zero query's with every item."""
        if self.distance != "cosine":
            return i, j
        zero = np.concatenate([np.empty(0, np.int64), *zeros])
        lost = np.flatnonzero(np.asarray(side.zero)[:count])
        for who, items in (
            (np.setdiff1d(np.arange(count), lost), zero),
            (lost, None),
        ):
            if not len(who):
                continue
            if items is None:
                items = np.arange(len(self.gallery.rows))
                items = items if self.there is None else items[self.there]
            for one in who if len(items) else ():
                mine = items
                if self.codes is not None:
                    # Enough for k that are not the query's own.
                    mine = items[self.codes[1][items] != self.codes[0][at + one]]
                mine = mine[:k]
                i = np.concatenate([i, np.full(len(mine), one, i.dtype)])
                j = np.concatenate([j, mine.astype(j.dtype)])
        return i, j


def _counts(k: int | ArrayLike, q: int) -> np.ndarray:
    wanted = np.asarray(k)
    if wanted.dtype.kind not in "iu" or wanted.shape not in ((), (q,)):
        raise UserError(f"k must be an integer or int [{q}], not {k!r:.60}")
    if (wanted < 1).any():
        raise UserError(f"k must be at least 1, not {int(wanted.min())}")
    return np.broadcast_to(wanted, (q,)).astype(np.int64)


def _kept(keep: ArrayLike | Predicate | None, gallery: Gallery) -> np.ndarray | None:
    if keep is None:
        return gallery.there
    kept = np.asarray(keep(gallery.ids) if callable(keep) else keep)
    if kept.dtype != bool or kept.shape != (len(gallery.rows),):
        raise UserError(
            f"keep must give bool [{len(gallery.rows)}], not {kept.dtype} {list(kept.shape)}"
        )
    return kept if gallery.there is None else kept & gallery.there


def _precision(precision: str, search: _Search) -> str:
    if precision not in bounds.PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown: use one of {bounds.PRECISIONS}")
    if precision != "auto":
        return precision
    search.adaptive = True
    large = len(search.queries) >= 64 and search.rows.width >= 64
    return "bfloat16" if large and _has_bfloat16() else "float32"


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32, and XLA makes use of it."""
    if jax.default_backend() != "cpu" or not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
