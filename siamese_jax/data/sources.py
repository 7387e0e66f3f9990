"""One door to every data set: `load_records("folder" | "csv" | "tfds:NAME" | "emoji" | ...)`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from siamese_jax.data import folders
from siamese_jax.data.csv_file import from_csv
from siamese_jax.data.emoji import emoji_folder
from siamese_jax.data.protocols import PROTOCOLS, load_protocol
from siamese_jax.data.records import Records, content_keys, fingerprint, split_by_class
from siamese_jax.data.tfds_source import from_tfds
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


SOURCES: dict[str, Callable[..., Records]] = {
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
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Records:
    """Reads a data set's records.

    Args:
      source: "folder" (class folders, `query/` + `gallery/`, `anchor/` + `positive/`, or `train/` +
        `test/`, whichever it is), "query_gallery", "anchor_positive", "images" (no labels), "csv",
        "tfds:NAME", "emoji", or a standard protocol: "cub", "cars", "sop", "inshop".
      root: the folder or the CSV file. "emoji" has none; for "tfds:NAME" it is TFDS's own data
        folder, and a protocol without one comes from TFDS.
      seed: of the split by class, for a data set that brings no split.
      fractions: train, validation and test share of the classes for such a data set. None leaves
        it without a split.
      resplit: split by class even what brings a split.
      cache_dir: where "emoji" and TFDS images are written; None for `cache_root()`.
      **options: of the source; see `from_csv`, `from_tfds`, `load_protocol`.

    Returns:
      Records whose classes are split, and whose queries all have an answer: a query whose class has
      no other gallery image in its split stays in the gallery if it was there, and is not asked.
      `notes` says how many.

    Raises:
      UserError: an unknown source or option, or a data set that cannot be read.
    """
    records = _open(source, root, cache_dir, options)
    if (records.label < 0).any():  # bool labels are never below zero
        return records
    if fractions is not None and (resplit or not (records.split != "").any()):
        records = split_by_class(records, seed=seed, fractions=fractions)
    return _note_shared_classes(_only_answerable(records))


def _open(
    source: str,
    root: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Records:
    if source == "emoji":
        if root is not None:
            raise UserError("the emoji have no data.root; data.cache_dir says where they are drawn")
        read = partial(folders.from_query_gallery, emoji_folder(cache_dir))
    elif source.startswith("tfds:"):
        read = partial(from_tfds, source.removeprefix("tfds:"), root, cache_dir=cache_dir)
    elif source in PROTOCOLS:
        read = partial(load_protocol, source, root, cache_dir=cache_dir)
    elif source in SOURCES:
        if root is None:
            raise UserError(f"the data source '{source}' needs data.root, the path of the data set")
        read = partial(SOURCES[source], root)
    else:
        known = ", ".join((*SOURCES, *PROTOCOLS, "emoji", "tfds:NAME"))
        raise UserError(f"unknown data source '{source}'; known: {known}")
    unknown = options.keys() - signature(read).parameters.keys()
    if unknown:
        raise UserError(f"the data source '{source}' has no option '{min(unknown)}'")
    return read(**options)


def load_images(path: str | os.PathLike[str]) -> Records:
    """Images to embed or to search, without a split: a folder, a CSV file or one image.

    Class folders give labels; a flat folder and a single image have none (-1).
    """
    if os.path.isfile(path):
        return from_csv(path) if str(path).lower().endswith(".csv") else folders.from_images(path)
    if folders.is_flat(path):
        return folders.from_images(path)
    return folders.from_folder(path)


def _note_shared_classes(records: Records) -> Records:
    """Says where a data set's own split trains on classes that it tests."""
    if records.label.ndim != 1:
        return records
    train, test = (records.label[records.split == split] for split in ("train", "test"))
    shared = np.intersect1d(train, test)
    if not len(shared):
        return records
    note = (
        f"{len(shared)} classes are in both train and test (the first is "
        f"'{records.class_names[shared[0]]}'): scores will not be those of unseen classes"
    )
    return replace(records, notes=(*records.notes, note))


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
