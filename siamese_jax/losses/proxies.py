"""Losses that compare embeddings with one learned proxy per class: proxy-NCA, proxy-anchor."""

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
    class_targets,
    cross_entropy,
    log_one_plus_sum_exp,
    log_sum_exp,
    ratio,
    refuse,
    similarity,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss

_WHY = "it compares embeddings with its own proxies, not with each other"


def init_proxies(key: Array, embedding_dim: int, num_classes: int) -> Params:
    """{"proxies": [classes, d]}: random directions, of length about 1."""
    proxies = jax.random.normal(key, (num_classes, embedding_dim), jnp.float32)
    return {"proxies": proxies * embedding_dim**-0.5}


@checked_loss
def proxy_nca(scale: float = 1.0, *, own_in_denominator: bool = True) -> Loss:
    """Proxy-NCA, d the Euclidean distance of unit vectors, q_c the proxy of class c:

        l_i = -log(e^(-scale d(x_i, q_y)^2) / sum_c e^(-scale d(x_i, q_c)^2))

    Teh, DeVries, Taylor: ProxyNCA++ (2020), where scale is 1 / temperature, 9 in the paper. With
    own_in_denominator=False the sum leaves the item's own proxies out: Movshovitz-Attias et al.: No
    Fuss Distance Metric Learning using Proxies (2017); that loss can be negative.

    init gives {"proxies": [classes, d]}. Values [n], the loss is their mean; the mean over the
    item's labels if it has several. An item without a label of 0 .. classes - 1 has weight 0, and
    without own_in_denominator so has one that has every label.

    Defined values: a zero vector is at distance 1 from every proxy.
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
        refuse("proxy_nca", _WHY, mined=mined, references=references)
        x = distances.unit(miners.candidates(embeddings, mask, None))
        proxies = distances.unit(params["proxies"].astype(x.dtype))
        logits = -scale * distances.pairwise(x, proxies, "sqeuclidean")
        targets = class_targets(labels, proxies.shape[0])
        if own_in_denominator:
            return cross_entropy(logits, targets, mask)
        others = log_sum_exp(logits, ~targets)[:, None]
        count = as_weights(jnp.sum(targets, axis=1), logits)
        valid = (count > 0) & ~jnp.all(targets, axis=1)
        valid = valid if mask is None else valid & mask.astype(bool)
        terms = jnp.where(targets & valid[:, None], others - logits, 0)
        return ratio(jnp.sum(terms, axis=1), count), as_weights(valid, logits)

    return Loss(init_proxies, jax.jit(apply))


@checked_loss
def proxy_anchor(margin: float = 0.1, alpha: float = 32.0) -> Loss:
    """Proxy-anchor loss: every proxy is an anchor, s the cosine.

        loss = 1/|C+| sum_c log(1 + sum_(x of c)     e^(-alpha (s(x, q_c) - margin)))
             + 1/|C|  sum_c log(1 + sum_(x not of c) e^( alpha (s(x, q_c) + margin)))

    C+ are the classes present in the batch. Kim et al.: Proxy Anchor Loss for Deep Metric Learning
    (2020). init gives {"proxies": [classes, d]}. Values and weights are per class [classes]; the
    first part carries the factor |C| / |C+|, so that the mean of the values is the loss.

    Defined values: 0 where all rows are masked.
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
        refuse("proxy_anchor", _WHY, mined=mined, references=references)
        x = distances.unit(miners.candidates(embeddings, mask, None))
        proxies = distances.unit(params["proxies"].astype(x.dtype))
        s = similarity(x, proxies, "cosine")
        targets = class_targets(labels, proxies.shape[0])
        present = jnp.ones(len(x), bool) if mask is None else mask.astype(bool)
        positive, negative = targets & present[:, None], ~targets & present[:, None]
        attract = log_one_plus_sum_exp(-alpha * (s - margin), positive, axis=0)
        repel = log_one_plus_sum_exp(alpha * (s + margin), negative, axis=0)
        classes_present = as_weights(jnp.sum(jnp.any(positive, axis=0)), s)
        factor = ratio(jnp.full_like(classes_present, proxies.shape[0]), classes_present)
        return attract * factor + repel, jnp.ones_like(repel)

    return Loss(init_proxies, jax.jit(apply))
