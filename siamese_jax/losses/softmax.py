"""Losses that classify: plain softmax."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import miners
from siamese_jax.errors import UserError
from siamese_jax.losses.core import Loss, as_weights, ratio, refuse

_WHY = "it compares embeddings with its own class weights, not with each other"


def softmax() -> Loss:
    """Softmax classification: the baseline, whose penultimate features are the embedding.

        z = x W + b,  l_i = -log softmax(z_i)[y_i]

    init gives {"kernel": [d, classes], "bias": [classes]}. Values and weights [n], the loss is
    their mean. With multi-hot labels, l_i is the mean over the item's labels; an item without a
    label of 0 .. classes - 1 has weight 0.
    """

    def init(key, embedding_dim, num_classes):
        kernel = jax.random.normal(key, (embedding_dim, num_classes), jnp.float32)
        return {"kernel": kernel * embedding_dim**-0.5, "bias": jnp.zeros(num_classes)}

    def apply(params, embeddings, labels, mask=None, *, mined=None, references=None):
        refuse("softmax", _WHY, mined=mined, references=references)
        x = miners.candidates(embeddings, mask, None)
        kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
        logits = jnp.matmul(x, kernel, precision=lax.Precision.HIGHEST) + bias[None, :]
        return cross_entropy(logits, class_targets(labels, kernel.shape[1]), mask)

    return Loss(init, apply)


def class_targets(labels: Array, num_classes: int) -> Array:
    """Labels as bool [n, classes]; a label outside 0 .. classes - 1 gives a row without any."""
    if labels.ndim == 1:
        return jax.nn.one_hot(labels, num_classes, dtype=bool)
    if labels.shape[1] != num_classes:
        raise UserError(
            f"labels have {labels.shape[1]} classes, but the loss was initialised for {num_classes}"
        )
    return labels.astype(bool)


def cross_entropy(logits: Array, targets: Array, mask: Array | None) -> tuple[Array, Array]:
    """-log softmax at the targets (their mean if several), and weights: [n, classes] -> [n]."""
    surprise = jax.nn.logsumexp(logits, axis=1, keepdims=True) - logits
    count = jnp.sum(targets, axis=1)
    values = ratio(jnp.sum(jnp.where(targets, surprise, 0), axis=1), as_weights(count, logits))
    valid = count > 0 if mask is None else (count > 0) & mask.astype(bool)
    return values, as_weights(valid, values)
