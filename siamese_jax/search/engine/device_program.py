"""The search on accelerators, and over a gallery split over several devices.

Each device goes through its own rows and keeps, for every query, some more than k of the best
scores: the best lie in the best groups, so only those are sorted. It scores these exactly, in
float64, and gives back its k first. If the k-th best lower end of all devices is above what any
device may have left out, no answer can be missing; the few queries where it isn't are searched
again by `scan`, which takes as many candidates as it needs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from siamese_jax.search.engine import bounds, operands
from siamese_jax.search.engine.operands import Side

_AXIS = "items"
_GROUP = 64


class Sizes(NamedTuple):
    """The sizes of a search: queries at a time, gallery rows at a time on all devices together,
    and rows whose scores are in memory at a time on one device."""

    chunk: int
    slab: int
    block: int


def sizes(q: int, g: int, d: int, k: int, devices: int, memory_limit: int) -> Sizes:
    """Sizes from a few fixed steps; rows are padded to them.

    A row takes 16 bytes a column: as given, centred, as the product takes it, and in between.
    """
    block = 512 if g <= 512 * devices else 8192
    share = memory_limit // 4
    while block > 128 and 16 * d * block > share:
        block //= 2
    most = max(block, 2 * share // (16 * d) // block * block)
    each = min(most, -(-g // (block * devices)) * block)
    chunk = next((c for c in (8, 64, 512, 4096) if c >= q), 4096)
    # Scores twice, and the candidates of some columns in float64.
    while chunk > 8 and chunk * (8 * block + 16 * d + 24 * k) > share:
        chunk //= 2
    return Sizes(chunk, each * devices, block)


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """One axis of devices, along which gallery rows are split."""
    return Mesh(np.array(devices), (_AXIS,))


def place(mesh: Mesh, array: np.ndarray) -> Array:
    """Splits rows over the devices; their number must be divisible."""
    return jax.device_put(array, NamedSharding(mesh, P(_AXIS)))


class Asked(NamedTuple):
    """Queries as the program takes them: float32 [n, padded d], columns from d on zero, and codes
    int32 [n]; on all devices."""

    rows: Any
    code: Any


class Slab(NamedTuple):
    """Some of the gallery, split over the devices, m rows on each: float32 [devices * m, padded d],
    bool, which rows are to be found, and codes int32."""

    rows: Array
    there: Array
    code: Array


@partial(
    jax.jit,
    static_argnames=("mesh", "k", "block", "distance", "precision", "exclude"),
)
def search(
    asked: Asked,
    slab: Slab,
    origin: Array,
    width: Array,
    *,
    mesh: Mesh,
    k: int,
    block: int,
    distance: str,
    precision: str,
    exclude: bool,
) -> dict[str, Array]:
    """Every device's k first of its own rows. To be traced with 64-bit types enabled.

    Args:
      asked: the queries.
      slab: the rows; `block` divides m.
      origin: float32 [padded d].
      width: float32 [], d.
      mesh: the devices.
      k: at most m.
      block: rows whose scores are in memory at a time.
      distance, precision, exclude: as in `bounds`.

    Returns:
      row: int32 [devices, n, k], counted from the first row of all; -1 where there is none.
      distance: float32 [devices, n, k], in no order.
      low: float32 [devices, n, k], the best lower ends of scores.
      ceiling: float32 [devices, n], the upper end of all that was left out.
      bad: int32 [devices], the first bad row of each device, or m.
    """
    local = partial(
        _local, k=k, block=block, distance=distance, precision=precision, exclude=exclude
    )
    split = P(_AXIS)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), split, P(), P()),
        out_specs=dict.fromkeys(("row", "distance", "low", "ceiling", "bad"), split),
        check_vma=False,
    )(asked, slab, origin, width)


def _local(
    asked: Asked,
    slab: Slab,
    origin: Array,
    width: Array,
    *,
    k: int,
    block: int,
    distance: str,
    precision: str,
    exclude: bool,
) -> dict[str, Array]:
    """`search` on one device, of its own part of the slab."""
    n, m = len(asked.rows), len(slab.rows)
    frame: dict[str, Any] = {"distance": distance, "precision": precision}
    every = jnp.ones(n, bool)
    x = operands.prepare(asked.rows, every, asked.code, origin, width, is_query=True, **frame)
    y = operands.prepare(*slab, origin, width, is_query=False, **frame)
    many = min(m, k + k // 4 + 32)
    score = partial(
        bounds.scores,
        x,
        origin_length=jnp.sqrt(jnp.sum(origin * origin)),
        width=width,
        group=min(_GROUP, block),
        exclude=exclude,
        **frame,
    )
    best, where, error = _best_of_blocks(score, y, (n, many), block)
    away = _distances(asked.rows, slab.rows, where, distance, width)
    none = best == -jnp.inf
    away = jnp.where(none, jnp.inf, away)
    where = jnp.where(none, -1, lax.axis_index(_AXIS).astype(jnp.int32) * m + where)
    # Ties are in the order of rows: both are sort keys.
    away, where = lax.sort((away, where), dimension=1, num_keys=2)
    # Everything was kept if all rows fit.
    ceiling = best[:, -1] + error if many < m else jnp.full(n, -jnp.inf, jnp.float32)
    low = jnp.where(none, -jnp.inf, best - error[:, None])
    return {
        "row": where[None, :, :k],
        "distance": away[None, :, :k],
        "low": low[None, :, :k],
        "ceiling": ceiling[None],
        "bad": jnp.min(jnp.where(y.fine, m, jnp.arange(m, dtype=jnp.int32)))[None],
    }


def _best_of_blocks(
    score: Callable[..., tuple[Array, Array, Array]], y: Side, shape: tuple[int, int], block: int
) -> tuple[Array, Array, Array]:
    """The best scores of n queries, a block of items after another: float32 and int32 `shape`, how
    many are kept being its last number, and the largest error of each query, float32 [n]."""
    n, many = shape

    def step(carry: tuple[Array, Array, Array], start: Array) -> tuple[tuple, None]:
        best, where, error = carry
        s, low, high = score(Side(*(lax.dynamic_slice_in_dim(v, start, block, axis=0) for v in y)))
        # -inf - -inf is where a group has no item.
        e = jnp.where(jnp.isfinite(high), (high - low) / 2, 0)
        s, j = _best(s, high, many)
        best = jnp.concatenate([best, s], axis=1)
        where = jnp.concatenate([where, start + j], axis=1)
        best, order = lax.top_k(best, many)
        where = jnp.take_along_axis(where, order, axis=1)
        return (best, where, jnp.maximum(error, jnp.max(e, axis=1))), None

    empty = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(n, jnp.float32),
    )
    found, _ = lax.scan(step, empty, jnp.arange(0, len(y.fine), block, dtype=jnp.int32))
    return found


def _best(s: Array, high: Array, many: int) -> tuple[Array, Array]:
    """The `many` largest scores and their columns, float32 and int32 [n, many or all].

    They lie in the `many` groups of the largest scores, which takes the sort from all columns to
    the groups and then to the columns of those groups.
    """
    n, columns = s.shape
    groups = high.shape[1]
    size = columns // groups
    if groups > 2 * many:
        top = jnp.max(s.reshape(n, groups, size), axis=2)
        _, chosen = lax.top_k(top, many)
        inside = jnp.arange(size, dtype=jnp.int32)
        j = (chosen[:, :, None] * size + inside[None, None, :]).reshape(n, -1)
        s, order = lax.top_k(jnp.take_along_axis(s, j, axis=1), many)
        return s, jnp.take_along_axis(j, order, axis=1)
    return lax.top_k(s, min(many, columns))


def _distances(queries: Array, rows: Array, where: Array, distance: str, width: Array) -> Array:
    """As `exact.pair_distances`, for queries [n, d] and their candidates [n, m] -> [n, m]."""
    x = queries.astype(jnp.float64)

    def one(column: Array) -> Array:
        y = rows[column].astype(jnp.float64)
        if distance == "dot":
            return (0.0 - jnp.sum(x * y, axis=1)).astype(jnp.float32) + 0.0
        u, v = (_unit(x), _unit(y)) if distance == "cosine" else (x, y)
        squared = jnp.sum((v - u) ** 2, axis=1)
        if distance == "cosine":
            least = ((width.astype(jnp.float64) + 4) / 2.0**52) ** 2
            squared = jnp.where(squared < least, 0.0, squared) / 2
            squared = jnp.where(_is_zero(x) | _is_zero(y), 1.0, squared)
        root = jnp.sqrt(squared) if distance == "euclidean" else squared
        return root.astype(jnp.float32)

    return lax.map(one, where.T, batch_size=8).T


def _is_zero(x: Array) -> Array:
    return jnp.all(x == 0, axis=1)


def _unit(x: Array) -> Array:
    norm = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1.0)


def certain(low: np.ndarray, ceiling: np.ndarray, k: int) -> np.ndarray:
    """Whether each query's k first are among the devices' answers, bool [n]."""
    lows = np.moveaxis(low, 0, 1).reshape(low.shape[1], -1)
    if lows.shape[1] < k:
        return ceiling.max(axis=0) == -np.inf
    floor = np.partition(lows, lows.shape[1] - k, axis=1)[:, lows.shape[1] - k]
    highest = ceiling.max(axis=0)
    return (floor > highest) | (highest == -np.inf)
