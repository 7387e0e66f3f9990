"""One door to every data set: `load_records("folder" | "csv" | "tfds:NAME" | "emoji" | ...)`."""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from siamese_jax.data import folders
from siamese_jax.data.csv_file import from_csv
from siamese_jax.data.emoji import emoji_folder
from siamese_jax.data.records import Records, content_keys, fingerprint, split_by_class
from siamese_jax.errors import UserError

__all__ = [
    "SOURCES",
    "Records",
    "content_keys",
    "fingerprint",
    "load_images",
    "load_records",
    "split_by_class",
]


def _emoji(root: str | None) -> Records:
    return folders.from_query_gallery(emoji_folder(root))


SOURCES = {
    "emoji": _emoji,
    "folder": folders.from_folder,
    "query_gallery": folders.from_query_gallery,
    "anchor_positive": folders.from_anchor_positive,
    "images": folders.from_images,
    "csv": from_csv,
}


def load_records(
    source: str,
    root: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    fractions: Sequence[float] | None = (0.5, 0.0, 0.5),
    resplit: bool = False,
    **options: object,
) -> Records:
    """Reads a data set's records.

    Args:
      source: "folder" (class folders, `query/` + `gallery/`, or `anchor/` + `positive/`, whichever
        it is), "query_gallery", "anchor_positive", "images" (no labels), "csv", "tfds:NAME" or
        "emoji".
      root: the folder or the CSV file; for "emoji" and TFDS the cache folder, or None.
      seed: of the split by class, for a data set that brings no split.
      fractions: train, validation and test share of the classes for such a data set. None leaves
        it without a split.
      resplit: split by class even what brings a split.
      **options: of the source.

    Returns:
      Records whose classes are split, and whose queries all have an answer: a query whose class has
      no other gallery image in its split stays in the gallery if it was there, and is not asked.

    Raises:
      UserError: an unknown source, or a data set that cannot be read.
    """
    if source not in SOURCES:
        raise UserError(f"unknown data source '{source}'; known: {', '.join(SOURCES)}")
    if root is None and source != "emoji":
        raise UserError(f"the data source '{source}' needs a root: the path of the data set")
    records = SOURCES[source](root, **options)  # type: ignore[operator]
    if fractions is not None and (resplit or not (records.split != "").any()):
        records = split_by_class(records, seed=seed, fractions=fractions)
    return _only_answerable(records) if (records.label >= 0).all() else records


def load_images(path: str | os.PathLike[str]) -> Records:
    """Images to embed or to search, without a split: a folder, a CSV file or one image.

    Class folders give labels; a flat folder and a single image have none (-1).
    """
    if os.path.isfile(path):
        return from_csv(path) if str(path).lower().endswith(".csv") else folders.from_images(path)
    if folders.is_flat(path):
        return folders.from_images(path)
    return folders.from_folder(path)


def _only_answerable(records: Records) -> Records:
    """Takes the question mark from queries without a right answer, and says how many."""
    if records.label.ndim != 1:
        return records
    splits, part = np.unique(records.split, return_inverse=True)
    cell = records.label * np.int64(len(splits)) + part  # one number a class and split
    answers = np.bincount(cell, weights=records.is_gallery, minlength=int(cell.max()) + 1)[cell]
    lonely = records.is_query & (answers - records.is_gallery < 1)
    if not lonely.any():
        return records
    note = (
        f"{int(lonely.sum())} queries have no other image of their class to find (the first is "
        f"{records.path[lonely][0]}): they are not asked, and serve as distractors and negatives"
    )
    return replace(records, is_query=records.is_query & ~lonely, notes=(*records.notes, note))
