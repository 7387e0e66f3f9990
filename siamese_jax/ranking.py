"""rank(): the exact k nearest gallery items of every query, in bounded memory."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import ArrayLike

from siamese_jax.distances import check
from siamese_jax.errors import UserError


class Ranking(NamedTuple):
    """The gallery items found for each query, nearest first.

    Attributes:
      indices: int32 [q, k], rows of the gallery; -1 where fewer than k items remain.
      distances: float32 [q, k], ascending; +inf where the index is -1.
    """

    indices: np.ndarray
    distances: np.ndarray


def rank(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    distance: str = "euclidean",
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = 256 * 2**20,
) -> Ranking:
    """The k nearest gallery items of every query, exactly.

    Args:
      queries: [q, d] real.
      gallery: [g, d] real.
      k: how many to return, at least 1.
      distance: "euclidean", "sqeuclidean", "cosine" or "dot".
      query_ids: int [q]; a gallery item with the query's own id is left out.
      gallery_ids: int [g], needed with `query_ids`.
      memory_limit: bytes of working memory.

    Returns:
      A `Ranking`. Equal distances are in ascending order of the gallery's rows.

    Raises:
      UserError: unknown distance, shapes that do not match, or rows that are not finite.

    >>> rank([[0.0, 0.0]], [[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]], k=2)
    Ranking(indices=array([[1, 2]], dtype=int32), distances=array([[1., 1.]], dtype=float32))
    """
    check(distance)
    queries, gallery = np.asarray(queries), np.asarray(gallery)
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries {queries.shape} and gallery {gallery.shape} are not [q, d], [g, d]"
        )
    q, g = len(queries), len(gallery)
    if (query_ids is None) != (gallery_ids is None):
        raise UserError("give both query_ids and gallery_ids, or neither")
    own = np.full(q, -1) if query_ids is None else np.asarray(query_ids)
    ids = np.full(g, -2) if gallery_ids is None else np.asarray(gallery_ids)
    _, codes = np.unique(np.concatenate([own, ids]), return_inverse=True)
    own, ids = np.split(codes.astype(np.int32), [q])
    found = []
    size_q, size_g = 256, 4096
    for i in range(0, q, size_q):
        x = jnp.asarray(queries[i : i + size_q], jnp.float32)
        best = Ranking(
            jnp.full((len(x), k), -1, jnp.int32), jnp.full((len(x), k), jnp.inf, jnp.float32)
        )
        for j in range(0, g, size_g):
            y = jnp.asarray(gallery[j : j + size_g], jnp.float32)
            best = _merge(
                best, x, y, own[i : i + size_q], ids[j : j + size_g], j, distance
            )
        found.append(best)
    return Ranking(*(np.concatenate(column) for column in zip(*found, strict=True)))


@partial(jax.jit, static_argnames="distance")
def _merge(best: Ranking, x: Array, y: Array, own: Array, ids: Array, start: int, distance: str):
    scores = _scores(x, y, distance)
    scores = jnp.where(own[:, None] == ids[None, :], jnp.inf, scores)
    rows = start + jnp.broadcast_to(jnp.arange(len(y), dtype=jnp.int32)[None, :], scores.shape)
    scores = jnp.concatenate([best.distances, scores], axis=1)
    rows = jnp.concatenate([best.indices, rows], axis=1)
    k = best.indices.shape[1]
    top, places = jax.lax.top_k(-scores, k)
    rows = jnp.take_along_axis(rows, places, axis=1)
    return Ranking(jnp.where(top == -jnp.inf, -1, rows), -top)


def _scores(x: Array, y: Array, distance: str) -> Array:
    """Distances [q, g] from the differences themselves, so that equal rows are at exactly 0."""
    if distance == "dot":
        return -jnp.matmul(x, y.T, precision="highest")
    if distance == "cosine":
        x, y = _unit(x), _unit(y)
    squared = jnp.sum((x[:, None, :] - y[None, :, :]) ** 2, axis=2)
    return {"euclidean": jnp.sqrt(squared), "sqeuclidean": squared, "cosine": squared / 2}[distance]


def _unit(x: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)
