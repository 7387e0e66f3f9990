"""Losses that pick the positive out of its negatives by a softmax: N-pairs, NT-Xent, SupCon."""

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax.errors import UserError
from siamese_jax.losses import miners
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    Views,
    as_weights,
    log_sum_exp,
    no_params,
    ratio,
    refuse,
    similarity,
    view,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def n_pairs(*, l2: float = 0.0, distance: str = "dot") -> Loss:
    """Multi-class N-pair loss: each pair's positive against the positives of the other pairs.

        l_i = log(1 + sum_j e^(<x_i, y_j> - <x_i, y_i>)) + l2 (|x_i|^2 + |y_i|^2) / 2

    j runs over the pairs whose y does not match x_i, and over the references that do not. The rows
    are interleaved x0, y0, x1, y1, ..., as a sampler of classes with an even number of images each
    gives them. Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective (2016).

    Args:
      l2: weight of the embeddings' squared norm, which the paper uses in place of normalising.
      distance: "dot", or "cosine" for the cosine in place of the inner product.

    Values [n / 2], the loss is their mean. A pair whose rows share no label, or of which a row is
    masked, has weight 0.

    Defined values: 0 where there is no pair; without negatives only the l2 part is left.
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
        refuse("n_pairs", "the order of the rows says which pairs to use", mined=mined)
        n = embeddings.shape[0]
        if n % 2:
            raise UserError(
                f"loss n_pairs: pairs are rows x, y, x, y, ..., but {n} rows is an odd number"
            )
        z = miners.candidates(embeddings, mask, references)
        positive, negative = miners.relations(labels, mask, references)
        x, y = z[0:n:2], jnp.concatenate([z[1:n:2], z[n:]])
        columns = jnp.concatenate([jnp.arange(1, n, 2), jnp.arange(n, z.shape[0])])
        s = similarity(x, y, distance)
        own = jnp.diagonal(s)
        others = log_sum_exp(s, negative[0:n:2][:, columns])
        norms = (jnp.sum(x**2, axis=1) + jnp.sum(y[: n // 2] ** 2, axis=1)) / 2
        values = jax.nn.softplus(others - own) + l2 * norms
        matches = jnp.diagonal(positive[0:n:2, 1:n:2])
        return values, as_weights(matches, values)

    return Loss(no_params, jax.jit(apply))


@checked_loss
def nt_xent(temperature: float = 0.07, *, distance: str = "cosine") -> Loss:
    """Normalised-temperature cross-entropy (InfoNCE), t the temperature, s the cosine:

        l_ap = -log(e^(s_ap / t) / (e^(s_ap / t) + sum_N e^(s_an / t)))

    Each positive pair has only itself and the anchor's negatives in the denominator. Sohn (2016);
    van den Oord et al.: Representation Learning with Contrastive Predictive Coding (2018); Chen et
    al.: A Simple Framework for Contrastive Learning of Visual Representations (2020). Values are
    per anchor [n], the mean over its positives; weights count them, so the loss is the mean over
    positive pairs. distance="dot" takes the inner product instead.

    Defined values: 0 for a pair without negatives (which counts) and where there is no pair.
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
        return pair_cross_entropy(similarity(v.x, v.y, distance) / temperature, v)

    return Loss(no_params, jax.jit(apply))


def pair_cross_entropy(s: Array, v: Views) -> Terms:
    """-log of each positive pair's share e^s of its own and the anchor's negatives', [n] each."""
    negatives = log_sum_exp(s, v.negative)
    terms = jnp.where(v.positive, jax.nn.softplus(negatives[:, None] - s), 0)
    count = as_weights(jnp.sum(v.positive, axis=1), terms)
    return ratio(jnp.sum(terms, axis=1), count), count


@checked_loss
def sup_con(temperature: float = 0.1, *, distance: str = "cosine") -> Loss:
    """Supervised contrastive loss, the mean outside the logarithm, s the cosine:

        l_a = -mean_P(s_ap / t - log sum_(P u N) e^(s / t))

    Khosla et al.: Supervised Contrastive Learning (2020). Values [n]; the loss is the mean over the
    anchors where it is above 0. distance="dot" takes the inner product instead.

    Defined values: 0 with weight 0 for an anchor without positives.
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
        s = similarity(v.x, v.y, distance) / temperature
        everyone = log_sum_exp(s, v.positive | v.negative)
        terms = jnp.where(v.positive, everyone[:, None] - s, 0)
        count = as_weights(jnp.sum(v.positive, axis=1), terms)
        values = ratio(jnp.sum(terms, axis=1), count)
        return values, as_weights((count > 0) & (values > 0), values)

    return Loss(no_params, jax.jit(apply))
