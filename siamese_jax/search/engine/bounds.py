"""A score of every pair from one matrix product, and how far it can be from the true one.

With the origin moved to mu (near the gallery's mean: distances do not change, but numbers get
smaller), x = query - mu and y = item - mu, an item is the closer the larger

    S = <x, y> - |y|^2 / 2  =  (|x|^2 - |x - y|^2) / 2     euclidean, sqeuclidean
                                                           cosine, of rows made unit length first
    S = <x, y>,  x = query                                 dot: <x, mu> is one constant per query

Under cosine a zero item's |y|^2 is 1 more: so it is at distance 1 from all, as everything is from a
zero query.

The product itself gives it: x gets three more columns of ones, and y three that add up to
h = -|y|^2 / 2, so no pass over the scores is needed. Computed is s = fl(<x', y'>), where x' and y'
are those rows as the matrix product takes them, rounded to bfloat16 perhaps. Let u = 2^-24, c as in
`rounding`, X >= |x|, |x'| and Y >= |y|, |y'| (without the added columns), and r_x >= |x' - x|,
r_y >= |y' - y|. By the inequality of Cauchy and Schwarz |<x', y'> - <x, y>| <= r_x Y + X r_y. By
`rounding` (its constant is twice Higham's, and bfloat16 units round twice) the sum is within
c/2 (X Y + |h|), and |y|^2 within c/2 Y^2. What three columns of bfloat16 leave out of h is below
u |h|. Together

    |s - S| <= E = r_x Y + X r_y + c X Y + c Y^2 + c X^2 + a,

with room left for the rounding of E itself and for what two different distances that round to
the same float32 can differ by; a covers underflow. All pairs whose interval [s - E, s + E] reaches
the k-th best lower end are candidates, and no others can be among the k best.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax.search.engine import exact
from siamese_jax.search.engine.operands import TINY, Frame, Side
from siamese_jax.search.engine.rounding import SINGLE, rounding
from siamese_jax.search.engine.rows import Rows

PRECISIONS = ("auto", "float32", "tf32", "bfloat16")


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
    s = products(x.values, y.values, precision)
    if exclude:
        s = jnp.where(x.code[:, None] == y.code[None, :], -jnp.inf, s)
    best = jnp.max(s.reshape(len(s), -1, group), axis=2)
    e = errors(x, y, origin_length, width, distance=distance, group=group)
    return s, best - e, best + e


@partial(
    jax.jit,
    static_argnames=("distance", "precision", "group", "exclude"),
    donate_argnames="spare",
    keep_unused=True,
)
def scores_into(spare: Array, *sides: Any, **options: Any) -> tuple[Array, Array, Array]:
    """`scores`, with s in the memory of an array of its shape that is not needed any more."""
    return scores(*sides, **options)


def errors(
    x: Side, y: Side, origin_length: Array, width: Array, *, distance: str, group: int
) -> Array:
    """E, the largest of each group of items, float32 [n, m / group]."""
    c = rounding(width, SINGLE)
    length, residual = y.length, y.residual
    along = residual + c * length
    constant = c * length * length + residual * residual
    if distance == "cosine":
        # The unit rows themselves are rounded, and so is |y|^2 of them.
        constant += (width + 16) * SINGLE * (length + 1)
    if distance == "dot":
        along += c * origin_length
    along, constant, longest = (
        jnp.max(v.reshape(-1, group), axis=1)[None, :] for v in (along, constant, length)
    )
    own = c * x.length * x.length + 8 * width * TINY
    e = x.length[:, None] * along + x.residual[:, None] * longest + constant + own[:, None]
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


def true_square(queries: Rows, here: slice, frame: Frame) -> np.ndarray:
    """float64 [q], the term that turns a score of these queries into a distance: see `score_of`."""
    origin = frame.origin[: frame.width].astype(np.float64)
    if frame.distance in ("euclidean", "sqeuclidean") and not origin.any():
        return queries.squares[here]
    x = queries.shards[0][here].astype(np.float64)
    if frame.distance == "dot":
        return x @ origin
    if frame.distance == "cosine":
        exact.unit(x)
    x -= origin
    return np.vecdot(x, x)


def score_of(radius: np.ndarray, square: np.ndarray, distance: str) -> np.ndarray:
    """S of an item at distance `radius` from a query, float64 [q]."""
    if distance == "dot":
        return -radius - square
    squared = {"euclidean": radius**2, "sqeuclidean": radius, "cosine": 2 * radius}[distance]
    return (square - squared) / 2


def below(score: np.ndarray) -> np.ndarray:
    """float64 -> float32, a step downwards: E has room for that."""
    low, high = np.finfo(np.float32).min, np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        return np.nextafter(np.clip(score, low, high).astype(np.float32), np.float32(-np.inf))
