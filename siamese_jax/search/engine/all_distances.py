"""Where k is a large share of the gallery: all distances, from one product in float64.

Scoring every candidate by itself has none of the reuse that makes matrix products fast; for many
candidates a product over the whole gallery is cheaper. `rounded` says how far it can be trusted.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax.search.engine import exact, operands, order
from siamese_jax.search.engine.blocks import check_rows, padded
from siamese_jax.search.engine.candidates import TooManyError, even
from siamese_jax.search.engine.parallel import in_threads
from siamese_jax.search.engine.request import Search
from siamese_jax.search.engine.rounding import from_product, rounding
from siamese_jax.search.engine.rows import Rows

# How many numbers of a product in float64 cost as much as one of a candidate's.
_GAIN = 20
_AT_ONCE = 1 << 18
# One distance in so many tells where about the k-th of all is.
_SAMPLE = 8


class Plan(NamedTuple):
    """Queries at a time, gallery rows at a time, and whether the latter stay in memory."""

    chunk: int
    block: int
    keep: bool


def plan(q: int, g: int, d: int, k: int, memory_limit: int) -> Plan | None:
    """The sizes of such a search, or None where it isn't worth while."""
    if _GAIN * k < g * (1 + _GAIN / max(1, q)):
        return None
    d = operands.padded_width(d)
    share = memory_limit // 4
    block = 2048
    while block > 128 and 24 * block * d > share:
        block //= 2
    block = even(g, block, 512)
    chunk = next((c for c in (8, 64, 256) if c >= q), 1024)
    while chunk > 8 and chunk * (4 * g + 32 * k + 32 * block + 16 * d) > 2 * share:
        chunk //= 2
    if chunk < min(q, 64):
        return None
    return Plan(even(q, chunk, 256), block, 8 * (g + block) * d <= share)


class Doubles(NamedTuple):
    """Rows of one side of the product.

    Attributes:
      values: float64 [n, padded d].
      length: float64 [n].
      there: bool [n].
      code: int32 [n], equal where query and item have the same id.
    """

    values: Array
    length: Array
    there: Array
    code: Array


def _side(
    rows: Rows,
    start: int,
    size: int,
    there: np.ndarray | None,
    code: np.ndarray | None,
    spare_code: int,
) -> Doubles:
    count, d = min(size, len(rows) - start), rows.width
    values = np.zeros((size, operands.padded_width(d)))
    values[:count, :d] = check_rows(rows, start, count)
    rows.release()
    here, codes = padded(start, size, count, there, code, spare_code)
    return Doubles(*map(jnp.asarray, (values, np.sqrt(np.vecdot(values, values)), here, codes)))


@partial(jax.jit, static_argnames=("distance", "exclude"))
def _distances(x: Doubles, y: Doubles, c: Array, *, distance: str, exclude: bool) -> Array:
    """float32 [n, m]: distances, +inf where there is no pair, -inf where they are not certain.

    One array, as XLA goes through the product anew for each.
    """
    product = lax.dot_general(
        x.values, y.values, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )
    found, unsure = from_product(product, x.length[:, None], y.length[None, :], c, distance, jnp)
    pair = x.there[:, None] & y.there[None, :]
    if exclude:
        pair &= x.code[:, None] != y.code[None, :]
    return jnp.where(pair, jnp.where(unsure, -jnp.inf, found), jnp.inf)


def nearest_of_all(search: Search, wanted: np.ndarray, sizes: Plan) -> Iterator[tuple]:
    """As `cpu.nearest`, from the distances of all pairs.

    Args:
      search: what is asked.
      wanted: int [q], how many answers each query wants.
      sizes: from `plan`.

    Raises:
      UserError: a row is not finite, or too large.
      TooManyError: so many pairs are uncertain that this is no way to go; before the first yield.
    """
    rows, distance = search.gallery.rows, search.distance
    g, queries = len(rows), search.queries
    own, code = (None, None) if search.codes is None else search.codes
    program = partial(_distances, distance=distance, exclude=search.codes is not None)
    kept: dict[int, Doubles] = {}

    def item(start: int) -> Doubles:
        if start in kept:
            return kept[start]
        side = _side(rows, start, sizes.block, search.there, code, -1)
        if sizes.keep:
            kept[start] = side
        return side

    for at in range(0, len(queries), sizes.chunk):
        here = slice(at, min(at + sizes.chunk, len(queries)))
        found: list[Array] = []
        with jax.enable_x64(True):
            x = _side(search.rows, at, sizes.chunk, None, own, -2)
            for start in range(0, g, sizes.block):
                found.append(program(x, item(start), np.float64(rounding(rows.width))))
                # The next block is prepared while this product runs, but not all of them.
                found[-2:][0].block_until_ready()
        settle = partial(exact.pair_distances, queries[here], rows, distance=distance)
        patience = max(g, 512) // 32 if at == 0 else g
        values = [np.asarray(v) for v in found]
        for i, place, j, away in _select(values, g, wanted[here], settle, patience):
            yield i + at, place, j, away


def _select(
    blocks: list[np.ndarray],
    g: int,
    wanted: np.ndarray,
    settle: Callable[[np.ndarray, np.ndarray], np.ndarray],
    patience: int,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The first wanted[i] finite ones of each row of distances, as `order.first`, for some rows
    after another.

    Args:
      blocks: float32 [>= n, block], side by side; columns from g on are padding.
      wanted: int [n].
      settle: gives the distances of some pairs, which are -inf here.
      patience: of how many of them in a row on average.
    """
    n = len(wanted)
    step = max(1, _AT_ONCE // g)
    parts: dict[int, tuple] = {}
    starts = iter(range(0, n, step))

    def work() -> None:
        for at in starts:
            k = wanted[at : at + step]
            here = np.concatenate([v[at : at + len(k)] for v in blocks], axis=1)
            here[:, g:] = np.inf
            unsure = np.flatnonzero(here == -np.inf)
            if len(unsure) > len(k) * patience:
                raise TooManyError
            i, j = np.divmod(unsure, here.shape[1])
            here.reshape(-1)[unsure] = settle(at + i, j)
            limits = _limits(here, int(k.max()))
            hit = np.flatnonzero((here <= limits[:, None]) & (here < np.inf))
            i, j = np.divmod(hit, here.shape[1])
            i, j = i.astype(np.int32), j.astype(np.int32)
            i, place, j, away = order.first(i, j, here.reshape(-1)[hit], k)
            parts[at] = i + at, place, j, away

    in_threads(work)
    return [parts[at] for at in sorted(parts)]


def _limits(values: np.ndarray, k: int) -> np.ndarray:
    """For each row of float32 [n, g] a number that at least k (or all) of it do not exceed, and not
    many more: mostly from a sample, as that is faster than to find the k-th."""
    n, g = values.shape
    if k >= g:
        return np.full(n, np.inf, np.float32)
    sample = values[:, ::_SAMPLE]
    share = sample.shape[1] * k / g
    last = int(share + 3 * share**0.5) + 1
    if last >= sample.shape[1]:
        return np.partition(values, k - 1, axis=1)[:, k - 1]
    limits = np.partition(sample, last, axis=1)[:, last]
    short = np.count_nonzero(values <= limits[:, None], axis=1) < k
    limits[short] = np.partition(values[short], k - 1, axis=1)[:, k - 1]
    return limits
