"""The options that measure embeddings beyond their rankings: verification and clustering."""

import argparse
from typing import Any

import numpy as np

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.tools import cli, search

FMRS = (0.1, 0.01, 0.001)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of what is measured beyond rankings."""
    group = parser.add_argument_group("beyond rankings (of the embeddings, before --rerank)")
    group.add_argument(
        "--verification",
        action="store_true",
        help="roc_auc, eer and fnmr@fmr over all pairs of a query and a gallery image",
    )
    group.add_argument(
        "--fmr",
        type=cli.Value(values.several(values.number(0, 1), 1)),
        default=FMRS,
        help="false match rates to take fnmr at: 0.1,0.01",
    )
    group.add_argument(
        "--clustering",
        type=cli.COUNT,
        nargs="?",
        const=0,
        metavar="K",
        help="nmi and ami of k-means on all images; K clusters, by default as many as classes",
    )


def measure(pair: search.Pair, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A block of metrics for each option that was given."""
    blocks = {}
    if args.verification:
        blocks["verification"] = verify(pair, args.fmr)
    if args.clustering is not None:
        blocks["clustering"] = cluster(pair, args.clustering or None)
    return blocks


def verify(pair: search.Pair, fmrs: tuple[float, ...]) -> dict[str, float]:
    """Names and values of `siamese_jax.metrics.verification`, over the labelled rows."""
    from siamese_jax.metrics import verification

    known, there = pair.query.labelled, pair.gallery.labelled
    return verification.verify(
        pair.query.vectors[known],
        pair.query.labels[known],
        pair.gallery.vectors[there],
        pair.gallery.labels[there],
        query_ids=pair.query_ids[known],
        gallery_ids=pair.gallery_ids[there],
        distance=pair.distance,
        fmrs=fmrs,
    )


def cluster(pair: search.Pair, k: int | None) -> dict[str, Any]:
    """nmi and ami over every labelled image, of both sides, once; rows of length 1 for cosine."""
    from siamese_jax.metrics.clustering import clustering
    from siamese_jax.search.engine.checked_rows import unit_rows

    if pair.query.labels.ndim == 2:
        raise UserError("--clustering needs one label for each image")
    sides = (pair.query, pair.gallery)
    labels = np.concatenate([side.labels for side in sides])
    rows = np.concatenate([side.vectors for side in sides])
    first = np.unique(np.concatenate([pair.query_ids, pair.gallery_ids]), return_index=True)[1]
    kept = first[np.concatenate([side.labelled for side in sides])[first]]
    rows = unit_rows(rows[kept]) if pair.distance == "cosine" else rows[kept]
    clusters = len(np.unique(labels[kept])) if k is None else k
    return clustering(rows, labels[kept], k=clusters) | {"clusters": clusters}
