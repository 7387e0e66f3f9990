"""Verification: do two images show the same thing? One threshold for all pairs.

A pair is accepted when its distance is at most t. Genuine pairs share a label, impostors do not:

    FMR(t)     false match rate, the share of impostors accepted
    FNMR(t)    false non-match rate, the share of genuine pairs rejected
    roc_auc    the chance that a genuine pair is closer than an impostor, ties counting half
    eer        equal error rate, where FMR = FNMR, between thresholds on the straight line
    fnmr@f     the least FNMR at a threshold with FMR <= f, not interpolated (ISO/IEC 19795-1;
               true accept rate at a false accept rate, "TAR@FAR", is 1 - fnmr@f)

`roc` takes given pairs and is exact. `verify` takes all q x g pairs, which can't be kept: it counts
their distances in about a million bins. They are those of `siamese_jax.search.engine.exact`,
computed in float64 and rounded once to float32, so all that is lost is which of a genuine pair and
an impostor in one bin is closer: "resolution" in its answer is half the share of such two, and
bounds the error of roc_auc.

Bins. The bits of a float, read as a whole number, are in the order of floats: their upper 16 name a
cell, and a cell of g genuine pairs and i impostors is split into m bins by the bits that follow.
The loss is about sum g i / m over the cells, and least, for a given number of bins, where m grows
as sqrt(g i). So a few rows far outside don't make the bins of all others coarse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.metrics.relevance import Relevance, as_relevance
from siamese_jax.search.engine.checked_rows import amid
from siamese_jax.search.engine.exact import definition
from siamese_jax.search.engine.rounding import from_product, rounding

BINS = 2**20
_CELLS = 2**16
_SAMPLE = 4096  # queries whose pairs say how to split the cells


@dataclass(frozen=True)
class Roc:
    """Both error rates at every threshold.

    Attributes:
      threshold: float64 [n], ascending; pairs at most this far apart are accepted.
      genuine, impostor: int64 [n], how many pairs of each kind lie at (or up to) each threshold
        since the one before.
    """

    threshold: np.ndarray
    genuine: np.ndarray
    impostor: np.ndarray

    def __post_init__(self) -> None:
        if not self.genuine.sum() or not self.impostor.sum():
            raise UserError(
                f"verification needs pairs of both kinds, but there are {self.genuine.sum()} "
                f"genuine and {self.impostor.sum()} impostor pairs"
            )

    @property
    def fmr(self) -> np.ndarray:
        """FMR at each threshold, before it one point where nothing is accepted: [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.impostor) / self.impostor.sum()])

    @property
    def fnmr(self) -> np.ndarray:
        """FNMR, likewise [n + 1]."""
        return 1 - np.concatenate([[0], np.cumsum(self.genuine) / self.genuine.sum()])

    def auc(self) -> float:
        """Area under 1 - FNMR over FMR, by trapezoids: ties count half."""
        return float(np.trapezoid(1 - self.fnmr, self.fmr))

    def eer(self) -> float:
        """The rate at which FMR = FNMR."""
        gap = self.fmr - self.fnmr  # from -1 up to 1
        i = int(np.argmax(gap >= 0))
        part = -gap[i - 1] / (gap[i] - gap[i - 1])
        return float(self.fmr[i - 1] + part * (self.fmr[i] - self.fmr[i - 1]))

    def fnmr_at(self, fmr: float) -> float:
        """The least FNMR among thresholds whose FMR is at most `fmr`."""
        return float(self.fnmr[np.searchsorted(self.fmr, fmr, side="right") - 1])

    def threshold_at(self, fmr: float) -> float:
        """The largest threshold whose FMR is at most `fmr`; -inf if there is none."""
        i = int(np.searchsorted(self.fmr, fmr, side="right") - 1)
        return float(self.threshold[i - 1]) if i else -np.inf

    def summary(self, fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4)) -> dict[str, float]:
        """{"roc_auc", "eer", "fnmr@0.1", ...}, each in [0, 1]."""
        rates = {f"fnmr@{f:g}": self.fnmr_at(f) for f in fmrs}
        found = {"roc_auc": self.auc(), "eer": self.eer(), **rates}
        assert all(0 <= value <= 1 for value in found.values()), found
        return found


def roc(distances: ArrayLike, same: ArrayLike) -> Roc:
    """The error rates of given pairs, exactly.

    Args:
      distances: float [n], smaller is closer.
      same: bool [n], is the pair genuine?

    Raises:
      UserError: shapes that differ, NaN, or pairs of one kind only.

    >>> roc([0.1, 0.4, 0.3, 0.9], [True, True, False, False]).auc()
    0.75
    """
    distances, same = np.asarray(distances), np.asarray(same)
    if distances.ndim != 1 or distances.shape != same.shape or same.dtype != bool:
        raise UserError(
            f"pairs need distances [n] and same bool [n], not {distances.shape} and "
            f"{same.dtype} {same.shape}"
        )
    if np.isnan(distances).any():
        raise UserError(f"the distance of pair {int(np.isnan(distances).argmax())} is NaN")
    threshold, step = np.unique(distances, return_inverse=True)
    count = partial(np.bincount, minlength=len(threshold))
    return Roc(threshold, count(step[same]), count(step[~same]))


def all_pairs(
    queries: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    distance: str = "euclidean",
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = 256 * 2**20,
) -> Roc:
    """The error rates of all pairs of a query and a gallery item, in bounded memory.

    Arguments as `siamese_jax.metrics.evaluate`: pairs of equal ids (without a gallery, of an item
    with itself) are left out. A threshold is the largest distance of its bin, so that the pairs
    with `distance <= threshold` are those that were counted.

    Raises:
      UserError: rows that aren't finite or don't match, or pairs of one kind only.
    """
    check(distance)
    x = np.asarray(queries)
    y = x if gallery is None else np.asarray(gallery)
    found = as_relevance(
        x, query_labels, None if gallery is None else y, gallery_labels, query_ids, gallery_ids
    )
    size = max(1, min(1024, memory_limit // (48 * max(1024, x.shape[1]))))
    blocks = [np.arange(i, min(i + size, len(x))) for i in range(0, len(x), size)]
    some = blocks[:: max(1, -(-len(x) // _SAMPLE))]
    bins = _Bins.split(_counts(x, y, found, distance, some, _Bins.whole()))
    counts = _counts(x, y, found, distance, blocks, bins)
    used = np.flatnonzero(counts.any(0))
    return Roc(bins.last(used), counts[1][used], counts[0][used])


class _Bins(NamedTuple):
    """How the cells are split: uint32 [65536] each.

    Attributes:
      first: number of the cell's first bin.
      shift: how many of the lower 16 bits don't matter.
    """

    first: Any
    shift: Any

    @classmethod
    def whole(cls) -> "_Bins":
        """One bin a cell."""
        return cls(np.arange(_CELLS, dtype=np.uint32), np.full(_CELLS, 16, np.uint32))

    @classmethod
    def split(cls, counts: np.ndarray) -> "_Bins":
        """About `BINS` of them, from the impostors and genuine pairs in each cell [2, 65536]: half
        to the cells that hold both, half to all that hold any."""
        both, any_ = np.sqrt(counts.astype(np.float64)).prod(0), counts.any(0)
        share = both / max(1.0, both.sum()) + any_ / max(1, any_.sum())
        bits = np.log2(np.maximum(1, BINS / 2 * share)).astype(np.uint32).clip(0, 16)
        sizes = np.uint32(1) << bits
        return cls(np.cumsum(sizes, dtype=np.uint32) - sizes, np.uint32(16) - bits)

    @property
    def total(self) -> int:
        return int(self.first[-1]) + (1 << 16 - int(self.shift[-1]))

    def of(self, bits: Any, xp: Any) -> Any:
        """The bin of floats, given as uint32 of the same bits."""
        # Negative numbers are ordered backwards.
        order = bits ^ xp.where(bits >> 31 == 1, np.uint32(2**32 - 1), np.uint32(2**31))
        cell = order >> 16
        return self.first[cell] + ((order & np.uint32(_CELLS - 1)) >> self.shift[cell])

    def last(self, which: np.ndarray) -> np.ndarray:
        """The largest float32 of some bins, as float64."""
        cell = np.searchsorted(self.first, which, side="right") - 1
        inside = which - self.first[cell] + 1
        order = ((cell << 16) + (inside << self.shift[cell].astype(np.int64)) - 1).astype(np.uint32)
        bits = order ^ np.where(order >> 31 == 1, np.uint32(2**31), np.uint32(2**32 - 1))
        return bits.view(np.float32).astype(np.float64)


def _counts(
    x: np.ndarray,
    y: np.ndarray,
    found: Relevance,
    distance: str,
    blocks: Sequence[np.ndarray],
    bins: _Bins,
) -> np.ndarray:
    """Impostors and genuine pairs of some queries in each bin, int64 [2, bins]."""
    counts = np.zeros((3, bins.total), np.int64)
    origin = amid(y) if "euclidean" in distance else np.zeros(y.shape[1])
    size = max(map(len, blocks), default=1)
    for rows in blocks:
        left = _side(x[rows], origin)
        query, own = found.own(rows)
        for j in range(0, len(y), size):
            items = np.arange(j, min(j + size, len(y)))
            with jax.enable_x64(True):
                step = np.array(_binned(*left, *_side(y[items], origin), *bins, distance=distance))
            unsure = np.argwhere(step < 0)
            for at in range(0, len(unsure), size):
                b, c = unsure[at : at + size].T
                u, v = x[rows[b]].astype(np.float64), y[items[c]].astype(np.float64)
                step[b, c] = bins.of(definition(u, v, distance).view(np.uint32), np)
            kind = found.related(rows, items).astype(np.int32)
            mine = (own >= j) & (own < j + len(items))
            kind[query[mine], own[mine] - j] = 2
            kind *= bins.total
            kind += step
            counts += np.bincount(kind.ravel(), minlength=counts.size).reshape(counts.shape)
    return counts[:2]


def _side(rows: np.ndarray, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows about the origin, within 2^-53, for which `rounding` has room; and their norms."""
    rows = rows.astype(np.float64) - origin
    return rows, np.sqrt(np.vecdot(rows, rows))


@partial(jax.jit, static_argnames="distance")
def _binned(
    x: Array, a: Array, y: Array, b: Array, first: Array, shift: Array, *, distance: str
) -> Array:
    """The bin of every pair, int32 [b, c]; -1 where the product can't tell its distance."""
    product = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    c = rounding(x.shape[1])
    found, unsure = from_product(product, a[:, None], b[None, :], c, distance, jnp)
    bits = lax.bitcast_convert_type(found, jnp.uint32)
    return jnp.where(unsure, -1, _Bins(first, shift).of(bits, jnp).astype(jnp.int32))


def verify(
    queries: ArrayLike,
    query_labels: ArrayLike,
    gallery: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    fmrs: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
    **options: object,
) -> dict[str, float]:
    """roc_auc, eer and fnmr@f over all pairs, and "resolution", the error bound of roc_auc.

    `options` are those of `all_pairs`.

    >>> found = verify([[0.0], [1.0], [5.0], [5.5]], [1, 1, 2, 2])
    >>> found["roc_auc"], found["eer"]
    (1.0, 0.0)
    """
    found = all_pairs(queries, query_labels, gallery, gallery_labels, **options)  # type: ignore[arg-type]
    genuine, impostor = found.genuine, found.impostor
    tied = float((genuine / genuine.sum() * (impostor / impostor.sum())).sum() / 2)
    return found.summary(fmrs) | {"resolution": tied}
