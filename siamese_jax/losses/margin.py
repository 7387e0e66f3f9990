"""The margin loss: one boundary between positive and negative distances, learned if asked."""

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
    pair_counts,
    ratio,
    view,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def margin(
    margin: float = 0.2,
    *,
    beta: float = 1.2,
    beta_by: str = "global",
    nu: float = 0.0,
    distance: str = "euclidean",
    normalize: bool = True,
) -> Loss:
    """Margin loss, with a learnable boundary beta:

        l+ = [margin + d_ap - beta]_+,  l- = [margin + beta - d_an]_+
        loss = sum of both / number of pairs where it is above 0, + nu * beta

    Wu et al.: Sampling Matters in Deep Embedding Learning (2017), there with the triplets of
    `miners.distance_weighted`: each counts as its pair (a, p) and its pair (a, n), and a pair that
    was drawn twice counts twice. Without a miner, every pair counts once.

    Args:
      beta: where the boundary starts. init gives {"beta": []}, or {"beta": [classes]} with
        beta_by="class" (by the anchor's class; the mean over its classes if it has several).
      nu: pulls beta down; the mean of the active pairs' beta is charged.
      distance: one of `distances.DISTANCES`.
      normalize: put the embeddings on the unit sphere first.

    Values are per anchor [n]: the mean over its active pairs; weights count those pairs.

    Defined values: 0 where no pair is active. Equal points have distance 0 with gradient 0.
    """

    def init(key: Array, embedding_dim: int, num_classes: int) -> Params:
        shape = (num_classes,) if beta_by == "class" else ()
        return {"beta": jnp.full(shape, beta, jnp.float32)}

    def boundary(params: Params, labels: Array, like: Array) -> Array:
        """beta of each anchor [n, 1]."""
        value = params["beta"].astype(like.dtype)
        if beta_by == "global":
            return jnp.full((labels.shape[0], 1), value)
        targets = class_targets(labels, value.shape[0])
        total = jnp.sum(jnp.where(targets, value[None, :], 0), axis=1, keepdims=True)
        return ratio(total, as_weights(jnp.sum(targets, axis=1, keepdims=True), like))

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        v = view(embeddings, labels, mask, None, references, normalize=normalize)
        pairs = miners.Pairs(v.positive, v.negative)
        often = pair_counts(pairs if mined is None else mined, v.positive.shape)
        d = distances.pairwise(v.x, v.y, distance)
        b = boundary(params, labels, d)
        attract, repel = margin + d - b, margin + b - d
        w_attract = as_weights(jnp.where(v.positive & (attract > 0), often[0], 0), d)
        w_repel = as_weights(jnp.where(v.negative & (repel > 0), often[1], 0), d)
        total = jnp.sum(w_attract * attract + w_repel * repel, axis=1)
        active = jnp.sum(w_attract + w_repel, axis=1)
        return ratio(total, active) + nu * b[:, 0], active

    return Loss(init, jax.jit(apply))
