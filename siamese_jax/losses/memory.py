"""Cross-batch memory: the embeddings of recent batches as more candidates for miners and losses.

Embeddings drift slowly, so those of a few hundred steps ago are still good negatives. Wang et al.:
Cross-Batch Memory for Embedding Learning (2020). The memory is a ring buffer of fixed shape, so it
can be part of the jitted training state and of its checkpoints:

    memory = init(1024, dim=128)
    values, weights = loss.apply(params, embeddings, labels, mask, references=references(memory))
    memory = push(memory, embeddings, labels, mask)

Push after the loss: the batch is among its own candidates anyway, without its copies.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from siamese_jax.errors import UserError


class Memory(NamedTuple):
    """A ring buffer; slots that were never written are masked."""

    embeddings: Array  # float32 [size, dim]
    labels: Array  # int32 [size], or bool [size, classes]
    mask: Array  # bool [size]
    position: Array  # int32 [], the slot to write next


def init(size: int, dim: int, label_shape: tuple[int, ...] = ()) -> Memory:
    """An empty memory.

    Args:
      size: the number of embeddings kept.
      dim: their length.
      label_shape: () for integer labels, (classes,) for multi-hot ones.

    Raises:
      UserError: size or dim is below 1, or label_shape has more than one entry.
    """
    if size < 1 or dim < 1:
        raise UserError(f"a memory of size {size} and dim {dim}: both must be at least 1")
    if len(label_shape) > 1:
        raise UserError(f"label_shape={label_shape}: give () for integers or (classes,)")
    return Memory(
        embeddings=jnp.zeros((size, dim), jnp.float32),
        labels=jnp.zeros((size, *label_shape), bool if label_shape else jnp.int32),
        mask=jnp.zeros(size, bool),
        position=jnp.zeros((), jnp.int32),
    )


def push(memory: Memory, embeddings: Array, labels: Array, mask: Array | None = None) -> Memory:
    """Writes the rows whose mask is true over the oldest ones, in order and without gradient.

    Args:
      memory: of `init`.
      embeddings: [n, dim], any float dtype. Of more rows than the memory has slots, the last stay.
      labels: int [n] or bool [n, classes].
      mask: bool [n].

    >>> memory = init(3, 1)
    >>> rows, keep = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([True, False, True])
    >>> memory = push(memory, rows, jnp.array([1, 2, 3]), keep)
    >>> memory = push(memory, 10 * rows, jnp.array([4, 5, 6]))
    >>> memory.labels.tolist(), memory.position.item()
    ([5, 6, 4], 2)
    """
    size = memory.mask.shape[0]
    keep = jnp.ones(embeddings.shape[0], bool) if mask is None else mask.astype(bool)
    order = jnp.cumsum(keep, dtype=jnp.int32)
    count = order[-1]
    keep &= order > count - size
    # A row that is not kept is sent beyond the end, where "drop" loses it.
    slot = jnp.where(keep, (memory.position + order - 1) % size, size)

    def write(old: Array, new: Array) -> Array:
        return old.at[slot].set(lax.stop_gradient(new).astype(old.dtype), mode="drop")

    return Memory(
        embeddings=write(memory.embeddings, embeddings),
        labels=write(memory.labels, labels),
        mask=write(memory.mask, keep),
        position=(memory.position + count) % size,
    )


def references(memory: Memory) -> Memory:
    """The memory as candidates for a miner or a loss, which never receive a gradient."""
    return lax.stop_gradient(memory)
