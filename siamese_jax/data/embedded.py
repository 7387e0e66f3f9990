"""Embeddings with the names of what they are of, as `embed_folder` gives them and searches take."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from siamese_jax.distances import check
from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from siamese_jax.data.records import Records

DEFAULT_DISTANCE = "euclidean"  # of arrays, which don't say what they are compared by


class Embedded(NamedTuple):
    """The embeddings of some images, one row an image.

    Labels and ids mean the same wherever they come from, so those of two folders can be compared;
    the numbers that `records` hold mean something within their own data set alone.

    Attributes:
      vectors: float32 [n, d].
      ids: str [n], the absolute path without links (and the box, of part of a picture): the same
        file has one id in every folder. An image in memory has one by its content.
      labels: str [n], the class names, "" where unknown; or, where images may have several, object
        [n] of tuples of names.
      paths: str [n].
      distance: what the encoder's embeddings are compared by.
      encoder: the encoder's fingerprint.
      records: the images' rows of their data set.
    """

    vectors: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    paths: np.ndarray
    distance: str
    encoder: str
    records: "Records"


class Asked(NamedTuple):
    """A search's arguments, as arrays."""

    queries: Any
    gallery: Any
    distance: str
    query_ids: Any
    gallery_ids: Any


def unpack(
    queries: Any, gallery: Any, distance: str | None, query_ids: Any, gallery_ids: Any
) -> Asked:
    """The arguments of a search in which `Embedded` stand for their vectors, ids and distance.

    Args:
      queries: `Embedded`, or anything else, which stays as it is.
      gallery: likewise; None where the queries search one another.
      distance: None for that of the `Embedded`, or `DEFAULT_DISTANCE`.
      query_ids, gallery_ids: in place of those of the `Embedded`.

    Raises:
      UserError: only one side is `Embedded` and the other an array, or they can't be compared: they
        are of different encoders, widths or distances.
    """
    sides = [side for side in (queries, gallery) if side is not None]
    if isinstance(queries, Embedded) and isinstance(gallery, Embedded):
        _check_comparable(queries, gallery, distance)
    elif any(isinstance(side, Embedded) for side in sides) and not all(
        hasattr(side, "ids")  # as a `Gallery` has
        for side in sides
    ):
        raise UserError(
            "one side is embedded images and the other an array, which has no ids to compare: give "
            "both as they were embedded, or .vectors of both"
        )
    if isinstance(queries, Embedded):
        distance = distance or queries.distance
        query_ids = queries.ids if query_ids is None else query_ids
        queries = queries.vectors
    if isinstance(gallery, Embedded):
        gallery_ids = gallery.ids if gallery_ids is None else gallery_ids
        gallery = gallery.vectors
    return Asked(queries, gallery, check(distance or DEFAULT_DISTANCE), query_ids, gallery_ids)


def _check_comparable(first: Embedded, second: Embedded, distance: str | None) -> None:
    if first.distance != second.distance and distance is None:
        raise UserError(
            f"the queries were embedded to be compared by {first.distance}, the gallery by "
            f"{second.distance}: embed both with one encoder"
        )
    widths = first.vectors.shape[1], second.vectors.shape[1]
    if widths[0] != widths[1] or first.encoder != second.encoder:
        raise UserError(
            f"queries and gallery were embedded by two encoders (of widths {widths[0]} and "
            f"{widths[1]}), whose vectors can't be compared: embed both with one, or give the "
            ".vectors of both if you know better"
        )
