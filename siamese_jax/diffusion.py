"""Diffusion: similarity that flows along the gallery's own neighbourhoods (Iscen et al. 2017).

With s(i, j) = max(cos(i, j), 0)^gamma, over the gallery's graph of mutual k nearest neighbours:

    A_ij = s(i, j) where i and j are among each other's k nearest, else 0
    S    = D^(-1/2) A D^(-1/2),  D the row sums of A
    y    = s(q, i) for the query's nearest gallery items, else 0
    f    solves (I - alpha S) f = y

by conjugate gradients; f is large where paths from the query's neighbours lead. Items that no path
reaches follow, in the order of their cosine to the query.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.ranking import MEMORY_LIMIT, Ranking, rank
from siamese_jax.reciprocal import neighbours
from siamese_jax.relevance import relevance
from siamese_jax.unit import unit


def diffuse(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    graph_k: int = 50,
    query_k: int = 10,
    alpha: float = 0.99,
    gamma: float = 3.0,
    iterations: int = 20,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Ranking:
    """The k gallery items with the largest f.

    Args:
      queries: [q, d] real.
      gallery: [g, d] real.
      k: how many to return, at least 1.
      graph_k: neighbours of each gallery item in the graph.
      query_k: gallery items that a query starts from.
      alpha: in [0, 1); the nearer to 1, the farther it flows.
      gamma: above 0; the larger, the less far neighbours count.
      iterations: of conjugate gradients; the error shrinks with each.
      query_ids, gallery_ids: an item with the query's id is neither a start nor an answer.
      memory_limit: bytes of working memory, beyond the graph's [g, graph_k].

    Returns:
      A `Ranking` whose distances are -f.

    Raises:
      UserError: an argument out of range, or what `siamese_jax.rank` raises.
    """
    if min(k, graph_k, query_k, iterations) < 1 or not 0 <= alpha < 1 or gamma <= 0:
        raise UserError("k, graph_k, query_k, iterations must be >= 1, alpha in [0, 1), gamma > 0")
    x, y = unit(queries), unit(gallery)
    near, weight = _graph(y, graph_k, gamma, memory_limit)
    start = rank(
        x, y, query_k, distance="cosine", query_ids=query_ids, gallery_ids=gallery_ids,
        memory_limit=memory_limit,
    )  # fmt: skip
    # Labels don't matter here: this only says which items are a query itself.
    same = relevance(
        np.zeros(len(x), int), np.zeros(len(y), int), query_ids=query_ids, gallery_ids=gallery_ids
    )
    found = Ranking(np.full((len(x), k), -1, np.int32), np.full((len(x), k), np.inf, np.float32))
    block = max(1, min(len(x), memory_limit // (64 * len(y))))
    for i in range(0, len(x), block):
        rows = np.arange(i, min(i + block, len(x)))
        there = start.indices[rows] >= 0
        source = np.zeros((len(y), len(rows)), np.float32)
        b, place = np.nonzero(there)
        cosine = 1 - start.distances[rows][b, place]
        source[start.indices[rows][b, place], b] = np.maximum(cosine, 0) ** gamma
        f = np.array(_solve(near, weight, jnp.asarray(source), jnp.float32(alpha), iterations)).T
        away = -(x[rows] @ y.T)
        query, own = same.own(rows)
        f[query, own] = -np.inf
        order = np.lexsort((away, -f), axis=1)[:, :k]
        value = -np.take_along_axis(f, order, axis=1)
        there = value < np.inf
        found.indices[rows, : order.shape[1]] = np.where(there, order, -1)
        found.distances[rows, : order.shape[1]] = value
    return found


def _graph(rows: np.ndarray, k: int, gamma: float, memory_limit: int) -> tuple[Array, Array]:
    """S of mutual neighbours: for each item whom it is joined to, int32 [g, k], and S [g, k].

    An entry that is no mutual neighbour points to the item itself with weight 0.
    """
    near = neighbours(rows, min(k, len(rows) - 1), memory_limit)[:, 1:]
    weight = np.zeros(near.shape, np.float32)
    block = max(1, memory_limit // (16 * max(1, near.shape[1]) * (rows.shape[1] + near.shape[1])))
    for start in range(0, len(rows), block):
        i = np.arange(start, min(start + block, len(rows)))
        mutual = (near[near[i]] == i[:, None, None]).any(-1)
        cosine = np.einsum("bd,bkd->bk", rows[i], rows[near[i]])
        weight[i] = mutual * np.maximum(cosine, 0) ** np.float32(gamma)
    degree = weight.sum(1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    weight *= root[:, None] * root[near]
    return jnp.asarray(near, jnp.int32), jnp.asarray(weight, jnp.float32)


@partial(jax.jit, static_argnames="iterations")
def _solve(near: Array, weight: Array, y: Array, alpha: Array, iterations: int) -> Array:
    """f [g, b] with (I - alpha S) f = y, by conjugate gradients on all columns at once."""

    def apply(f: Array) -> Array:
        def add(j: Array, total: Array) -> Array:
            return total + weight[:, j][:, None] * f[near[:, j]]

        return f - alpha * lax.fori_loop(0, near.shape[1], add, jnp.zeros_like(f))

    def step(
        _: Array, state: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        f, residual, direction, size = state
        ahead = apply(direction)
        curve = jnp.sum(direction * ahead, axis=0)
        length = jnp.where(curve > 0, size / jnp.where(curve > 0, curve, 1), 0)
        f, residual = f + length[None, :] * direction, residual - length[None, :] * ahead
        smaller = jnp.sum(residual * residual, axis=0)
        turn = jnp.where(size > 0, smaller / jnp.where(size > 0, size, 1), 0)
        return f, residual, residual + turn[None, :] * direction, smaller

    state = (jnp.zeros_like(y), y, y, jnp.sum(y * y, axis=0))
    return lax.fori_loop(0, iterations, step, state)[0]
