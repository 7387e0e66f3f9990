"""Losses that weigh an anchor's pairs by how hard they are: multi-similarity, circle, lifted."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    as_weights,
    log_one_plus_sum_exp,
    log_sum_exp,
    no_params,
    similarity,
    view,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def multi_similarity(
    alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, *, distance: str = "cosine"
) -> Loss:
    """Multi-similarity loss, s the cosine (or, with distance="dot", the inner product):

        l_a = 1/alpha log(1 + sum_P e^(alpha (base - s_ap)))
            + 1/beta  log(1 + sum_N e^(beta (s_an - base)))

    Wang et al.: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning (2019),
    there with the pairs of `miners.multi_similarity`. Values [n]; the loss is the mean over all
    anchors, those without a pair (0) included.

    Defined values: 0 for an anchor without pairs, and for a batch without anchors.
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
        v = view(embeddings, labels, mask, mined, references, normalize=distance == "cosine")
        s = similarity(v.x, v.y, distance)
        values = log_one_plus_sum_exp(alpha * (base - s), v.positive) / alpha
        values += log_one_plus_sum_exp(beta * (s - base), v.negative) / beta
        return values, as_weights(v.present, values)

    return Loss(no_params, jax.jit(apply))


@checked_loss
def circle(margin: float = 0.4, scale: float = 80.0) -> Loss:
    """Circle loss, s the cosine; the factors [.]_+ carry no gradient:

        l_a = log(1 + sum_P e^(-scale [1 + margin - s_ap]_+ (s_ap - 1 + margin))
                    * sum_N e^( scale [s_an + margin]_+     (s_an - margin)))

    Sun et al.: Circle Loss: A Unified Perspective of Pair Similarity Optimization (2020). Values
    [n]; the loss is the mean over the anchors where it is above 0.

    Defined values: 0 for an anchor that lacks positives or negatives.
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
        fixed = lax.stop_gradient(s)
        attract = -scale * jnp.maximum(1 + margin - fixed, 0) * (s - (1 - margin))
        repel = scale * jnp.maximum(fixed + margin, 0) * (s - margin)
        values = jax.nn.softplus(log_sum_exp(attract, v.positive) + log_sum_exp(repel, v.negative))
        return values, as_weights(v.present & (values > 0), values)

    return Loss(no_params, jax.jit(apply))


@checked_loss
def lifted_structure(
    margin: float = 1.0, *, distance: str = "euclidean", normalize: bool = True
) -> Loss:
    """Generalised lifted structure loss, which takes all of an anchor's positives together:

        l_a = [log sum_P e^(d_ap) + log sum_N e^(margin - d_an)]_+

    Song et al.: Deep Metric Learning via Lifted Structured Feature Embedding (2016), in the form of
    Hermans, Beyer, Leibe: In Defense of the Triplet Loss (2017). Values [n]; the loss is the mean
    over the anchors that have both positives and negatives.

    Args:
      distance: one of `distances.DISTANCES`.
      normalize: put the embeddings on the unit sphere first.

    Defined values: 0 with weight 0 for an anchor that lacks positives or negatives.
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
        v = view(embeddings, labels, mask, mined, references, normalize=normalize)
        d = distances.pairwise(v.x, v.y, distance)
        values = log_sum_exp(d, v.positive) + log_sum_exp(margin - d, v.negative)
        valid = jnp.any(v.positive, axis=1) & jnp.any(v.negative, axis=1)
        return jnp.maximum(values, 0), as_weights(valid, values)

    return Loss(no_params, jax.jit(apply))
