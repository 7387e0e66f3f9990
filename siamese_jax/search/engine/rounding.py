"""When sums in float64, added up in any order, tell a distance as it is defined to the last bit.

With v = 2^-53, A = |x|, B = |y| and c = (2d + 64) v, computed

    |x - y|^2             is within c of its own size,
    <x, y>                within c A B / 2,
    A^2 + B^2 - 2<x, y>   within c (A + B)^2

of the true one (Higham 2002, section 3.1), whichever the order of summation, and so is the
definition in `exact`, with room for both. Both ends of that interval are rounded to float32 as the
definition is. Where they agree, which is nearly everywhere, that is the distance.
"""

from typing import Any

import numpy as np

# A jitted program takes numbers below 2^-126 for zero. Squares and lengths above these do not
# change by that.
_SQUARE = 2.0**-120
_LENGTH = 2.0**-60


def rounding(d: int) -> float:
    """c for rows of d columns."""
    return (2 * d + 64) * 2.0**-53


def of_square(square: np.ndarray, c: float, distance: str) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances, or their squares, and where they are not certain.

    Args:
      square: float64 [n], |x - y|^2 from differences, by a jitted program.
      c: of `rounding`.
      distance: "euclidean" or "sqeuclidean".

    Returns:
      (float32 [n], bool [n]).
    """
    found, unsure = _between(square * (1 - c), square * (1 + c), distance, np)
    return found, unsure | (square < _SQUARE)


def of_product(
    product: Any, a: Any, b: Any, c: float, distance: str
) -> tuple[np.ndarray, np.ndarray]:
    """As `from_product`, for a product that a jitted program made of float32 rows."""
    found, unsure = from_product(product, a, b, c, distance)
    return found, unsure | (a < _LENGTH) | (b < _LENGTH)


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
    unsure |= xp.abs(found) < np.float32(_SQUARE)
    if distance == "cosine":
        found, unsure = xp.where(zero, np.float32(1), found), unsure & ~zero
    return found, unsure


def _between(low: Any, high: Any, distance: str, xp: Any) -> tuple[Any, Any]:
    """The upper end as a distance in float32, and where the lower one gives another."""
    if distance == "euclidean":
        low, high = xp.sqrt(low), xp.sqrt(high)
    low, high = low.astype(np.float32), high.astype(np.float32)
    return high, low != high
