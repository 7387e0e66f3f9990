"""Where k is a large share of the gallery: all distances, from one product in float64.

Scoring every candidate from its difference takes d steps for each, without any of the reuse that
makes matrix products fast; for many candidates a product over the whole gallery is cheaper. With
rows centred, v = 2^-53, A = |x|, B = |y| and c = (2d + 64) v, the value

    fl(A^2 + B^2 - 2<x, y>)  or  fl(-<x, y>)

is within c (A + B)^2 of the true one (Higham 2002, section 3.1), and so is the definition in
`exact` within c of its own size. Both ends of that interval are rounded to float32 as the
definition is. Where they agree, which is nearly everywhere, that is the distance; the other pairs
are computed by the definition.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax.search import bounds, exact, order
from siamese_jax.search.scan import TooManyError, check_rows
from siamese_jax.search.sources import Rows
from siamese_jax.search.threads import in_threads

# How many numbers of a product in float64 cost as much as one of a difference.
_GAIN = 32
_AT_ONCE = 1 << 18


class Plan(NamedTuple):
    """Queries at a time, gallery rows at a time, and whether the latter stay in memory."""

    chunk: int
    block: int
    keep: bool


def plan(q: int, g: int, d: int, k: int, memory_limit: int) -> Plan | None:
    """The sizes of such a search, or None where it isn't worth while."""
    if _GAIN * k < g * (1 + _GAIN / max(1, q)):
        return None
    d = bounds.padded_width(d)
    share = memory_limit // 4
    block = next((b for b in (512, 2048) if b >= g), 2048)
    while block > 128 and 24 * block * d > share:
        block //= 2
    chunk = next((c for c in (8, 64, 256, 1024) if c >= q), 1024)
    while chunk > 8 and chunk * (4 * g + 32 * k + 32 * block + 16 * d) > 2 * share:
        chunk //= 2
    if chunk < min(q, 64):
        return None
    return Plan(chunk, block, 8 * (g + block) * d <= share)


class Side(NamedTuple):
    """Rows of one side of the product.

    Attributes:
      values: float64 [n, padded d], centred, or of unit length first, or as they are for dot.
      length: float64 [n].
      there: bool [n].
      zero: bool [n], zero rows, which have no direction.
      code: int32 [n], equal where query and item have the same id.
    """

    values: Array
    length: Array
    there: Array
    zero: Array
    code: Array


def _side(
    rows: Rows,
    start: int,
    size: int,
    there: np.ndarray | None,
    code: np.ndarray | None,
    distance: str,
    origin: np.ndarray,
    spare_code: int,
) -> Side:
    count, d = min(size, len(rows) - start), rows.width
    block = check_rows(rows, start, count)
    values = np.zeros((size, bounds.padded_width(d)))
    part = values[:count, :d]
    part[:] = block
    rows.release()
    zero = np.zeros(size, bool)
    if distance == "cosine":
        zero[:count] = ~exact.unit(part)
    if distance != "dot":
        part -= origin[None, :d]
    here, codes = np.zeros(size, bool), np.full(size, spare_code, np.int32)
    here[:count] = True if there is None else there[start : start + count]
    if code is not None:
        codes[:count] = code[start : start + count]
    return Side(*map(jnp.asarray, (values, np.sqrt(np.vecdot(values, values)), here, zero, codes)))


@partial(jax.jit, static_argnames=("distance", "exclude"))
def _distances(x: Side, y: Side, c: Array, *, distance: str, exclude: bool) -> tuple[Array, Array]:
    """(float32 [n, m] distances, inf where there is no pair; bool [n, m] which are not certain)."""
    product = lax.dot_general(
        x.values, y.values, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    a, b = x.length[:, None], y.length[None, :]
    if distance == "dot":
        value, error = -product, c * a * b
    else:
        value = a * a + b * b - 2 * product
        error = c * ((a + b) * (a + b) + jnp.abs(value))
    if distance == "cosine":
        # Two ways to a unit row may differ by its rounding.
        value, error = value / 2, error + c * (a + b + c)
    low, high = value - error, value + error
    if distance != "dot":
        low, high = jnp.maximum(low, 0), jnp.maximum(high, 0)
    if distance == "euclidean":
        low, high = jnp.sqrt(low), jnp.sqrt(high)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    # Numbers too small for float32's full precision may be taken for zero here.
    unsure = (low != high) | (jnp.abs(high) < np.float32(2.0**-120))
    if distance == "cosine":
        zero = x.zero[:, None] | y.zero[None, :]
        high, unsure = jnp.where(zero, 1, high), unsure & ~zero
    pair = x.there[:, None] & y.there[None, :]
    if exclude:
        pair &= x.code[:, None] != y.code[None, :]
    return jnp.where(pair, high, jnp.inf), unsure & pair


def nearest(
    queries: np.ndarray,
    rows: Rows,
    wanted: np.ndarray,
    sizes: Plan,
    *,
    there: np.ndarray | None,
    codes: tuple[np.ndarray, np.ndarray] | None,
    distance: str,
    origin: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (i, place, j, distance) arrays as `order.first` gives them, whole queries in each.

    Args:
      queries: float32 [q, d].
      rows: the gallery.
      wanted: int [q], how many answers each query wants.
      sizes: from `plan`.
      there: bool [g], the rows to be found; None for all.
      codes: int32 [q] and [g]; a pair of equal codes is left out.
      distance: one of `siamese_jax.distances.DISTANCES`.
      origin: float32 [>= d], near the mean of the rows (of unit length, for cosine).

    Raises:
      UserError: a row is not finite, or too large.
      TooManyError: so many pairs are uncertain that this is no way to go; before the first yield.
    """
    origin, g = origin.astype(np.float64), len(rows)
    own, code = (None, None) if codes is None else codes
    asked = Rows([queries], "queries")
    program = partial(_distances, distance=distance, exclude=codes is not None)
    kept: dict[int, Side] = {}

    def item(start: int) -> Side:
        if start in kept:
            return kept[start]
        side = _side(rows, start, sizes.block, there, code, distance, origin, -1)
        if sizes.keep:
            kept[start] = side
        return side

    for at in range(0, len(queries), sizes.chunk):
        count = min(sizes.chunk, len(queries) - at)
        found = np.empty((count, g), np.float32)
        with jax.enable_x64(True):
            c = np.float64((2 * rows.width + 64) * 2.0**-53)
            x = _side(asked, at, sizes.chunk, None, own, distance, origin, -2)
            # The next product runs while the last one is read.
            ahead: list[tuple[int, Array, Array]] = []
            for start in [*range(0, g, sizes.block), g]:
                if start < g:
                    ahead.append((start, *program(x, item(start), c)))
                if start and ahead:
                    first, values, doubt = ahead.pop(0)
                    unsure = _fill(
                        found, first, values, doubt, queries[at : at + count], rows, distance
                    )
                    if at == first == 0 and unsure > count * sizes.block // 32:
                        raise TooManyError
        i, place, j, away = _select(found, wanted[at : at + count])
        yield i + at, place, j, away


def _fill(
    found: np.ndarray,
    start: int,
    values: Array,
    unsure: Array,
    queries: np.ndarray,
    rows: Rows,
    distance: str,
) -> int:
    """Puts a block's distances into their columns; returns how many were not certain."""
    part = found[:, start : start + values.shape[1]]
    part[:] = np.asarray(values)[: len(part), : part.shape[1]]
    # Eight at a time, as nearly all are certain.
    eights = np.asarray(unsure)[: len(part)].reshape(-1, 8)
    some = np.flatnonzero(eights.view(np.uint64))
    which, inside = np.nonzero(eights[some])
    i, j = np.divmod(some[which] * 8 + inside, values.shape[1])
    for at in range(0, len(i), _AT_ONCE):
        a, b = i[at : at + _AT_ONCE], j[at : at + _AT_ONCE]
        part[a, b] = exact.pair_distances(queries, rows.take, a, start + b, distance)
    return len(i)


def _select(
    found: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first wanted[i] finite ones of each row of distances [n, g], as `order.first`."""
    n, g = found.shape
    step = max(1, _AT_ONCE // g)
    parts: dict[int, tuple] = {}
    starts = iter(range(0, n, step))

    def work() -> None:
        for at in starts:
            here, most = found[at : at + step], min(g, int(wanted[at : at + step].max()))
            if most < g:
                last = np.partition(here, most - 1, axis=1)[:, most - 1 : most]
                hit = np.flatnonzero((here <= last) & (here < np.inf))
            else:
                hit = np.flatnonzero(here < np.inf)
            i, j = np.divmod(hit, g)
            i, place, j, away = order.first(
                i.astype(np.int32),
                j.astype(np.int32),
                here.reshape(-1)[hit],
                wanted[at : at + step],
            )
            parts[at] = i + at, place, j, away

    in_threads(work)
    first, place, j, away = (
        np.concatenate(v) for v in zip(*(parts[at] for at in sorted(parts)), strict=True)
    )
    return first, place, j, away
