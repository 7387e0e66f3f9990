"""Which gallery items answer which query: they share a label and are not the query itself.

What labels and ids are, and when two are equal or one is missing: `siamese_jax.data.labels`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from siamese_jax.data.labels import Codebook, Groups, as_ids, label_codes, share, share_all
from siamese_jax.errors import UserError
from siamese_jax.search.engine.checked_rows import finite

ArrayLike = Any


@dataclass(frozen=True)
class Relevance:
    """The relevant gallery items of every query, listed block by block so that memory is bounded.

    query_labels, gallery_labels: codes of `label_codes`: int64 [q], [g] or bool [q, c], [g, c].
    query_ids, gallery_ids: int32 numbers [q], [g] of a `Codebook`; an item with the query's id is
      never relevant.
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
            shared = share_all(self.query_labels[rows], self.gallery_labels)
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
        return share_all(self.query_labels[rows], self.gallery_labels[items])

    def matches(self, rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """bool [b, k]: is the gallery row relevant? An index of -1 is nobody, hence never."""
        there = indices >= 0
        if not len(self.gallery_labels):
            return there
        items = np.where(there, indices, 0)
        same = share(self.query_labels[rows][:, None], self.gallery_labels[items])
        if self.query_ids is not None and self.gallery_ids is not None:
            same &= self.query_ids[rows][:, None] != self.gallery_ids[items]
        return same & there


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
    if gallery_labels is None:
        vocabulary, (first,) = label_codes(query_labels, what=["query labels"])
        second = first
        if query_ids is None:
            query_ids = np.arange(len(first))
        gallery_ids = query_ids if gallery_ids is None else gallery_ids
    else:
        vocabulary, (first, second) = label_codes(
            query_labels, gallery_labels, what=["query labels", "gallery labels"]
        )
    if (query_ids is None) != (gallery_ids is None):
        raise UserError("ids were given for one side only: give query_ids and gallery_ids, or none")

    by_id = ids = own_ids = None
    if query_ids is not None and gallery_ids is not None:
        book = Codebook(as_ids(gallery_ids, len(second), "gallery_ids"))
        ids, own_ids = book.of(as_ids(query_ids, len(first), "query_ids")), book.own
        by_id = Groups.of(own_ids, len(book))

    if first.ndim == 1:
        by_label = Groups.of(second, len(vocabulary))
        counts = by_label.sizes(first)
    else:
        by_label = None
        counts = np.concatenate(
            [np.zeros(0, np.int64)]
            + [share_all(first[i : i + block], second).sum(1) for i in range(0, len(first), block)]
        )
    found = Relevance(first, second, ids, own_ids, by_label, by_id, counts)
    owner, item = found.own(np.arange(len(first)))
    self_match = share(first[owner], second[item])
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
    for name, items, rows, labels in (
        ("queries", "queries", queries, found.query_labels),
        ("gallery", "gallery items", gallery, found.gallery_labels),
    ):
        if len(rows) != len(labels):
            raise UserError(f"{len(rows)} {items} have {len(labels)} labels")
        finite(rows, name)
    return found
