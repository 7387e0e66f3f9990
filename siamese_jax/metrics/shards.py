"""`evaluate` where the gallery lies in parts, one with each of several processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from siamese_jax import processes
from siamese_jax.metrics.relevance import relevance
from siamese_jax.metrics.retrieval import METRICS, expand, of_ranking
from siamese_jax.search.shards import rank_shards


def evaluate_shards(
    queries: ArrayLike,
    query_labels: ArrayLike,
    rows: ArrayLike,
    labels: ArrayLike,
    *,
    ks: Sequence[int] = (1, 5, 10),
    metrics: Sequence[str] = ("recall@k", "precision@k", "map@k", "ndcg@k", "map@r", "r_precision"),
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    **options: Any,
) -> dict[str, float]:
    """What `evaluate` gives of the whole gallery, of which each process holds some rows.

    Args:
      queries, query_labels, query_ids: float32 [q, d], [q] and [q], the same in every process.
      rows, labels, gallery_ids: float32 [g, d], int or str [g] and [g], of this process; their
        labels and ids travel, the rows stay.
      ks, metrics: as `evaluate`. "map" and "mrr" look at the whole gallery, and so need rankings of
        q x (all rows); the others need max(ks) or the largest class.
      **options: as `rank_shards`.

    Returns:
      name -> mean in [0, 1], and "lone_share".

    Raises:
      UserError: as `evaluate` and `rank_shards`.
    """
    all_labels = np.concatenate(processes.told_by_all(np.asarray(labels)))
    all_ids = None
    if gallery_ids is not None:
        all_ids = np.concatenate(processes.told_by_all(np.asarray(gallery_ids)))
    ids: dict[str, Any] = {"query_ids": query_ids, "gallery_ids": all_ids}
    found = relevance(query_labels, all_labels, **ids)
    deepest = {"r": int(found.counts.max(initial=1)), "all": len(all_labels), "k": 1}
    looked = [k or deepest[METRICS[family][1]] for family, k in expand(metrics, ks).values()]
    k = min(max(looked), len(all_labels))
    ranking = rank_shards(queries, rows, k, query_ids=query_ids, gallery_ids=gallery_ids, **options)
    of_each = of_ranking(ranking, query_labels, all_labels, ks=ks, metrics=metrics, **ids)
    return of_each.means() | {"lone_share": of_each.lone / len(of_each.relevant)}
