"""A score of every pair from one matrix product, and how far it can be from the true one.

With the origin moved to mu (near the gallery's mean: distances do not change, but numbers get
smaller), x = query - mu and y = item - mu, an item is the closer the larger

    S = 2<x, y> - |y|^2  =  |x|^2 - |x - y|^2        euclidean, sqeuclidean
                                                     cosine, of rows made unit length first
    S = 2<x, y>,  x = query                          dot: <x, mu> is one constant per query

It is computed as s = fl(2 fl(<x', y'>) - fl(|y|^2)), where x' and y' are x and y as the matrix
product takes them, rounded to bfloat16 perhaps. Let u = 2^-24, c = (2d + 64) u, X >= |x|, |x'| and
Y >= |y|, |y'|, and r_x >= |x' - x|, r_y >= |y' - y|. By the inequality of Cauchy and Schwarz
|<x', y'> - <x, y>| <= r_x Y + X r_y, and in any order of summation (Higham, Accuracy and Stability
of Numerical Algorithms, 2002, section 3.1, with twice its constant, as bfloat16 units round
twice) the sums are within c X Y / 2 and c Y^2 / 2. Together

    |s - S| <= E = 2 r_x Y + 2 X r_y + 2 c X Y + c Y^2 + c X^2 + a,

with room left for the rounding of E itself and for what two different distances that round to
the same float32 can differ by; a covers underflow. All pairs whose interval [s - E, s + E] reaches
the k-th best lower end are candidates, and no others can be among the k best.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_U = 2.0**-24
_TINY = 2.0**-126

PRECISIONS = ("auto", "float32", "tf32", "bfloat16")


class Frame(NamedTuple):
    """What the scores of one search have in common.

    Attributes:
      distance: one of `siamese_jax.distances.DISTANCES`.
      precision: of the matrix product, "float32", "tf32" or "bfloat16".
      width: d, before padding with zero columns.
      origin: float32 [padded d], mu.
    """

    distance: str
    precision: str
    width: int
    origin: np.ndarray


class Side(NamedTuple):
    """Rows of one side of the product, ready for it.

    Attributes:
      values: [n, padded d] x' or y', in the product's dtype.
      length: float32 [n], X or Y.
      residual: float32 [n], r_x or r_y.
      square: float32 [n], |y|^2; +inf where there is no item.
      code: int32 [n], equal where query and item have the same id.
      zero: bool [n], zero rows under cosine, which have no direction.
      bad: int32, the first row that is not finite or too large, or n.
    """

    values: Array
    length: Array
    residual: Array
    square: Array
    code: Array
    zero: Array
    bad: Array


def padded_width(d: int) -> int:
    """Few different widths to compile for; none of a power of two changes."""
    step = 16 if d <= 256 else 64
    return max(step, -(-d // step) * step)


def largest(d: int) -> float:
    """The largest entry whose squared distances do not overflow float32."""
    return float(2**61 / max(1, d) ** 0.5)


@partial(jax.jit, static_argnames=("distance", "precision", "is_query"))
def prepare(
    rows: Array,
    there: Array,
    code: Array,
    origin: Array,
    width: Array,
    *,
    distance: str,
    precision: str,
    is_query: bool,
) -> Side:
    """One side of the product.

    Args:
      rows: float32 [n, padded d], columns from `width` on zero.
      there: bool [n]; other rows are padding, or not to be found.
      code: int32 [n].
      origin: float32 [padded d].
      width: float32 [], d. Not static, so that one program serves all d of a padded width.
      distance, precision: as in `Frame`.
      is_query: whether these are the queries.
    """
    fine = jnp.all(jnp.abs(rows) <= 2.0**61 / jnp.sqrt(width), axis=1)
    bad = jnp.min(jnp.where(fine, len(rows), jnp.arange(len(rows), dtype=jnp.int32)))
    slack = width * _TINY
    zero = jnp.zeros(len(rows), bool)
    if distance == "cosine":
        biggest = jnp.max(jnp.abs(rows), axis=1, keepdims=True)
        zero = biggest[:, 0] == 0
        rows = rows / jnp.where(biggest > 0, biggest, 1)
        norm = jnp.sqrt(jnp.sum(rows * rows, axis=1, keepdims=True))
        rows = rows / jnp.where(norm > 0, norm, 1)
        slack += (width + 16) * _U
    if not (distance == "dot" and is_query):
        rows = rows - origin[None, :]
    there &= ~zero
    rows = jnp.where(there[:, None], rows, 0)
    square = jnp.sum(rows * rows, axis=1)
    length = jnp.sqrt(square)
    values, residual = rows, jnp.zeros(len(rows), jnp.float32)
    if precision == "bfloat16":
        values = rows.astype(jnp.bfloat16)
        residual = jnp.sqrt(jnp.sum((rows - values.astype(jnp.float32)) ** 2, axis=1))
    elif precision == "tf32":
        # TensorFloat-32 keeps 10 bits of the fraction; it may cut instead of rounding.
        residual = 2.0**-10 * length
    residual = residual * (1 + _room(width)) + slack
    square = jnp.where(there, 0 if distance == "dot" else square, jnp.inf)
    return Side(values, (length + residual) * (1 + _room(width)), residual, square, code, zero, bad)


def _room(width: Array) -> Array:
    return (2 * width + 64) * _U


@partial(jax.jit, static_argnames=("distance", "precision", "group", "exclude"))
def scores(
    x: Side,
    y: Side,
    origin_length: Array,
    width: Array,
    *,
    distance: str,
    precision: str,
    group: int,
    exclude: bool,
) -> tuple[Array, Array, Array]:
    """The scores of all pairs, and intervals around the best of each group of items.

    Args:
      x: the queries, n rows.
      y: the items, m rows.
      origin_length: float32 [], |mu|.
      width: float32 [], d.
      distance, precision: as in `Frame`.
      group: how many neighbouring items make a group; divides m.
      exclude: whether a pair of equal codes is left out.

    Returns:
      (s float32 [n, m], low float32 [n, m / group], high likewise): in each group some item has
      S >= low, and none has S > high. -inf where there is no item.
    """
    s = 2 * products(x.values, y.values, precision) - y.square[None, :]
    if exclude:
        s = jnp.where(x.code[:, None] == y.code[None, :], -jnp.inf, s)
    best = jnp.max(s.reshape(len(s), -1, group), axis=2)
    e = errors(x, y, origin_length, width, distance=distance, group=group)
    return s, best - e, best + e


def errors(
    x: Side, y: Side, origin_length: Array, width: Array, *, distance: str, group: int
) -> Array:
    """E, the largest of each group of items, float32 [n, m / group]."""
    c = _room(width)
    length, residual = y.length, y.residual
    along = 2 * residual + 2 * c * length
    constant = c * length * length + 2 * residual * residual
    if distance == "cosine":
        # The unit rows themselves are rounded, and so is |y|^2 of them.
        constant += 2 * (width + 16) * _U * (length + 1)
    if distance == "dot":
        along += c * origin_length
    along, constant, longest = (
        jnp.max(v.reshape(-1, group), axis=1)[None, :] for v in (along, constant, length)
    )
    own = c * x.length * x.length + 8 * width * _TINY
    e = x.length[:, None] * along + 2 * x.residual[:, None] * longest + constant + own[:, None]
    return 1.001 * e


def products(x: Array, y: Array, precision: str) -> Array:
    """<x_i, y_j> in float32, [n, d] and [m, d] -> [n, m]."""
    dot: Any = {
        "float32": lax.Precision.HIGHEST,
        "tf32": lax.DotAlgorithmPreset.TF32_TF32_F32,
        "bfloat16": lax.Precision.DEFAULT,
    }[precision]
    if precision == "tf32" and jax.default_backend() != "gpu":
        dot = lax.Precision.HIGHEST
    return lax.dot_general(
        x, y, (((1,), (1,)), ((), ())), precision=dot, preferred_element_type=jnp.float32
    )


def true_square(queries: np.ndarray, frame: Frame) -> np.ndarray:
    """float64 [q], the term that turns a score into a distance: see `score_of`."""
    x, origin = queries.astype(np.float64), frame.origin[: frame.width].astype(np.float64)
    if frame.distance == "dot":
        return x @ origin
    if frame.distance == "cosine":
        norm = np.sqrt(np.einsum("nd,nd->n", x, x))[:, None]
        x = x / np.where(norm > 0, norm, 1)
    x = x - origin
    return np.einsum("nd,nd->n", x, x)


def score_of(radius: np.ndarray, square: np.ndarray, distance: str) -> np.ndarray:
    """S of an item at distance `radius` from a query, float64 [q]."""
    if distance == "dot":
        return -2 * radius - 2 * square
    squared = {"euclidean": radius**2, "sqeuclidean": radius, "cosine": 2 * radius}[distance]
    return square - squared
