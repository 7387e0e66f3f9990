"""Scores that put gallery rows in the order of their distance to a query, and how far they err.

A matrix product gives scores

    s(x, y) = |y|^2 - 2 <x, y>      (or -<x, y> where the distance is a product).

With Y the largest |y|, and c_u, c_v the constants of `siamese_jax.search.engine.rounding` for the
product's precision (u = 2^-24 in float32) and for float64 (v = 2^-53), it errs by c_u |x| Y;
8 u Y^2 is for the norm, the subtraction and what the score is compared with; c_v is for centring by
o, norms and distances in float64. Distances D are rounded to float32, which makes ties of what lies
within 2^-23 of them. So a score is off by at most

    e = 1.01 (c_u |x| Y + 8 u Y^2 + c_v (|x| + Y + |o|)^2) + d 2^-139 + 2^-23 D.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from siamese_jax.search.engine.exact import pair_distances
from siamese_jax.search.engine.rounding import rounding
from siamese_jax.search.engine.rows import Rows


@dataclass(frozen=True)
class Space:
    """Rows to compare, and how.

    Attributes:
      queries: float32 [q, d].
      gallery: float32 [g, d]; may be a memory map.
      distance: one of `siamese_jax.distances.DISTANCES`.
      origin: float64 [d], subtracted from all rows where that changes no distance.
    """

    queries: np.ndarray
    gallery: np.ndarray
    distance: str
    origin: np.ndarray

    @classmethod
    def of(cls, queries: np.ndarray, gallery: np.ndarray, distance: str) -> "Space":
        """The space of [n, d] and [m, d]; Euclidean distances are taken from near the mean."""
        origin = np.zeros(gallery.shape[1])
        if distance in ("euclidean", "sqeuclidean") and len(gallery):
            origin = np.asarray(gallery[:: -(-len(gallery) // 4096)], np.float64).mean(0)
        rows = gallery.astype(np.float32, copy=False)
        asking = rows if queries is gallery else queries.astype(np.float32, copy=False)
        return cls(asking, rows, distance, origin)

    @property
    def within(self) -> bool:
        """Do the rows search one another?"""
        return self.queries is self.gallery

    @property
    def scale(self) -> int:
        """The factor of <x, y> in the score."""
        return 2 if self.distance in ("euclidean", "sqeuclidean") else 1

    @cached_property
    def as_rows(self) -> tuple[Rows, Rows]:
        """Queries and gallery, whose squares are computed once."""
        gallery = Rows([self.gallery], "gallery")
        return gallery if self.within else Rows([self.queries], "queries"), gallery

    def rows(self, raw: np.ndarray) -> np.ndarray:
        """Rows as scores use them, float64: centred, or for cosine of unit length."""
        rows = np.asarray(raw, np.float64)
        return _unit(rows) if self.distance == "cosine" else rows - self.origin

    def offsets(self, rows: np.ndarray) -> np.ndarray:
        """The part of a score that comes from the gallery's row alone."""
        return (rows**2).sum(1) if self.scale == 2 else np.zeros(len(rows))

    def error(self, query_norms: np.ndarray, largest: float, unit: float) -> np.ndarray:
        """e of every query [b] without its last term, from |x|, Y and u."""
        d = self.gallery.shape[1]
        whole = query_norms + largest + np.sqrt((self.origin**2).sum())
        scores = rounding(d, unit) * query_norms * largest + 8 * unit * largest**2
        return 1.01 * (scores + rounding(d) * whole**2) + (d + 8) * 2.0**-139

    def squared(self, distances: np.ndarray) -> np.ndarray:
        """Distances as they stand in scores: squared, where they are Euclidean."""
        return distances**2 if self.distance == "euclidean" else distances

    def shift(self, query_norms: np.ndarray) -> np.ndarray:
        """What the squared distances of a query have above its scores, [b]."""
        constant = {"dot": 0.0, "cosine": 1.0}.get(self.distance)
        return query_norms**2 if constant is None else np.full(len(query_norms), constant)

    def exact(self, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Distances of pairs, the very ones that `rank` sorts by, float64 [n]."""
        asking, rows = self.as_rows
        found = pair_distances(asking, rows, query, item, self.distance)
        return found.astype(np.float64)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)
