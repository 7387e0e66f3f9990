"""Evaluate embeddings of a data set's split, and keep what the report and `diff` need of it."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.data.records import Records
from siamese_jax.metrics.retrieval import PerQuery, per_query

METRICS = ("recall@k", "map@r", "r_precision", "mrr")


class Evaluated(NamedTuple):
    """A split's embeddings [n, d], its n records that could be read, and each query's metrics."""

    vectors: np.ndarray
    records: Records
    values: PerQuery


def evaluate_split(
    vectors: np.ndarray, records: Records, *, distance: str, ks: tuple[int, ...]
) -> PerQuery:
    """The metrics of every query of these records against their gallery, own image left out.

    Args:
      vectors: float32 [n, d].
      records: n of them, with `is_query` and `is_gallery`.
      distance: one of `siamese_jax.distances.DISTANCES`.
      ks: depths of recall@k.

    Raises:
      UserError: there is no query with an answer.
    """
    q, g = records.is_query, records.is_gallery
    return per_query(
        vectors[q],
        records.label[q],
        vectors[g],
        records.label[g],
        query_ids=records.id[q],
        gallery_ids=records.id[g],
        ks=ks,
        metrics=METRICS,
        distance=distance,
    )


def summary(values: PerQuery, records: Records) -> dict[str, Any]:
    """The means, with the counts behind them."""
    return {
        **values.means(),
        "queries": int((values.relevant > 0).sum()),
        "lone_queries": values.lone,
        "gallery": int(records.is_gallery.sum()),
    }


def save_per_query(path: Path, values: PerQuery, queries: np.ndarray, gallery: np.ndarray) -> None:
    """What `diff` needs: a row a query, and what was asked and searched.

    Args:
      path: of the .npz file to write.
      values: of the q queries.
      queries, gallery: uint64 [q], [g] of `siamese_jax.data.records.marks`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {"query": queries, "gallery": np.sort(gallery)}
    columns |= {"relevant": values.relevant, **values.values}
    np.savez_compressed(path, **columns)
