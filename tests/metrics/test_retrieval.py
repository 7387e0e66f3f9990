"""Retrieval metrics against a loop that reads the definitions aloud."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siamese_jax.distances import DISTANCES
from siamese_jax.errors import UserError
from siamese_jax.metrics import positions, retrieval
from siamese_jax.search.ranking import rank


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
    way=st.sampled_from([{"SHALLOW": 64}, {"SHALLOW": 0, "FEW": 64}, {"SHALLOW": 0, "FEW": 0}]),
    chunk=st.sampled_from([1, 4, 1024]),
    names=st.sets(st.sampled_from(sorted(retrieval.METRICS)), min_size=1),
)
def test_every_metric_is_its_definition_and_lies_between_0_and_1(
    seed, q, g, classes, multi, ids, whole, way, chunk, names
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
    with pytest.MonkeyPatch.context() as patch:
        # ranked, counted or sorted
        for name, value in (way | {"_CHUNK": chunk, "_BLOCK": chunk}).items():
            patch.setattr(positions, name, value)
        found = retrieval.per_query(
            queries, labels, gallery, gallery_labels, ks=(1, 3, 40), metrics=sorted(names),
            query_ids=query_ids, gallery_ids=gallery_ids,
        )  # fmt: skip
    assert found.lone == sum(row is None for row in expected)
    assert {name.partition("@")[0] for name in names} == {
        name.partition("@")[0] for name in found.values
    }
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


def awkward(rng, kind, n, d):
    """Rows that rounding confuses: duplicates, near-duplicates of large norm, tiny rows, zeros."""
    base = rng.normal(size=(n // 3 + 1, d))
    rows = base[rng.integers(0, len(base), n)]
    if kind == "far":
        rows = 1000 + 1e-3 * rng.integers(-3, 4, (n, d)) * rng.random((1, d))
    elif kind == "near":
        rows = rows + 1e-6 * rng.normal(size=(n, d)) * (rng.random((n, 1)) < 0.5)
    elif kind == "tiny":
        rows = rows * 1e-24
    elif kind == "parallel":
        rows = rows * rng.integers(0, 4, (n, 1))
    return rows.astype(np.float32)


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("kind", ["far", "near", "tiny", "parallel"])
def test_positions_are_those_of_the_full_ranking_even_where_rounding_decides(
    rng, monkeypatch, kind, distance, few
):
    monkeypatch.setattr(positions, "FEW", few)
    monkeypatch.setattr(positions, "SHALLOW", 0)
    monkeypatch.setattr(positions, "_CHUNK", 32)
    monkeypatch.setattr(positions, "_BLOCK", 16)
    x, y = awkward(rng, kind, 20, 8), awkward(rng, kind, 90, 8)
    y[:20] = x
    labels, gallery_labels = rng.integers(0, 9, 20), rng.integers(0, 9, 90)
    ids, own = np.arange(20), np.arange(90)
    for ways in ({}, {"query_ids": ids, "gallery_ids": own}):
        ranking = rank(x, y, 90, distance=distance, **ways)
        listed = retrieval.of_ranking(ranking, labels, gallery_labels, **ways)
        counted = retrieval.per_query(
            x, labels, y, gallery_labels, distance=distance, memory_limit=2**16, **ways
        )
        for name, value in listed.values.items():
            np.testing.assert_array_equal(value, counted.values[name], err_msg=name)
            alone = retrieval.per_query(
                x, labels, y, gallery_labels, distance=distance, metrics=[name], **ways
            )
            np.testing.assert_array_equal(value, alone.values[name], err_msg=f"{name} alone")


def test_unequal_classes_and_memory_limits_change_nothing(rng):
    # One class of 300, whose queries are sorted, among many of two, whose queries are counted.
    labels = np.concatenate([np.zeros(300, int), np.repeat(np.arange(1, 100), 2)])
    x = rng.normal(size=(len(labels), 6)).astype(np.float32) + 0.3 * (labels[:, None] % 7)
    wide, narrow = retrieval.per_query(x, labels), retrieval.per_query(x, labels, memory_limit=1)
    shuffled = rng.permutation(len(labels))
    again = retrieval.per_query(
        x[shuffled], labels[shuffled], x, labels,
        query_ids=shuffled, gallery_ids=np.arange(len(labels)),
    )  # fmt: skip
    for name, value in wide.values.items():
        np.testing.assert_array_equal(value, narrow.values[name])
        np.testing.assert_array_equal(value[shuffled], again.values[name])


def test_padding_is_nobody():
    # Read as "the last item", the -1 of a ranking that has ended would score and lift map above 1.
    found = retrieval.of_ranking([[0, 1, -1, -1]], [7], [3, 7], ks=[1, 4]).means()
    assert found["map"] == found["mrr"] == 0.5
    assert found["precision@4"] == 0.25
    beyond = retrieval.evaluate([[0.0]], [7], [[1.0], [2.0]], [3, 7], ks=[10])
    assert beyond["map@10"] == beyond["map"] == 0.5
    assert beyond["recall@10"] == 1


@pytest.mark.parametrize("low", [2**24, 2**53])
def test_labels_beyond_the_reach_of_floats_stay_apart(low):
    found = retrieval.evaluate(
        [[0.0], [0.1], [5.0], [5.1]], [low, low + 1, low + 1, low], metrics=["recall@1", "mrr"]
    )
    assert found["recall@1"] == 0
    unsigned = retrieval.of_ranking(
        [[0]], np.array([low + 1], np.uint64), np.array([low + 1]), ks=[1]
    )
    assert unsigned.means()["recall@1"] == 1


def test_lone_queries_are_left_out_and_counted():
    x, labels = [[0.0], [1.0], [2.0], [9.0]], [5, 5, 6, 7]
    found = retrieval.per_query(x, labels, ks=[1])
    assert found.lone == 2
    assert np.isnan(found.values["map"]).tolist() == [False, False, True, True]
    means = retrieval.evaluate(x, labels, ks=[1])
    assert means["recall@1"] == 1
    assert means["lone_share"] == 0.5
    assert not any(np.isnan(value) for value in means.values())
    with pytest.raises(UserError, match="same labels"):
        retrieval.evaluate([[0.0]], [1], [[0.0]], [2])


def test_self_is_left_out_by_id_not_by_column():
    # Three copies tie at distance 0: dropping the first column would lose a true neighbour of the
    # second and third, and keep the query itself.
    x, labels = [[1.0], [1.0], [1.0], [4.0], [4.0]], [0, 0, 0, 1, 1]
    assert retrieval.evaluate(x, labels, ks=[1])["recall@1"] == 1
    ids = np.array(["a", "a", "b", "c", "d"])  # the first two are one image
    found = retrieval.per_query(x, labels, query_ids=ids, ks=[2])
    assert found.relevant.tolist() == [1, 1, 2, 1, 1]


def test_precision_is_not_recall():
    found = retrieval.of_ranking([[0, 1, 2, 3]], [1], [0, 1, 1, 0], ks=[1, 2, 4]).means()
    assert [found[f"recall@{k}"] for k in (1, 2, 4)] == [0, 1, 1]
    assert [found[f"precision@{k}"] for k in (1, 2, 4)] == [0, 0.5, 0.5]


def test_a_ranking_gives_the_metrics_its_depth_determines():
    labels = [1, 1, 1, 2]
    found = retrieval.of_ranking([[1], [0], [1], [0]], labels, ks=[1, 3])
    assert sorted(found.values) == ["map@1", "ndcg@1", "precision@1", "recall@1"]
    with pytest.raises(UserError, match="map@r needs rankings of 2 items"):
        retrieval.of_ranking([[1], [0], [1], [0]], labels, metrics=["map@r"])
    asked = retrieval.of_ranking([[1, 2], [0, 2], [1, 0], [0, 1]], labels, metrics=["map@r"])
    assert asked.means()["map@r"] == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval.of_ranking([[0, 0]], [1], [1]), "query 0 lists an item twice"),
        (lambda: retrieval.of_ranking([[2]], [1], [1, 1]), "outside the gallery of 2"),
        (lambda: retrieval.of_ranking([[0]], [1]), "lists the query itself"),
        (lambda: retrieval.of_ranking([[0.5]], [1], [1]), "not float64"),
        (lambda: retrieval.of_ranking([0], [1], [1]), "must be .q, n."),
        (lambda: retrieval.evaluate([[0.0]], [1.0]), "whole numbers or strings"),
        (lambda: retrieval.evaluate([[0.0]], [[1, 0]]), "must be bool"),
        (lambda: retrieval.evaluate([[0.0]], [1, 2]), "1 queries have 2 labels"),
        (lambda: retrieval.evaluate([[0.0]], [1], [[0.0]]), "together"),
        (lambda: retrieval.evaluate([[0.0]], [1], [[0.0]], ["a"]), "never match"),
        (lambda: retrieval.evaluate([[0.0]], [1], [[0.0]], [1], query_ids=[1]), "one side only"),
        (lambda: retrieval.evaluate([[0.0]], [1], [[0.0, 1.0]], [1]), "are not .q, d., .g, d."),
        (lambda: retrieval.evaluate([[0.0], [np.nan]], [1, 1]), "queries row 1 is not finite"),
        (lambda: retrieval.evaluate([[0.0]], [1], metrics=["recal@1"]), "'recal@1' is unknown"),
        (lambda: retrieval.evaluate([[0.0]], [1], ks=[0]), "k of recall@k=0: must be"),
        (lambda: retrieval.evaluate([[0.0]], [1], distance="l1"), "l1"),
    ],
)
def test_mistakes_are_said_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
