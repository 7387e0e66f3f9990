"""What each post-processing step gains on the default emoji task: one design searches another.

    python benchmarks/rerank.py --encoder runs/emoji
    python benchmarks/rerank.py --encoder efficientnet_lite0 --image-size 128

Options of each step are chosen on the training classes: whitenings are fitted to one half of them
and judged by the other half, then fitted to all. The table, in Markdown, is of the test classes,
which nothing was chosen on: recall@1, its gain over plain cosine with a paired bootstrap interval
(95 %), the mean reciprocal rank, the options, and seconds for all queries.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import records

from siamese_jax.data.sources import load_records
from siamese_jax.encoder.embedding import embed_records
from siamese_jax.encoder.load import load_encoder
from siamese_jax.metrics.bootstrap import difference
from siamese_jax.metrics.retrieval import PerQuery, of_ranking
from siamese_jax.search import rerank
from siamese_jax.search.ranking import Ranking, rank
from siamese_jax.tools.images import own_records


class Side(NamedTuple):
    """Queries and gallery of some classes: their encodings, and their labels."""

    queries: np.ndarray
    gallery: np.ndarray
    queries_mirrored: np.ndarray
    gallery_mirrored: np.ndarray
    queries_views: np.ndarray
    gallery_views: np.ndarray
    queries_other: np.ndarray
    gallery_other: np.ndarray
    query_labels: np.ndarray
    gallery_labels: np.ndarray

    def of(self, classes: np.ndarray) -> "Side":
        """The part of some classes."""
        rows = [np.isin(labels, classes) for labels in (self.query_labels, self.gallery_labels)]
        return Side._make(column[rows[i % 2]] for i, column in enumerate(self))


Method = Callable[..., Ranking]


def whole(queries: np.ndarray, gallery: np.ndarray) -> Ranking:
    return rank(queries, gallery, len(gallery), distance="cosine")


def plain(train: Side, side: Side) -> Ranking:
    return whole(side.queries, side.gallery)


def mirrored(train: Side, side: Side) -> Ranking:
    return whole(side.queries_mirrored, side.gallery_mirrored)


def views(train: Side, side: Side) -> Ranking:
    return whole(side.queries_views, side.gallery_views)


def fused(train: Side, side: Side, weight: float) -> Ranking:
    fuse = partial(rerank.concatenate, weights=[1, weight])
    return whole(fuse([side.queries, side.queries_other]), fuse([side.gallery, side.gallery_other]))


def fitted(train: Side, learned: bool, dim: int, shrinkage: float) -> rerank.Whitening:
    rows = np.concatenate([train.queries, train.gallery])
    labels = np.concatenate([train.query_labels, train.gallery_labels])
    return rerank.fit_whitening(rows, labels if learned else None, dim=dim, shrinkage=shrinkage)


def whitened(train: Side, side: Side, **options: Any) -> Ranking:
    white = fitted(train, **options)
    return whole(white(side.queries), white(side.gallery))


def expanded(train: Side, side: Side, k: int, alpha: float) -> Ranking:
    moved = rerank.expand_queries(side.queries, side.gallery, k, alpha=alpha)
    return whole(moved, side.gallery)


def augmented_gallery(train: Side, side: Side, k: int, alpha: float) -> Ranking:
    return whole(side.queries, rerank.augment_gallery(side.gallery, k, alpha=alpha))


def reciprocal(train: Side, side: Side, **options: Any) -> Ranking:
    return rerank.k_reciprocal(side.queries, side.gallery, len(side.gallery), **options)


def diffused(train: Side, side: Side, **options: Any) -> Ranking:
    return rerank.diffuse(side.queries, side.gallery, len(side.gallery), **options)


def whitened_reciprocal(
    train: Side, side: Side, k1: int, k2: int, weight: float, **options: Any
) -> Ranking:
    white = fitted(train, **options)
    x, y = white(side.queries), white(side.gallery)
    return rerank.k_reciprocal(x, y, len(y), k1=k1, k2=k2, weight=weight)


def views_fused(train: Side, side: Side, weight: float) -> Ranking:
    fuse = partial(rerank.concatenate, weights=[1, weight])
    return whole(
        fuse([side.queries_views, side.queries_other]),
        fuse([side.gallery_views, side.gallery_other]),
    )


EXPANSIONS: dict[str, list] = {"k": [1, 2, 5], "alpha": [0.0, 3.0]}
RECIPROCAL: dict[str, list] = {"k1": [6, 12, 20], "k2": [1, 3], "weight": [0.3, 0.6, 0.8]}
LEARNED: dict[str, list] = {
    "learned": [True],
    "dim": [256, 512, 1024],
    "shrinkage": [0.01, 0.1, 0.3, 1.0, 3.0, 10.0],
}
WEIGHTS: dict[str, list] = {"weight": [0.1, 0.25, 0.5, 1.0]}
METHODS: dict[str, tuple[Method, dict[str, list]]] = {
    "cosine": (plain, {}),
    "mirror": (mirrored, {}),
    "mirror and two scales": (views, {}),
    "two encoders": (fused, WEIGHTS),
    "two encoders, the first with views": (views_fused, WEIGHTS),
    "PCA whitening": (whitened, LEARNED | {"learned": [False]}),
    "learned whitening": (whitened, LEARNED),
    "query expansion": (expanded, EXPANSIONS),
    "gallery augmentation": (augmented_gallery, EXPANSIONS),
    "k-reciprocal": (reciprocal, RECIPROCAL),
    "diffusion": (diffused, {"graph_k": [5, 20], "query_k": [3, 10], "alpha": [0.5, 0.9]}),
    "learned whitening, k-reciprocal": (
        whitened_reciprocal,
        RECIPROCAL | {"learned": [True], "dim": [512], "shrinkage": [1.0, 3.0]},
    ),
}


def measure(found: Ranking, side: Side) -> PerQuery:
    return of_ranking(found, side.query_labels, side.gallery_labels, metrics=["recall@1", "mrr"])


def sides(encoder: str, other: str, image_size: int | None, limit: int | None) -> list[Side]:
    """The training and the test classes: the run's own split, or that of seed 0."""
    run = Path(encoder)
    records = own_records([encoder])[1] if run.is_dir() else load_records("emoji")
    main, second = (load_encoder(name, image_size=image_size) for name in (encoder, other))
    encoders = (
        main,
        rerank.augmented(main, mirror=True),
        rerank.augmented(main, mirror=True, scales=(1.0, 2**0.5)),
        second.at_size(main.image_size),
    )
    found = []
    for split in ("train", "test"):
        part = records.where(split)
        if limit:
            part = part.select(np.isin(part.label, np.unique(part.label)[:limit]))
        columns: list[np.ndarray] = []
        for each in encoders:
            vectors = embed_records(each, part).vectors
            columns += [vectors[part.is_query], vectors[part.is_gallery]]
        columns += [part.label[part.is_query], part.label[part.is_gallery]]
        found.append(Side._make(columns))
    return found


def choose(method: Method, grid: dict[str, list], train: Side) -> dict[str, Any]:
    """The options that find most on one half of the training classes, fitted to the other."""
    classes = np.random.default_rng(0).permutation(np.unique(train.query_labels))
    first, second = (train.of(half) for half in np.array_split(classes, 2))
    best, chosen = -1.0, {}
    for values in product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        if options.get("dim", 0) > train.queries.shape[1]:
            continue
        score = measure(method(first, second, **options), second).means()["recall@1"]
        if score > best:
            best, chosen = score, options
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="efficientnet_lite0", help="a run, or a trunk")
    parser.add_argument("--other", default="efficientnet_lite1", help="to fuse it with")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--classes", type=int, help="fewer classes, for a quick look")
    records.add_option(parser)
    args = parser.parse_args()
    train, test = sides(args.encoder, args.other, args.image_size, args.classes)
    base = measure(plain(train, test), test)
    print(f"{args.encoder}, {len(test.queries)} queries, fused with {args.other}\n")
    columns, table = ("step", "recall@1", "gain", "mrr", "options", "seconds"), []
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, (method, grid) in METHODS.items():
        options = choose(method, grid, train)
        start = time.perf_counter()
        found = method(train, test, **options)
        seconds = time.perf_counter() - start
        values = measure(found, test)
        gain = difference(base.values["recall@1"], values.values["recall@1"])
        means, told = values.means(), ", ".join(f"{k} {v}" for k, v in options.items())
        spread = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        recall, mrr = f"{means['recall@1']:.3f}", f"{means['mrr']:.3f}"
        table.append([name, recall, spread, mrr, told, f"{seconds:.1f}"])
        print(f"| {' | '.join(table[-1])} |", flush=True)
    if args.record:
        names = (Path(name).name for name in (args.encoder, args.other))
        note = "{}, fused with {}; {} queries.".format(*names, len(test.queries))
        records.save("rerank", columns, table, [note])


if __name__ == "__main__":
    main()
