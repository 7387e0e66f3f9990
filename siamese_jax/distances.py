"""Distances between embeddings, differentiable everywhere. Smaller always means closer.

    euclidean    |x - y|
    sqeuclidean  |x - y|^2
    cosine       1 - <x, y> / (|x| |y|)      in [0, 2]; a zero vector is at distance 1 from all
    dot          -<x, y>

These are for losses and miners, where gradients matter. To sort a gallery use
`siamese_jax.search.ranking.rank`, whose distances are exact.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from siamese_jax.errors import UserError

DISTANCES = ("euclidean", "sqeuclidean", "cosine", "dot")


def check(distance: str) -> str:
    """Returns `distance`, or raises `UserError` if it is not the name of one."""
    if distance not in DISTANCES:
        raise UserError(f"distance={distance!r} is unknown: use one of {', '.join(DISTANCES)}")
    return distance


def pairwise(x: ArrayLike, y: ArrayLike, distance: str = "euclidean") -> Array:
    """The distance of every row of x from every row of y.

    |x - y|^2 is computed as |x - o|^2 + |y - o|^2 - 2<x - o, y - o>, o a point amid the rows of y,
    which is off by at most (d + 8) 2^-24 (|x - o| + |y - o|)^2, wherever the origin lies. Two equal
    rows may so be up to about 1e-3 of their distance from o apart; `aligned` gives exactly 0. The
    cosine distance is half of |x - y|^2 for rows of length 1, rounded to float32 as such.

    Args:
      x: [n, d], any real dtype.
      y: [m, d], any real dtype.
      distance: one of `DISTANCES`.

    Returns:
      [n, m] float32 (float64 if either argument is).

    Raises:
      UserError: the name is unknown, or the shapes do not match.

    >>> pairwise([[0.0, 0.0], [3.0, 0.0]], [[0.0, 4.0]]).tolist()
    [[4.0], [5.0]]
    """
    x, y = _matrices(x, y, distance)
    if distance == "dot":
        return -_products(x, y)
    if distance == "cosine":
        u, v = unit(x), unit(y)
        # 1 - <u, v> = |u - v|^2 / 2 + 1 - (|u|^2 + |v|^2) / 2, where |u| is 1, or 0 for a zero row.
        lost = [jnp.all(rows == 0, axis=1).astype(rows.dtype) for rows in (x, y)]
        return (_squared(u, v) + lost[0][:, None] + lost[1][None, :]) / 2
    squared = _squared(x, y)
    return squared if distance == "sqeuclidean" else safe_sqrt(squared)


def aligned(x: ArrayLike, y: ArrayLike, distance: str = "euclidean") -> Array:
    """The distance of each row of x from the same row of y, [n, d] and [n, d] -> [n].

    Computed from the difference, so that a row is at distance exactly 0 from its copy. Dtypes
    and errors as `pairwise`.

    >>> aligned([[1.0, 1.0], [3.0, 0.0]], [[1.0, 1.0], [0.0, 4.0]]).tolist()
    [0.0, 5.0]
    """
    x, y = _matrices(x, y, distance)
    if x.shape != y.shape:
        raise UserError(f"aligned distances need equal shapes, not {x.shape} and {y.shape}")
    if distance == "dot":
        return -jnp.sum(x * y, axis=1)
    if distance == "cosine":
        # |u - v|^2 / 2 = 1 - <u, v> for unit vectors, without the cancellation; but a zero
        # vector has no direction, and is at distance 1 from all.
        u, v = unit(x), unit(y)
        directed = jnp.any(x != 0, axis=1) & jnp.any(y != 0, axis=1)
        return jnp.where(directed, jnp.sum((u - v) ** 2, axis=1) / 2, 1)
    squared = jnp.sum((x - y) ** 2, axis=1)
    return squared if distance == "sqeuclidean" else safe_sqrt(squared)


def safe_sqrt(squared: Array) -> Array:
    """The root, with derivative 0 instead of infinity where the argument is 0 (or denormal).

    Equal points so have a finite gradient, and their distance stays 0 rather than the root of
    an epsilon. The inner `where` keeps the infinity out of the backward pass.
    """
    positive = squared > jnp.finfo(squared.dtype).tiny
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def unit(x: Array) -> Array:
    """Rows of length 1; a zero row stays 0 with a finite gradient.

    Dividing by the largest entry first keeps the squares from over- or underflowing; the result
    does not depend on it, so neither does the gradient.
    """
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0))
    x = x / jnp.where(largest > 0, largest, 1)
    norm = safe_sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def _squared(x: Array, y: Array) -> Array:
    """|x_i - y_j|^2 [n, m]."""
    origin = lax.stop_gradient(_amid(y))
    x, y = x - origin, y - origin
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    return jnp.maximum(norms - 2 * _products(x, y), 0)


def _amid(y: Array) -> Array:
    """A point amid the rows, [1, d]: the mean of those that lie near the mean of all.

    A few rows far outside must not move it away from the others. Zero rows have no say, as masked
    ones and the empty slots of a memory are zero.
    """

    def mean(keep: Array) -> Array:
        count = jnp.maximum(jnp.sum(keep, dtype=jnp.int32), 1).astype(y.dtype)
        return jnp.sum(jnp.where(keep[:, None], y, 0), axis=0, keepdims=True) / count

    there = jnp.any(y != 0, axis=1)
    squared = jnp.sum((y - mean(there)) ** 2, axis=1)
    squared = jnp.where(there, squared, jnp.inf)
    return mean(there & (squared <= 16 * jnp.min(squared, initial=jnp.inf)))


def _products(x: Array, y: Array) -> Array:
    """<x_i, y_j>, without the reduced precision that accelerators use by default."""
    return jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)


def _matrices(x: ArrayLike, y: ArrayLike, distance: str) -> tuple[Array, Array]:
    check(distance)
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"distances need x [n, d] and y [m, d], not {x.shape} and {y.shape}")
    dtype = jnp.float64 if jnp.float64 in (x.dtype, y.dtype) else jnp.float32
    return x.astype(dtype), y.astype(dtype)
