"""Watching for collapse: embeddings that shrink to a point or a line, and stop learning.

A hard-mined triplet loss that stays at its margin is the classic sign: all distances are equal, as
they are when all embeddings are. On the way there they draw together, and no triplet is learnt.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances
from siamese_jax.losses import miners
from siamese_jax.losses.core import ratio

POINT = 0.05
LINE = 0.9
MARGIN = 0.2  # of the triplets that count as active
CLOSER = 0.5  # of the mean distance that a run began with
ALL = 0.95  # of the triplets, where nothing is told apart


def embedding_statistics(
    embeddings: Array, labels: Array, mask: Array | None = None
) -> dict[str, Array]:
    """Four numbers that tell a healthy batch from a collapsed one; runs under jit.

    Args:
      embeddings: [n, d], any float dtype.
      labels: int [n] or multi-hot bool [n, classes].
      mask: bool [n].

    Returns:
      float32 scalars, each 0 where it is not defined (no row, no triplet, no variance):
        mean_distance: mean Euclidean distance of the pairs, on the unit sphere: 0 to 2, near
          sqrt(2) for directions without relation; sqrt(2) too without a pair, so that a batch of
          one row does not look collapsed.
        mean_norm: mean length of the embeddings, as they are.
        active_triplets: share of all triplets with d_ap - d_an + MARGIN > 0, on the unit sphere.
        first_component: share of the variance, on the unit sphere, along its main direction; 1 if
          all lie on a line.
    """
    x = lax.stop_gradient(miners.candidates(embeddings, mask, None)).astype(jnp.float32)
    present = jnp.ones(len(x), bool) if mask is None else mask.astype(bool)
    count = jnp.sum(present).astype(jnp.float32)
    norms = distances.safe_sqrt(jnp.sum(x * x, axis=1))
    u = distances.unit(x)
    positive, negative = miners.relations(labels, mask, None)
    d = distances.pairwise(u, u, "euclidean")
    pairs = positive | negative

    def count_active(p: Array, has: Array, total: Array) -> Array:
        reach = jnp.take_along_axis(d, p[:, None], axis=1) + MARGIN
        return total + jnp.sum(has[:, None] & negative & (d < reach), axis=1, dtype=jnp.int32)

    active = miners.in_turn(count_active, positive, jnp.zeros(len(x), jnp.int32))
    triplets = jnp.sum(positive, axis=1) * jnp.sum(negative, axis=1)
    mean_distance = ratio(_total(jnp.where(pairs, d, 0)), _total(pairs))
    return {
        "mean_distance": jnp.where(jnp.any(pairs), mean_distance, math.sqrt(2)),
        "mean_norm": ratio(jnp.sum(norms), count),
        "active_triplets": ratio(_total(active), _total(triplets)),
        "first_component": _first_component(u, present, count),
    }


def _total(counts: Array) -> Array:
    """The sum in float32, in which counts of triplets cannot overflow."""
    return jnp.sum(counts.astype(jnp.float32))


def _first_component(u: Array, present: Array, count: Array) -> Array:
    """The largest eigenvalue of the rows' covariance over the sum of all."""
    centre = ratio(jnp.sum(jnp.where(present[:, None], u, 0), axis=0), count)
    x = jnp.where(present[:, None], u - centre[None, :], 0)
    # x x^T and x^T x have the same eigenvalues, but for zeros: take the smaller one.
    x = x if x.shape[0] < x.shape[1] else x.T
    scatter = jnp.matmul(x, x.T, precision=lax.Precision.HIGHEST)
    total = jnp.trace(scatter)
    # Rounding alone leaves a variance of about 1e-14 a row; it has no direction worth a number.
    total = jnp.where(total > 1e-12 * count, total, 0)
    return ratio(jnp.linalg.eigvalsh(scatter)[-1], total)


def collapse_warning(
    statistics: Mapping[str, Array | float], start: Mapping[str, Array | float] | None = None
) -> str | None:
    """One line saying that the embeddings have collapsed and what to try, or None if they have not.

    A head that begins at random may give embeddings that lie close together, and all triplets are
    active then too: it is no collapse until their distance has halved.

    Args:
      statistics: of `embedding_statistics`, best averaged over some steps.
      start: those that the run began with, where they are known.

    >>> start = {"mean_distance": 1.3, "mean_norm": 9.0, "active_triplets": 0.1,
    ...          "first_component": 0.2}
    >>> collapse_warning(start) is None
    True
    >>> now = {**start, "mean_distance": 0.28, "active_triplets": 1.0}
    >>> collapse_warning(now, start).partition(":")[0]
    'the embeddings have collapsed towards each other'
    """
    distance = float(statistics["mean_distance"])
    share = float(statistics["first_component"])
    active = float(statistics["active_triplets"])
    began = float(start["mean_distance"]) if start else 0.0
    if distance < POINT:
        what = f"to a point: their mean distance on the unit sphere is {distance:.3g}"
    elif share > LINE:
        what = f"to a line: {share:.0%} of their variance lies along one direction"
    elif distance < CLOSER * began and active > ALL:
        what = (
            f"towards each other: their mean distance on the unit sphere fell from {began:.3g} to "
            f"{distance:.3g}, and in {active:.0%} of the triplets the positive is not nearer than "
            f"the negative by {MARGIN:g}"
        )
    else:
        return None
    return (
        f"the embeddings have collapsed {what}. Try a lower learning rate, semi-hard or all "
        "triplets instead of the hardest, a soft margin, or more classes in a batch"
    )
