"""Where the patches of a Vision Transformer are: embeddings for any size of image, and rotations.

Embeddings are resized by one of two rules:

torch: PyTorch's bicubic with antialias, a = -0.5, as timm, and DINOv2 with registers, resize them.
dino: PyTorch's bicubic without it, a = -0.75, as DINO's and DINOv2's own code does: it asks for
    (new + 0.1) / old times the size, so that its steps are a little shorter than old / new.

Both are a weighted sum of old rows, then of old columns: new = R grid C^T.

DINOv3 has no embeddings, but turns queries and keys by angles that depend on the place alone. In
its own files the angles' periods are rounded to bfloat16 (dino); timm has them in float32 (torch).
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


def turns(size: tuple[int, int], width: int, rule: str) -> tuple[Array, Array]:
    """Sine and cosine of each place's angles, float32 [h * w, width] each; `width` is of one head.

        angle = 2 pi c / 100^(4 j / width),   c the place's row, then its column, from -1 to 1

    Source: DINOv3 (Simeoni et al. 2025, arXiv:2508.10104).
    """
    periods = np.float32(100) ** (4 * np.arange(width // 4, dtype=np.float32) / width)
    if rule == "dino":
        periods = periods.astype(jnp.bfloat16).astype(np.float32)
    rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in size)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    angles = (2 * np.pi * grid[..., None] / periods).reshape(len(grid), -1)
    angles = np.concatenate([angles, angles], -1)
    return jnp.asarray(np.sin(angles), jnp.float32), jnp.asarray(np.cos(angles), jnp.float32)


def turn(x: Array, sine: Array, cosine: Array) -> Array:
    """x [n,t,heads,d] with its last places turned, in float32: (a, b) -> (a c - b s, b c + a s).

    What comes before (class token, registers) stays.
    """
    first, last = jnp.split(x, [x.shape[1] - len(sine)], axis=1)
    last = last.astype(jnp.float32)
    a, b = jnp.split(last, 2, axis=-1)
    sine, cosine = sine[None, :, None], cosine[None, :, None]
    turned = last * cosine + jnp.concatenate([-b, a], -1) * sine
    return jnp.concatenate([first, turned.astype(x.dtype)], axis=1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel (1981): (a+2)|x|^3 - (a+3)|x|^2 + 1 to 1, a(|x|^3 - 5|x|^2 + 8|x| - 4) to 2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
