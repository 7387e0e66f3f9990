"""Whitening: a linear map after which no direction of the embedding outweighs the others.

    x' = unit( P (x - m) )

    PCA whitening      C = cov(x) = U diag(l) U^T;  P = diag(l)^(-1/2) U^T       (Jegou & Chum 2012)
    learned whitening  S = mean of (x - y)(x - y)^T over pairs that match = L L^T (Cholesky);
                       P = V^T L^-1, V the eigenvectors of cov(L^-1 x), largest first
                       (Mikolajczyk & Matas 2007; Radenovic et al. 2018): small where images of
                       one thing differ, large where different things do

Only the first `dim` rows of P are kept, which is the best reduction by either criterion.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.data.labels import label_codes
from siamese_jax.encoder.lda import eigen, leading, within
from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import finite, unit_rows
from siamese_jax.storage.arrays import read_arrays
from siamese_jax.storage.json_files import json_text
from siamese_jax.storage.writing import written
from siamese_jax.values import SHRINKAGE, check, whole


@dataclass(frozen=True)
class Whitening:
    """A fitted map; call it on embeddings real [n, d] to get float32 [n, dim] of length 1.

    Attributes:
      mean: float64 [d].
      projection: float64 [dim, d].
      about: what it was fitted to, as JSON can hold it.
      fitted_to: the keys of these images' contents; none where they are not known.
    """

    mean: np.ndarray
    projection: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)
    fitted_to: frozenset[bytes] = frozenset()

    def __call__(self, rows: ArrayLike) -> np.ndarray:
        rows = finite(rows, "embeddings")
        if rows.shape[1] != len(self.mean):
            raise UserError(f"this whitening was fitted to [n, {len(self.mean)}], not {rows.shape}")
        return unit_rows((rows - self.mean) @ self.projection.T)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits of the map."""
        numbers = np.concatenate([self.mean[None], self.projection]).astype("<f8")
        return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the map to `path`, an .npz file that `Whitening.load` reads."""
        about = np.array(json_text(self.about))
        with written(path, "wb") as file:
            keys = np.array([list(key) for key in sorted(self.fitted_to)], np.uint8)
            columns: dict[str, Any] = {"mean": self.mean, "projection": self.projection}
            np.savez(file, **columns, about=about, fitted_to=keys)

    @classmethod
    def load(cls, path: str | Path) -> "Whitening":
        """Raises UserError where `path` isn't a saved whitening."""
        try:
            found = read_arrays(path, "whitening", ("about", "mean", "projection"))
            about = json.loads(str(found["about"]))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; save a fitted whitening there first") from None
        except ValueError as error:
            raise UserError(f"{path}: not a whitening saved by Whitening.save ({error})") from None
        keys = frozenset(row.tobytes() for row in found.get("fitted_to", ()))
        return cls(found["mean"], found["projection"], about, keys)


def fit_whitening(
    rows: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    dim: int | None = None,
    shrinkage: float = 1e-4,
) -> Whitening:
    """PCA whitening, or with labels learned whitening, from embeddings that aren't tested on.

    Args:
      rows: [n, d] real, n >= 2.
      labels: int or str [n]; every two items of one class are a matching pair.
      dim: how many dimensions to keep, at most d (all, if not given).
      shrinkage: this share of its mean is added to the diagonal of the matrix that is inverted,
        so that directions in which few rows differ aren't blown up.

    Raises:
      UserError: too few rows, rows that are all equal, no two of one class, or a bad argument.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 2)) * [10, 1]
    >>> np.abs(np.corrcoef(fit_whitening(x)(x).T)[0, 1]) < 0.1
    np.True_
    """
    x = finite(rows, "embeddings").astype(np.float64)
    if len(x) < 2:
        raise UserError(f"whitening needs at least 2 embeddings [n, d], not {x.shape}")
    keep = x.shape[1] if dim is None else dim
    check("dim", keep, whole(1, x.shape[1]))
    check("shrinkage", shrinkage, SHRINKAGE)
    mean = x.mean(0)
    centred = x - mean
    spread = centred.T @ centred / len(x)
    if labels is None:
        values, vectors = eigen(_shrunk(spread, shrinkage))
        return Whitening(mean, vectors[:, :keep].T / np.sqrt(values[:keep, None]))
    lower = np.linalg.cholesky(_shrunk(_within(centred, labels), shrinkage))
    return Whitening(mean, leading(spread, lower, keep))


def _within(x: np.ndarray, labels: ArrayLike) -> np.ndarray:
    """Mean of (x - y)(x - y)^T over the pairs of one class; rows without a label are in none.

    Within a class of n with mean m, the sum over its unordered pairs is n sum (x - m)(x - m)^T.
    """
    _, (group,) = label_codes(labels)
    if group.shape != (len(x),):
        raise UserError(f"{len(x)} rows need labels [{len(x)}], not {group.shape}")
    total, pairs = within(lambda places: x[places], group, x.shape[1], pairs=True)
    if not pairs:
        raise UserError("learned whitening needs classes of at least two rows, but all are single")
    return total / pairs


def _shrunk(matrix: np.ndarray, shrinkage: float) -> np.ndarray:
    level = np.trace(matrix) / len(matrix)
    if not level > 0:
        raise UserError("whitening needs rows that differ (with labels, within a class)")
    # Even unasked, rounding must not make a direction without spread negative.
    return matrix + max(shrinkage, 1e-12) * level * np.eye(len(matrix))
