"""The options that better a ranking after the search: expansion, re-ranking, fused rankings."""

import argparse
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from siamese_jax import values
from siamese_jax.errors import UserError
from siamese_jax.tools import cli, search
from siamese_jax.values import COUNT, Kind, number

if TYPE_CHECKING:
    from siamese_jax.metrics.retrieval import PerQuery
    from siamese_jax.search.ranking import Ranking

# Their options are those of the functions in `siamese_jax.search.rerank`, which check their values.
METHODS: dict[str, dict[str, Kind]] = {
    "k_reciprocal": {"k1": COUNT, "k2": COUNT, "weight": number(0, 1)},
    "diffusion": {
        "graph_k": COUNT,
        "query_k": COUNT,
        "alpha": number(0, below=1),
        "gamma": number(above=0),
        "iterations": COUNT,
    },
}
FUSIONS: dict[str, dict[str, Kind]] = {
    "scores": {},
    "ranks": {"c": number(0), "depth": COUNT},
}


class Method(NamedTuple):
    """A way to order the gallery, and its options."""

    name: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable[..., "Ranking"]:
        """What re-ranks, imported when it is asked for."""
        from siamese_jax.search import rerank
        from siamese_jax.search.rerank import fusion

        ways: dict[str, Callable[..., Ranking]] = {
            "k_reciprocal": rerank.k_reciprocal,
            "diffusion": rerank.diffuse,
            "ranks": fusion.rank_by_each,
        }
        return ways[self.name]

    def describe(self) -> dict[str, Any]:
        """The name and every option, also those left at their defaults."""
        known = inspect.signature(self.function).parameters
        options = (METHODS | FUSIONS)[self.name]
        defaults = {name: known[name].default for name in options}
        return {"method": self.name} | defaults | self.options


def method(text: str, table: Mapping[str, Mapping[str, Kind]] = METHODS) -> Method:
    """ "k_reciprocal:k1=12,weight=0.5" as an argument's type.

    >>> method("k_reciprocal:k1=12,weight=0.5")
    Method(name='k_reciprocal', options={'k1': 12, 'weight': 0.5})
    """
    name, _, rest = text.partition(":")
    if name not in table:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(table)}")
    options = {}
    for part in rest.split(",") if rest else []:
        option, _, value = part.partition("=")
        if option not in table[name]:
            known = ", ".join(table[name]) or "none"
            raise argparse.ArgumentTypeError(f"{name} has no option {option!r}; it has: {known}")
        try:
            options[option] = values.parse(option, value, table[name][option])
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return Method(name, options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of re-ranking."""
    group = parser.add_argument_group("re-ranking (all by cosine; see siamese_jax.search.rerank)")
    group.add_argument(
        "--expand", type=cli.COUNT, metavar="K", help="add to each query its K nearest items"
    )
    group.add_argument(
        "--augment", type=cli.COUNT, metavar="K", help="add to each gallery item its K nearest"
    )
    group.add_argument(
        "--alpha",
        type=cli.Value(values.EXPONENT),
        default=0.0,
        help="of both: weight cosine^alpha; 0 is the plain mean",
    )
    ways = "; ".join(f"{name}:{'=,'.join(options)}=" for name, options in METHODS.items())
    group.add_argument(
        "--rerank",
        type=method,
        metavar="METHOD[:OPTION=VALUE,...]",
        help=f"order the gallery by this instead: {ways}",
    )
    group.add_argument(
        "--fuse",
        type=functools.partial(method, table=FUSIONS),
        default=Method("scores", {}),
        metavar="scores|ranks[:c=,depth=]",
        help="several encoders: mean of their cosines (the default), or sum over encoders of "
        "1 / (c + place in its list of the nearest DEPTH), for encoders whose cosines differ",
    )


def check(args: argparse.Namespace) -> None:
    """UserError for options that cannot go together: found before the work."""
    if args.fuse.name != "ranks":
        return
    if len(args.encoder) < 2:
        raise UserError("--fuse=ranks fuses several encoders: give --encoder for each of them")
    for name in ("rerank", "expand", "augment", "fuse_weights", "distance"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option} has no meaning with --fuse=ranks, which orders the gallery by itself"
            )


def expand(pair: search.Pair, args: argparse.Namespace) -> search.Pair:
    """The pair with its vectors moved as --augment and --expand say; noted in the provenance."""
    from siamese_jax.search import rerank

    if args.fuse.name == "ranks":
        return replace(pair, provenance=pair.provenance | {"fusion": args.fuse.describe()})
    used = {name: getattr(args, name) for name in ("expand", "augment") if getattr(args, name)}
    if used:
        used["alpha"] = args.alpha
    if args.rerank:
        used |= args.rerank.describe()
    if not used:
        return pair
    if args.augment:
        moved = rerank.augment_gallery(pair.gallery.vectors, args.augment, alpha=args.alpha)
        pair = replace(pair, gallery=replace(pair.gallery, vectors=moved))
    if args.expand:
        moved = rerank.expand_queries(
            *pair.sides.vectors, args.expand, alpha=args.alpha, **pair.sides.named_ids
        )
        pair = replace(pair, query=replace(pair.query, vectors=moved))
    facts = {**pair.provenance, "reranking": used, "distance": "cosine"}
    return replace(pair, distance="cosine", provenance=facts)


def order(pair: search.Pair, args: argparse.Namespace) -> Method | None:
    """What orders the gallery, if it is not the distance of the vectors."""
    if args.fuse.name != "ranks":
        return args.rerank
    return Method("ranks", {**args.fuse.options, "widths": pair.widths})


def rank(pair: search.Pair, method: Method | None, k: int) -> "Ranking":
    """The k nearest by the pair's distance, or by the method's own."""
    from siamese_jax.search import ranking

    sides = pair.sides
    if method is None:
        return ranking.rank(*sides.vectors, k, distance=sides.distance, **sides.named_ids)
    return method.function(*sides.vectors, k, **method.options, **sides.named_ids)


def measure(
    pair: search.Pair,
    method: Method | None,
    ks: Sequence[int],
    metrics: Sequence[str] | None = None,
) -> "PerQuery":
    """The metrics of every query: over the whole gallery, or over a method's ranking.

    A method's ranking is taken as deep as the largest k and the largest class ask for; what looks
    deeper (map, mrr) is left out, or has the whole gallery ranked where `metrics` names it.
    """
    from siamese_jax.metrics.relevance import relevance
    from siamese_jax.metrics.retrieval import DEFAULT, METRICS, expand, of_ranking

    sides = pair.sides
    if method is None:
        return sides.measure(ks, DEFAULT if metrics is None else metrics)
    found = relevance(*sides.labels, **sides.named_ids)
    largest = int(np.max(found.counts, initial=1))
    depth = max(*ks, largest)
    if metrics is not None:
        chosen = expand(metrics, ks)
        deepest = {"k": 0, "r": largest, "all": len(pair.gallery.vectors)}
        depth = max(k or deepest[METRICS[family][1]] for family, k in chosen.values())
    ranking = rank(pair, method, min(depth, len(pair.gallery.vectors)))
    return of_ranking(ranking, *sides.labels, ks=ks, metrics=metrics, **sides.named_ids)
