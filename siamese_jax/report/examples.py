"""The queries that a report shows, with their neighbours."""

import numpy as np

from siamese_jax.data.labels import share
from siamese_jax.data.records import Records
from siamese_jax.metrics.evaluation import sides_of
from siamese_jax.report.run_page import Example, Tile, choose_examples
from siamese_jax.search.ranking import rank


def examples(vectors: np.ndarray, records: Records, *, distance: str, seed: int) -> list[Example]:
    """Some queries, drawn honestly, with their ten nearest gallery images."""
    q, g = np.flatnonzero(records.is_query), np.flatnonzero(records.is_gallery)
    sides = sides_of(vectors, records, distance)
    ranking = rank(*sides.vectors, 10, distance=distance, **sides.named_ids)
    indices = np.asarray(ranking.indices)
    asked, found = sides.labels[0][:, None], sides.labels[1][np.maximum(indices, 0)]
    shared = share(asked, found) & (indices >= 0)
    result = []
    for i in choose_examples(indices, shared, seed=seed):
        neighbours = [
            _tile(records, g[j], float(ranking.distances[i, c]), bool(shared[i, c]))
            for c, j in enumerate(indices[i])
            if j >= 0
        ]
        result.append(Example(_tile(records, q[i]), neighbours))
    return result


def _tile(
    records: Records, row: int, distance: float | None = None, correct: bool | None = None
) -> Tile:
    label = records.label[row]
    names = (
        [records.class_names[j] for j in np.flatnonzero(label)]
        if np.ndim(label)
        else ([records.class_names[label]] if label >= 0 else [])
    )
    return Tile(str(records.path[row]), ", ".join(names), distance, correct)
