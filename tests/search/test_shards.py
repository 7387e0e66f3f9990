"""A gallery in parts, one with each process: the answers of one machine, ties too."""

import itertools
import json
import os
import subprocess

import numpy as np
import pytest
import tiny
import warm
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from network import free_port

import siamese_jax as sj
from siamese_jax.metrics.shards import evaluate_shards
from siamese_jax.search.shards import merged, rank_shards

PROGRAM = """
import json, sys
import numpy as np
from siamese_jax import processes
processes.begin(processes.Place(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
from siamese_jax.metrics.shards import evaluate_shards
from siamese_jax.search.shards import rank_shards
data = np.load(sys.argv[4])
limits = json.loads(sys.argv[5])
own = slice(*limits[processes.index() :][:2])
found = []
for distance in ("euclidean", "cosine", "dot"):
    ids = dict(query_ids=data["query_ids"], gallery_ids=data["ids"][own])
    of = dict(distance=distance, **ids)
    ranking = rank_shards(data["queries"], data["rows"][own], 7, **of)
    metrics = evaluate_shards(
        data["queries"], data["query_labels"], data["rows"][own], data["labels"][own],
        metrics=["recall@k", "map@r", "mrr"], **of)
    found.append([ranking.indices.tolist(), ranking.distances.tolist(), metrics])
print(json.dumps(found), flush=True)
try:
    rank_shards(data["queries"] + processes.index(), data["rows"][own], 7)
except ValueError as error:
    print(json.dumps(str(error)), flush=True)
processes.end(0)
"""


@pytest.fixture
def data(tmp_path):
    """Rows on a coarse grid: many distances are equal."""
    rng = np.random.default_rng(3)
    columns = {
        "queries": rng.integers(0, 3, (20, 4)).astype(np.float32),
        "rows": rng.integers(0, 3, (150, 4)).astype(np.float32),
        "query_labels": rng.integers(0, 6, 20),
        "labels": rng.integers(0, 6, 150),
        "query_ids": np.arange(20),
        "ids": np.arange(150) + 10,  # some of the queries are in the gallery
    }
    np.savez(tmp_path / "data.npz", **columns)
    return columns


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits", [[0, 31, 150], pytest.param([0, 5, 5, 99, 150], marks=pytest.mark.long)]
)
def test_answers_are_those_of_one_process(data, tmp_path, limits):
    count, at = len(limits) - 1, f"127.0.0.1:{free_port()}"
    more = [str(tmp_path / "data.npz"), json.dumps(limits)]
    running = [
        subprocess.Popen(
            [warm.python(), "-c", PROGRAM, at, str(number), str(count), *more],
            cwd=tiny.ROOT, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)}, text=True,
            stdout=subprocess.PIPE,
        )
        for number in range(count)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * count
    ids = {"query_ids": data["query_ids"], "gallery_ids": data["ids"]}
    for lines in said:
        for distance, found in zip(
            ("euclidean", "cosine", "dot"), json.loads(lines[0]), strict=True
        ):
            of = {"distance": distance, **ids}
            one = sj.rank(data["queries"], data["rows"], 7, **of)
            np.testing.assert_array_equal(found[0], one.indices)
            np.testing.assert_array_equal(np.float32(found[1]), one.distances)
            whole = sj.evaluate(
                *(data[name] for name in ("queries", "query_labels", "rows", "labels")),
                metrics=["recall@k", "map@r", "mrr"], **of,
            )  # fmt: skip
            assert found[2] == pytest.approx(whole, abs=1e-12)
        assert "process 1 has another search" in json.loads(lines[1])


def test_one_process_is_plain_rank(data):
    ids = {"query_ids": data["query_ids"], "gallery_ids": data["ids"]}
    one = sj.rank(data["queries"], data["rows"], 200, **ids)
    other = rank_shards(data["queries"], data["rows"], 200, **ids)
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.distances, other.distances)
    four = [data[name] for name in ("queries", "query_labels", "rows", "labels")]
    found = evaluate_shards(*four, **ids)
    whole = sj.evaluate(*four, **ids)
    assert found == pytest.approx({name: whole[name] for name in found}, abs=1e-12)


@given(
    nps.arrays(np.float32, (3, 12), elements=st.sampled_from([0.0, 1.0, 2.0, -1.0])),
    st.integers(1, 14),
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
)
def test_parts_of_a_list_are_merged_in_its_order(away, k, cuts):
    """An oracle by Python's stable sort, of each query's whole list."""
    limits = [0, *sorted(cuts), 12]
    parts = []
    for low, high in itertools.pairwise(limits):
        order = np.argsort(away[:, low:high], axis=1, kind="stable")[:, :k]
        parts.append((np.int32(order + low), np.take_along_axis(away[:, low:high], order, axis=1)))
    found = merged(parts, k)
    for query in range(3):
        order = sorted(range(12), key=lambda row: (away[query, row], row))[:k]
        rest = k - len(order)
        assert found.indices[query].tolist() == [*order, *[-1] * rest]
        assert found.distances[query].tolist() == [
            *(float(away[query, row]) for row in order), *[float("inf")] * rest,
        ]  # fmt: skip
