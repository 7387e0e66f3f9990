"""Rows made ready for the matrix product of `bounds`: centred, rounded, and with added columns."""

import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from siamese_jax.search.engine.rounding import SINGLE, rounding

TINY = 2.0**-126
# Columns of the product for the items' own term.
ADDED = 3
# Which 16 bits of a float32 are its upper half.
_HIGH = 1 if sys.byteorder == "little" else 0
# Rows no longer than this have squared distances that do not overflow float32.
LONGEST = 2.0**61


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
      values: [n, product_width] x' or y' with the added columns, in the product's dtype; they
        give a score of -inf where there is no item.
      length: float32 [n], X or Y.
      residual: float32 [n], r_x or r_y.
      code: int32 [n], equal where query and item have the same id.
      fine: bool [n], whether a row is finite, and no longer than `LONGEST`.
    """

    values: Any
    length: Any
    residual: Any
    code: Any
    fine: Any


def padded_width(d: int) -> int:
    """Few different widths to compile for; none of a power of two changes."""
    step = 16 if d <= 256 else 64
    return max(step, -(-d // step) * step)


def product_width(d: int, precision: str) -> int:
    """Columns of the product: the padded ones and those added, to whole tiles."""
    tile = 32 if precision == "bfloat16" else 8
    return -(-(padded_width(d) + ADDED) // tile) * tile


def product_dtype(precision: str) -> np.dtype:
    """Of the product's operands."""
    return np.dtype(jnp.bfloat16 if precision == "bfloat16" else np.float32)


def row_bytes(d: int, precision: str) -> int:
    """Memory that a row takes, as it is prepared."""
    return product_width(d, precision) * product_dtype(precision).itemsize


def fits(rows: np.ndarray) -> np.ndarray:
    """Whether rows of float32 [n, d] are finite, and no longer than `LONGEST`: bool [n]."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.vecdot(rows, rows) <= LONGEST**2


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
    """One side of the product, on a device.

    Args:
      rows: float32 [n, w], columns from `width` on zero.
      there: bool [n]; other rows are padding, or not to be found.
      code: int32 [n].
      origin: float32 [w], 0 from `width` on.
      width: float32 [], d. Not static, so that one program serves all d of a padded width.
      distance, precision: as in `Frame`.
      is_query: whether these are the queries.
    """
    n, w = rows.shape
    fine = _squares(rows) <= LONGEST**2
    apart = jnp.zeros(n, jnp.float32)
    if distance == "cosine":
        most = jnp.max(jnp.abs(rows), axis=1)
        zero = most == 0
        rows = rows / jnp.where(zero, 1, most)[:, None]
        rows = rows / jnp.where(zero, 1, jnp.sqrt(_squares(rows)))[:, None]
        apart = zero.astype(jnp.float32)
    if not (distance == "dot" and is_query):
        rows = rows - origin[None, :]
    square = _squares(rows) + apart
    values, rounded = rows, rows
    if precision == "bfloat16":
        # XLA may leave out a conversion to fewer bits and back, but not this.
        rounded = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)
        values = rounded.astype(jnp.bfloat16)
    off = _squares(rows - rounded)
    square, length, residual = sizes(
        square, off, there, width, distance=distance, precision=precision, xp=jnp
    )
    added = jnp.ones((n, ADDED), jnp.float32)
    if not is_query:
        parts, h = [], half(square, distance)
        for _ in range(ADDED):
            parts.append(lax.reduce_precision(h, exponent_bits=8, mantissa_bits=7))
            h -= parts[-1]
        added = jnp.stack([jnp.where(there, parts[0], -jnp.inf), *parts[1:]], axis=1)
    spare = jnp.zeros((n, product_width(w, precision) - w - ADDED), values.dtype)
    values = jnp.concatenate([values, spare, added.astype(values.dtype)], axis=1)
    return Side(values, length, residual, code, fine)


def _squares(x: Array) -> Array:
    return jnp.sum(x * x, axis=1)


def prepare_into(
    side: Side, rows: np.ndarray, there: np.ndarray, frame: Frame, is_query: bool
) -> None:
    """`prepare` on the host: writes all of `side` but the codes, as NumPy arrays.

    Args:
      side: n rows.
      rows: float32 [n, w], columns from `width` on zero.
      there: bool [n].
      frame, is_query: as above.
    """
    values, width, w = side.values, np.float32(frame.width), rows.shape[1]
    square = np.vecdot(rows, rows)
    side.fine[:] = square <= LONGEST**2
    x = np.empty_like(rows)
    if frame.distance == "cosine":
        most = np.max(np.abs(rows, out=x), axis=1)
        apart = most == 0
        np.divide(rows, np.where(apart, 1, most)[:, None], out=x)
        x /= np.where(apart, 1, np.sqrt(np.vecdot(x, x)))[:, None]
        rows, square = x, np.vecdot(x, x)
    if frame.origin.any() and not (frame.distance == "dot" and is_query):
        rows = np.subtract(rows, frame.origin, out=x)
        square = np.vecdot(x, x)
    if frame.distance == "cosine":
        square += apart
    off = np.zeros(len(x), np.float32)
    if frame.precision == "bfloat16":
        rounded = _bfloat16(rows)
        values.view(np.uint16)[:, :w] = rounded.view(np.uint16)[:, _HIGH::2]
        np.subtract(rows, rounded, out=rounded)
        off = np.vecdot(rounded, rounded)
    else:
        values[:, :w] = rows
    square, side.length[:], side.residual[:] = sizes(
        square, off, there, width, distance=frame.distance, precision=frame.precision, xp=np
    )
    values[:, w:-ADDED] = 0
    added = values[:, -ADDED:]
    added[:] = 1
    if not is_query:
        h = half(square, frame.distance)
        for n in range(ADDED):
            part = _bfloat16(h)
            added[:, n] = part
            h -= part
        added[~there, 0] = -np.inf


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Finite float32 to the nearest bfloat16, as float32; ties away from zero.

    bfloat16 is the upper half of a float32. NumPy's own conversion would hold up other threads.
    """
    bits = np.add(x.view(np.uint32), np.uint32(0x8000))
    return np.bitwise_and(bits, np.uint32(0xFFFF0000), out=bits).view(np.float32)


def sizes(
    square: Any, off: Any, there: Any, width: Any, *, distance: str, precision: str, xp: Any
) -> tuple[Any, Any, Any]:
    """(|x|^2, X, r_x) from |x|^2 and |x' - x|^2 as computed; 0 for rows that are not there."""
    slack = width * TINY + ((width + 16) * SINGLE if distance == "cosine" else 0)
    square = xp.where(there, square, np.float32(0))
    length, residual = xp.sqrt(square), xp.sqrt(off)
    if precision == "tf32":
        # TensorFloat-32 keeps 10 bits of the fraction; it may cut instead of rounding.
        residual = np.float32(2.0**-10) * length
    residual = xp.where(there, residual * (1 + rounding(width, SINGLE)) + slack, np.float32(0))
    return square, (length + residual) * (1 + rounding(width, SINGLE)), residual


def half(square: Any, distance: str) -> Any:
    """h, the items' own term of their scores."""
    return square * np.float32(0 if distance == "dot" else -0.5)
