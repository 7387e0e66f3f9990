"""One door to every data set: `load_records("folder" | "csv" | "tfds:NAME" | "emoji" | ...)`."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from siamese_jax.data.csv_file import from_csv
from siamese_jax.data.emoji import emoji_folder
from siamese_jax.data.folders import from_folder
from siamese_jax.data.places import Name, read_place
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

log = logging.getLogger(__name__)


def _folder(root: str | os.PathLike[str], layout: str | None = None) -> Records:
    return from_folder(root, layout=layout, labels="none" if layout == "images" else "needed")


def _csv(
    root: str | os.PathLike[str], images: str | None = None, separator: str | None = None
) -> Records:
    return from_csv(root, images=images, separator=separator)


SOURCES: dict[str, Callable[..., Records]] = {
    "folder": _folder,
    "query_gallery": partial(_folder, layout="query_gallery"),
    "anchor_positive": partial(_folder, layout="anchor_positive"),
    "images": partial(_folder, layout="images"),
    "csv": _csv,
}


def load_records(
    source: str,
    root: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    fractions: Sequence[float] | None = (0.5, 0.0, 0.5),
    split: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Records:
    """Reads a data set's records.

    Args:
      source: "folder" (the layout that it has, or the option `layout`: `siamese_jax.data.folders`),
        "query_gallery", "anchor_positive", "images" (no labels), "csv", "tfds:NAME", "emoji", or a
        standard protocol: "cub", "cars", "sop", "inshop".
      root: the folder or the CSV file. "emoji" has none; for "tfds:NAME" it is TFDS's own data
        folder, and a protocol without one comes from TFDS.
      seed: of the split by class, for a data set that brings no split.
      fractions: train, validation and test share of the classes for such a data set. None leaves
        it without a split.
      split: "own" takes the split that the data set brings, "classes" divides its classes all the
        same. None means "classes" for "tfds:NAME", whose splits mostly share classes, and "own"
        elsewhere, where there is one.
      cache_dir: where "emoji" and TFDS images are written; None for `cache_root()`.
      **options: of the source; see `from_csv`, `from_tfds`, `load_protocol`.

    Returns:
      Records whose classes are split, and whose queries all have an answer: a query whose class has
      no other gallery image in its split stays in the gallery if it was there, and is not asked.
      `notes` says how many, and what else there is to say; every note is logged.

    Raises:
      UserError: an unknown source or option, or a data set that cannot be read.
    """
    if split not in (None, "own", "classes"):
        raise UserError(f"data.split={split!r}; choose own or classes, or leave it out")
    records = _open(source, root, cache_dir, options)
    if split == "own" and not (records.split != "").any():
        raise UserError(f"data.split=own: {root or source} brings no split; take classes")
    if split == "classes" or (split is None and source.startswith("tfds:")):
        records = replace(records, split=np.full_like(records.split, ""))
    if (records.label < 0).any():  # bool labels are never below zero
        return _told(records)
    brought = {str(part) for part in np.unique(records.split)} - {""}
    if fractions is not None and (not brought or (len(brought) == 1 and split is None)):
        if brought:
            note = f"only the split '{min(brought)}' is there: its classes are divided again"
            records = replace(records, notes=(*records.notes, note))
        records = split_by_class(records, seed=seed, fractions=fractions)
    return _told(_note_shared_classes(_only_answerable(records)))


def _told(records: Records) -> Records:
    tell(records.notes)
    return records


def tell(notes: Iterable[str]) -> None:
    """Says what was left out, guessed or decided about images: main.py and every tool, by this."""
    for note in notes:
        log.warning("%s", note)


def _open(
    source: str,
    root: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> Records:
    if source == "emoji":
        if root is not None:
            raise UserError("the emoji have no data.root; data.cache_dir says where they are drawn")
        read = partial(SOURCES["query_gallery"], emoji_folder(cache_dir))
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


def load_images(
    place: Name | Iterable[Name],
    *,
    layout: str | None = None,
    labels: str = "known",
    separator: str | None = None,
) -> Records:
    """Images to embed or to search, without a split by class; every note is logged.

    Args:
      place: a folder, a picture, a list of pictures, or a CSV file; `siamese_jax.data.places` says
        what a list may be. No picture of a folder is left out, but for hidden ones.
      layout: of a folder, where it can be taken in several ways; see `siamese_jax.data.folders`.
      labels: "known": where they are sure, and -1 elsewhere; "needed": UserError where they are
        not; "none"; "stem": the names of the files without suffix.
      separator: between the labels of an image, in a CSV file.

    Raises:
      UserError: nothing is there, or it cannot be read so.
    """
    return _told(read_place(place, layout=layout, labels=labels, separator=separator))


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
