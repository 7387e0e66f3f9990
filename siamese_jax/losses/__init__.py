"""Losses as pairs of functions: `LOSSES[name](**options)` is a `Loss(init, apply)`.

>>> import jax, jax.numpy as jnp
>>> loss = LOSSES["triplet"](margin=0.5, mining="explicit")
>>> params = loss.init(jax.random.key(0), embedding_dim=2, num_classes=2)
>>> anchor, positive, negative = [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]
>>> rows = jnp.array([anchor, negative, positive])  # the wrong way round: distance sqrt(2) too far
>>> round(float(mean(loss, params, rows, jnp.array([0, 0, 1]))), 4)
1.9142
"""

from collections.abc import Callable

from siamese_jax.losses.contrastive import contrastive
from siamese_jax.losses.core import Loss, mean, reduce
from siamese_jax.losses.softmax import softmax
from siamese_jax.losses.triplet import triplet

__all__ = ["LOSSES", "Loss", "mean", "reduce"]

LOSSES: dict[str, Callable[..., Loss]] = {
    "softmax": softmax,
    "contrastive": contrastive,
    "triplet": triplet,
}
