"""Rows of length 1, which is how re-ranking compares embeddings."""

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.errors import UserError


def unit(rows: ArrayLike) -> np.ndarray:
    """[n, d] real -> float32 [n, d] of length 1; a zero row stays zero.

    >>> unit([[3, 4], [0, 0]]).round(2).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 2:
        raise UserError(f"embeddings must be [n, d], not of shape {rows.shape}")
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))[:, None]
    return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)
