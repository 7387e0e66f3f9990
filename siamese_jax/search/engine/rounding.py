"""How far computed products can be from the true ones: what search and metrics alike rest on.

With u half the spacing of floats at 1 (2^-24 in float32, 2^-53 in float64), A = |x|, B = |y| and
c = (2d + 64) u, computed

    <x, y>                is within c A B / 2,
    A^2 + B^2 - 2<x, y>   is within c (A + B)^2

of the true one (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1),
whichever the order of summation, with room for a few more roundings. Underflow comes on top.

In float64 that tells a distance as defined to the last bit: the definition in `exact` lies in the
same interval, with room for both. Both ends are rounded to float32 as the definition is. Where
they agree, which is nearly everywhere, that is the distance.
"""

from typing import Any

import numpy as np

# u of float32 and float64.
SINGLE, DOUBLE = 2.0**-24, 2.0**-53
# A jitted program takes numbers below 2^-126 for zero.
_SMALLEST = 2.0**-120


def rounding(d: Any, unit: float = DOUBLE) -> Any:
    """c for rows of d columns; d may be an array."""
    return (2 * d + 64) * unit


def from_product(
    product: Any, a: Any, b: Any, c: Any, distance: str, xp: Any = np
) -> tuple[Any, Any]:
    """Distances as they are defined, and where a product cannot tell them.

    Args:
      product: float64, <x, y> of pairs of rows.
      a, b: float64, |x| and |y|, which broadcast to its shape.
      c: float64, of `rounding`.
      distance: one of `siamese_jax.distances.DISTANCES`.
      xp: the module of the arrays.

    Returns:
      (float32 distances, bool where they are not certain).
    """
    zero = (a == 0) | (b == 0)
    if distance == "cosine":
        # Unit rows have A = B = 1. The definition's are rounded themselves: 8 c and not 4 c.
        product = product / xp.where(zero, 1.0, a * b)
        value, error = 1 - product, 8 * c
    elif distance == "dot":
        value, error = -product, c * a * b
    else:
        value = a * a + b * b - 2 * product
        error = c * ((a + b) * (a + b) + xp.abs(value))
    low, high = value - error, value + error
    if distance != "dot":
        low, high = xp.maximum(low, 0), xp.maximum(high, 0)
    found, unsure = _between(low, high, distance, xp)
    # Numbers too small for float32's full precision may be taken for zero by a jitted program.
    unsure |= xp.abs(found) < np.float32(_SMALLEST)
    if distance == "cosine":
        found, unsure = xp.where(zero, np.float32(1), found), unsure & ~zero
    return found, unsure


def _between(low: Any, high: Any, distance: str, xp: Any) -> tuple[Any, Any]:
    """The upper end as a distance in float32, and where the lower one gives another."""
    if distance == "euclidean":
        low, high = xp.sqrt(low), xp.sqrt(high)
    low, high = low.astype(np.float32), high.astype(np.float32)
    return high, low != high
