"""Clustering: k-means on the embeddings, and how well its clusters agree with the labels.

With n(a, b) the items of class a in cluster b, N in all:

    I(A, B)   sum_ab n(a, b)/N  log( N n(a, b) / (n(a) n(b)) )      mutual information
    nmi       I / mean(H(A), H(B))                   arithmetic mean (Strehl & Ghosh 2002 take the
                                                     geometric one; Manning et al. 2008 this one)
    ami       (I - E I) / (mean(H(A), H(B)) - E I)   E over random clusters of the same sizes
                                                     (Vinh et al. 2010); may fall below 0, and is
                                                     then given as 0 by `clustering`

nmi rises with the number of clusters even for random ones, ami does not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from siamese_jax.data.labels import label_codes, missing
from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import amid, at_least_one, finite, moved
from siamese_jax.search.ranking import rank


class KMeans(NamedTuple):
    """Clusters of n rows.

    Attributes:
      assignment: int32 [n], the nearest centroid of each row.
      centroids: float64 [k, d].
      inertia: the sum of squared distances to the nearest centroid.
    """

    assignment: np.ndarray
    centroids: np.ndarray
    inertia: float


def kmeans(
    rows: ArrayLike,
    k: int,
    *,
    seed: int = 0,
    restarts: int = 1,
    iterations: int = 100,
    memory_limit: int = 256 * 2**20,
) -> KMeans:
    """Lloyd's k-means from k-means++ seeds (Arthur & Vassilvitskii 2007); the best of `restarts`.

    The nearest centroid is `siamese_jax.rank`'s, so exact; of equally near ones it is the first.
    Where the rows lie changes nothing: they are moved to the origin in float64 first.

    Args:
      rows: [n, d] real, n >= k.
      k: number of clusters. One left empty takes the row that is farthest from its centroid.
      restarts: at least 1.
      iterations: an upper bound; it stops as soon as no assignment changes.
      memory_limit: bytes for the search of centroids, at least 1 MiB of which are taken.

    Raises:
      UserError: k below 1 or above n, or a row that is not finite.

    >>> kmeans([[0.0], [0.1], [9.0]], 2).assignment.tolist() in ([0, 0, 1], [1, 1, 0])
    True
    """
    rows = finite(rows, "embeddings")
    at_least_one(k=k, restarts=restarts)
    if k > len(rows):
        raise UserError(f"k-means needs no more clusters than rows, not k = {k} of {len(rows)}")
    origin = amid(rows)
    near = moved(rows, origin)
    tries = (
        _lloyd(near, k, np.random.default_rng([seed, i]), iterations, max(memory_limit, 2**20))
        for i in range(restarts)
    )
    best = min(tries, key=lambda found: found.inertia)
    return best._replace(centroids=best.centroids + origin)


def _lloyd(
    rows: np.ndarray, k: int, rng: np.random.Generator, iterations: int, memory_limit: int
) -> KMeans:
    centroids = _plus_plus(rows, k, rng)
    assignment, squared = _nearest(rows, centroids, memory_limit)
    for _ in range(iterations):
        sizes = np.bincount(assignment, minlength=k)
        for empty in np.flatnonzero(sizes == 0):
            lost = int(np.argmax(np.where(sizes[assignment] > 1, squared, -1)))
            sizes[assignment[lost]] -= 1
            assignment[lost], squared[lost], sizes[empty] = empty, 0, 1
        starts = np.cumsum(sizes) - sizes
        grouped = rows[np.argsort(assignment, kind="stable")]
        sums = np.add.reduceat(grouped, starts, axis=0, dtype=np.float64)
        centroids = sums / sizes[:, None]
        before = assignment
        assignment, squared = _nearest(rows, centroids, memory_limit)
        if (before == assignment).all():
            break
    return KMeans(assignment, centroids, float(squared.sum(dtype=np.float64)))


def _plus_plus(rows: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Seeds drawn in turn, each row with a chance in proportion to its squared distance so far."""
    chosen = np.empty(k, np.int64)
    chosen[0] = rng.integers(len(rows))
    x = jnp.asarray(rows)
    squared = _squared(x, x[chosen[0]])
    for i in range(1, k):
        mass = np.cumsum(np.asarray(squared), dtype=np.float64)
        # Where every row lies on a seed already, any row will do.
        draw = np.searchsorted(mass, rng.random() * mass[-1], side="right")
        chosen[i] = min(int(draw), len(rows) - 1) if mass[-1] > 0 else rng.integers(len(rows))
        squared = jnp.minimum(squared, _squared(x, x[chosen[i]]))
    return rows[chosen]


@jax.jit
def _squared(rows: Array, row: Array) -> Array:
    return jnp.sum((rows - row[None, :]) ** 2, axis=1)


def _nearest(
    rows: np.ndarray, centroids: np.ndarray, memory_limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row and the squared distance to it."""
    found = rank(rows, centroids, 1, distance="sqeuclidean", memory_limit=memory_limit)
    return found.indices[:, 0], found.distances[:, 0]


def clustering(
    rows: ArrayLike,
    labels: ArrayLike,
    *,
    k: int | None = None,
    seed: int = 0,
    restarts: int = 1,
    iterations: int = 100,
    memory_limit: int = 256 * 2**20,
) -> dict[str, float]:
    """{"nmi", "ami"} of k-means on [n, d] embeddings against int or str labels [n], in [0, 1].

    `k` is the number of classes unless given. Other arguments as `kmeans`. Rows without a label
    (`siamese_jax.data.labels`) are left out.

    Raises UserError for other numbers of rows and labels, and as `kmeans`.

    >>> found = clustering([[0.0], [0.1], [9.0], [9.1]], [1, 1, 4, 4])
    >>> round(found["nmi"], 9), round(found["ami"], 9)
    (1.0, 1.0)
    """
    classes, (codes,) = label_codes(labels)
    rows = finite(rows, "embeddings")
    if codes.ndim != 1 or len(codes) != len(rows):
        raise UserError(f"clustering needs one label for each item: {len(rows)}, not {codes.shape}")
    rows, codes = rows[~missing(codes)], codes[~missing(codes)]
    found = kmeans(
        rows,
        len(classes) if k is None else k,
        seed=seed,
        restarts=restarts,
        iterations=iterations,
        memory_limit=memory_limit,
    )
    return {
        "nmi": nmi(codes, found.assignment),
        "ami": max(0.0, ami(codes, found.assignment)),
    }


def nmi(first: ArrayLike, second: ArrayLike) -> float:
    """Normalised mutual information of two labellings [n], in [0, 1].

    1 where both put all items into one class, which leaves nothing to disagree on.
    """
    table = _table(first, second)
    mean = (_entropy(table.first) + _entropy(table.second)) / 2
    return 1.0 if mean == 0 else float(np.clip(_information(table) / mean, 0, 1))


def ami(first: ArrayLike, second: ArrayLike) -> float:
    """Mutual information adjusted for chance: 1 for equal labellings, about 0 for random ones."""
    table = _table(first, second)
    mean = (_entropy(table.first) + _entropy(table.second)) / 2
    expected = _expected(table)
    alone = (table.first == 1).all() and (table.second == 1).all()
    if alone or len(table.first) == len(table.second) == 1:
        return 1.0
    room = mean - expected
    # Rounding may leave nothing, or less, between the expected and the largest value.
    room = np.sign(room or 1) * max(abs(room), np.finfo(np.float64).eps)
    return float(min(1.0, (_information(table) - expected) / room))


class _Table(NamedTuple):
    """A contingency table without its zeros: sizes of both sides, and of the cells with rows."""

    first: np.ndarray
    second: np.ndarray
    cells: np.ndarray
    first_of: np.ndarray
    second_of: np.ndarray


def _table(first: ArrayLike, second: ArrayLike) -> _Table:
    a, b = (label_codes(labels)[1][0] for labels in (first, second))
    if a.shape != b.shape or a.ndim != 1:
        raise UserError(f"labellings {a.shape} and {b.shape} can't be compared: give [n] of both")
    known = ~missing(a) & ~missing(b)
    if not known.any():
        raise UserError(f"none of {len(a)} items has a label in both labellings to compare")
    a, b = (np.unique(x[known], return_inverse=True)[1] for x in (a, b))
    cell, cells = np.unique(a * (int(b.max()) + 1) + b, return_counts=True)
    return _Table(np.bincount(a), np.bincount(b), cells, *np.divmod(cell, int(b.max()) + 1))


def _entropy(sizes: np.ndarray) -> float:
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum())


def _information(table: _Table) -> float:
    total, cells = table.cells.sum(), table.cells
    ratio = np.log(cells * total) - np.log(
        table.first[table.first_of].astype(np.float64) * table.second[table.second_of]
    )
    return float(max(0.0, (cells / total * ratio).sum()))


def _expected(table: _Table) -> float:
    """E I over random labellings of these sizes: n(a, b) is then hypergeometric.

    E I = sum_ab sum_n  P(n; a, b, N)  n/N  log(N n / (a b)). Equal sizes share their terms, so the
    work grows with the number of different sizes, not of classes.
    """
    total = int(table.cells.sum())
    sizes_a, count_a = np.unique(table.first, return_counts=True)
    sizes_b, count_b = np.unique(table.second, return_counts=True)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])  # of factorials
    expected = 0.0
    for a, times_a in zip(sizes_a, count_a, strict=True):
        for b, times_b in zip(sizes_b, count_b, strict=True):
            n = np.arange(max(1, a + b - total), min(a, b) + 1)
            log_p = logs[a] + logs[b] + logs[total - a] + logs[total - b] - logs[total]
            log_p = log_p - logs[n] - logs[a - n] - logs[b - n] - logs[total - a - b + n]
            term = n / total * (np.log(total) + np.log(n) - np.log(a) - np.log(b))
            expected += times_a * times_b * (np.exp(log_p) * term).sum()
    return float(expected)
