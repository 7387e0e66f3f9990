"""The options that better a ranking after the search: expansion of vectors, then re-ranking."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from siamese_jax.tools import cli, search

if TYPE_CHECKING:
    from siamese_jax.metrics import PerQuery
    from siamese_jax.ranking import Ranking

METHODS = ("k_reciprocal", "diffusion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("re-ranking (all by cosine; see siamese_jax.rerank)")
    group.add_argument(
        "--expand", type=cli.count, metavar="K", help="add to each query its K nearest items"
    )
    group.add_argument(
        "--augment", type=cli.count, metavar="K", help="add to each gallery item its K nearest"
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=0.0,
        help="of both: weight cosine^alpha; 0 is the plain mean (%(default)s)",
    )
    group.add_argument("--rerank", choices=METHODS, help="order the gallery by this instead")


def expand(pair: search.Pair, args: argparse.Namespace) -> search.Pair:
    """The pair with its vectors moved as --augment and --expand say; noted in the provenance."""
    from siamese_jax import rerank

    asked = {name: getattr(args, name) for name in ("expand", "augment", "rerank")}
    used = {name: value for name, value in asked.items() if value is not None}
    if not used:
        return pair
    if args.augment:
        moved = rerank.augment_gallery(pair.gallery.vectors, args.augment, alpha=args.alpha)
        pair = replace(pair, gallery=replace(pair.gallery, vectors=moved))
    if args.expand:
        moved = rerank.expand_queries(
            pair.query.vectors,
            pair.gallery.vectors,
            args.expand,
            alpha=args.alpha,
            query_ids=pair.query_ids,
            gallery_ids=pair.gallery_ids,
        )
        pair = replace(pair, query=replace(pair.query, vectors=moved))
    facts = {**pair.provenance, "reranking": used | {"alpha": args.alpha}, "distance": "cosine"}
    return replace(pair, distance="cosine", provenance=facts)


def rank(pair: search.Pair, method: str | None, k: int) -> "Ranking":
    """The k nearest by the pair's distance, or by the method's own."""
    from siamese_jax import ranking, rerank

    ids: dict[str, Any] = {"query_ids": pair.query_ids, "gallery_ids": pair.gallery_ids}
    vectors = (pair.query.vectors, pair.gallery.vectors)
    if method == "k_reciprocal":
        return rerank.k_reciprocal(*vectors, k, **ids)
    if method == "diffusion":
        return rerank.diffuse(*vectors, k, **ids)
    return ranking.rank(*vectors, k, distance=pair.distance, **ids)


def measure(
    pair: search.Pair, method: str | None, ks: Sequence[int], metrics: Sequence[str] | None = None
) -> "PerQuery":
    """The metrics of every query: over the whole gallery, or over a method's ranking.

    A method's ranking is taken as deep as the largest k and the largest class ask for; what looks
    deeper (map, mrr) is left out, or an error where `metrics` names it.
    """
    if method is None:
        return search.measure(pair, ks, metrics)
    from siamese_jax.metrics import of_ranking
    from siamese_jax.relevance import relevance

    labels = (pair.query.labels, pair.gallery.labels)
    ids: dict[str, Any] = {"query_ids": pair.query_ids, "gallery_ids": pair.gallery_ids}
    largest = int(np.max(relevance(*labels, **ids).counts, initial=1))
    found = rank(pair, method, max(*ks, largest))
    return of_ranking(found, *labels, ks=ks, metrics=metrics, **ids)
