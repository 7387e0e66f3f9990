"""A search as it was asked for: its arguments, checked, and what all ways to answer it share."""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.search.engine import blocks, bounds, exact, order
from siamese_jax.search.engine.operands import Frame
from siamese_jax.search.engine.rows import Rows, as_rows

Predicate = Callable[[np.ndarray], ArrayLike]  # a gallery's ids -> bool [g], which to search


class Search:
    """The arguments of a search, of a `Gallery`; see `siamese_jax.search.ranking.rank`."""

    def __init__(
        self,
        queries: Any,
        gallery: Any,
        distance: str,
        query_ids: ArrayLike | None,
        keep: ArrayLike | Predicate | None,
        memory_limit: int,
    ):
        self.distance = check(distance)
        self.rows = as_rows(queries, "queries")
        self.gallery = gallery
        if self.rows.width != self.gallery.rows.width:
            raise UserError(
                f"queries have {self.rows.width} columns, the gallery {self.gallery.rows.width}"
            )
        self.memory_limit = check_memory(memory_limit)
        # float32 [q, d].
        self.queries = _whole(self.rows)
        self.rows = Rows([self.queries], "queries")
        self.codes = self.gallery.codes(query_ids, len(self.rows))
        self.there = _kept(keep, self.gallery)

    def frame(self, precision: str) -> Frame:
        """The frame of the gallery's rows for this search's distance, at a precision."""
        return self.gallery.frame(self.distance, precision)

    def sides(self, frame: Frame, size: int, start: int = 0, stop: int | None = None) -> Iterator:
        """(first query, how many, their side of the product), a chunk at a time."""
        stop = len(self.queries) if stop is None else min(stop, len(self.queries))
        code = None if self.codes is None else self.codes[0]
        for at in range(start, stop, size):
            yield (
                at,
                min(size, stop - at),
                blocks.prepare_rows(self.rows, at, size, None, code, frame, is_query=True),
            )

    def only(self, which: np.ndarray) -> "Search":
        """The same search for some of the queries."""
        rest = copy.copy(self)
        rest.queries = self.queries[which]
        rest.rows = Rows([rest.queries], "queries")
        rest.codes = None if self.codes is None else (self.codes[0][which], self.codes[1])
        return rest

    def away(self, at: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Exact distances of the pairs (query at + i, item j), both int [m]: float [m]."""
        memory = self.memory_limit // 8
        away = exact.pair_distances(self.rows, self.gallery.rows, at + i, j, self.distance, memory)
        self.gallery.rows.release()
        return away

    def settle(
        self, at: int, wanted: np.ndarray, i: np.ndarray, j: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Each query's first pairs among (i, j)."""
        i, _, j, _ = order.first(i, j, self.away(at, i, j), wanted[: i.max(initial=0) + 1])
        return i.astype(np.int32), j


def check_memory(memory_limit: Any) -> int:
    """Returns it; UserError where it is no number, or too small to work in."""
    if not isinstance(memory_limit, int | float) or not memory_limit >= 1 << 20:
        raise UserError(f"memory_limit={memory_limit!r} is less than 1 MiB (2**20 bytes)")
    return memory_limit  # type: ignore[return-value]


def _whole(rows: Rows) -> np.ndarray:
    """All rows as one array, float32 [n, d]."""
    whole = rows.view(0, len(rows)) if len(rows) else None
    if whole is None:
        whole = np.zeros((len(rows), rows.width), np.float32)
        rows.read(0, whole)
    return whole


def _kept(keep: ArrayLike | Predicate | None, gallery: Any) -> np.ndarray | None:
    if keep is None:
        return gallery.there
    kept = np.asarray(keep(gallery.ids) if callable(keep) else keep)
    if kept.dtype != bool or kept.shape != (len(gallery.rows),):
        raise UserError(
            f"keep must give bool [{len(gallery.rows)}], not {kept.dtype} {list(kept.shape)}"
        )
    return kept if gallery.there is None else kept & gallery.there


def chosen_precision(precision: str, search: Search) -> tuple[str, bool]:
    """The precision of the product, and whether another may be taken in its place."""
    if precision not in bounds.PRECISIONS:
        raise UserError(f"precision={precision!r} is unknown: use one of {bounds.PRECISIONS}")
    if precision != "auto":
        return precision, False
    large = len(search.queries) >= 64 and search.rows.width >= 64
    return "bfloat16" if large and _has_bfloat16() else "float32", True


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32, and XLA makes use of it."""
    if jax.default_backend() != "cpu" or not os.path.exists("/proc/cpuinfo"):
        return False
    with open("/proc/cpuinfo") as file:
        flags = next((line for line in file if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
