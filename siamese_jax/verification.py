"""Verification: do two images show the same thing? One threshold for all pairs.

A pair is accepted when its distance is at most t. Genuine pairs share a label, impostors do not:

    FMR(t)     false match rate, the share of impostors accepted
    FNMR(t)    false non-match rate, the share of genuine pairs rejected
    roc_auc    the chance that a genuine pair is closer than an impostor, ties counting half
    eer        equal error rate, where FMR = FNMR, between thresholds on the straight line
    fnmr@f     the least FNMR at a threshold with FMR <= f, not interpolated (ISO/IEC 19795-1;
               true accept rate at a false accept rate, "TAR@FAR", is 1 - fnmr@f)

`roc` takes given pairs and is exact. `verify` takes all q x g pairs, which can't be kept: it counts
their distances in steps, a million over the range, and errs by less than the share of genuine
and impostor pairs that fall into one step ("resolution" in its answer bounds the error of roc_auc).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from siamese_jax.distances import check
from siamese_jax.errors import UserError
from siamese_jax.relevance import as_relevance
from siamese_jax.space import Space

STEPS = 2**20


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
    with itself) are left out. Distances are in float32, and counted in `STEPS` steps.
    """
    check(distance)
    x = np.asarray(queries)
    y = x if gallery is None else np.asarray(gallery)
    found = as_relevance(
        x, query_labels, None if gallery is None else y, gallery_labels, query_ids, gallery_ids
    )
    space = Space.of(x, y, distance)
    size = max(1, min(1024, memory_limit // (16 * max(1024, x.shape[1]))))
    span = _norm(space, y, size) + _norm(space, x, size) if len(x) and len(y) else 0.0
    low, high = {"cosine": (0.0, 2.0), "dot": (-(span**2) / 4, span**2 / 4)}.get(
        distance, (0.0, span)
    )
    width = (high - low or 1.0) / (STEPS - 1)
    counts = np.zeros((3, STEPS), np.int64)
    for i in range(0, len(x), size):
        rows = np.arange(i, min(i + size, len(x)))
        left = space.rows(x[rows])
        query, own = found.own(rows)
        for j in range(0, len(y), size):
            items = np.arange(j, min(j + size, len(y)))
            right = space.rows(y[items])
            step = np.asarray(
                _steps(
                    jnp.asarray(left, jnp.float32),
                    jnp.asarray(right, jnp.float32),
                    jnp.float32(low),
                    jnp.float32(width),
                    distance,
                )
            )
            kind = found.related(rows, items).astype(np.int64)
            mine = (own >= j) & (own < j + len(items))
            kind[query[mine], own[mine] - j] = 2
            counts += np.bincount((kind * STEPS + step).ravel(), minlength=3 * STEPS).reshape(
                3, STEPS
            )
    used = counts[:2].any(0)
    threshold = low + width * (np.flatnonzero(used) + 0.5)
    return Roc(threshold, counts[1][used], counts[0][used])


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


def _norm(space: Space, rows: np.ndarray, size: int) -> float:
    parts = (space.rows(rows[i : i + size]) for i in range(0, len(rows), size))
    return max(float(np.sqrt((part**2).sum(1).max())) for part in parts)


@partial(jax.jit, static_argnames="distance")
def _steps(x: Array, y: Array, low: Array, width: Array, distance: str) -> Array:
    """Which step the distance of each pair falls into, int32 [b, c]."""
    product = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    if distance == "dot":
        value = -product
    elif distance == "cosine":
        value = 1 - product
    else:
        squared = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :] - 2 * product
        value = jnp.maximum(squared, 0)
        value = jnp.sqrt(value)
    return jnp.clip((value - low) / width, 0, STEPS - 1).astype(jnp.int32)
