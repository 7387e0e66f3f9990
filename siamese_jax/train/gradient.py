"""The gradient of a batch's loss: of all its images at once, or of one chunk after the other.

    e_i = f(w, x_i),   L = loss(e_1 .. e_n),   dL/dw = sum of (de_i/dw)^T dL/de_i

The loss needs all embeddings; the encoder's backward pass needs only those of its chunk. So all are
embedded, the loss gives the gradient of each embedding, and each chunk is embedded again to pass
its own on: the same gradient in the memory of a chunk, for one forward pass more (GradCache, Gao et
al. 2021, arXiv:2101.06983). What `embed` gives for an image must not depend on the others then: no
batch statistics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any
Embed = Callable[[Tree, Tree, Array], tuple[Array, Tree]]  # weights, batch, key -> [n, d], stats
Measure = Callable[[Array, Tree, Tree, Array], Array]  # embeddings, weights, batch, key -> loss []


class Gradient(NamedTuple):
    """What a batch gives.

    Attributes:
      value: the loss, [].
      grads: of the weights.
      embeddings: [n, d], without a gradient.
      batch_stats: the new ones, None where they are as before.
    """

    value: Array
    grads: Tree
    embeddings: Array
    batch_stats: Tree = None


def whole(embed: Embed, measure: Measure, weights: Tree, batch: Tree, keys: Array) -> Gradient:
    """Of all images at once; `keys` are that of `embed` and that of `measure`."""

    def compute(weights: Tree) -> tuple[Array, tuple[Array, Tree]]:
        embeddings, batch_stats = embed(weights, batch, keys[0])
        value = measure(embeddings, weights, batch, keys[1])
        return value, (jax.lax.stop_gradient(embeddings), batch_stats)

    (value, (embeddings, batch_stats)), grads = jax.value_and_grad(compute, has_aux=True)(weights)
    return Gradient(value, grads, embeddings, batch_stats)


def in_chunks(
    embed: Embed, measure: Measure, weights: Tree, batch: Tree, keys: Array, chunks: int
) -> Gradient:
    """The same of one chunk after the other; what is drawn by `embed` is drawn for each."""
    parts, own_keys = split(batch, chunks), jax.random.split(keys[0], chunks)
    found = jax.lax.map(lambda part: embed(weights, *part)[0], (parts, own_keys))
    embeddings = joined(found, len(jax.tree.leaves(batch)[0]))
    value, (passed, grads) = jax.value_and_grad(measure, argnums=(0, 1))(
        embeddings, weights, batch, keys[1]
    )

    def add(total: Tree, part: tuple[Tree, Array, Array]) -> tuple[Tree, None]:
        images, key, of_embeddings = part
        _, pull = jax.vjp(lambda weights: embed(weights, images, key)[0], weights)
        return jax.tree.map(jnp.add, total, pull(of_embeddings)[0]), None

    # What fills a chunk has no part in the loss: its gradient is 0.
    grads, _ = jax.lax.scan(add, grads, (parts, own_keys, split(passed, chunks, "constant")))
    return Gradient(value, grads, embeddings)


def split(columns: Tree, chunks: int, fill: str = "edge") -> Tree:
    """Columns [n, ...] as [chunks, m, ...], m = ceil(n / chunks).

    Chunk k has the rows k, k + chunks, ...: where rows are split over devices, each chunk is too.
    They are filled up with the last row, or as `jnp.pad` calls another `fill`: "constant" is zeros.

    >>> split(jnp.arange(1, 6), 2).tolist()
    [[1, 3, 5], [2, 4, 5]]
    """

    def of(column: Array) -> Array:
        more = [(0, -len(column) % chunks)] + [(0, 0)] * (column.ndim - 1)
        column = jnp.pad(column, more, mode=fill)
        return column.reshape(-1, chunks, *column.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(of, columns)


def joined(chunks: Array, rows: int) -> Array:
    """The [n, ...] that `split` has made [chunks, m, ...] of.

    >>> joined(split(jnp.arange(1, 6), 2), 5).tolist()
    [1, 2, 3, 4, 5]
    """
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:rows]
