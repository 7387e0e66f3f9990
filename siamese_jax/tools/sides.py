"""Queries and gallery as users point at them, turned into vectors, class names and ids."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.errors import UserError

if TYPE_CHECKING:
    from siamese_jax.combined import Part
    from siamese_jax.data.records import Records

LABELS = ("folder", "stem", "none")


@dataclass(frozen=True)
class Side:
    """One side of a search.

    Attributes:
      vectors: float32 [n, d].
      records: the n images.
      labels: str [n] class names, or bool [n, c] where an image may have several; an unlabelled
        image has a class of its own.
      ids: str [n]; the same file has the same id on both sides, so it is never its own answer.
      labelled: bool [n].
      classes: names of multi-hot columns; nothing where a label is a name itself.
      marks: uint64 [n] of `siamese_jax.data.records.marks`.
      facts: where the images are from, how many, their fingerprint, for the provenance.
    """

    vectors: np.ndarray
    records: "Records"
    labels: np.ndarray
    ids: np.ndarray
    labelled: np.ndarray
    classes: tuple[str, ...]
    marks: np.ndarray
    facts: dict[str, Any]


def add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", help="only this split of a data set that has splits: train, validation, test"
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="folder",
        help="labels of a folder's images: its class folders, the file names' stems, or none",
    )
    parser.add_argument(
        "--label-separator",
        help="what stands between the labels of an image with several, in a CSV: ';'",
    )


def read_records(
    where: str, *, split: str | None = None, labels: str = "folder", separator: str | None = None
) -> "Records":
    """The images at a place, all of them or one split; nothing is split here.

    Args:
      where: a folder in any known layout, an image file, a CSV file, or a data set's name.
      split: "train", "validation" or "test", of a data set that brings splits.
      labels: as in `LABELS`; of folders without class folders only stems can give any.
      separator: between the labels of an image, in a CSV file.

    Raises:
      UserError: nothing is there, or not that split.
    """
    from siamese_jax.data.csv_file import from_csv
    from siamese_jax.data.folders import from_images
    from siamese_jax.data.sources import load_images, load_records

    path = Path(where)
    if path.is_file() and path.suffix.lower() == ".csv":
        records = from_csv(where, separator=separator)
    elif path.exists():
        records = load_images(where) if labels == "folder" else from_images(where)
        records = _labelled_by_stem(records) if labels == "stem" else records
    elif where == "emoji" or where.startswith("tfds:"):
        records = load_records(where, None, fractions=None)
    else:
        raise UserError(
            f"{where} does not exist; give a folder, an image, a CSV file, emoji or tfds:NAME"
        )
    return records if split is None else records.where(split)


def _labelled_by_stem(records: "Records") -> "Records":
    names, label = np.unique([Path(p).stem for p in records.path], return_inverse=True)
    return replace(
        records, label=label.astype(np.int32), class_names=tuple(str(name) for name in names)
    )


def read_sides(
    query: str,
    gallery: str | None,
    *,
    split: str | None,
    labels: str,
    separator: str | None = None,
) -> tuple["Records", "Records"]:
    """The images that are asked and those that are searched.

    With one place, its own marks decide (`query/` and `gallery/`, a CSV's is_query and is_gallery);
    a set without marks searches itself. With two places, each gives what is marked for its part.

    Raises:
      UserError: a side without images.
    """
    options: dict[str, Any] = {"labels": labels, "separator": separator}
    asked = read_records(query, **options)
    searched = asked if gallery is None else read_records(gallery, **options)
    if split is not None:
        # Image folders have no splits: the option is for the side that has some.
        divided = [bool((side.split != "").any()) for side in (asked, searched)]
        asked = asked.where(split) if divided[0] or not divided[1] else asked
        searched = searched.where(split) if divided[1] else searched
    asked, searched = asked.select(asked.is_query), searched.select(searched.is_gallery)
    for side, name, where in ((asked, "query", query), (searched, "gallery", gallery or query)):
        if not len(side):
            raise UserError(f"{where}: no image is marked as {name}")
    return asked, searched


def run_records(run: Path) -> "Records":
    """The data set of a run, split as it was, checked to be unchanged.

    Raises:
      UserError: the folder is no run, or its images are others now.
    """
    from ml_collections import ConfigDict

    from siamese_jax import run_folder
    from siamese_jax.train import load_data

    if not run.is_dir():
        raise UserError(f"{run} does not exist; give the folder of a run")
    for name in ("config.json", "run.json"):
        if not (run / name).exists():
            raise UserError(f"{run} is not a run: it has no {name}")
    config = ConfigDict(run_folder.read_json(run / "config.json"))
    return load_data(config, run_folder.read_json(run / "run.json"))[0]


def own_records(encoders: Sequence[str]) -> tuple[Path, "Records"]:
    """The run that the encoders come from, and its data set.

    Raises:
      UserError: no encoder is of a run, or they are of runs with different data or splits, where
        one may have been trained on what the other is tested on.
    """
    from siamese_jax import encoder_folder
    from siamese_jax.run_folder import read_json
    from siamese_jax.tools.diff import check_comparable

    homes = [encoder_folder.home(name) for name in encoders if Path(name).is_dir()]
    runs = [folder for folder in homes if folder.is_dir()]
    if not runs:
        raise UserError(f"{encoders[0]} is no run with data of its own: give --query=DIR")
    records = run_records(runs[0])
    for other in runs[1:]:
        facts = [read_json(run / "run.json") for run in (runs[0], other)]
        check_comparable(runs[0], facts[0], other, facts[1])
    return runs[0], records


def embed_side(
    encoder: "Part", records: "Records", where: str, *, batch_size: int, cache_dir: str | None
) -> Side:
    """Embeds a side's images, those that were not embedded before."""
    from siamese_jax.data.records import content_keys, fingerprint, marks
    from siamese_jax.features import embed_records

    keys = content_keys(records)
    found = embed_records(encoder, records, batch_size=batch_size, cache_dir=cache_dir, keys=keys)
    kept = found.records
    ids = np.array([str(Path(path).resolve()) for path in found.paths], dtype=np.str_)
    if kept.box is not None:  # Several things in one picture are several items.
        boxed = [f"{i}#{tuple(b)}" if b.any() else i for i, b in zip(ids, kept.box, strict=True)]
        ids = np.array(boxed, dtype=np.str_)
    labels, labelled = _class_names(kept, ids)
    facts = {
        "from": where,
        "images": len(kept),
        "unreadable": len(records) - len(kept),
        "classes": len(np.unique(labels[labelled])) if labels.ndim == 1 else labels.shape[1],
        "fingerprint": fingerprint(records, keys),
    }
    classes = kept.class_names if labels.ndim == 2 else ()
    marked = marks(records, keys)[np.isin(records.id, kept.id)]
    return Side(found.vectors, kept, labels, ids, labelled, classes, marked, facts)


def _class_names(records: "Records", ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels that mean the same on both sides: names, or multi-hot rows; and which are known."""
    label = records.label
    if label.ndim == 2:
        return label, np.asarray(label.any(axis=1))
    known = np.greater_equal(label, 0)
    names = np.array(records.class_names, dtype=np.str_)[np.maximum(label, 0)]
    # No two unlabelled images are relevant to each other.
    return np.where(known, names, np.char.add("\0", ids)), np.asarray(known)


def align_classes(query: Side, gallery: Side) -> tuple[Side, Side]:
    """Multi-hot columns of both sides brought to one order of classes; names are so already."""
    if query.labels.ndim == gallery.labels.ndim == 1:
        return query, gallery
    if query.labels.ndim != gallery.labels.ndim:
        raise UserError(
            "one side has several labels an image and the other has one; use equal CSVs"
        )
    sides = (query, gallery)
    classes = sorted({name for side in sides for name in side.records.class_names})

    def brought(side: Side) -> Side:
        labels = np.zeros((len(side.labels), len(classes)), bool)
        labels[:, np.searchsorted(classes, side.records.class_names)] = side.labels
        return replace(side, labels=labels, classes=tuple(classes))

    return brought(query), brought(gallery)


def integer_ids(query: Side, gallery: Side) -> tuple[np.ndarray, np.ndarray]:
    """The ids of both sides as int64 [q], [g], equal where the strings are."""
    codes = np.unique(np.concatenate([query.ids, gallery.ids]), return_inverse=True)[1]
    first, second = np.split(codes.astype(np.int64), [len(query.ids)])
    return first, second


def shown_labels(side: Side) -> list[str]:
    """What to write beside each image: its class or classes, or the file's name without one."""
    names = np.array(side.records.class_names, dtype=np.str_)
    return [
        (", ".join(names[label]) if side.labels.ndim == 2 else str(names[label]))
        if known
        else Path(path).stem
        for label, known, path in zip(
            side.records.label, side.labelled, side.records.path, strict=True
        )
    ]


def provenance(encoder: "Part", facts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the numbers came from: encoder, weights, data, versions, device."""
    from siamese_jax.run_folder import environment

    described = dict(encoder.provenance) | {
        "fingerprint": encoder.fingerprint,
        "image_size": encoder.image_size,
        "width": encoder.embedding_dim,
    }
    return {"encoder": described, "data": facts, **more, **environment()}
