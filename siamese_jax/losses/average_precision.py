"""Smooth stand-ins for average precision: FastAP, Smooth-AP, and ROADMAP with its SupAP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax import distances
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    Views,
    as_weights,
    no_params,
    ratio,
    similarity,
    sum_over_positives,
    view,
)
from siamese_jax.losses.miners import Mined, Pairs, References
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
def smooth_ap(temperature: float = 0.01, *, self_included: bool = False) -> Loss:
    """Smooth-AP: average precision with a sigmoid in place of the step, s the cosine.

        R_S(i) = sum over j in S, j != i, of sigmoid((s_j - s_i) / t)
        l_a = 1 - 1/|P| sum_(i in P) (1 + R_P(i)) / (1 + R_P(i) + R_N(i))

    Brown et al.: Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval (2020). Values
    [n]; the loss is the mean over the anchors that have positives. Memory n^2: positives
    are taken in turn, and again in the backward pass.

    Args:
      self_included: count each anchor among its own positives. The paper ranks the rest of the
        batch, and so does this loss; the authors' code (and pytorch-metric-learning's) leaves the
        anchor in. An anchor without other positives counts then too.

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
        s = similarity(v.x, v.y, "cosine")
        return _one_less_precision(s, v, rise, rise, self_included)

    def rise(t: Array) -> Array:
        return jax.nn.sigmoid(t / temperature)

    return Loss(no_params, jax.jit(apply))


@checked_loss
def roadmap(
    temperature: float = 0.01,
    *,
    rho: float = 100.0,
    delta: float = 0.05,
    calibration: float = 0.5,
    positive_threshold: float = 0.9,
    negative_threshold: float = 0.6,
    self_included: bool = False,
) -> Loss:
    """ROADMAP: an upper bound of the loss in average precision, and thresholds for the cosine s.

        R_P(i) = sum over j in P, j != i, of [s_j >= s_i]
        R_N(i) = sum over j in N of H(s_j - s_i), never less than the true step but at 0:
          H(x) = sigmoid(min(x, delta) / t) + 1/2 [x > 0] + rho [x - delta]_+
        SupAP_a = 1 - 1/|P| sum_(i in P) (1 + R_P(i)) / (1 + R_P(i) + R_N(i))
        l_a = (1 - calibration) SupAP_a
            + calibration (1/|P| sum_P [positive_threshold - s_i]_+
                         + 1/|N| sum_N [s_j - negative_threshold]_+)

    Ramzi et al.: Robust and Decomposable Average Precision for Image Retrieval (2021). SupAP alone
    is calibration=0. Its gradient never stops where a negative is far ahead, as Smooth-AP's does.
    Thresholds that hold for every batch make the mean over batches closer to the whole set's value.

    This is the paper's formula. The authors' code is another: beyond delta, H is 100 x + 1.44, so
    that it jumps there, from 1.49 to 6.44; both terms have the weight 1, twice the loss of
    calibration=0.5; and the means over P and N leave out what costs nothing.

    Values [n]; the loss is the mean over the anchors that have positives. Memory as `smooth_ap`.

    Args:
      self_included: as in `smooth_ap`; for the authors' code it is true.

    Defined values: 0 with weight 0 for an anchor without positives; without negatives the first
    threshold is left.
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
        s = similarity(v.x, v.y, "cosine")
        values, weights = _one_less_precision(s, v, step, bound, self_included)
        low = _mean_where(v.positive, jnp.maximum(positive_threshold - s, 0))
        high = _mean_where(v.negative, jnp.maximum(s - negative_threshold, 0))
        values = (1 - calibration) * values + calibration * (low + high)
        return jnp.where(weights > 0, values, 0), weights

    def step(t: Array) -> Array:
        return as_weights(t >= 0, t)

    def bound(t: Array) -> Array:
        below = jax.nn.sigmoid(jnp.minimum(t, delta) / temperature) + as_weights(t > 0, t) / 2
        return below + rho * jnp.maximum(t - delta, 0)

    return Loss(no_params, jax.jit(apply))


def _mean_where(keep: Array, x: Array) -> Array:
    """The mean of each row's kept entries; 0 where none is."""
    return ratio(jnp.sum(jnp.where(keep, x, 0), axis=1), as_weights(jnp.sum(keep, axis=1), x))


def _one_less_precision(
    s: Array,
    v: Views,
    positive_step: Callable[[Array], Array],
    negative_step: Callable[[Array], Array],
    self_included: bool,
) -> Terms:
    """1 - the mean precision of each anchor at its positives, by a step for either kind of rival.

    A step takes by how much a rival's similarity is above the positive's, [n, m].
    """

    def precision(p: Array, has: Array, s: Array, pairs: Pairs) -> Array:
        """Of each anchor at its positive p: [n]."""
        here = jax.nn.one_hot(p, s.shape[1], dtype=bool)
        ahead = s - jnp.take_along_axis(s, p[:, None], axis=1)
        r_p = 1 + jnp.sum(jnp.where(pairs.positive & ~here, positive_step(ahead), 0), axis=1)
        r_n = jnp.sum(jnp.where(pairs.negative, negative_step(ahead), 0), axis=1)
        return jnp.where(has, r_p / (r_p + r_n), 0)

    positive = v.positive
    if self_included:
        positive |= jnp.eye(s.shape[0], s.shape[1], dtype=bool) & v.present[:, None]
    total = sum_over_positives(precision, positive, s, Pairs(positive, v.negative))
    count = as_weights(jnp.sum(positive, axis=1), s)
    return jnp.where(count > 0, 1 - ratio(total, count), 0), as_weights(count > 0, s)
