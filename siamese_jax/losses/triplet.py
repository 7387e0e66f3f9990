"""The triplet margin loss, over explicit, all, batch-hard, semi-hard or mined triplets."""

from typing import NamedTuple

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
    Views,
    as_weights,
    no_params,
    ratio,
    refuse,
    sum_over_positives,
    view,
)
from siamese_jax.losses.miners import Mined, References, Triplets
from siamese_jax.losses.options import checked_loss


@checked_loss
def triplet(
    margin: float = 0.2,
    *,
    mining: str = "all",
    distance: str = "euclidean",
    normalize: bool = True,
    soft: bool = False,
    swap: bool = False,
    average: str = "active",
) -> Loss:
    """Triplet margin loss: the positive must be nearer than the negative by a margin.

        l(a, p, n) = [d_ap - d_an + margin]_+            hinge
                   = log(1 + exp(d_ap - d_an + margin))  if soft (margin 0 in the paper)
        swap: d_an is replaced by min(d_an, d_pn)

    Schroff et al.: FaceNet (2015); Hermans et al.: In Defense of the Triplet Loss (2017) for
    batch-hard and soft; Balntas et al.: Learning local feature descriptors (2016) for swap.

    Args:
      mining: where the triplets come from.
        "all": every (a, p, n) of the batch. Values and weights are per anchor [n].
        "hard": for each anchor its farthest positive and nearest negative, found among the rows
          whose mask is true; labels say which is which. An anchor without one of the two has
          weight 0. Values [n].
        "semi_hard": for each positive pair the nearest negative farther than the positive, within
          the margin (`miners.semi_hard`). Values [n * m], row by pair.
        "explicit": the rows are interleaved a0, p0, n0, a1, p1, n1, ...; n is a multiple of 3.
          Labels are not read. A triplet counts if its three rows do. Values [n / 3].
      distance: one of `distances.DISTANCES`.
      normalize: put the embeddings on the unit sphere first.
      average: "active" is the mean over the triplets with a loss above 0 (with soft: all of them),
        "all" the mean over all triplets.

    `mined` restricts "all" to the mined `Pairs` (all their triplets) or `Triplets` (values [t]).

    "all" never holds n^3 numbers: the anchors' positives are taken in turn, and again in the
    backward pass.

    Defined values: 0 where there is no triplet. Equal points have distance 0 with gradient 0, a
    zero vector stays 0 when normalised.
    """
    options = _Options(margin, distance, normalize, soft, swap, average)
    if mining == "semi_hard":
        own_miner = miners.semi_hard(margin, distance=distance, normalize=normalize)
    else:
        own_miner = miners.hard(distance=distance, normalize=normalize)

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        if mining == "explicit":
            refuse("triplet", "mining is explicit", mined=mined, references=references)
            return _explicit(options, embeddings, mask)
        if mining != "all":
            refuse("triplet", f"it mines by itself (mining={mining!r})", mined=mined)
            mined = own_miner(embeddings, labels, mask, references=references)
        restrict = None if isinstance(mined, Triplets) else mined
        v = view(embeddings, labels, mask, restrict, references, normalize=normalize)
        return _listed(options, v, mined) if isinstance(mined, Triplets) else _every(options, v)

    return Loss(no_params, jax.jit(apply))


class _Options(NamedTuple):
    """What `triplet` was asked for."""

    margin: float
    distance: str
    normalize: bool
    soft: bool
    swap: bool
    average: str


def _term(options: _Options, positive: Array, negative: Array) -> Array:
    """l(a, p, n) of distances to the positives and the negatives."""
    x = positive - negative + options.margin
    return jax.nn.softplus(x) if options.soft else jnp.maximum(x, 0)


def _weighed(options: _Options, values: Array, valid: Array) -> Terms:
    """The values, and what each counts in the mean."""
    counts = valid & (values > 0) if options.average == "active" else valid
    return values, as_weights(counts, values)


def _explicit(options: _Options, embeddings: Array, mask: Array | None) -> Terms:
    """Of rows a0, p0, n0, a1, p1, n1, ..."""
    if embeddings.shape[0] % 3:
        raise UserError(
            f"loss triplet: explicit triplets are rows a, p, n, a, p, n, ..., but "
            f"{embeddings.shape[0]} rows is not a multiple of 3"
        )
    x = miners.candidates(embeddings, mask, None)
    x = distances.unit(x) if options.normalize else x
    a, p, n = x[0::3], x[1::3], x[2::3]
    negative = distances.aligned(a, n, options.distance)
    if options.swap:
        negative = jnp.minimum(negative, distances.aligned(p, n, options.distance))
    present = jnp.ones(len(x), bool) if mask is None else mask.astype(bool)
    valid = present[0::3] & present[1::3] & present[2::3]
    positive = distances.aligned(a, p, options.distance)
    return _weighed(options, _term(options, positive, negative), valid)


def _listed(options: _Options, v: Views, mined: Triplets) -> Terms:
    """Of the triplets that were mined."""
    d = distances.pairwise(v.x, v.y, options.distance)
    negative = d[mined.anchor, mined.negative]
    if options.swap:
        among = distances.pairwise(v.y, v.y, options.distance)
        negative = jnp.minimum(negative, among[mined.positive, mined.negative])
    positive = d[mined.anchor, mined.positive]
    return _weighed(options, _term(options, positive, negative), mined.mask)


def _every(options: _Options, v: Views) -> Terms:
    """Of all triplets of the batch: one value an anchor, the mean over its triplets."""

    def of_positive(
        p: Array, has: Array, floats: tuple[Array, Array | None], negative: Array
    ) -> Terms:
        """The sum, and number above 0, of each anchor's terms with its positive p: [n] each."""
        d, among = floats
        d_an = d if among is None else jnp.minimum(d, among[p])
        d_ap = jnp.take_along_axis(d, p[:, None], axis=1)
        values = jnp.where(has[:, None] & negative, _term(options, d_ap, d_an), 0)
        return jnp.sum(values, axis=1), jnp.sum(values > 0, axis=1).astype(d.dtype)

    d = distances.pairwise(v.x, v.y, options.distance)
    triplets = jnp.sum(v.positive, axis=1) * jnp.sum(v.negative, axis=1)
    among = distances.pairwise(v.y, v.y, options.distance) if options.swap else None
    total, active = sum_over_positives(of_positive, v.positive, (d, among), v.negative)
    count = as_weights(active if options.average == "active" else triplets, d)
    return ratio(total, count), count
