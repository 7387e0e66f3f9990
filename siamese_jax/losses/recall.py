"""A smooth stand-in for recall at k, with embeddings that are mixed of the batch's pairs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
    similarity,
    sum_over_positives,
    view,
)
from siamese_jax.losses.miners import Mined, Pairs, References
from siamese_jax.losses.options import checked_loss

# Its multiples, without their whole part, lie evenly in (0, 1).
_GOLDEN = (5**0.5 - 1) / 2


@checked_loss
def recall_at_k(
    ks: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    temperature: float = 0.01,
    k_temperature: float | Sequence[float] = 1.0,
    mixup: int = 0,
) -> Loss:
    """Recall@k surrogate: sigmoids in place of both steps of recall, s the cosine.

        r(p) = 1 + sum over z != p of sigmoid((s_z - s_p) / temperature)
        R_k = min(k, sum_P sigmoid((k - r(p)) / k_temperature)) / min(k, |P|)
        l_a = 1 - mean_k R_k

    Patel, Tolias, Matas: Recall@k Surrogate Loss with Large Batches and Similarity Mixup (2022).
    z runs over the positives and negatives of the anchor. In the authors' code it runs over the
    anchor itself too, whose cosine is 1: that adds about 1 to each rank, but the anchor is not
    counted among its own answers. The bounds by k are that code's. Values [n]; the
    loss is the mean over the anchors that have positives. It is above 0 for a perfect ranking
    too: the item at rank k counts half. Memory n^2: positives are taken in turn, and again in the
    backward pass.

    Args:
      ks: the ranks.
      k_temperature: 1 in the paper; one for all k, or one for each (in the authors' code k).
      mixup: the paper's similarity mixup. Embeddings v = alpha x + (1 - alpha) z of two unit
        vectors of one class stand beside the batch, as anchors and as candidates; of them only
        s_v = alpha s_x + (1 - alpha) s_z is computed. Each item is mixed with the next `mixup` of
        its class, round the batch, and each pair once. Half a class's items, rounded down, gives
        all its pairs, as in the paper. Values are then [n (1 + mixup)], and no `mined` is taken.
        Time grows with the cube of 1 + mixup. alpha is even on (0, 1) but takes no key: the i-th
        pair of every batch has the fraction of i times the golden ratio, and other images.

    Defined values: 0 with weight 0 for an anchor without positives.
    """
    if isinstance(k_temperature, Sequence) and len(k_temperature) != len(ks):
        raise UserError(
            f"loss recall_at_k: k_temperature={tuple(k_temperature)}: give one number, or one for "
            f"each of the {len(ks)} ks"
        )
    widths = np.broadcast_to(np.asarray(k_temperature, float), len(ks))

    def retrieved(p: Array, has: Array, s: Array, pairs: Pairs) -> Array:
        """How far each anchor's positive p is among its k first: [n, ks]."""
        rivals = (pairs.positive | pairs.negative) & ~jax.nn.one_hot(p, s.shape[1], dtype=bool)
        ahead = (s - jnp.take_along_axis(s, p[:, None], axis=1)) / temperature
        rank = 1 + jnp.sum(jnp.where(rivals, jax.nn.sigmoid(ahead), 0), axis=1)
        room = (jnp.asarray(ks, s.dtype)[None, :] - rank[:, None]) / widths.astype(s.dtype)[None, :]
        return jnp.where(has[:, None], jax.nn.sigmoid(room), 0)

    def apply(
        params: Params,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        *,
        mined: Mined | None = None,
        references: References | None = None,
    ) -> Terms:
        if mixup:
            refuse("recall_at_k", "mixup makes pairs that no miner knows of", mined=mined)
        v = view(embeddings, labels, mask, mined, references, normalize=True)
        s, pairs = similarity(v.x, v.y, "cosine"), Pairs(v.positive, v.negative)
        if mixup:
            s, labels, mask = _mixed(s, labels, v.present, mixup)
            pairs = miners.relations(labels, mask, references)
        k = jnp.asarray(ks, s.dtype)[None, :]
        count = as_weights(jnp.sum(pairs.positive, axis=1, keepdims=True), s)
        total = sum_over_positives(retrieved, pairs.positive, s, pairs)
        recall = ratio(jnp.minimum(total, k), jnp.minimum(k, count))
        there = count[:, 0] > 0
        return jnp.where(there, 1 - jnp.mean(recall, axis=1), 0), as_weights(there, s)

    return Loss(no_params, jax.jit(apply))


def _mixed(s: Array, labels: Array, mask: Array, times: int) -> tuple[Array, Array, Array]:
    """Similarities, labels and mask with n * times mixed rows after the batch's n.

    The mixed columns stand there too, before the references' ones.
    """
    n = s.shape[0]
    first, second, there = _pairs_round(miners.relations(labels, mask, None).positive, times)
    alpha = jnp.asarray(np.arange(1, n * times + 1) * _GOLDEN % 1, s.dtype)[:, None]

    def mix(rows: Array) -> Array:
        return jnp.concatenate([rows, alpha * rows[first] + (1 - alpha) * rows[second]])

    s = mix(s)
    s = jnp.concatenate([mix(s[:, :n].T).T, s[:, n:]], axis=1)
    shared = labels[first] & labels[second] if labels.ndim == 2 else labels[first]
    return s, jnp.concatenate([labels, shared]), jnp.concatenate([mask, there])


def _pairs_round(positive: Array, times: int) -> tuple[Array, Array, Array]:
    """Each item with the next `times` positives after it, round the batch, and each pair once.

    Two indices and whether there is such a pair, [n * times] each.
    """
    seen = jnp.cumsum(positive, axis=1, dtype=jnp.int32)
    turn = seen - jnp.diagonal(seen)[:, None]  # 1 for the next positive, 2 for the one after it
    turn = jnp.where(turn > 0, turn, turn + seen[:, -1:])
    sooner = (turn < turn.T) | ((turn == turn.T) & jnp.triu(jnp.ones(turn.shape, bool)))
    chosen = positive & sooner & (turn <= times)
    size = positive.shape[0] * times
    first, second = jnp.nonzero(chosen, size=size, fill_value=0)
    return first, second, jnp.arange(size) < jnp.sum(chosen)
