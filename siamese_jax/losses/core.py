"""What the losses share: the `Loss` pair, the reduction, and sums that survive empty sets."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from siamese_jax import distances
from siamese_jax.errors import UserError
from siamese_jax.losses import miners
from siamese_jax.losses.miners import Mined, Pairs, References

Params = dict[str, Array]
Terms = tuple[Array, Array]  # values and weights, [m] each


class Loss(NamedTuple):
    """A loss as a pair of functions, like optax's transformations.

    init(key, embedding_dim, num_classes) -> params
        A dict of float32 arrays, empty for losses that learn nothing.
    apply(params, embeddings, labels, mask=None, *, mined=None, references=None)
        -> (values [m], weights [m])
        embeddings: [n, d], any float dtype; sums are float32 (float64 for float64).
        labels: int [n], or multi-hot bool [n, classes].
        mask: bool [n]; a row that is false counts for nothing, whatever it holds.
        mined: `Pairs` or `Triplets` of a miner, to look at these only.
        references: more candidates (see `siamese_jax.losses.miners`).
        Weights carry no gradient, and are 0 for a term that is not defined. Jitted.
    """

    init: Callable[..., Params]
    apply: Callable[..., Terms]


def reduce(values: Array, weights: Array) -> Array:
    """sum(values * weights) / sum(weights), and 0 if all weights are 0.

    >>> float(reduce(jnp.array([1.0, 4.0, 9.0]), jnp.array([1.0, 2.0, 0.0])))
    3.0
    """
    return ratio(jnp.sum(values * weights), jnp.sum(weights))


def mean(
    loss: Loss,
    params: Params,
    embeddings: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    mined: Mined | None = None,
    references: References | None = None,
) -> Array:
    """The scalar, reduced as the loss's paper reduces it; 0 where no term is defined."""
    extra = {"mined": mined, "references": references}
    return reduce(*loss.apply(params, embeddings, labels, mask, **extra))


def no_params(key: Array, embedding_dim: int, num_classes: int) -> Params:
    """`init` of a loss that learns nothing."""
    return {}


class Views(NamedTuple):
    """A batch as a pair loss sees it: anchors x [n, d], candidates y [m, d], which pairs count."""

    x: Array
    y: Array
    positive: Array  # bool [n, m]
    negative: Array  # bool [n, m]
    present: Array  # bool [n]


def view(
    embeddings: Array,
    labels: Array,
    mask: Array | None,
    mined: Mined | None,
    references: References | None,
    *,
    normalize: bool,
) -> Views:
    """The pairs of the batch (and references), reduced to the mined ones."""
    n = embeddings.shape[0]
    y = miners.candidates(embeddings, mask, references)
    y = distances.unit(y) if normalize else y
    pairs = miners.relations(labels, mask, references)
    if mined is not None:
        chosen = pair_counts(mined, pairs.positive.shape)
        pairs = Pairs(pairs.positive & (chosen[0] > 0), pairs.negative & (chosen[1] > 0))
    present = jnp.ones(n, bool) if mask is None else mask.astype(bool)
    return Views(y[:n], y, *pairs, present)


def pair_counts(mined: Mined, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """How often each pair was mined, as positive and as negative: float32 [n, m] each."""
    if isinstance(mined, Pairs):
        counts = mined.positive.astype(jnp.float32), mined.negative.astype(jnp.float32)
        if counts[0].shape != shape or counts[1].shape != shape:
            raise UserError(
                f"mined pairs are {mined.positive.shape}, the loss sees {shape}: give miner and "
                "loss the same batch and the same references"
            )
        return counts
    keep = mined.mask.astype(jnp.float32)
    nothing = jnp.zeros(shape, jnp.float32)
    return (
        nothing.at[mined.anchor, mined.positive].add(keep),
        nothing.at[mined.anchor, mined.negative].add(keep),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_positives(term: Callable[..., Any], positive: Array, floats: Any, fixed: Any) -> Any:
    """The sum over each anchor's positives of term(p [n], has [n], floats, fixed).

    The memory of a single term is enough, for the gradient too: the backward pass computes the
    terms anew. See `miners.in_turn`.

    Args:
      term: gives a tree of floats [n, ...], 0 where `has` is false; it closes over no array.
      positive: bool [n, m].
      floats: a tree of arrays that receive a gradient.
      fixed: a tree of arrays that do not.
    """
    start = jnp.zeros(positive.shape[0], jnp.int32), jnp.zeros(positive.shape[0], bool)
    shapes = jax.eval_shape(term, *start, floats, fixed)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(p: Array, has: Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, term(p, has, floats, fixed))

    return miners.in_turn(add, positive, zeros)


def _sum_forward(
    term: Callable[..., Any], positive: Array, floats: Any, fixed: Any
) -> tuple[Any, Any]:
    return sum_over_positives(term, positive, floats, fixed), (positive, floats, fixed)


def _sum_backward(term: Callable[..., Any], kept: Any, cotangent: Any) -> tuple[None, Any, None]:
    positive, floats, fixed = kept

    def add(p: Array, has: Array, gradient: Any) -> Any:
        _, pull = jax.vjp(lambda floats: term(p, has, floats, fixed), floats)
        return jax.tree.map(jnp.add, gradient, pull(cotangent)[0])

    return None, miners.in_turn(add, positive, jax.tree.map(jnp.zeros_like, floats)), None


sum_over_positives.defvjp(_sum_forward, _sum_backward)


def similarity(x: Array, y: Array, distance: str) -> Array:
    """Cosine or inner product [n, m]."""
    if distance == "cosine":
        x, y = distances.unit(x), distances.unit(y)
    return -distances.pairwise(x, y, "dot")


def ratio(a: Array, b: Array) -> Array:
    """a / b, and 0 with gradient 0 where b is 0."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


# Stands for the log of nothing: exp() of it is 0, and sums of a few of them stay finite.
LOG_ZERO = -1e30


def log_sum_exp(x: Array, keep: Array, axis: int = -1) -> Array:
    """log of the sum of exp(x) over the kept entries; LOG_ZERO, with gradient 0, if none is."""
    largest = jnp.max(jnp.where(keep, x, LOG_ZERO), axis=axis, keepdims=True)
    # The difference is at most 0, and 0 somewhere; but a compiler may round x otherwise here than
    # in the maximum, by 1000 at x = 1e10. The bound and the 1 keep the result finite then.
    below = jnp.minimum(x - lax.stop_gradient(largest), 1)
    total = jnp.sum(jnp.where(keep, jnp.exp(jnp.where(keep, below, 0)), 0), axis=axis)
    total = jnp.log(jnp.where(total > 0, total, 1)) + lax.stop_gradient(largest).squeeze(axis)
    return jnp.where(jnp.any(keep, axis=axis), total, LOG_ZERO)


def log_one_plus_sum_exp(x: Array, keep: Array, axis: int = -1) -> Array:
    """log(1 + sum of exp(x) over the kept entries): 0 if none is."""
    return jax.nn.softplus(log_sum_exp(x, keep, axis))


def as_weights(x: Array, like: Array) -> Array:
    """Weights in the dtype of the values, without gradient."""
    return lax.stop_gradient(x.astype(like.dtype))


def refuse(loss: str, why: str, **given: Any) -> None:
    """Raises `UserError` for an argument that the loss would have to ignore."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"loss {loss} takes no {name}: {why}")


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
    everything = log_sum_exp(logits, jnp.ones(logits.shape, bool))
    surprise = everything[:, None] - logits
    count = jnp.sum(targets, axis=1)
    values = ratio(jnp.sum(jnp.where(targets, surprise, 0), axis=1), as_weights(count, logits))
    valid = count > 0 if mask is None else (count > 0) & mask.astype(bool)
    return values, as_weights(valid, values)
