"""Rows of length 1, which is how re-ranking compares embeddings."""

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.rows import finite


def unit(
    rows: ArrayLike, name: str = "embeddings", gallery: np.ndarray | None = None
) -> np.ndarray:
    """[n, d] real -> float32 [n, d] of length 1; a zero row stays zero.

    Raises UserError as `siamese_jax.rows.finite`, which the other arguments are for.

    >>> unit([[3, 4], [0, 0]]).round(2).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    rows = finite(rows, name, gallery).astype(np.float32, copy=False)
    norm = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))[:, None]
    return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)
