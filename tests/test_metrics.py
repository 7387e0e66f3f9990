"""Retrieval metrics against a loop that reads the definitions aloud."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_jax import metrics, positions
from siamese_jax.errors import UserError


def oracle(queries, labels, gallery, gallery_labels, own, ks):
    """Dictionaries of per-query values by plain loops over float64 distances."""
    rows = []
    for q, x in enumerate(queries):
        order = sorted(
            (float(np.sqrt(((x - y) ** 2).sum())), g)
            for g, y in enumerate(gallery)
            if not own(q, g)
        )
        hit = [bool(np.any(labels[q] & gallery_labels[g])) for _, g in order]
        total = sum(hit)
        if not total:
            rows.append(None)
            continue
        precision = [sum(hit[: i + 1]) / (i + 1) for i in range(len(hit))]
        row = {
            "map": sum(p for p, h in zip(precision, hit, strict=True) if h) / total,
            "mrr": 1 / (hit.index(True) + 1),
            "r_precision": sum(hit[:total]) / total,
            "map@r": sum(precision[i] for i in range(total) if hit[i]) / total,
        }
        for k in ks:
            top = hit[:k]
            row[f"recall@{k}"] = row[f"cmc@{k}"] = float(any(top))
            row[f"hits@{k}"] = float(sum(top))
            row[f"precision@{k}"] = sum(top) / k
            row[f"map@{k}"] = sum(precision[i] for i, h in enumerate(top) if h) / min(total, k)
            gain = sum(1 / math.log2(i + 2) for i, h in enumerate(top) if h)
            row[f"ndcg@{k}"] = gain / sum(1 / math.log2(i + 2) for i in range(min(total, k)))
        rows.append(row)
    return rows


def one_hot(labels, count):
    return np.arange(count)[None, :] == np.asarray(labels)[:, None]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    q=st.integers(1, 12),
    g=st.integers(1, 25),
    classes=st.integers(1, 6),
    multi=st.booleans(),
    ids=st.booleans(),
    whole=st.booleans(),
    few=st.sampled_from([0, 64]),
)
def test_every_metric_is_its_definition_and_lies_between_0_and_1(
    seed, q, g, classes, multi, ids, whole, few
):
    rng = np.random.default_rng(seed)
    # Small whole numbers make many ties; their float32 distances are exactly ordered.
    draw = (
        (lambda n: rng.integers(-2, 3, (n, 2)).astype(np.float32))
        if whole
        else (lambda n: rng.normal(size=(n, 3)).astype(np.float32))
    )
    queries, gallery = draw(q), draw(g)
    if multi:
        labels, gallery_labels = rng.random((q, classes)) < 0.3, rng.random((g, classes)) < 0.3
        hot, gallery_hot = labels, gallery_labels
    else:
        labels, gallery_labels = rng.integers(0, classes, q), rng.integers(0, classes, g)
        hot, gallery_hot = one_hot(labels, classes), one_hot(gallery_labels, classes)
    query_ids = rng.integers(0, 15, q) if ids else None
    gallery_ids = rng.integers(0, 15, g) if ids else None
    expected = oracle(
        queries.astype(np.float64), hot, gallery.astype(np.float64), gallery_hot,
        lambda i, j: ids and query_ids[i] == gallery_ids[j], (1, 3, 40),
    )  # fmt: skip
    names = list(metrics.METRICS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions, "FEW", few)  # 0: all queries are sorted; 64: all are counted
        found = metrics.per_query(
            queries, labels, gallery, gallery_labels, ks=(1, 3, 40), metrics=names,
            query_ids=query_ids, gallery_ids=gallery_ids,
        )  # fmt: skip
    assert found.lone == sum(row is None for row in expected)
    for i, row in enumerate(expected):
        for name, value in found.values.items():
            if row is None:
                assert np.isnan(value[i])
            else:
                np.testing.assert_allclose(value[i], row[name], rtol=0, atol=1e-12, err_msg=name)
    if found.lone < q:
        assert all(0 <= mean <= 1 for mean in found.means().values())
    else:
        with pytest.raises(UserError, match="same labels"):
            found.means()
