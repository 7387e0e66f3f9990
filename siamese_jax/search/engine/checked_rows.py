"""Rows of numbers as every part of the package takes them: finite, and not far from the origin.

Squared distances come from |x|^2 + |y|^2 - 2<x, y>, whose rounding is that of |x|^2, however near
x and y are. So a common point is subtracted first, which changes no distance.
"""

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError
from siamese_jax.search.engine.blocks import check_all
from siamese_jax.search.engine.rows import Rows

_STEP = 65536


def finite(x: ArrayLike, name: str, gallery: np.ndarray | None = None) -> np.ndarray:
    """Rows [n, d] as they are, after the check that `siamese_jax.rank` makes of its own.

    Args:
      x: real [n, d]; a memory map stays one.
      name: what messages call it, such as "gallery".
      gallery: [g, d], of the same width.

    Raises:
      UserError: not a matrix of real numbers, not as wide as the gallery, or a row that has a NaN
        or an infinity or is too long for its squared distances to fit float32.

    >>> finite([[1.0, 2.0], [3.0, np.nan]], "gallery")
    Traceback (most recent call last):
    siamese_jax.errors.UserError: gallery row 1 is not finite: remove it or mend what computed it
    """
    rows = Rows([x], name)
    if gallery is not None and rows.width != gallery.shape[1]:
        raise UserError(f"{name} have {rows.width} columns, the gallery {gallery.shape[1]}")
    check_all(rows)
    return rows.shards[0]


def amid(rows: np.ndarray) -> np.ndarray:
    """A point amid most of the rows: the median of up to 1024 of them, float64 [d].

    Unlike the mean, a few rows far outside don't move it away from all the others.
    """
    if not len(rows):
        return np.zeros(rows.shape[1])
    return np.median(np.asarray(rows[:: -(-len(rows) // 1024)], np.float64), axis=0)


def moved(rows: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """rows - origin, subtracted in float64 and rounded once to float32 [n, d]."""
    found = np.empty(rows.shape, np.float32)
    for start in range(0, len(rows), _STEP):
        part = slice(start, start + _STEP)
        found[part] = np.asarray(rows[part], np.float64) - origin
    return found


def at_least_one(**counts: int) -> None:
    """Raises UserError for an argument that isn't a whole number above 0."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise UserError(f"{name} = {value!r} must be a whole number, at least 1")


MOST_EMPTY = 2**28  # places of an answer that may stay empty because the gallery is smaller than k


def check_room(q: int, g: int, **counts: int) -> None:
    """UserError for an answer of q rows that is far longer than a gallery of g could fill.

    >>> check_room(4, 6, k=10**9)
    Traceback (most recent call last):
    siamese_jax.errors.UserError: k=1000000000: the gallery has 6 rows; give at most that many
    """
    for name, value in counts.items():
        if value > g and q * value > MOST_EMPTY:
            raise UserError(f"{name}={value}: the gallery has {g} rows; give at most that many")


def unit_rows(
    rows: ArrayLike, name: str = "embeddings", gallery: np.ndarray | None = None
) -> np.ndarray:
    """[n, d] real -> float32 [n, d] of length 1; a zero row stays zero.

    Raises UserError as `finite`, which the other arguments are for.

    >>> unit_rows([[3, 4], [0, 0]]).round(2).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows = finite(rows, name, gallery).astype(np.float32, copy=False)
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))[:, None]
    return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)
