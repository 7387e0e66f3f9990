"""Queries and gallery as users point at them, turned into vectors, class names and ids."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from siamese_jax.data.folders import LAYOUTS
from siamese_jax.data.labels import Codebook, joined, missing
from siamese_jax.errors import UserError
from siamese_jax.tools import cli, stored

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.encoder.combined import Part

LABELS = ("folder", "stem", "none")
NO_ENCODER = (
    "give --encoder; it may be left out only where both sides are .npz files that `embed` wrote"
)


@dataclass(frozen=True)
class Side:
    """One side of a search.

    Attributes:
      vectors: float32 [n, d].
      records: the n images.
      labels: str [n] class names, "" where unknown, or bool [n, c] where an image may have several.
      ids: str [n]; the same file has the same id on both sides, so it is never its own answer.
      labelled: bool [n].
      classes: names of multi-hot columns; nothing where a label is a name itself.
      marks: uint64 [n] of `siamese_jax.data.records.marks`.
      keys: n of `siamese_jax.data.records.content_keys`.
      facts: where the images are from, how many, their fingerprint, for the provenance.
    """

    vectors: np.ndarray
    records: "Records"
    labels: np.ndarray
    ids: np.ndarray
    labelled: np.ndarray
    classes: tuple[str, ...]
    marks: np.ndarray
    keys: list[bytes]
    facts: dict[str, Any]


def add_split(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a split and say where labels come from."""
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="only this split of a data set that has splits",
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="folder",
        help="labels of images: their class folders (or CSV), the file names' stems, or none",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="what the folders inside mean, where it could be several things; images: no labels",
    )
    parser.add_argument(
        "--label-separator",
        type=cli.TEXT,
        help="what stands between the labels of an image with several, in a CSV: ';'",
    )


class Wanted(NamedTuple):
    """How images are read, as the command line says.

    Attributes:
      labels: one of `LABELS`.
      layout: one of `LAYOUTS`, or None: of folders.
      separator: between the labels of an image, in a CSV file.
      needed: whether labels that could be wrong, or are not there, are an error.
    """

    labels: str = "folder"
    layout: str | None = None
    separator: str | None = None
    needed: bool = False


def wanted(args: argparse.Namespace, *, needed: bool = False) -> Wanted:
    """The options of `add_split`, but for the split."""
    return Wanted(args.labels, args.layout, args.label_separator, needed)


def read_records(where: str, how: Wanted, *, split: str | None = None) -> "Records":
    """The images at a place, all of them or one split; nothing is split here.

    Args:
      where: what `load_images` takes, a data set's name, or a file of embeddings.
      how: to read it.
      split: "train", "validation" or "test", of a data set that brings splits.

    Raises:
      UserError: nothing is there, or not that split.
    """
    from siamese_jax.data.places import relabel
    from siamese_jax.data.sources import load_images, load_records, tell

    labels = ("needed" if how.needed else "known") if how.labels == "folder" else how.labels
    if stored.is_stored(where):
        records = relabel(stored.read_stored(where), labels)
    elif where == "emoji" or where.startswith("tfds:"):
        records = relabel(load_records(where, None, fractions=None), labels)
    else:
        # A layout is of folders, and the other side may be none.
        layout = how.layout if Path(where).is_dir() else None
        records = load_images(where, layout=layout, labels=labels, separator=how.separator)
    if split is not None:
        return records.where(split)
    if len(there := sorted({str(part) for part in records.split} - {""})) > 1:
        tell([f"{where}: the splits {', '.join(there)} are taken together; --split takes one"])
    return records


def read_sides(
    query: str, gallery: str | None, how: Wanted, *, split: str | None
) -> tuple["Records", "Records"]:
    """The images that are asked and those that are searched.

    With one place, its own marks decide (`query/` and `gallery/`, a CSV's is_query and is_gallery);
    a set without marks searches itself. With two places, each gives what is marked for its part.

    Raises:
      UserError: a side without images.
    """
    if how.layout and not any(Path(place).is_dir() for place in (query, gallery or query)):
        raise UserError(f"--layout={how.layout} is said of a folder, and {query} is none")
    if query == gallery == "-":
        raise UserError("standard input can be read once: give one of --query and --gallery a file")
    asked = read_records(query, how)
    searched = asked if gallery is None else read_records(gallery, how)
    if split is not None:
        # Image folders have no splits: the option is for the side that has some.
        divided = [bool((side.split != "").any()) for side in (asked, searched)]
        asked = asked.where(split) if divided[0] or not divided[1] else asked
        searched = searched.where(split) if divided[1] else searched
    return _marked(asked, "query", query), _marked(searched, "gallery", gallery or query)


def _marked(records: "Records", name: str, where: str) -> "Records":
    """What is marked for a side. UserError where nothing is."""
    marked = records.select(records.is_query if name == "query" else records.is_gallery)
    if not len(marked):
        raise UserError(f"{where}: no image is marked as {name}")
    return marked


def own_records(encoders: Sequence[str]) -> tuple[Path, "Records"]:
    """The run that the encoders come from, and its data set, split as it was.

    Raises:
      UserError: no encoder is of a run; a run's images are others now; or they are of runs with
        different data or splits, where one may have been trained on what the other is tested on.
    """
    from ml_collections import ConfigDict

    from siamese_jax.encoder import folder as encoder_folder
    from siamese_jax.storage import run_folder
    from siamese_jax.train.experiment import load_data

    homes = [encoder_folder.home(name) for name in encoders if Path(name).is_dir()]
    runs = [run_folder.read(folder) for folder in homes if folder.is_dir()]
    if not runs:
        raise UserError(f"{encoders[0]} is no run with data of its own: give --query=DIR")
    for other in runs[1:]:
        run_folder.check_comparable(runs[0], other)
    return runs[0].folder, load_data(ConfigDict(runs[0].config), runs[0].facts)[0]


def embed_side(
    encoder: "Part | None",
    records: "Records",
    where: str,
    *,
    batch_size: int,
    cache_dir: str | None,
) -> Side:
    """Embeds a side's images, those that were not embedded before.

    Where the place is a file of embeddings, these are taken.
    """
    from siamese_jax.data.records import content_keys, fingerprint, marks
    from siamese_jax.encoder.embedding import embed_records, item_ids, label_names

    if stored.is_stored(where):
        vectors, keys = stored.read_vectors(where, records)
        kept = records
    else:
        if encoder is None:
            raise UserError(NO_ENCODER)
        keys = content_keys(records)
        options: dict[str, Any] = {"batch_size": batch_size, "cache_dir": cache_dir}
        found = embed_records(encoder, records, keys=keys, **options)
        vectors, kept = found.vectors, found.records
    ids, labelled = item_ids(kept), ~missing(kept.label)
    labels = kept.label if kept.label.ndim == 2 else label_names(kept)
    # A file of embeddings says it of all that it holds.
    fitted = encoder.fitted_to if encoder else frozenset()
    seen = sum(key in fitted for key in keys)
    if stored.is_stored(where):
        seen = stored.read_facts(where).get("data", {}).get("fitted_to", seen)
    facts = {
        "from": where,
        "images": len(kept),
        "unreadable": len(records) - len(kept),
        "classes": len(np.unique(labels[labelled])) if labels.ndim == 1 else labels.shape[1],
        "fingerprint": fingerprint(records, keys),
        "fitted_to": seen,
    }
    classes = kept.class_names if labels.ndim == 2 else ()
    there = np.isin(records.id, kept.id)
    marked = marks(records, keys)[there]
    kept_keys = [key for key, here in zip(keys, there, strict=True) if here]
    return Side(vectors, kept, labels, ids, labelled, classes, marked, kept_keys, facts)


def integer_ids(query: Side, gallery: Side) -> tuple[np.ndarray, np.ndarray]:
    """The ids of both sides as int64 [q], [g], equal where the strings are."""
    numbers = Codebook(joined(query.ids, gallery.ids)).own.astype(np.int64)
    first, second = np.split(numbers, [len(query.ids)])
    return first, second


def shown_labels(side: Side) -> list[str]:
    """What to write beside each image: its class or classes, or the file's name without one."""
    names = np.array([*side.records.class_names, ""], dtype=np.str_)
    label = side.records.label
    shown = [", ".join(names[:-1][row]) for row in label] if label.ndim == 2 else names[label]
    return [
        str(name) if known else Path(path).stem
        for name, known, path in zip(shown, side.labelled, side.records.path, strict=True)
    ]


def provenance(
    encoder: "Part | None", facts: dict[str, Any], *, own: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """What the numbers came from: encoder, weights, data, versions, device.

    Args:
      encoder: what embedded; None where embeddings were given, whose encoder is described by `own`.
    """
    from siamese_jax.storage.run_folder import environment

    described = own or {}
    if encoder is not None:
        described = dict(encoder.provenance) | {
            "fingerprint": encoder.fingerprint,
            "image_size": encoder.image_size,
            "width": encoder.embedding_dim,
        }
    return {"encoder": described, "data": facts, **more, **environment()}
