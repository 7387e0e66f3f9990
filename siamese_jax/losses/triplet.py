"""The triplet margin loss, over explicit, all, batch-hard, semi-hard or mined triplets."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances, miners
from siamese_jax.errors import UserError
from siamese_jax.losses.core import (
    Loss,
    as_weights,
    check_choice,
    no_params,
    ratio,
    refuse,
    view,
)
from siamese_jax.miners import Triplets

_MINING = ("explicit", "all", "hard", "semi_hard")


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

    No triplet with a hinge needs n^3 numbers: what is active is counted after sorting each row.
    With soft or swap, anchors are taken one after another and recomputed in the backward pass.

    Defined values: 0 where there is no triplet. Equal points have distance 0 with gradient 0, a
    zero vector stays 0 when normalised.
    """
    distances.check(distance)
    check_choice("triplet", "mining", mining, _MINING)
    check_choice("triplet", "average", average, ("active", "all"))
    if mining == "semi_hard":
        own_miner = miners.semi_hard(margin, distance=distance, normalize=normalize)
    else:
        own_miner = miners.hard(distance=distance, normalize=normalize)

    def term(positive, negative):
        x = positive - negative + margin
        return jax.nn.softplus(x) if soft else jnp.maximum(x, 0)

    def weigh(values, valid):
        return values, as_weights(valid & (values > 0) if average == "active" else valid, values)

    def explicit(embeddings, mask):
        if embeddings.shape[0] % 3:
            raise UserError(
                f"loss triplet: explicit triplets are rows a, p, n, a, p, n, ..., but "
                f"{embeddings.shape[0]} rows is not a multiple of 3"
            )
        x = miners.candidates(embeddings, mask, None)
        x = distances.unit(x) if normalize else x
        a, p, n = x[0::3], x[1::3], x[2::3]
        negative = distances.aligned(a, n, distance)
        if swap:
            negative = jnp.minimum(negative, distances.aligned(p, n, distance))
        present = jnp.ones(len(x), bool) if mask is None else mask.astype(bool)
        valid = present[0::3] & present[1::3] & present[2::3]
        return weigh(term(distances.aligned(a, p, distance), negative), valid)

    def listed(v, mined):
        d = distances.pairwise(v.x, v.y, distance)
        negative = d[mined.anchor, mined.negative]
        if swap:
            among = distances.pairwise(v.y, v.y, distance)
            negative = jnp.minimum(negative, among[mined.positive, mined.negative])
        return weigh(term(d[mined.anchor, mined.positive], negative), mined.mask)

    def every(v):
        d = distances.pairwise(v.x, v.y, distance)
        triplets = jnp.sum(v.positive, axis=1) * jnp.sum(v.negative, axis=1)
        if soft or swap:
            among = distances.pairwise(v.y, v.y, distance) if swap else None
            total, active = _sum_one_by_one(term, d, among, v.positive, v.negative)
        else:
            total, active = _sum_of_hinges(d, v.positive, v.negative, margin)
        count = active if average == "active" else triplets
        count = as_weights(count, d)
        return ratio(total, count), count

    def apply(params, embeddings, labels, mask=None, *, mined=None, references=None):
        if mining == "explicit":
            refuse("triplet", "mining is explicit", mined=mined, references=references)
            return explicit(embeddings, mask)
        if mining != "all":
            refuse("triplet", f"it mines by itself (mining={mining!r})", mined=mined)
            mined = own_miner(embeddings, labels, mask, references=references)
        restrict = None if isinstance(mined, Triplets) else mined
        v = view(embeddings, labels, mask, restrict, references, normalize=normalize)
        return listed(v, mined) if isinstance(mined, Triplets) else every(v)

    return Loss(no_params, apply)


def active_counts(d: Array, positive: Array, negative: Array, margin: float) -> tuple[Array, Array]:
    """In how many active triplets (d_ap + margin > d_an) each pair takes part.

    Args:
      d: [n, m] distances; positive, negative: bool [n, m].

    Returns:
      int32 [n, m] for the pair as (a, p), and as (a, n); 0 for other pairs. Found by sorting, in
      O(m log m) an anchor.
    """
    reach = d + margin

    def one(d, reach, positive, negative):
        negatives = jnp.sort(jnp.where(negative, d, jnp.inf))
        below = jnp.searchsorted(negatives, reach, side="left")
        reaches = jnp.sort(jnp.where(positive, reach, -jnp.inf))
        above = d.shape[0] - jnp.searchsorted(reaches, d, side="right")
        return jnp.where(positive, below, 0), jnp.where(negative, above, 0)

    return jax.vmap(one)(d, reach, positive, negative)


def _sum_of_hinges(
    d: Array, positive: Array, negative: Array, margin: float
) -> tuple[Array, Array]:
    """Per anchor, the sum of [d_ap - d_an + margin]_+ over all its triplets, and how many are > 0.

    Each active triplet adds d_ap + margin - d_an, so with k the number of active triplets of a
    pair, the sum is linear in the distances: sum_p k_ap (d_ap + margin) - sum_n k_an d_an. Its
    gradient is that of the hinges. As many are added as taken away, so all distances may be
    measured from the anchor's mean one, which keeps the two sums small.
    """
    as_p, as_n = active_counts(lax.stop_gradient(d), positive, negative, margin)
    active = jnp.sum(as_p, axis=1)
    origin = lax.stop_gradient(jnp.mean(d, axis=1, keepdims=True))
    signed = (as_p - as_n).astype(d.dtype)
    total = jnp.sum(signed * (d - origin), axis=1) + margin * active.astype(d.dtype)
    return total, active


def _sum_one_by_one(term, d, among, positive, negative) -> tuple[Array, Array]:
    """As `_sum_of_hinges`, for any term: anchor by anchor, recomputed in the backward pass."""

    @jax.checkpoint
    def one(row):
        d, positive, negative = row
        farther = d[None, :] if among is None else jnp.minimum(d[None, :], among)
        valid = positive[:, None] & negative[None, :]
        values = jnp.where(valid, term(d[:, None], farther), 0)
        return jnp.sum(values), jnp.sum(values > 0)

    return lax.map(one, (d, positive, negative))
