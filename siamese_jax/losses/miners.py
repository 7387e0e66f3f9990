"""Miners: which pairs or triplets of a batch a loss should look at.

A miner is built once, from `MINERS`, with its options, and then called in every step:

    miner = MINERS["hard"](distance="cosine")
    mined = miner(embeddings, labels, mask, key)                  # Pairs or Triplets
    values, weights = loss.apply(params, embeddings, labels, mask, mined=mined)

All shapes depend on the batch's shape alone, so one compilation serves a whole run: a miner says
"no" with a mask, never by returning fewer rows. Nothing it returns carries a gradient.

The candidates (columns) of every anchor (row) are the batch itself and then, if given, the
references: anything with `embeddings [r, d]`, `labels` and `mask [r]`, such as the cross-batch
memory of `siamese_jax.losses.memory`. An index below n is a row of the batch, n + j is reference j.
The same references must be given to the loss.

Labels are int [n], or a multi-hot bool [n, c]; items match if they share a label, so one without a
label (-1, or a row of zeros; see `siamese_jax.data.labels`) has no positive. An item is never its
own positive. `mask` is bool [n]: a masked row is neither an anchor nor a candidate.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances
from siamese_jax.data.labels import share_all
from siamese_jax.errors import UserError
from siamese_jax.losses.options import checked_miner


class References(Protocol):
    """Extra candidates from outside the batch; they never receive a gradient."""

    @property
    def embeddings(self) -> Array:
        """The candidates, [r, d]."""

    @property
    def labels(self) -> Array:
        """Their labels, int [r] or bool [r, c]."""

    @property
    def mask(self) -> Array:
        """Which of them count, bool [r]."""


class Pairs(NamedTuple):
    """The pairs to use: bool [n, n + r] each, row by anchor, column by candidate."""

    positive: Array
    negative: Array


class Triplets(NamedTuple):
    """The triplets to use: int32 [t] each, and a bool [t] that is false where there is none."""

    anchor: Array
    positive: Array
    negative: Array
    mask: Array


Mined = Pairs | Triplets


class Miner(Protocol):
    """What chooses pairs or triplets in a batch; the module's text says of what shapes."""

    def __call__(
        self,
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Mined: ...


# --- relevance -------------------------------------------------------------------------------


def relevant(labels: Array, others: Array) -> Array:
    """Whether each item shares a label with each other one: [n] and [m] -> bool [n, m].

    Raises:
      UserError: one is a vector of integers and the other a multi-hot matrix.

    >>> relevant(jnp.array([0, 1]), jnp.array([1, 1, 0])).astype(int).tolist()
    [[0, 0, 1], [1, 1, 0]]
    """
    if labels.ndim == 1 and others.ndim == 1:
        return share_all(labels.astype(jnp.int32), others.astype(jnp.int32))
    if labels.ndim == 2 and others.ndim == 2 and labels.shape[1] == others.shape[1]:
        return share_all(labels, others)
    raise UserError(
        f"labels {labels.shape} and {others.shape} cannot be compared: give both as integers [n], "
        "or both as a multi-hot matrix [n, classes]"
    )


def relations(labels: Array, mask: Array | None, references: References | None) -> Pairs:
    """All positive and all negative pairs of a batch with itself and with the references."""
    n = labels.shape[0]
    present = jnp.ones(n, bool) if mask is None else mask.astype(bool)
    same = relevant(labels, labels)
    self_pair = jnp.eye(n, dtype=bool)
    columns = present
    if references is not None:
        same = jnp.concatenate([same, relevant(labels, references.labels)], axis=1)
        columns = jnp.concatenate([present, references.mask.astype(bool)])
        self_pair = jnp.pad(self_pair, ((0, 0), (0, references.labels.shape[0])))
    usable = present[:, None] & columns[None, :]
    # An item without any label does not even match itself: it must not become its own negative.
    usable &= ~self_pair
    return Pairs(same & usable, ~same & usable)


def candidates(embeddings: Array, mask: Array | None, references: References | None) -> Array:
    """The batch's rows, then the references': [n + r, d], float32 or float64.

    What a masked row holds is replaced by zeros, so not even a NaN there reaches a result.
    """
    x = _blank(embeddings, mask)
    if references is None:
        return x
    extra = lax.stop_gradient(_blank(references.embeddings, references.mask)).astype(x.dtype)
    return jnp.concatenate([x, extra])


def _blank(x: Array, mask: Array | None) -> Array:
    x = x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
    return x if mask is None else jnp.where(mask.astype(bool)[:, None], x, 0)


def _measure(
    embeddings: Array,
    labels: Array,
    mask: Array | None,
    references: References | None,
    distance: str,
    normalize: bool,
) -> tuple[Array, Pairs]:
    """The distances [n, n + r], without gradient, and the relations."""
    y = lax.stop_gradient(candidates(embeddings, mask, references))
    y = distances.unit(y) if normalize else y
    d = distances.pairwise(y[: embeddings.shape[0]], y, distance)
    return d, relations(labels, mask, references)


# --- miners ----------------------------------------------------------------------------------


@checked_miner
def every() -> Miner:
    """All positive and all negative pairs."""

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Pairs:
        return relations(labels, mask, references)

    return jax.jit(mine)


@checked_miner
def hard(*, distance: str = "euclidean", normalize: bool = True) -> Miner:
    """Batch-hard: each anchor with its farthest positive and its nearest negative.

    Hermans, Beyer, Leibe: In Defense of the Triplet Loss (2017). Returns n triplets; an anchor
    without a positive or without a negative has none.
    """
    return easy_hard("hard", "hard", distance=distance, normalize=normalize)


@checked_miner
def semi_hard(margin: float = 0.2, *, distance: str = "euclidean", normalize: bool = True) -> Miner:
    """Each positive pair with the nearest negative farther than the positive, within the margin:

        n(a, p) = argmin_n d_an  such that  d_ap < d_an < d_ap + margin

    Schroff, Kalenichenko, Philbin: FaceNet (2015). Returns n (n + r) triplets, one for each pair;
    masked where the pair is not a positive one or no negative is in that range.
    """

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Triplets:
        d, pairs = _measure(embeddings, labels, mask, references, distance, normalize)

        def nearest_farther(p: Array, has: Array) -> tuple[Array, Array]:
            d_ap = _at(d, p)
            allowed = pairs.negative & (d > d_ap) & (d < d_ap + margin) & has[:, None]
            return jnp.argmin(jnp.where(allowed, d, jnp.inf), axis=1), jnp.any(allowed, axis=1)

        return _one_negative_each(nearest_farther, pairs.positive)

    return jax.jit(mine)


@checked_miner
def easy_hard(
    positive: str = "easy",
    negative: str = "semi_hard",
    *,
    distance: str = "euclidean",
    normalize: bool = True,
) -> Miner:
    """For each anchor one positive and one negative, each chosen by its own rule.

        positive: "easy" the nearest, "hard" the farthest,
                  "semi_hard" the farthest of those nearer than the chosen negative
        negative: "easy" the farthest, "hard" the nearest,
                  "semi_hard" the nearest of those farther than the chosen positive
        "all":    every one of them (the result is then `Pairs`, else n `Triplets`)

    Xuan, Stylianou, Pless: Improved Embeddings with Easy Positive Triplet Mining (2020). An anchor
    for which a rule finds nothing is left out.

    Raises:
      UserError: an unknown rule, or "semi_hard" beside "semi_hard" or "all", which give it
        nothing to be measured against.
    """
    if "semi_hard" in (positive, negative) and {positive, negative} & {"all"}:
        raise UserError('easy_hard: "semi_hard" needs "easy" or "hard" on the other side')
    if positive == negative == "semi_hard":
        raise UserError('easy_hard: "semi_hard" needs "easy" or "hard" on the other side')

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Mined:
        d, (pos, neg) = _measure(embeddings, labels, mask, references, distance, normalize)
        if positive == "semi_hard":
            n, neg = _choose(d, neg, nearest=negative == "hard")
            p, pos = _choose(d, pos & (d < _at(d, n)), nearest=False)
        else:
            p, pos = _choose(d, pos, nearest=positive == "easy", keep_all=positive == "all")
            if negative == "semi_hard":
                neg = neg & (d > _at(d, p))
            nearest = negative in ("hard", "semi_hard")
            n, neg = _choose(d, neg, nearest=nearest, keep_all=negative == "all")
        if "all" in (positive, negative):
            both = jnp.any(pos, axis=1, keepdims=True) & jnp.any(neg, axis=1, keepdims=True)
            return Pairs(pos & both, neg & both)
        rows = jnp.arange(d.shape[0], dtype=jnp.int32)
        return Triplets(rows, p, n, jnp.any(pos, axis=1) & jnp.any(neg, axis=1))

    return jax.jit(mine)


@checked_miner
def distance_weighted(cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4) -> Miner:
    """Each positive pair with one negative drawn so that all distances are equally likely:

        P(n | a) ~ 1 / q(max(d_an, cutoff))  if d_an < nonzero_loss_cutoff, else 0
        q(d) = d^(k - 2) (1 - d^2 / 4)^((k - 3) / 2)

    q is the density of the distance of two random points on the unit sphere in k dimensions, on
    which the embeddings are placed first. Wu et al.: Sampling Matters in Deep Embedding Learning
    (2017). Needs a key. Returns n (n + r) triplets, one for each pair; masked where the pair is
    not a positive one or the anchor has no negative within reach.
    """

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Triplets:
        if key is None:
            raise UserError("distance_weighted draws at random: call the miner with a key")
        d, pairs = _measure(embeddings, labels, mask, references, "euclidean", True)
        k = embeddings.shape[1]
        clipped = jnp.maximum(d, cutoff)
        log_q = (k - 2) * jnp.log(clipped) + (k - 3) / 2 * jnp.log(
            jnp.maximum(1 - clipped**2 / 4, 1e-8)
        )
        allowed = pairs.negative & (d < nonzero_loss_cutoff)
        log_weight = jnp.where(allowed, -log_q, -jnp.inf)
        top = jnp.max(log_weight, axis=1, keepdims=True)
        weight = jnp.exp(log_weight - jnp.where(jnp.isfinite(top), top, 0))
        # Inverse of the cumulative distribution: the first column whose sum exceeds the draw.
        cumulative = jnp.cumsum(weight, axis=1)
        draws = jax.random.uniform(key, d.shape, d.dtype) * cumulative[:, -1:]

        def drawn(p: Array, has: Array) -> tuple[Array, Array]:
            n = jnp.sum(cumulative <= _at(draws, p), axis=1)
            n = jnp.minimum(n, d.shape[1] - 1)
            return n, has & _at(allowed, n)[:, 0]

        return _one_negative_each(drawn, pairs.positive)

    return jax.jit(mine)


@checked_miner
def multi_similarity(epsilon: float = 0.1) -> Miner:
    """Pairs that are hard relative to the anchor's pairs of the other kind, s the cosine:

        keep n if s_an > min_p s_ap - epsilon,  keep p if s_ap < max_n s_an + epsilon

    Wang et al.: Multi-Similarity Loss with General Pair Weighting (2019).
    """

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Pairs:
        d, (pos, neg) = _measure(embeddings, labels, mask, references, "cosine", True)
        s = 1 - d
        hardest_positive = jnp.min(jnp.where(pos, s, jnp.inf), axis=1, keepdims=True)
        hardest_negative = jnp.max(jnp.where(neg, s, -jnp.inf), axis=1, keepdims=True)
        return Pairs(pos & (s < hardest_negative + epsilon), neg & (s > hardest_positive - epsilon))

    return jax.jit(mine)


@checked_miner
def pair_margin(
    positive_margin: float = 0.2,
    negative_margin: float = 0.8,
    *,
    distance: str = "euclidean",
    normalize: bool = True,
) -> Miner:
    """Positive pairs farther than one margin and negative pairs nearer than another."""

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Pairs:
        d, (pos, neg) = _measure(embeddings, labels, mask, references, distance, normalize)
        return Pairs(pos & (d > positive_margin), neg & (d < negative_margin))

    return jax.jit(mine)


@checked_miner
def angular(angle: float = 20.0) -> Miner:
    """Each positive pair with the negative that sees it under the widest angle, if wide enough.

    With the centre c = (a + p) / 2, the angle (in degrees) at the negative is

        atan(|a - p| / (2 |n - c|)),  4 |n - c|^2 = 2 |n - a|^2 + 2 |n - p|^2 - |a - p|^2

    so the widest angle belongs to the negative nearest to the centre, and only squared distances
    are needed. Wang et al.: Deep Metric Learning with Angular Loss (2017). Embeddings are placed
    on the unit sphere. Returns n (n + r) triplets, one for each pair; masked where the pair is not
    a positive one or its widest angle is not above `angle`. Memory n (n + r): anchors are taken
    one after another.
    """
    tangent = math.tan(math.radians(angle))

    def mine(
        embeddings: Array,
        labels: Array,
        mask: Array | None = None,
        key: Array | None = None,
        *,
        references: References | None = None,
    ) -> Triplets:
        y = distances.unit(lax.stop_gradient(candidates(embeddings, mask, references)))
        pairs = relations(labels, mask, references)
        squared = distances.pairwise(y, y, "sqeuclidean")

        rows = embeddings.shape[0]

        def widest(p: Array, has: Array) -> tuple[Array, Array]:
            from_anchor, apart = squared[:rows], _at(squared[:rows], p)
            four_centre = 2 * from_anchor + 2 * squared[p] - apart
            four_centre = jnp.where(pairs.negative, four_centre, jnp.inf)
            nearest = jnp.maximum(jnp.min(four_centre, axis=1), 0)
            wide = apart[:, 0] > tangent**2 * nearest
            return jnp.argmin(four_centre, axis=1), has & wide & jnp.any(pairs.negative, axis=1)

        return _one_negative_each(widest, pairs.positive)

    return jax.jit(mine)


def _choose(
    d: Array, allowed: Array, *, nearest: bool, keep_all: bool = False
) -> tuple[Array, Array]:
    """Each row's nearest or farthest allowed column [n], and the mask reduced to that choice."""
    if nearest:
        index = jnp.argmin(jnp.where(allowed, d, jnp.inf), axis=1)
    else:
        index = jnp.argmax(jnp.where(allowed, d, -jnp.inf), axis=1)
    if keep_all:
        return index.astype(jnp.int32), allowed
    chosen = jax.nn.one_hot(index, d.shape[1], dtype=bool)
    return index.astype(jnp.int32), allowed & chosen


def _at(d: Array, index: Array) -> Array:
    return jnp.take_along_axis(d, index[:, None], axis=1)


def _one_negative_each(choose: Callable[..., tuple[Array, Array]], positive: Array) -> Triplets:
    """Triplets of all pairs (a, p) in row order; choose(p, has) gives (n, valid), [n] each."""
    rows, columns = positive.shape
    anchor = jnp.arange(rows)

    def fill(p: Array, has: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        n, valid = choose(p, has)
        # Anchors that have had all their positives write beyond the end, where it is lost.
        p = jnp.where(has, p, columns)
        n = n.astype(jnp.int32)
        return (
            found[0].at[anchor, p].set(n, mode="drop"),
            found[1].at[anchor, p].set(valid, mode="drop"),
        )

    nothing = jnp.zeros(positive.shape, jnp.int32), jnp.zeros(positive.shape, bool)
    negative, mask = in_turn(fill, positive, nothing)
    return Triplets(
        jnp.repeat(jnp.arange(rows, dtype=jnp.int32), columns),
        jnp.tile(jnp.arange(columns, dtype=jnp.int32), rows),
        negative.ravel(),
        mask.ravel(),
    )


def in_turn(body: Callable[..., Any], positive: Array, carry: Any) -> Any:
    """Calls body(p, has, carry) with every anchor's next positive, until none is left.

    What belongs to a positive pair and all the anchor's candidates is an array [n, m, m], of which
    all but a few slices are empty when a class has few items in the batch. So it is made slice by
    slice: as many as the anchor with most positives has. Shapes stay fixed, the number of turns
    does not; hence no gradient passes through (but see `losses.core.sum_over_positives`).

    Args:
      positive: bool [n, m].
      body: (p int32 [n], has bool [n], carry) -> carry. `has` is false for an anchor that has had
        its turns; its p is then 0.
      carry: a tree of arrays, as it is before the first turn.

    Returns:
      The carry after the last turn.
    """
    rows = jnp.arange(positive.shape[0])

    def turn(state: tuple[Array, Any]) -> tuple[Array, Any]:
        left, carry = state
        p, has = jnp.argmax(left, axis=1), jnp.any(left, axis=1)
        return left.at[rows, p].set(False), body(p, has, carry)

    return lax.while_loop(lambda state: jnp.any(state[0]), turn, (positive, carry))[1]


MINERS: dict[str, Callable[..., Miner]] = {
    "all": every,
    "hard": hard,
    "semi_hard": semi_hard,
    "easy_hard": easy_hard,
    "distance_weighted": distance_weighted,
    "multi_similarity": multi_similarity,
    "pair_margin": pair_margin,
    "angular": angular,
}
