"""The pairwise sigmoid loss: every pair is a question of its own, is it a match or not."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax.losses.core import Loss, Params, Terms, as_weights, similarity, view
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def pairwise_sigmoid(scale: float = 10.0, bias: float = -10.0) -> Loss:
    """Pairwise sigmoid loss (SigLIP), s the cosine, with a learned scale and bias:

        l_a = -sum_P log sigmoid(scale s_ap + bias) - sum_N log sigmoid(-(scale s_an + bias))

    Zhai et al.: Sigmoid Loss for Language Image Pre-Training (2023), there between images and
    texts, one positive each. Here both are the batch (and the references), and a row makes no pair
    with itself. As in the paper a row's pairs are summed, not averaged: values [n], the loss is
    their mean. The bias starts low because most pairs are negative.

    Args:
      scale: where the learned scale starts. init gives {"logit_scale": []}, its logarithm, so that
        the scale stays above 0.
      bias: where the learned bias starts. init gives {"logit_bias": []}.

    Defined values: 0 for an anchor without pairs, which counts. A zero vector has cosine 0 with
    all.
    """

    def init(key: Array, embedding_dim: int, num_classes: int) -> Params:
        start = {"logit_scale": math.log(scale), "logit_bias": bias}
        return {name: jnp.full((), value, jnp.float32) for name, value in start.items()}

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
        logits = jnp.exp(params["logit_scale"]).astype(s.dtype) * s
        logits += params["logit_bias"].astype(s.dtype)
        surprise = jax.nn.softplus(jnp.where(v.positive, -logits, logits))
        values = jnp.sum(jnp.where(v.positive | v.negative, surprise, 0), axis=1)
        return values, as_weights(v.present, values)

    return Loss(init, jax.jit(apply))
