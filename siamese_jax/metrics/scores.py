"""Scores that put gallery rows in the order of their distance to a query, and how far they err.

A matrix product gives scores

    s(x, y) = |y|^2 - 2 <x, y>      (or -<x, y> where the distance is a product).

With u half the spacing of floats at 1, x and y rounded from the centred rows, and Y the largest
|y|: the product errs by (d + 2) u |x| Y, the norm by 3 u Y^2, and subtracting, and rounding what
it is compared with, by u (Y^2 + 2 |x| Y) each (Higham 2002, section 3.1: any order of summation).
Centring by c, norms and distances in float64 add their own, with v = 2^-53; so does underflow, and
distances D are rounded to float32, which makes ties of what lies within 2^-23 of them. So a score
is off by at most

    e = 1.01 (u ((2 d + 16) |x| Y + 8 Y^2) + v (2 d + 16) (|x| + Y + |c|)^2) + d 2^-140 + 2^-23 D.
"""

from dataclasses import dataclass

import numpy as np

from siamese_jax.search.engine.exact import pair_distances
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

    def rows(self, raw: np.ndarray) -> np.ndarray:
        """Rows as scores use them, float64: centred, or for cosine of unit length."""
        rows = np.asarray(raw, np.float64)
        return _unit(rows) if self.distance == "cosine" else rows - self.origin

    def offsets(self, rows: np.ndarray) -> np.ndarray:
        """The part of a score that comes from the gallery's row alone."""
        return (rows**2).sum(1) if self.scale == 2 else np.zeros(len(rows))

    def error(self, query_norms: np.ndarray, largest: float, unit: float) -> np.ndarray:
        """e of every query [b] without its last term, from |x|, Y and u."""
        terms = 2 * self.gallery.shape[1] + 16
        whole = query_norms + largest + np.sqrt((self.origin**2).sum())
        scores = unit * (terms * query_norms * largest + 8 * largest**2)
        return 1.01 * (scores + 2.0**-53 * terms * whole**2) + terms * 2.0**-140

    def squared(self, distances: np.ndarray) -> np.ndarray:
        """Distances as they stand in scores: squared, where they are Euclidean."""
        return distances**2 if self.distance == "euclidean" else distances

    def shift(self, query_norms: np.ndarray) -> np.ndarray:
        """What the squared distances of a query have above its scores, [b]."""
        constant = {"dot": 0.0, "cosine": 1.0}.get(self.distance)
        return query_norms**2 if constant is None else np.full(len(query_norms), constant)

    def exact(self, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Distances of pairs, the very ones that `rank` sorts by, float64 [n]."""
        rows = Rows([self.gallery], "gallery")
        found = pair_distances(self.queries, rows, query, item, self.distance)
        return found.astype(np.float64)


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt((x * x).sum(1, keepdims=True))
    return x / np.where(norm > 0, norm, 1)
