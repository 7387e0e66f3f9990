"""Which gallery items answer which query: they share a label and are not the query itself.

Labels are whole numbers or strings [n], or a multi-hot bool matrix [n, c] (two items match when
they share at least one label). Labels are compared as they are, never as floats: 2**24 and
2**24 + 1 are two labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.search.sides import fits

ArrayLike = Any


def as_labels(labels: ArrayLike, what: str = "labels") -> np.ndarray:
    """Labels as an array fit for exact comparison: integers or strings [n], or bool [n, c].

    Raises UserError for floats, for a matrix that isn't bool, and for any other shape.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2:
        if labels.dtype != bool:
            raise UserError(
                f"{what} are a matrix of {labels.dtype}: a multi-hot matrix must be bool [n, c]"
            )
        return labels
    if labels.ndim != 1:
        raise UserError(f"{what} have shape {labels.shape}: give [n], or bool [n, c]")
    if labels.dtype.kind not in "biuUO":
        raise UserError(f"{what} are {labels.dtype}: labels must be whole numbers or strings")
    if labels.dtype.kind == "O":
        labels = np.asarray([str(label) for label in labels])
    if labels.dtype.kind == "u":
        # Unsigned beside signed would meet in float64, which merges neighbours above 2**53.
        if labels.size and int(labels.max()) > np.iinfo(np.int64).max:
            raise UserError(f"{what} exceed 2**63 - 1: renumber them")
        labels = labels.astype(np.int64)
    return labels


def codes(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two label vectors as int64 codes of one shared vocabulary: (first, second, vocabulary)."""
    if (first.dtype.kind == "U") != (second.dtype.kind == "U"):
        raise UserError(
            f"query labels are {first.dtype} and gallery labels {second.dtype}: they never match"
        )
    vocabulary, numbers = np.unique(np.concatenate([first, second]), return_inverse=True)
    numbers = numbers.reshape(-1).astype(np.int64)
    return numbers[: len(first)], numbers[len(first) :], vocabulary


@dataclass(frozen=True)
class Groups:
    """The gallery's rows by key: those of key c are `order[starts[c]:starts[c + 1]]`, ascending."""

    order: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, count: int) -> "Groups":
        sizes = np.bincount(keys, minlength=count)
        order = np.argsort(keys, kind="stable")
        return cls(order, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def sizes(self, keys: np.ndarray) -> np.ndarray:
        return self.starts[keys + 1] - self.starts[keys]

    def members(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All members of each key: (position in `keys` int64 [h], gallery row int64 [h])."""
        sizes = self.sizes(keys)
        owner = np.repeat(np.arange(len(keys)), sizes)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return owner, self.order[self.starts[keys][owner] + within]


@dataclass(frozen=True)
class Relevance:
    """The relevant gallery items of every query, listed block by block so that memory is bounded.

    query_labels, gallery_labels: int64 codes [q], [g] or multi-hot bool [q, c], [g, c].
    query_ids, gallery_ids: int64 codes [q], [g]; an item with the query's id is never relevant.
    """

    query_labels: np.ndarray
    gallery_labels: np.ndarray
    query_ids: np.ndarray | None
    gallery_ids: np.ndarray | None
    by_label: Groups | None
    by_id: Groups | None
    counts: np.ndarray

    def own(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gallery rows that are a query itself: (position in `rows`, gallery row)."""
        if self.by_id is None or self.query_ids is None:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        return self.by_id.members(self.query_ids[rows])

    def lists(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relevant pairs of some queries: (position in `rows`, gallery row), both ascending."""
        if self.by_label is None:
            shared = _share(self.query_labels[rows], self.gallery_labels)
            shared[self.own(rows)] = False
            owner, item = np.nonzero(shared)
            return owner, item
        owner, item = self.by_label.members(self.query_labels[rows])
        if self.query_ids is not None and self.gallery_ids is not None:
            keep = self.query_ids[rows][owner] != self.gallery_ids[item]
            owner, item = owner[keep], item[keep]
        return owner, item

    def related(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """bool [b, c]: does each query share a label with each of some gallery rows?"""
        queries, gallery = self.query_labels[rows], self.gallery_labels[items]
        if self.by_label is None:
            return _share(queries, gallery)
        return queries[:, None] == gallery[None, :]

    def matches(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """bool [b, k]: is the gallery row relevant? An index of -1 is nobody, hence never."""
        there = indices >= 0
        items = np.where(there, indices, 0)
        queries, gallery = self.query_labels[rows], self.gallery_labels[items]
        if self.by_label is None:
            same = (queries[:, None, :] & gallery).any(-1)
        else:
            same = queries[:, None] == gallery
        if self.query_ids is not None and self.gallery_ids is not None:
            same &= self.query_ids[rows][:, None] != self.gallery_ids[items]
        return same & there


def _share(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """bool [b, g] from multi-hot [b, c] and [g, c]; sums of at most c ones are exact in float32."""
    return (queries.astype(np.float32) @ gallery.T.astype(np.float32)) > 0


def relevance(
    query_labels: ArrayLike,
    gallery_labels: ArrayLike | None = None,
    *,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    block: int = 1024,
) -> Relevance:
    """Relevance of a gallery to queries; without a gallery the queries search one another.

    >>> found = relevance([3, 3, 5])
    >>> found.counts.tolist()
    [1, 1, 0]

    Raises UserError when labels or ids have the wrong kind or length, or only one side has ids.
    """
    first = as_labels(query_labels, "query labels")
    if gallery_labels is None:
        second = first
        if query_ids is None:
            query_ids = np.arange(len(first))
        gallery_ids = query_ids if gallery_ids is None else gallery_ids
    else:
        second = as_labels(gallery_labels, "gallery labels")
    if (query_ids is None) != (gallery_ids is None):
        raise UserError("ids were given for one side only: give query_ids and gallery_ids, or none")
    if first.ndim != second.ndim or first.shape[1:] != second.shape[1:]:
        raise UserError(
            f"query labels have shape {first.shape} and gallery labels {second.shape}: "
            "both must be [n], or both multi-hot with the same number of labels"
        )

    by_id = ids = own_ids = None
    if query_ids is not None and gallery_ids is not None:
        ids, own_ids, names = codes(as_labels(query_ids, "ids"), as_labels(gallery_ids, "ids"))
        for part, labels, side in ((ids, first, "query"), (own_ids, second, "gallery")):
            if len(part) != len(labels):
                raise UserError(f"{len(part)} {side} ids for {len(labels)} {side} labels")
        by_id = Groups.of(own_ids, len(names))

    if first.ndim == 1:
        first, second, classes = codes(first, second)
        by_label = Groups.of(second, len(classes))
        counts = by_label.sizes(first)
    else:
        by_label = None
        counts = np.concatenate(
            [np.zeros(0, np.int64)]
            + [_share(first[i : i + block], second).sum(1) for i in range(0, len(first), block)]
        )
    found = Relevance(first, second, ids, own_ids, by_label, by_id, counts)
    owner, item = found.own(np.arange(len(first)))
    if by_label is None:
        self_match = (first[owner] & second[item]).any(-1)
    else:
        self_match = first[owner] == second[item]
    counts = counts - np.bincount(owner[self_match], minlength=len(first))
    return Relevance(first, second, ids, own_ids, by_label, by_id, counts)


def as_relevance(
    queries: np.ndarray,
    query_labels: ArrayLike,
    gallery: np.ndarray | None,
    gallery_labels: ArrayLike | None,
    query_ids: ArrayLike | None,
    gallery_ids: ArrayLike | None,
) -> Relevance:
    """`relevance`, after checking that rows and labels are of equal number."""
    if (gallery is None) != (gallery_labels is None):
        raise UserError("give gallery and gallery_labels together, or neither")
    gallery = queries if gallery is None else gallery
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"queries {queries.shape} and gallery {gallery.shape} are not [q, d], [g, d]"
        )
    found = relevance(query_labels, gallery_labels, query_ids=query_ids, gallery_ids=gallery_ids)
    for side, rows, labels in (
        ("queries", queries, found.query_labels),
        ("gallery items", gallery, found.gallery_labels),
    ):
        if len(rows) != len(labels):
            raise UserError(f"{len(rows)} {side} have {len(labels)} labels")
        for start in range(0, len(rows), 65536):
            with np.errstate(over="ignore"):
                part = rows[start : start + 65536].astype(np.float32, copy=False)
            fit = fits(part)
            if not fit.all():
                bad = start + int(fit.argmin())
                raise UserError(f"row {bad} of the {side} is not finite, or too large for float32")
    return found
