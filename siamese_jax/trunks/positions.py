"""Position embeddings of a Vision Transformer for images of another size, by two rules.

torch: PyTorch's bicubic with antialias, a = -0.5, as timm, and DINOv2 with registers, resize them.
dino: PyTorch's bicubic without it, a = -0.75, as DINO's and DINOv2's own code does: it asks for
    (new + 0.1) / old times the size, so that its steps are a little shorter than old / new.

Both are a weighted sum of old rows, then of old columns: new = R grid C^T.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

RULES = ("torch", "dino")


def resize(grid: Array, size: tuple[int, int], rule: str) -> Array:
    """Embeddings of a grid of patches [h,w,c] for another grid: [*size,c]. An equal one is kept."""
    if grid.shape[:2] == size:
        return grid
    rows, columns = (
        jnp.asarray(weights(old, new, rule), grid.dtype)
        for old, new in zip(grid.shape[:2], size, strict=True)
    )
    return jnp.einsum("ip,jq,pqc->ijc", rows, columns, grid)


@functools.cache
def weights(old: int, new: int, rule: str) -> np.ndarray:
    """float64 [new, old]: what each new place takes of each old one; rows sum to 1."""
    step = old / (new + 0.1) if rule == "dino" else old / new
    centre = (np.arange(new) + 0.5) * step - 0.5
    if rule == "torch":
        found = _cubic((np.arange(old) - centre[:, None]) / max(step, 1.0), -0.5)
        return found / found.sum(1, keepdims=True)
    found = np.zeros((new, old))
    first = np.floor(centre).astype(int)
    for tap in range(-1, 3):  # beyond the border, its last row counts again
        place = np.clip(first + tap, 0, old - 1)
        found[np.arange(new), place] += _cubic(first + tap - centre, -0.75)
    return found


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel (1981): (a+2)|x|^3 - (a+3)|x|^2 + 1 to 1, a(|x|^3 - 5|x|^2 + 8|x| - 4) to 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
