"""A pair of sides and its measures, for training and the tools; and what `diff` needs of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.data.records import Records
from siamese_jax.metrics.retrieval import DEFAULT, PerQuery, per_query
from siamese_jax.storage.writing import written

# Of training: what choosing a checkpoint and comparing runs need.
METRICS = ("recall@k", "map@r", "r_precision", "mrr")
Two = tuple[np.ndarray, np.ndarray]


class Sides(NamedTuple):
    """What is asked and what is searched, each field of both: (queries, gallery).

    Attributes:
      vectors: float32 [q, d], [g, d].
      labels: [q], [g] or bool [q, c], [g, c]; see `siamese_jax.metrics.retrieval.per_query`.
      ids: int64 [q], [g]; equal where it is the same image, which is never its own answer.
      distance: one of `siamese_jax.distances.DISTANCES`.
    """

    vectors: Two
    labels: Two
    ids: Two
    distance: str

    @property
    def named_ids(self) -> dict[str, Any]:
        """The ids, as arguments of the functions that search and measure."""
        return {"query_ids": self.ids[0], "gallery_ids": self.ids[1]}

    def measure(self, ks: Sequence[int], metrics: Sequence[str] = DEFAULT) -> PerQuery:
        """The metrics of every query over the whole gallery.

        Args:
          ks: depths of the metrics named "...@k".
          metrics: see `siamese_jax.metrics.retrieval.per_query`.

        Raises:
          UserError: there is no query with an answer.
        """
        (asked, searched), (wanted, held) = self.vectors, self.labels
        options: dict[str, Any] = {"ks": tuple(ks), "metrics": metrics, "distance": self.distance}
        return per_query(asked, wanted, searched, held, **self.named_ids, **options)


class Evaluated(NamedTuple):
    """A split's embeddings [n, d], its n records that could be read, and each query's metrics."""

    vectors: np.ndarray
    records: Records
    values: PerQuery


def sides_of(vectors: np.ndarray, records: Records, distance: str) -> Sides:
    """The queries and the gallery that n records are marked as, of their vectors [n, d]."""
    asked, searched = records.is_query, records.is_gallery
    found, labels, ids = ((of[asked], of[searched]) for of in (vectors, records.label, records.id))
    return Sides(found, labels, ids, distance)


def summary(values: PerQuery, gallery: int) -> dict[str, Any]:
    """The means, with the counts behind them; `gallery` is how many images were searched."""
    return values.means() | {
        "queries": int((values.relevant > 0).sum()),
        "lone_queries": values.lone,
        "gallery": gallery,
    }


def save_per_query(path: Path, values: PerQuery, queries: np.ndarray, gallery: np.ndarray) -> None:
    """What `diff` needs: a row a query, and what was asked and searched.

    Args:
      path: of the .npz file to write.
      values: of the q queries.
      queries, gallery: uint64 [q], [g] of `siamese_jax.data.records.marks`.
    """
    columns: dict[str, Any] = {"query": queries, "gallery": np.sort(gallery)}
    columns |= {"relevant": values.relevant, **values.values}
    with written(path, "wb") as file:
        np.savez_compressed(file, **columns)
