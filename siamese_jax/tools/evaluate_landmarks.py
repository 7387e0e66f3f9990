"""The options of the Oxford and Paris protocol: graded answers, from the data set's own file."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.tools import reranking, search

if TYPE_CHECKING:
    from siamese_jax.data.records import Records
    from siamese_jax.metrics.retrieval import PerQuery

# What has no meaning where answers are graded, and its default.
OTHERS: dict[str, Any] = {
    "metrics": None,
    "per_query": None,
    "per_class": None,
    "interval": None,
    "verification": False,
    "clustering": None,
    "split": None,
    "labels": "folder",
    "layout": None,
    "label_separator": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of graded answers."""
    group = parser.add_argument_group("graded answers (easy, medium and hard; junk is ignored)")
    group.add_argument(
        "--landmarks",
        metavar="FILE",
        help="ground truth of revisited Oxford or Paris, .pkl or .json; the images are in "
        "--gallery, those of queries in --query or there too",
    )


def check(args: argparse.Namespace) -> None:
    """UserError for options that do nothing here, and for images that were not named."""
    for name, default in OTHERS.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} has no meaning with --landmarks")
    if args.gallery is None:
        raise UserError("--landmarks names images but not where they are: give --gallery=DIR")


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], search.Pair, "PerQuery"]:
    """{"landmarks": {"easy": ..., "medium": ..., "hard": ...}}, the two sides, and "easy/map"..."""
    from siamese_jax.data.landmarks_file import read_ground_truth
    from siamese_jax.metrics.landmarks import SETTINGS, landmarks
    from siamese_jax.metrics.retrieval import PerQuery

    truth = read_ground_truth(args.landmarks)
    searched = find_images(args.gallery, truth.gallery)
    asked = find_images(args.query or args.gallery, truth.queries, truth.boxes)
    where = (args.query or args.gallery, args.gallery)
    pair = reranking.expand(search.embed_pair(args, asked, searched, where), args)
    way = reranking.order(pair, args)
    found = np.asarray(reranking.rank(pair, way, len(pair.gallery.vectors)).indices)
    # An image that could not be read is in no ranking: rows are those of the file's lists again.
    found = np.where(found >= 0, pair.gallery.records.id[found], -1)
    grades = [truth.grades[i] for i in pair.query.records.id]
    block: dict[str, Any] = {}
    columns: dict[str, np.ndarray] = {}
    for setting in SETTINGS:
        values = landmarks(found, grades, setting=setting, ks=args.ks)
        means = values.means() if (values.relevant > 0).any() else {}
        counts = {"queries": int((values.relevant > 0).sum()), "lone_queries": values.lone}
        block[setting] = means | counts | {"gallery": len(searched)}
        columns |= {f"{setting}/{name}": value for name, value in values.values.items()}
    facts = {**pair.provenance, "landmarks": args.landmarks}
    graded = np.array([sum(map(len, grade.values())) for grade in grades])
    return {"landmarks": block}, replace(pair, provenance=facts), PerQuery(columns, graded)


def find_images(folder: str, names: list[str], boxes: np.ndarray | None = None) -> "Records":
    """The images of a folder by their names without suffix, in the order of the names.

    Raises:
      UserError: some of them are not there.
    """
    from siamese_jax.data.records import make_records
    from siamese_jax.data.sources import load_images

    found = load_images(folder, labels="none")
    there = {
        Path(os.path.relpath(path, found.root)).with_suffix("").as_posix(): str(path)
        for path in found.path
    }
    absent = [name for name in names if name not in there]
    if absent:
        raise UserError(
            f"{folder}: {len(absent)} of {len(names)} images of the ground truth are not there, "
            f"the first is '{absent[0]}'"
        )
    return make_records(
        [there[name] for name in names], [None] * len(names), root=folder, box=boxes
    )
