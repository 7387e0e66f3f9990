"""Retrieval metrics: a value per query first, then means over the queries that have an answer.

Every metric is a function of the positions p_1 < p_2 < ... < p_R (1 is the nearest item) at which
a query finds its R relevant items. With P(i) = (hits among the first i) / i:

    recall@k      1 if p_1 <= k, else 0: any hit (Jegou et al. 2011; metric learning's recall@k)
    cmc@k         the same value, under the name that person re-identification gives it
    precision@k   hits among the first k, over k
    hits@k        hits among the first k, a count (per query only: its mean is not in [0, 1])
    r_precision   hits among the first R, over R
    map@r         1/R sum over hits p_i <= R of P(p_i)              (Musgrave et al. 2020)
    map@k         1/min(R, k) sum over hits p_i <= k of P(p_i)      (Google Landmarks 2019)
    map           1/R sum over all hits of P(p_i): non-interpolated average precision
    mrr           1 / p_1
    ndcg@k        sum over hits p_i <= k of 1/log2(1 + p_i), over the same sum for hits at
                  1..min(R, k)                                      (Jarvelin & Kekalainen 2002)

R counts the relevant items in the whole gallery, the query itself (same id) excepted. A query with
R = 0 is *lone*: no metric is defined for it. It is left out of the means and counted. So is a query
without a label; gallery items without one are wrong answers to all (`siamese_jax.data.labels` says
which labels are missing, and when two are equal).

Where tools disagree:

    name          here                    elsewhere
    recall@k      any hit                 hits/R in torchmetrics, TREC: the share that was found
    precision@k   hits/k                  hits/min(k, R) in open-metric-learning: 1 is reachable
    precision@1   equals recall@1 and cmc@1 everywhere
    map@k         over min(R, k)          over R in some, which makes 1 unreachable when k < R;
                                          over the hits found in others, which rewards finding few
    map           positions, exact        trapezoids in the Oxford/Paris protocol: see landmarks.py
    ndcg@k        gain 0 or 1             2^rel - 1 elsewhere: equal for gains of 0 and 1
    lone queries  out of the means        0 in torchmetrics by default, NaN in others
    self          left out by id          first column dropped in others, which loses a true
                                          neighbour when a duplicate ties with the query
    equal         ascending gallery row   whatever the sort gives
    distances
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax.data.embedded import Embedded, unpack
from siamese_jax.data.labels import label_codes, missing
from siamese_jax.errors import UserError
from siamese_jax.metrics.counting import Depths
from siamese_jax.metrics.positions import Positions, listed_positions, positions
from siamese_jax.metrics.relevance import Relevance, as_relevance, relevance
from siamese_jax.search.ranking import Ranking
from siamese_jax.values import COUNT, check

DEFAULT = (
    "recall@k", "precision@k", "map@k", "ndcg@k", "map@r", "r_precision", "map", "mrr",
)  # fmt: skip


def _hits(p: Positions, k: np.ndarray) -> np.ndarray:
    return p.total((p.position <= k[p.query]).astype(np.float64))


def _recall(p: Positions, k: np.ndarray) -> np.ndarray:
    return (_hits(p, k) > 0).astype(np.float64)


def _precision(p: Positions, k: np.ndarray) -> np.ndarray:
    return _hits(p, k) / k


def _average_precision(p: Positions, k: np.ndarray) -> np.ndarray:
    precision = np.where(p.position <= k[p.query], p.found() / p.position, 0)
    return p.total(precision) / np.minimum(p.relevant, k)


def _reciprocal_rank(p: Positions, k: np.ndarray) -> np.ndarray:
    return p.total(np.where(p.found() == 1, 1 / p.position, 0))


def _ndcg(p: Positions, k: np.ndarray) -> np.ndarray:
    best = np.minimum(p.relevant, k)
    ideal = np.cumsum(1 / np.log2(np.arange(1, best.max(initial=1) + 1) + 1))
    gain = p.total(np.where(p.position <= k[p.query], 1 / np.log2(p.position + 1), 0))
    return gain / ideal[best - 1]


# The metric; the depth it looks down to: k, the query's R, or the whole gallery ("all"); and
# whether it asks for every hit there or for the first one only.
METRICS: dict[str, tuple[Callable[[Positions, np.ndarray], np.ndarray], str, str]] = {
    "recall@k": (_recall, "k", "first"),
    "cmc@k": (_recall, "k", "first"),
    "precision@k": (_precision, "k", "every"),
    "hits@k": (_hits, "k", "every"),
    "map@k": (_average_precision, "k", "every"),
    "ndcg@k": (_ndcg, "k", "every"),
    "r_precision": (_precision, "r", "every"),
    "map@r": (_average_precision, "r", "every"),
    "map": (_average_precision, "all", "every"),
    "mrr": (_reciprocal_rank, "all", "first"),
}


@dataclass(frozen=True)
class PerQuery:
    """Metrics of each query.

    Attributes:
      values: name -> float64 [q], NaN for lone queries.
      relevant: int64 [q], how many relevant items the gallery holds; 0 for lone queries.
    """

    values: dict[str, np.ndarray]
    relevant: np.ndarray

    @property
    def lone(self) -> int:
        """How many queries have no relevant item, and so no part in any mean."""
        return int((self.relevant == 0).sum())

    def means(self) -> dict[str, float]:
        """Mean of each metric over the queries that have an answer, each in [0, 1].

        Counts (hits@k) are left out. Raises UserError if every query is lone.
        """
        known = self.relevant > 0
        if not known.any():
            raise UserError(
                f"none of the {len(known)} queries has a relevant item in the gallery: "
                "check that both sides use the same labels"
            )
        means = {
            name: float(value[known].mean())
            for name, value in self.values.items()
            if not name.startswith("hits@")
        }
        for name, mean in means.items():
            assert 0 <= mean <= 1, f"{name} = {mean} is outside [0, 1]"
        return means


def evaluate(
    queries: Any,
    query_labels: Any = None,
    gallery: Any = None,
    gallery_labels: Any = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    metrics: Sequence[str] = DEFAULT,
    distance: str | None = None,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = 256 * 2**20,
) -> dict[str, float]:
    """Means of retrieval metrics over all queries that have an answer.

        evaluate(photos)                               # as `siamese_jax.embed_folder` gives them
        evaluate(photos, shop)
        evaluate(queries, query_labels)
        evaluate(queries, query_labels, gallery, gallery_labels)

    Args:
      queries: [q, d] real, embeddings; or `Embedded`, which bring labels, ids and the distance.
      query_labels: int or str [q], tuples of those, or multi-hot bool [q, c]: items match if they
        share a label (`siamese_jax.data.labels`). After `Embedded`, those of the gallery.
      gallery: [g, d]; without it the queries search one another, each leaving itself out.
      gallery_labels: as `query_labels`, [g] or [g, c].
      ks: the k of the metrics named "...@k".
      metrics: names from `METRICS`, such as "map@r" or "recall@k"; "recall@3" also works.
      distance: "euclidean", "sqeuclidean", "cosine" or "dot"; by default that of the `Embedded`,
        and of arrays "euclidean".
      query_ids: [q] int, str or bytes; a gallery item with the query's id is no answer to it.
      gallery_ids: [g], needed with `query_ids` when there is a gallery.
      memory_limit: bytes of working memory, whatever q and g.

    Returns:
      name -> mean in [0, 1], such as {"recall@1": 0.75, "map@r": 0.5}; and "lone_share", the share
      of queries without any relevant item, which take no part in the means.

    Raises:
      UserError: shapes, labels or names that do not fit, `Embedded` of two encoders, or no query
        has a relevant item.

    >>> found = evaluate([[0.0], [1.0], [5.0], [5.5]], [7, 7, 7, 8], metrics=["recall@1", "mrr"])
    >>> found["recall@1"], round(found["mrr"], 3), found["lone_share"]
    (0.6666666666666666, 0.833, 0.25)
    """
    sides = _sides(queries, query_labels, gallery, gallery_labels)
    found = per_query(
        *sides,
        ks=ks,
        metrics=metrics,
        distance=distance,
        query_ids=query_ids,
        gallery_ids=gallery_ids,
        memory_limit=memory_limit,
    )
    if not found.relevant.any():
        raise UserError(_why_none(sides[1], sides[3], found.relevant))
    return found.means() | {"lone_share": found.lone / len(found.relevant)}


def per_query(
    queries: Any,
    query_labels: Any = None,
    gallery: Any = None,
    gallery_labels: Any = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    metrics: Sequence[str] = DEFAULT,
    distance: str | None = None,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    memory_limit: int = 256 * 2**20,
) -> PerQuery:
    """The metrics of every query, exactly. Arguments and errors as `evaluate`."""
    chosen = expand(metrics, ks)
    queries, query_labels, gallery, gallery_labels = _sides(
        queries, query_labels, gallery, gallery_labels
    )
    asked = unpack(queries, gallery, distance, query_ids, gallery_ids)
    queries, ids = np.asarray(asked.queries), (asked.query_ids, asked.gallery_ids)
    rows = None if asked.gallery is None else np.asarray(asked.gallery)
    found = as_relevance(queries, query_labels, rows, gallery_labels, *ids)
    rows = queries if rows is None else rows
    depths = Depths(np.ones(len(queries), int), np.ones(len(queries), int))
    for family, k in chosen.values():
        _, depth, hits = METRICS[family]
        down = {"r": found.counts, "all": np.full(len(queries), len(rows))}
        needed = getattr(depths, hits)
        np.maximum(needed, down[depth] if k is None else k, out=needed)
    blocks = positions(
        queries, rows, found, distance=asked.distance, depths=depths, memory_limit=memory_limit
    )
    values = {name: np.full(len(queries), np.nan) for name in chosen}
    for block in blocks:
        _fill(values, block, chosen)
    return PerQuery(values, found.counts)


def of_ranking(
    ranking: Ranking | ArrayLike,
    query_labels: ArrayLike,
    gallery_labels: ArrayLike | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    metrics: Sequence[str] | None = None,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
) -> PerQuery:
    """The metrics of a given ranking, such as a re-ranked one.

    Args:
      ranking: a `Ranking`, or its indices int [q, n]: gallery rows, -1 where it has ended.
      metrics: names as in `evaluate`; without it, those of `DEFAULT` that n columns determine.
      query_labels, gallery_labels, query_ids, gallery_ids, ks: as in `evaluate`. With ids (or
        without gallery labels), the ranking must have left each query itself out.

    Raises:
      UserError: a metric that looks deeper than n, an index outside the gallery, an item listed
        twice, or a ranking that lists a query as an answer to itself.

    >>> of_ranking([[1, 2], [0, 2], [1, 0]], [4, 4, 4], ks=[1]).means()["precision@1"]
    1.0
    """
    indices = np.asarray(ranking.indices if isinstance(ranking, Ranking) else ranking)
    found = relevance(query_labels, gallery_labels, query_ids=query_ids, gallery_ids=gallery_ids)
    _check_indices(indices, found)
    listed = listed_positions(indices, found, np.arange(len(indices)))
    known = listed.depth
    chosen = expand(DEFAULT if metrics is None else metrics, ks)
    deepest = {"r": int(found.counts.max(initial=0)), "all": len(found.gallery_labels)}
    # A list of the whole gallery is deep enough for anything.
    needs = {
        name: min(k or deepest[METRICS[family][1]], deepest["all"])
        for name, (family, k) in chosen.items()
    }
    if metrics is None:
        chosen = {name: way for name, way in chosen.items() if needs[name] <= known}
    for name in chosen:
        if needs[name] > known:
            raise UserError(f"{name} needs rankings of {needs[name]} items, but they hold {known}")
    values = {name: np.full(len(indices), np.nan) for name in chosen}
    _fill(values, listed, chosen)
    return PerQuery(values, found.counts)


def _sides(queries: Any, query_labels: Any, gallery: Any, gallery_labels: Any) -> tuple[Any, ...]:
    """The four with labels taken from `Embedded`, which then stay in place of their vectors."""
    if isinstance(queries, Embedded):
        if isinstance(query_labels, Embedded) and gallery is gallery_labels is None:
            query_labels, gallery = None, query_labels
        query_labels = queries.labels if query_labels is None else query_labels
    if isinstance(gallery, Embedded) and gallery_labels is None:
        gallery_labels = gallery.labels
    if query_labels is None:
        raise UserError("queries need query_labels, unless they are embedded images that have some")
    return queries, query_labels, gallery, gallery_labels


def _why_none(query_labels: Any, gallery_labels: Any, relevant: np.ndarray) -> str:
    """Why no query has a relevant item."""
    if not len(relevant):
        return "there is no query to evaluate"
    alone = gallery_labels is None
    vocabulary, codes = label_codes(query_labels, query_labels if alone else gallery_labels)
    if not len(codes[1]):
        return "the gallery is empty, so no query has an answer"
    for side, name in zip(codes, ("queries", "gallery items"), strict=True):
        if missing(side).all():
            return f"none of the {len(side)} {name} has a label: there is nothing to evaluate by"
    if alone:
        return (
            f"no two of the {len(relevant)} items share a label, so no query has an answer: check "
            "that items that belong together use the same labels"
        )
    asked, held = (
        [vocabulary[i] for i in (np.flatnonzero(c.any(0)) if c.ndim == 2 else np.unique(c[c >= 0]))]
        for c in codes
    )
    if set(asked) & set(held):
        return "each query shares its labels with itself alone (equal ids), so none has an answer"
    return (
        f"the {len(asked)} labels of the queries (the first is {asked[0]!r}) and the {len(held)} "
        f"of the gallery (the first is {held[0]!r}) have none in common, so no query has an "
        "answer: check that both sides use the same labels"
    )


def expand(metrics: Sequence[str], ks: Sequence[int]) -> dict[str, tuple[str, int | None]]:
    """Full names -> (name in `METRICS`, k): "recall@k" stands for one metric per k in `ks`.

    >>> expand(["map@r", "recall@k"], [1, 5])
    {'map@r': ('map@r', None), 'recall@1': ('recall@k', 1), 'recall@5': ('recall@k', 5)}
    """
    chosen: dict[str, tuple[str, int | None]] = {}
    for name in metrics:
        stem, _, tail = name.partition("@")
        if name in METRICS and tail != "k":
            chosen[name] = (name, None)
        elif f"{stem}@k" in METRICS and (tail == "k" or tail.isdecimal()):
            for k in ks if tail == "k" else [int(tail)]:
                check(f"k of {name}", k, COUNT)
                chosen[f"{stem}@{int(k)}"] = (f"{stem}@k", int(k))
        else:
            raise UserError(f"metric {name!r} is unknown: use {', '.join(METRICS)}")
    return chosen


def _fill(
    values: dict[str, np.ndarray], block: Positions, chosen: dict[str, tuple[str, int | None]]
) -> None:
    """Writes the metrics of a block of queries into their places; lone queries keep NaN."""
    known = block.relevant > 0
    everything = np.full(len(block.rows), np.iinfo(np.int64).max)
    for name, (family, k) in chosen.items():
        metric, depth, _ = METRICS[family]
        depths = {"r": np.maximum(block.relevant, 1), "all": everything}
        limit = np.full(len(block.rows), k) if k is not None else depths[depth]
        with np.errstate(invalid="ignore", divide="ignore"):
            value = metric(block, limit)
        values[name][block.rows[known]] = value[known]


def _check_indices(indices: np.ndarray, found: Relevance) -> None:
    if indices.ndim != 2 or indices.shape[0] != len(found.query_labels) or indices.shape[1] < 1:
        raise UserError(
            f"a ranking of {len(found.query_labels)} queries must be [q, n], not {indices.shape}"
        )
    if indices.dtype.kind not in "iu":
        raise UserError(f"a ranking holds gallery rows, not {indices.dtype}")
    if indices.max(initial=-1) >= len(found.gallery_labels) or indices.min(initial=0) < -1:
        raise UserError(f"a ranking names rows outside the gallery of {len(found.gallery_labels)}")
    ordered = np.sort(indices, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    if twice.any():
        raise UserError(f"the ranking of query {int(twice.argmax())} lists an item twice")
    if found.query_ids is not None and found.gallery_ids is not None and len(found.gallery_ids):
        own = found.gallery_ids[np.maximum(indices, 0)] == found.query_ids[:, None]
        if (own & (indices >= 0)).any():
            row = int((own & (indices >= 0)).any(1).argmax())
            raise UserError(f"the ranking of query {row} lists the query itself: rank with ids")
