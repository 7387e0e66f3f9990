"""The contrastive loss, on explicit pairs or on all pairs of a batch."""

import jax
import jax.numpy as jnp
from jax import Array

from siamese_jax import distances
from siamese_jax.errors import UserError
from siamese_jax.losses import miners
from siamese_jax.losses.core import (
    Loss,
    Params,
    Terms,
    as_weights,
    no_params,
    ratio,
    refuse,
    view,
)
from siamese_jax.losses.miners import Mined, References
from siamese_jax.losses.options import checked_loss


@checked_loss
def contrastive(
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    *,
    pairs: str = "batch",
    squared: bool = False,
    distance: str = "euclidean",
    normalize: bool = True,
) -> Loss:
    """Contrastive loss: positives within one margin, negatives beyond another.

        l+(d) = [d - positive_margin]_+,  l-(d) = [negative_margin - d]_+   (each squared if asked)

    Hadsell, Chopra, LeCun: Dimensionality Reduction by Learning an Invariant Mapping (2006), where
    squared is true.

    Args:
      pairs: "batch" takes all pairs; the loss is the mean of l+ over the positive pairs where it
        is above 0, plus the same of l- over the negative ones. Values and weights are per anchor
        [n]: an anchor's share of that sum, times the number of anchors.
        "explicit" reads the rows interleaved x0, y0, x1, y1, ...; a pair is positive if its rows
        share a label. Values [n / 2]; the loss is their mean. A pair counts if both rows do.
      distance: one of `distances.DISTANCES`.
      normalize: put the embeddings on the unit sphere first.

    Defined values: 0 where there is no pair. Equal points have distance 0 with gradient 0.
    """

    def terms(d: Array) -> tuple[Array, Array]:
        attract = jnp.maximum(d - positive_margin, 0)
        repel = jnp.maximum(negative_margin - d, 0)
        return (attract**2, repel**2) if squared else (attract, repel)

    def explicit(embeddings: Array, labels: Array, mask: Array | None) -> Terms:
        if embeddings.shape[0] % 2:
            raise UserError(
                f"loss contrastive: explicit pairs are rows x, y, x, y, ..., but "
                f"{embeddings.shape[0]} rows is an odd number"
            )
        z = miners.candidates(embeddings, mask, None)
        z = distances.unit(z) if normalize else z
        attract, repel = terms(distances.aligned(z[0::2], z[1::2], distance))
        shared = labels[0::2] & labels[1::2] if labels.ndim == 2 else labels[0::2] == labels[1::2]
        match = jnp.any(shared, axis=1) if labels.ndim == 2 else shared
        present = jnp.ones(len(z), bool) if mask is None else mask.astype(bool)
        values = jnp.where(match, attract, repel)
        return values, as_weights(present[0::2] & present[1::2], values)

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        if pairs == "explicit":
            refuse("contrastive", "pairs are explicit", mined=mined, references=references)
            return explicit(embeddings, labels, mask)
        v = view(embeddings, labels, mask, mined, references, normalize=normalize)
        attract, repel = terms(distances.pairwise(v.x, v.y, distance))
        attract, repel = jnp.where(v.positive, attract, 0), jnp.where(v.negative, repel, 0)
        weights = as_weights(v.present, attract)
        share = ratio(jnp.sum(attract, axis=1), as_weights(jnp.sum(attract > 0), attract))
        share += ratio(jnp.sum(repel, axis=1), as_weights(jnp.sum(repel > 0), repel))
        return jnp.sum(weights) * share, weights

    return Loss(no_params, jax.jit(apply))
