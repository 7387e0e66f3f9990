"""Diffusion: similarity that flows along the gallery's own neighbourhoods (Iscen et al. 2017).

With s(i, j) = max(cos(i, j), 0)^gamma, over the gallery's graph of mutual k nearest neighbours:

    A_ij = s(i, j) where i and j are among each other's k nearest, else 0
    S    = D^(-1/2) A D^(-1/2),  D the row sums of A
    y    = s(q, i) for the query's nearest gallery items, else 0
    f    solves (I - alpha S) f = y

by conjugate gradients; f is large where paths from the query's neighbours lead. Items that no path
reaches follow, in the order of their cosine to the query.

The eigenvalues of I - alpha S are at least 1 - alpha, and |f| at least |y|. So f is within a share
e of its length when the residual y - (I - alpha S) f is shorter than e (1 - alpha) |y|.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import ArrayLike

from siamese_jax import values
from siamese_jax.data.labels import Groups
from siamese_jax.search.engine.checked_rows import at_least_one, check_room, unit_rows
from siamese_jax.search.ranking import MEMORY_LIMIT, Ranking, rank
from siamese_jax.search.rerank.k_reciprocal import identities, neighbours

log = logging.getLogger(__name__)
_ERROR = 1e-6
_State = tuple[Array, Array, Array, Array, Array]


def diffuse(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    graph_k: int = 50,
    query_k: int = 10,
    alpha: float = 0.99,
    gamma: float = 3.0,
    iterations: int = 1000,
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
      iterations: of conjugate gradients, at most; they stop when f is within 1e-6 of its length,
        which for alpha = 0.99 takes about 100. Where they end before, a line says so.
      query_ids, gallery_ids: an item with the query's id is neither a start nor an answer.
      memory_limit: bytes of working memory, beyond the graph's [g, graph_k].

    Returns:
      A `Ranking` whose distances are -f; -1 and +inf where the gallery has no more items.

    Raises:
      UserError: an argument out of range, or what `siamese_jax.rank` raises.
    """
    at_least_one(k=k, graph_k=graph_k, query_k=query_k, iterations=iterations)
    values.check("alpha", alpha, values.number(0, below=1))
    values.check("gamma", gamma, values.number(above=0))
    y = unit_rows(gallery, "gallery")
    x = unit_rows(queries, "queries", y)
    check_room(len(x), len(y), k=k)
    near, weight = _graph(y, graph_k, gamma, memory_limit)
    start = rank(
        x, y, query_k, distance="cosine", query_ids=query_ids, gallery_ids=gallery_ids,
        memory_limit=memory_limit,
    )  # fmt: skip
    number = identities(query_ids, gallery_ids, len(x), len(y))
    of_gallery, of_queries = np.split(number, [len(y)])
    same = Groups.of(of_gallery, len(number))
    found = Ranking(np.full((len(x), k), -1, np.int32), np.full((len(x), k), np.inf, np.float32))
    block = max(1, min(len(x), memory_limit // (128 * max(1, len(y)))))
    error = 0.0
    for i in range(0, len(x), block):
        rows = np.arange(i, min(i + block, len(x)))
        there = start.indices[rows] >= 0
        source = np.zeros((len(y), len(rows)))
        b, place = np.nonzero(there)
        cosine = 1 - start.distances[rows][b, place]
        source[start.indices[rows][b, place], b] = np.maximum(cosine, 0) ** gamma
        with jax.enable_x64(True):
            solved, off = _solve(near, weight, source, alpha, iterations)
        f, error = np.array(solved).T, max(error, float(off))
        away = -(x[rows] @ y.T)
        query, own = same.members(of_queries[rows])
        f[query, own] = -np.inf
        order = np.lexsort((away, -f), axis=1)[:, :k]
        value = -np.take_along_axis(f, order, axis=1)
        there = value < np.inf
        found.indices[rows, : order.shape[1]] = np.where(there, order, -1)
        found.distances[rows, : order.shape[1]] = value
    if error > _ERROR:
        log.warning(
            "diffusion stopped after %d iterations, with f off by up to %.1e of its length: give "
            "more, or a smaller alpha",
            iterations,
            error,
        )
    return found


def _graph(
    rows: np.ndarray, k: int, gamma: float, memory_limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """S of mutual neighbours: for each item whom it is joined to, int32 [g, k], and S [g, k].

    An entry that is no mutual neighbour points to the item itself with weight 0.
    """
    if len(rows) < 2:
        return np.zeros((len(rows), 1), np.int32), np.zeros((len(rows), 1))
    near = neighbours(rows, min(k, len(rows) - 1), memory_limit)[:, 1:]
    weight = np.zeros(near.shape)
    block = max(1, memory_limit // (24 * near.shape[1] * (rows.shape[1] + near.shape[1])))
    for start in range(0, len(rows), block):
        i = np.arange(start, min(start + block, len(rows)))
        mutual = (near[near[i]] == i[:, None, None]).any(-1)
        cosine = np.einsum("bd,bkd->bk", rows[i], rows[near[i]], dtype=np.float64)
        weight[i] = mutual * np.maximum(cosine, 0) ** gamma
    degree = weight.sum(1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    weight *= root[:, None] * root[near]
    return near.astype(np.int32), weight


@jax.jit
def _solve(
    near: Array, weight: Array, y: Array, alpha: Array, iterations: Array
) -> tuple[Array, Array]:
    """f float64 [g, b] with (I - alpha S) f = y, by conjugate gradients on all columns at once,
    each until it has converged; and the largest share of its length by which one may be off."""

    def apply(f: Array) -> Array:
        def add(j: Array, total: Array) -> Array:
            return total + weight[:, j][:, None] * f[near[:, j]]

        return f - alpha * lax.fori_loop(0, near.shape[1], add, jnp.zeros_like(f))

    def step(state: _State) -> _State:
        n, f, residual, direction, size = state
        ahead = apply(direction)
        going = size > goal

        def over(a: Array, b: Array) -> Array:
            # Beyond its goal a column stays: only rounding is left there, which would grow.
            return jnp.where(going, a / jnp.where(going, b, 1), 0)

        length = over(size, jnp.sum(direction * ahead, axis=0))
        f, residual = f + length[None, :] * direction, residual - length[None, :] * ahead
        smaller = jnp.sum(residual * residual, axis=0)
        turn = over(smaller, size)
        return n + 1, f, residual, residual + turn[None, :] * direction, smaller

    size = jnp.sum(y * y, axis=0)
    goal = (_ERROR * (1 - alpha)) ** 2 * size
    state = (jnp.zeros((), jnp.int32), jnp.zeros_like(y), y, y, size)
    _, f, _, _, left = lax.while_loop(
        lambda state: (state[0] < iterations) & jnp.any(state[-1] > goal), step, state
    )
    share = jnp.sqrt(left / jnp.where(size > 0, size, 1)) / (1 - alpha)
    return f, jnp.max(share, initial=0)
