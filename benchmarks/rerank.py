"""What each post-processing step gains on the default emoji task: one design searches another.

    python benchmarks/rerank.py --encoder efficientnet_lite0 --image-size 128

Options of each step are chosen on the training classes, whitenings are fitted there, and the table
is of the test classes, which nothing was chosen on: recall@1, its gain over plain cosine with a
paired bootstrap interval (95 %), the mean reciprocal rank, and seconds for all queries.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from siamese_jax import rerank
from siamese_jax.bootstrap import difference
from siamese_jax.data.records import Records
from siamese_jax.data.sources import load_records
from siamese_jax.encoder import load_encoder
from siamese_jax.features import embed_records
from siamese_jax.metrics import PerQuery, of_ranking
from siamese_jax.ranking import Ranking, rank


class Side(NamedTuple):
    """Queries and gallery of some classes: two encodings of each, and their labels."""

    queries: np.ndarray
    gallery: np.ndarray
    queries_views: np.ndarray
    gallery_views: np.ndarray
    queries_other: np.ndarray
    gallery_other: np.ndarray
    query_labels: np.ndarray
    gallery_labels: np.ndarray


Method = Callable[..., Ranking]


def whole(queries: np.ndarray, gallery: np.ndarray) -> Ranking:
    return rank(queries, gallery, len(gallery), distance="cosine")


def plain(train: Side, side: Side) -> Ranking:
    return whole(side.queries, side.gallery)


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


EXPANSIONS: dict[str, list] = {"k": [1, 2, 5], "alpha": [0.0, 3.0]}
RECIPROCAL: dict[str, list] = {"k1": [6, 12, 20], "k2": [1, 3], "weight": [0.3, 0.6, 0.8]}
LEARNED: dict[str, list] = {
    "learned": [True],
    "dim": [128, 256, 512],
    "shrinkage": [0.03, 0.1, 0.3],
}
METHODS: dict[str, tuple[Method, dict[str, list]]] = {
    "cosine": (plain, {}),
    "mirror and two scales": (views, {}),
    "two encoders": (fused, {"weight": [0.25, 0.5, 1.0]}),
    "PCA whitening": (whitened, LEARNED | {"learned": [False]}),
    "learned whitening": (whitened, LEARNED),
    "query expansion": (expanded, EXPANSIONS),
    "gallery augmentation": (augmented_gallery, EXPANSIONS),
    "k-reciprocal": (reciprocal, RECIPROCAL),
    "diffusion": (diffused, {"graph_k": [5, 20], "query_k": [3, 10], "alpha": [0.5, 0.9]}),
    "learned whitening, k-reciprocal": (
        whitened_reciprocal,
        RECIPROCAL | {"learned": [True], "dim": [256], "shrinkage": [0.1]},
    ),
}


def measure(found: Ranking, side: Side) -> PerQuery:
    return of_ranking(found, side.query_labels, side.gallery_labels, metrics=["recall@1", "mrr"])


def sides(encoder: str, other: str, image_size: int, limit: int | None) -> list[Side]:
    records = load_records("emoji")
    main, second = (load_encoder(name, image_size=image_size) for name in (encoder, other))
    found = []
    for split in ("train", "test"):
        part = records.select(np.flatnonzero(records.split == split))
        if limit:
            part = part.select(np.flatnonzero(np.isin(part.label, np.unique(part.label)[:limit])))
        columns: list[np.ndarray] = []
        for vectors in (
            embed_records(main, part).vectors,
            view_vectors(main, part),
            embed_records(second, part).vectors,
        ):
            columns += [vectors[part.is_query], vectors[part.is_gallery]]
        columns += [part.label[part.is_query], part.label[part.is_gallery]]
        found.append(Side._make(columns))
    return found


def view_vectors(encoder: Callable[[np.ndarray], np.ndarray], records: Records) -> np.ndarray:
    from siamese_jax.data.pipeline import eval_batches

    encode = rerank.augmented(encoder, flip=True, scales=(1.0, 2**0.5))
    size = getattr(encoder, "image_size", 128)
    found = [
        np.asarray(encode(batch["image"]))[batch["mask"]]
        for batch in eval_batches(records, image_size=size, batch_size=32)
    ]
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="efficientnet_lite0")
    parser.add_argument("--other", default="efficientnet_lite1", help="to fuse it with")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--classes", type=int, help="fewer classes, for a quick look")
    args = parser.parse_args()
    train, test = sides(args.encoder, args.other, args.image_size, args.classes)
    base = measure(plain(train, test), test)
    print(f"{args.encoder} at {args.image_size} px, {len(test.queries)} queries")
    print(f"{'':32} recall@1  gain [95 %]                mrr   seconds  options")
    for name, (method, grid) in METHODS.items():
        best, chosen = -1.0, {}
        for values in product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            score = measure(method(train, train, **options), train).means()["recall@1"]
            if score > best:
                best, chosen = score, options
        start = time.perf_counter()
        found = method(train, test, **chosen)
        seconds = time.perf_counter() - start
        values_ = measure(found, test)
        gain = difference(base.values["recall@1"], values_.values["recall@1"])
        means = values_.means()
        print(
            f"{name:32} {means['recall@1']:.4f}  {gain.mean:+.4f} [{gain.low:+.4f}, "
            f"{gain.high:+.4f}]  {means['mrr']:.4f}  {seconds:6.2f}   {chosen}",
            flush=True,
        )


if __name__ == "__main__":
    main()
