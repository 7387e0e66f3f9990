"""Smooth stand-ins for average precision: FastAP and Smooth-AP."""

import jax
import jax.numpy as jnp
from jax import lax

from siamese_jax import distances
from siamese_jax.losses.core import (
    Loss,
    as_weights,
    check_positive,
    no_params,
    ratio,
    similarity,
    view,
)


def fast_ap(bins: int = 10) -> Loss:
    """FastAP: average precision from histograms of the squared distance on the unit sphere.

        h+_j, h_j = how many positives, and how many of all, fall into bin j; each is shared
                    between its two nearest bin centres, 0, 4 / bins, ..., 4
        l_a = 1 - 1/|P| sum_j h+_j H+_j / H_j,  H the cumulative sum of h

    Cakir et al.: Deep Metric Learning to Rank (2019). Values [n]; the loss is the mean over the
    anchors that have positives.

    Defined values: 0 with weight 0 for an anchor without positives, 0 for one without negatives.
    """
    check_positive("fast_ap", bins=bins)

    def apply(params, embeddings, labels, mask=None, *, mined=None, references=None):
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

    return Loss(no_params, apply)


def smooth_ap(temperature: float = 0.01) -> Loss:
    """Smooth-AP: average precision with a sigmoid in place of the step, s the cosine.

        R_S(i) = sum over j in S, j != i, of sigmoid((s_j - s_i) / t)
        l_a = 1 - 1/|P| sum_(i in P) (1 + R_P(i)) / (1 + R_P(i) + R_N(i))

    Brown et al.: Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval (2020). Values
    [n]; the loss is the mean over the anchors that have positives. Anchors are taken one after
    another and recomputed in the backward pass: memory n^2, not n^3.

    Defined values: 0 with weight 0 for an anchor without positives, 0 for one without negatives.
    """
    check_positive("smooth_ap", temperature=temperature)

    @jax.checkpoint
    def one(row):
        s, positive, negative = row
        above = jax.nn.sigmoid((s[None, :] - s[:, None]) / temperature)
        others = positive[None, :] & ~jnp.eye(s.shape[0], dtype=bool)
        among_positives = 1 + jnp.sum(jnp.where(others, above, 0), axis=1)
        among_all = among_positives + jnp.sum(jnp.where(negative[None, :], above, 0), axis=1)
        total = jnp.sum(jnp.where(positive, among_positives / among_all, 0))
        return ratio(total, as_weights(jnp.sum(positive), s))

    def apply(params, embeddings, labels, mask=None, *, mined=None, references=None):
        v = view(embeddings, labels, mask, mined, references, normalize=True)
        s = similarity(v.x, v.y, "cosine")
        some = jnp.any(v.positive, axis=1)
        values = jnp.where(some, 1 - lax.map(one, (s, v.positive, v.negative)), 0)
        return values, as_weights(some, s)

    return Loss(no_params, apply)
