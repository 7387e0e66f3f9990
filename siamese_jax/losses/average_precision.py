"""Smooth stand-ins for average precision: FastAP and Smooth-AP."""

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax import distances
from siamese_jax.losses import miners
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    as_weights,
    no_params,
    ratio,
    similarity,
    sum_over_positives,
    view,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def fast_ap(bins: int = 10) -> Loss:
    """FastAP: average precision from histograms of the squared distance on the unit sphere.

        h+_j, h_j = how many positives, and how many of all, fall into bin j; each is shared
                    between its two nearest bin centres, 0, 4 / bins, ..., 4
        l_a = 1 - 1/|P| sum_j h+_j H+_j / H_j,  H the cumulative sum of h

    Cakir et al.: Deep Metric Learning to Rank (2019). Values [n]; the loss is the mean over the
    anchors that have positives.

    Defined values: 0 with weight 0 for an anchor without positives, 0 for one without negatives.
    """

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        v = view(embeddings, labels, mask, mined, references, normalize=True)
        d = distances.pairwise(v.x, v.y, "sqeuclidean")
        width = 4 / bins
        centres = jnp.linspace(0, 4, bins + 1, dtype=d.dtype)
        share = jnp.maximum(1 - jnp.abs(d[:, :, None] - centres[None, None, :]) / width, 0)
        h_positive = jnp.sum(jnp.where(v.positive[:, :, None], share, 0), axis=1)
        h_all = h_positive + jnp.sum(jnp.where(v.negative[:, :, None], share, 0), axis=1)
        precision = ratio(jnp.cumsum(h_positive, axis=1), jnp.cumsum(h_all, axis=1))
        count = as_weights(jnp.sum(v.positive, axis=1), d)
        values = 1 - ratio(jnp.sum(h_positive * precision, axis=1), count)
        return jnp.where(count > 0, values, 0), as_weights(count > 0, d)

    return Loss(no_params, jax.jit(apply))


@checked_loss
def smooth_ap(temperature: float = 0.01) -> Loss:
    """Smooth-AP: average precision with a sigmoid in place of the step, s the cosine.

        R_S(i) = sum over j in S, j != i, of sigmoid((s_j - s_i) / t)
        l_a = 1 - 1/|P| sum_(i in P) (1 + R_P(i)) / (1 + R_P(i) + R_N(i))

    Brown et al.: Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval (2020). Values
    [n]; the loss is the mean over the anchors that have positives. Memory n^2: positives
    are taken in turn, and again in the backward pass.

    Defined values: 0 with weight 0 for an anchor without positives, 0 for one without negatives.
    """

    def precision(p: Array, has: Array, s: Array, pairs: miners.Pairs) -> Array:
        """The smooth precision of each anchor at its positive p: [n]."""
        here = jax.nn.one_hot(p, s.shape[1], dtype=bool)
        s_p = jnp.take_along_axis(s, p[:, None], axis=1)
        above = jax.nn.sigmoid((s - s_p) / temperature)
        r_p = 1 + jnp.sum(jnp.where(pairs.positive & ~here, above, 0), axis=1)
        r_n = jnp.sum(jnp.where(pairs.negative, above, 0), axis=1)
        return jnp.where(has, r_p / (r_p + r_n), 0)

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        v = view(embeddings, labels, mask, mined, references, normalize=True)
        s = similarity(v.x, v.y, "cosine")
        pairs = miners.Pairs(v.positive, v.negative)
        total = sum_over_positives(precision, v.positive, s, pairs)
        count = as_weights(jnp.sum(v.positive, axis=1), s)
        return jnp.where(count > 0, 1 - ratio(total, count), 0), as_weights(count > 0, s)

    return Loss(no_params, jax.jit(apply))
