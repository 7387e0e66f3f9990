"""The pair of sides that training and the tools measure: against a loop over its records."""

import numpy as np
import pytest

from siamese_jax.data.records import Records
from siamese_jax.metrics.evaluation import METRICS, sides_of, summary


@pytest.fixture
def records(rng):
    n = 37
    return Records(
        root="here",
        path=np.array([f"{i}.png" for i in range(n)]),
        label=rng.integers(-1, 7, n).astype(np.int32),
        class_names=tuple("abcdefg"),
        split=np.full(n, "test"),
        id=rng.permutation(n).astype(np.int32),
        is_query=rng.random(n) < 0.5,
        is_gallery=rng.random(n) < 0.7,
    )


def test_sides_are_measured_as_a_loop_does(records, rng):
    vectors = rng.normal(size=(len(records), 5))
    values = sides_of(vectors, records, "euclidean").measure((1, 3), METRICS)
    asked, gallery = (np.flatnonzero(m) for m in (records.is_query, records.is_gallery))
    label, hits, answered = records.label, [], []
    for i in asked:
        others = gallery[gallery != i]  # Its own image is never an answer.
        order = others[np.argsort(np.linalg.norm(vectors[others] - vectors[i], axis=1))]
        right = (label[order] == label[i]) & (label[i] >= 0)
        answered.append(right.any())
        hits.append(right[:3].any())
    assert sum(answered) < len(asked)
    np.testing.assert_array_equal(values.relevant > 0, answered)
    found = summary(values, len(gallery))
    assert found["recall@3"] == pytest.approx(np.mean(np.array(hits)[answered]), abs=1e-12)
    counts = (sum(answered), len(asked) - sum(answered), len(gallery))
    assert tuple(found[name] for name in ("queries", "lone_queries", "gallery")) == counts
