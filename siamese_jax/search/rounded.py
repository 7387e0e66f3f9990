"""The distance of a pair from one product in float64, where that tells it to the last bit.

With v = 2^-53, A = |x|, B = |y| and c = (2d + 64) v, the value

    fl(A^2 + B^2 - 2<x, y>)  or  fl(-<x, y>)

is within c (A + B)^2, or c A B, of the true one (Higham 2002, section 3.1), whichever the order of
summation, and so is the definition in `exact` within c of its own size. Both ends of that interval
are rounded to float32 as the definition is. Where they agree, which is nearly everywhere, that is
the distance. For cosine x and y stand for unit rows, so A = B = 1.
"""

from typing import Any

import numpy as np


def rounding(d: int) -> float:
    """c for rows of d columns."""
    return (2 * d + 64) * 2.0**-53


def rounded(product: Any, a: Any, b: Any, c: Any, distance: str, xp: Any = np) -> tuple[Any, Any]:
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
    if distance == "cosine":
        zero = (a == 0) | (b == 0)
        product = product / xp.where(zero, 1.0, a * b)
        # The definition's two unit rows are rounded themselves, hence 8 c and not 4 c.
        value, error = 1 - product, 8 * c
    elif distance == "dot":
        value, error = -product, c * a * b
    else:
        value = a * a + b * b - 2 * product
        error = c * ((a + b) * (a + b) + xp.abs(value))
    low, high = value - error, value + error
    if distance != "dot":
        low, high = xp.maximum(low, 0), xp.maximum(high, 0)
    if distance == "euclidean":
        low, high = xp.sqrt(low), xp.sqrt(high)
    low, high = low.astype(np.float32), high.astype(np.float32)
    # Numbers too small for float32's full precision may be taken for zero by a jitted program.
    unsure = (low != high) | (xp.abs(high) < np.float32(2.0**-120))
    if distance == "cosine":
        high, unsure = xp.where(zero, np.float32(1), high), unsure & ~zero
    return high, unsure
