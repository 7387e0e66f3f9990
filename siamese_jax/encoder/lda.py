"""Linear discriminant analysis (LDA) with shrinkage: a linear head in closed form.

    m    = the mean of all rows                    C = their covariance
    S_w  = the covariance within classes: the sum of (x - m_c)(x - m_c)^T over the rows of all
           classes c of two rows or more, over rows less classes
    S_a  = (1 - a) S_w + a tr(S_w)/d I = L L^T     (Cholesky)
    x'   = unit( V^T L^-1 (x - m) ),  V the leading eigenvectors of L^-1 C L^-T

L^-1 differs from S_a^(-1/2) by a rotation, which the eigenvectors take back. Directions in which
images of one class differ become short (Mika et al. 1999); the shrinkage a keeps those in which few
have been seen to differ from being blown up (Ledoit & Wolf 2004). With a = 1 it is the PCA.

A row with several labels is a row of each of its classes, so every two rows that share a label pull
together. A row without one, or alone in its class, has a part in m and C only. All is accumulated
in float64 from blocks of rows: what is held does not grow with their number. Of fewer rows than
columns, all happens within the rows' span, where it is the same: x = Q y, with Q of orthonormal
columns, and y [n] in place of x [d]; S_a is a tr(S_w)/d I outside of it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from siamese_jax.data.labels import missing
from siamese_jax.errors import UserError

Rows = Callable[[np.ndarray], np.ndarray]  # places int [m] -> real [m, d]
BLOCK = 4096
IMAGES_AN_AXIS = 2  # or all are kept
NARROW = 2048  # matrices up to here are taken apart at once: small, and other threads run meanwhile


class Copies(UserError):
    """No two images of a class differ."""


class Scatter(NamedTuple):
    """What LDA needs of n rows; the scatter of two sets is the sum of theirs.

    Attributes:
      origin: float64 [d], what was taken off the rows before the sums.
      rows: how many.
      total: float64 [d], their sum.
      products: float64 [d, d], the sum of their outer products.
      within: float64 [d, d], that of their deviations from the means of their classes.
      freedom: rows in classes of two or more, less these classes.
    """

    origin: np.ndarray
    rows: int
    total: np.ndarray
    products: np.ndarray
    within: np.ndarray
    freedom: float

    @property
    def mean(self) -> np.ndarray:
        """float64 [d], of the rows."""
        return np.asarray(self.origin + self.total / self.rows)

    def without(self, part: "Scatter") -> "Scatter":
        """Of the rows that are not in a part made of whole classes, in the part's memory."""
        return Scatter(
            self.origin,
            self.rows - part.rows,
            self.total - part.total,
            np.subtract(self.products, part.products, out=part.products),
            np.subtract(self.within, part.within, out=part.within),
            self.freedom - part.freedom,
        )

    def at(self, columns: np.ndarray) -> "Scatter":
        """Of some of the columns, int [e]."""
        if len(columns) == len(self.total):
            return self
        square = np.ix_(columns, columns)
        vectors = self.origin[columns], self.rows, self.total[columns]
        return Scatter(*vectors, self.products[square], self.within[square], self.freedom)


def scatter(
    rows: Rows, labels: np.ndarray, *, origin: np.ndarray | None = None, block: int = BLOCK
) -> Scatter:
    """Accumulates n rows.

    Args:
      rows: gives the rows of some places among the n; called with at most `block` of them.
      labels: int [n], -1 for none, or bool [n, c].
      origin: real [d], near the rows' mean; the mean of some of them, if not given.
      block: rows in memory at a time.
    """
    places = np.arange(len(labels))
    if origin is None:
        origin = np.asarray(rows(places[:: max(1, len(places) // block)][:block])).mean(axis=0)
    origin = np.asarray(origin, np.float64)
    total, products = np.zeros(len(origin)), np.zeros((len(origin),) * 2)
    for start in range(0, len(places), block):
        x = np.array(rows(places[start : start + block]), np.float64)
        x -= origin
        total += x.sum(axis=0)
        products += x.T @ x
    found, freedom = within(rows, labels, len(origin), block=block)
    return Scatter(origin, len(places), total, products, found, freedom)


def within(
    rows: Rows, labels: np.ndarray, width: int, *, pairs: bool = False, block: int = BLOCK
) -> tuple[np.ndarray, float]:
    """The sum of (x - m_c)(x - m_c)^T over all classes c of two rows or more, and its divisor.

    Args:
      rows, labels, block: as `scatter` takes them.
      width: of the rows.
      pairs: weigh a class by its size, so that each two rows of a class count alike; the quotient
        is then the mean of (x - y)(x - y)^T over these pairs.

    Returns:
      float64 [width, width], and how many degrees of freedom, or pairs, there are.
    """
    place, group = np.nonzero(labels) if labels.ndim == 2 else _known(labels)
    order = np.argsort(group, kind="stable")
    place, sizes = place[order], np.unique(group, return_counts=True)[1]
    several = np.repeat(sizes, sizes) > 1
    place, sizes = place[several], sizes[sizes > 1]
    found = np.zeros((width, width))
    for x, part in _deviations(rows, place, sizes, block):
        weighted = x * np.sqrt(part)[:, None] if pairs else x
        found += weighted.T @ weighted
    sizes = sizes.astype(np.float64)
    return found, float((sizes * (sizes - 1) / 2 if pairs else sizes - 1).sum())


def _known(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    place = np.flatnonzero(~missing(labels))
    return place, labels[place]


def _deviations(
    rows: Rows, place: np.ndarray, sizes: np.ndarray, block: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each row less its class's mean, float64 [m, d], and the size of its class, block by block.

    `place` holds the rows class after class, `sizes` how many each class has.
    """

    def read(start: int, stop: int) -> np.ndarray:
        return np.array(rows(place[start:stop]), np.float64)

    ends = np.cumsum(sizes)
    first = start = 0
    while first < len(sizes):
        stop = max(first + 1, int(np.searchsorted(ends, start + block, side="right")))
        held, end = sizes[first:stop], int(ends[stop - 1])
        if end - start <= block:
            x = read(start, end)
            heads = np.concatenate([[0], np.cumsum(held)[:-1]])
            mean = np.add.reduceat(x, heads, axis=0) / held[:, None]
            x -= np.repeat(mean, held, axis=0)
            yield x, np.repeat(held, held)
        else:  # one class of more rows than a block
            parts = [(i, min(i + block, end)) for i in range(start, end, block)]
            mean = np.sum([read(*part).sum(axis=0) for part in parts], axis=0) / held
            for part in parts:
                yield read(*part) - mean, np.repeat(held, part[1] - part[0])
        first, start = stop, end


def mean_square(found: Scatter) -> float:
    """The mean of the rows' squared lengths."""
    moved = np.trace(found.products) + 2 * found.total @ found.origin
    return float(moved / found.rows + found.origin @ found.origin)


def moments(found: Scatter, shrinkage: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m [d], C [d, d] and L [d, d] of the formula above; errors as `factor`."""
    return *mean_and_covariance(found), factor(found, shrinkage)


def mean_and_covariance(found: Scatter) -> tuple[np.ndarray, np.ndarray]:
    """m [d] and C [d, d] of all rows."""
    shift = found.total / found.rows
    spread = found.products / found.rows
    for row, part in zip(spread, shift, strict=True):  # no third matrix
        row -= part * shift
    return found.mean, spread


def factor(found: Scatter, shrinkage: float, size: int | None = None) -> np.ndarray:
    """L [d, d], the lower Cholesky factor of S_a.

    Args:
      found: of `scatter`.
      shrinkage: a.
      size: the d of tr(S_w)/d, where the rows were taken into their span; else their width.

    Raises:
      UserError: shrinkage outside 0..1, no two rows of one class, or none that differ.
    """
    from scipy.linalg import cholesky

    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage {shrinkage} must lie in 0..1")
    if not found.freedom > 0:
        raise UserError("LDA needs a class of two images or more, but all are single")
    shared = found.within / found.freedom
    size = size or len(shared)
    level = np.trace(shared) / size
    # Against the rows' own length: what rounding leaves of copies is no spread.
    if not level * size > 1e-12 * mean_square(found):
        raise Copies("LDA needs images of one class that differ: all are copies")
    shared *= 1 - shrinkage
    # Even unasked, rounding must not make a direction without spread negative.
    shared[np.diag_indices(len(shared))] += max(shrinkage, 1e-12) * level
    # LAPACK works in place on columns; of a symmetric matrix these are the rows.
    return cholesky(shared.T, lower=True, overwrite_a=True, check_finite=False)


def whitened(lower: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """L^-1 x for each of some rows, float64 [n, d]."""
    from scipy.linalg import solve_triangular

    return solve_triangular(lower, rows.T, lower=True, check_finite=False).T


def closed_form(found: Scatter, *, shrinkage: float, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The fitted map x -> P (x - m).

    Beside `found`, two matrices [d, d] and the axes are held.

    Args:
      found: of `scatter`.
      shrinkage: a in the formula above, from 0 to 1.
      width: how many axes to keep, at most d.

    Returns:
      m float64 [d], P float64 [width, d].

    Raises:
      UserError: a width that the rows do not have, or what `factor` raises.
    """
    mean, spread, lower = moments(found, shrinkage)
    if not 1 <= width <= len(mean):
        raise UserError(f"LDA keeps 1 to {len(mean)} axes, not {width}")
    return mean, leading(spread, lower, width)


def few(rows: int, axes: int, size: int) -> bool:
    """Whether rows are too few to tell which axes to keep, of a number between 0 and `size`."""
    return axes < size and rows < IMAGES_AN_AXIS * axes


def fitted(
    rows: Rows, labels: np.ndarray, *, shrinkage: float, width: int, block: int = BLOCK
) -> tuple[np.ndarray, np.ndarray]:
    """LDA of some rows: within their span, where they are fewer than columns.

    An axis outside the span has no row to tell it by: any of them follow those inside.

    Args:
      rows, labels, block: as `scatter` takes them.
      shrinkage, width, and what is returned and raised: of `closed_form`.
    """
    size = np.shape(rows(np.arange(1)))[1]
    if len(labels) >= size or width > size:
        found = scatter(rows, labels, block=block)
        return closed_form(found, shrinkage=shrinkage, width=width)
    x = gathered(rows, len(labels), block)
    basis, upper = np.linalg.qr(x.T)
    found = scatter(lambda places: upper.T[places], labels, block=block)
    mean, spread = mean_and_covariance(found)
    lower = factor(found, shrinkage, size)
    axes = leading(spread, lower, min(width, len(mean))) @ basis.T
    if width > len(axes):
        outside = np.linalg.qr(basis, mode="complete")[0][:, len(axes) : width]
        level = np.trace(found.within) / found.freedom / size
        axes = np.concatenate([axes, outside.T / np.sqrt(max(shrinkage, 1e-12) * level)])
    return basis @ mean, axes


def in_span(rows: Rows, count: int) -> np.ndarray:
    """Coordinates float64 [n, n] of n rows of more columns: their products with one another, to
    1e-15 of the largest. A row that the others span has zeros for a coordinate of its own.
    """
    from scipy.linalg import lapack

    x = gathered(rows, count)
    lower, order, rank, _ = lapack.dpstrf(x @ x.T, lower=1, overwrite_a=1)
    lower[:, rank:] = 0
    found = np.empty_like(lower)
    found[order - 1] = np.tril(lower)
    return found


def gathered(rows: Rows, count: int, block: int = BLOCK) -> np.ndarray:
    """All rows, float64 [n, d], read block by block."""
    places = np.split(np.arange(count), range(block, count, block))
    return np.concatenate([np.asarray(rows(some), np.float64) for some in places])


def leading(spread: np.ndarray, lower: np.ndarray, width: int) -> np.ndarray:
    """V^T L^-1 [width, d]: the first principal axes after the map L^-1, largest first.

    C is lost: L^-1 C L^-T is made in its place.
    """
    from scipy.linalg import lapack, solve_triangular

    reduced, _ = lapack.dsygst(spread.T, np.asfortranarray(lower), lower=1, overwrite_a=1)
    _, axes = eigen(reduced, width)
    return solve_triangular(
        lower, axes, trans="T", lower=True, overwrite_b=True, check_finite=False
    ).T


def eigen(matrix: np.ndarray, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first, and eigenvectors in columns, their largest entry positive.

    Args:
      matrix: float64 [d, d], symmetric; its lower triangle is read, and it is lost.
      width: how many; all of them, if not given.
    """
    from scipy.linalg import eigh

    size = len(matrix)
    if size <= NARROW:
        values, vectors = np.linalg.eigh(matrix)
    else:  # in place; few are found one by one, many are quicker all at once
        few = (size - width, size - 1) if width and width <= size // 3 else None
        values, vectors = eigh(
            matrix, subset_by_index=few, driver="evr", overwrite_a=True, check_finite=False
        )
    values, vectors = values[::-1][:width], vectors[:, ::-1][:, :width]
    vectors *= np.where(vectors.max(axis=0) >= -vectors.min(axis=0), 1.0, -1.0)
    return values, vectors
