"""Galleries written for other libraries: read back by each of them, and compared with a loop."""

import contextlib
import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from ranking_oracle import case, distances, ranking

from siamese_jax.distances import DISTANCES
from siamese_jax.errors import UserError
from siamese_jax.search import export
from siamese_jax.search.gallery import Gallery

pytestmark = pytest.mark.usefixtures("one_thread")
INDEXES = ("faiss_hnsw", "faiss_ivf", "usearch")
# Of each library's score, the distance.
DISTANCE = {
    "faiss": {
        "euclidean": np.sqrt,
        "sqeuclidean": lambda score: score,
        "cosine": lambda score: 1 - score,
        "dot": lambda score: -score,
    },
    "usearch": {
        "euclidean": np.sqrt,
        "sqeuclidean": lambda score: score,
        "cosine": lambda score: score,
        "dot": lambda score: score - 1,
    },
}


@pytest.fixture(scope="module")
def one_thread():
    """FAISS's threads wait for one another at every few rows, which a busy machine makes long."""
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)


def needs(name):
    """Skips a test whose libraries are not installed."""
    for module, _ in export.FORMATS[name].libraries:
        pytest.importorskip(module)


def read_back(path, facts, queries, k):
    """(labels, scores) [q, k] of the file, by its own library alone."""
    if facts["format"] == "usearch":
        index = pytest.importorskip("usearch.index").Index.restore(str(path))
        index.expansion_search = facts["parameters"]["expansion_search"]
        found = index.search(queries, k)
        return found.keys.astype(np.int64), found.distances
    index = pytest.importorskip("faiss").read_index(str(path))
    if facts["rows"] == "of length 1":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    scores, labels = index.search(queries, k)
    return labels, scores


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", INDEXES)
def test_an_index_is_read_back_by_its_library(rng, tmp_path, name, distance):
    """Its scores are the distances that the JSON says; its recall is the one that is written."""
    needs(name)
    x, y = case(rng, "normal", 60, 600, 12)
    ids = np.array([f"café {i}" for i in range(600)])
    gallery = Gallery([y[:300], y[300:]], ids)
    gallery.remove(ids[[3, 500]])
    path = tmp_path / f"shop{export.FORMATS[name].suffix}"
    facts = gallery.export(path, distance=distance, queries=x, k=5, columns={"label": range(600)})
    assert facts == json.loads(Path(f"{path}.json").read_text())
    assert (facts["format"], facts["count"], facts["dims"]) == (name, 598, 12)
    kept = np.delete(np.arange(600), [3, 500])
    assert facts["vectors_sha256"] == hashlib.sha256(y[kept].tobytes()).hexdigest()
    labels, scores = read_back(path, facts, x, 5)
    away = distances(x, y[kept], distance)
    own = np.take_along_axis(away, labels, axis=1)
    library = name.partition("_")[0]
    np.testing.assert_allclose(DISTANCE[library][distance](scores), own, rtol=1e-4, atol=1e-4)
    kth = np.sort(away, axis=1)[:, 4:5]
    assert facts["recall"] == {
        "k": 5,
        "value": pytest.approx((own <= kth).mean(), abs=0.01),
        "queries": 60,
        "of": "given queries",
    }
    assert facts["recall"]["value"] > (0.6 if distance == "dot" else 0.9)
    with open(f"{path}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == ids[kept].tolist()
    assert [(int(r["row"]), int(r["label"])) for r in table] == [*enumerate(kept.tolist())]


@pytest.mark.parametrize("name", INDEXES)
def test_recall_of_its_own_rows_leaves_each_out_and_takes_copies_as_equals(rng, tmp_path, name):
    """Every vector is there twice, so the nearest other row is at distance 0, whichever it is."""
    needs(name)
    y = np.repeat(rng.normal(size=(150, 8)).astype(np.float32), 3, axis=0)
    path = tmp_path / "shop"
    facts = Gallery(y).export(path, name, distance="euclidean", k=1, sample=90)
    assert facts["recall"]["queries"] == 90
    assert "itself" in facts["recall"]["of"]
    assert facts["recall"]["value"] > 0.95
    # An index that looks nowhere else finds less of more neighbours: the measure is of this one.
    bad = {"faiss_ivf": {"lists": 100, "probes": 1}}.get(name)
    if bad:
        facts = Gallery(y).export(path, name, distance="euclidean", k=50, sample=90, **bad)
        assert facts["parameters"] == bad
        assert facts["recall"]["value"] < 0.7


def test_parameters_reach_the_file(rng, tmp_path):
    faiss = pytest.importorskip("faiss")
    gallery = Gallery(rng.normal(size=(400, 8)))
    options = {"neighbours": 8, "construction": 30, "search": 20}
    gallery.export(tmp_path / "a.faiss", distance="dot", **options)
    index = faiss.read_index(str(tmp_path / "a.faiss"))
    assert (index.hnsw.efConstruction, index.hnsw.efSearch) == (30, 20)
    assert (index.hnsw.nb_neighbors(1), index.metric_type) == (8, faiss.METRIC_INNER_PRODUCT)
    facts = gallery.export(tmp_path / "a.ivf.faiss", distance="cosine", probes=3)
    index = faiss.read_index(str(tmp_path / "a.ivf.faiss"))
    assert (index.nprobe, index.nlist) == (3, facts["parameters"]["lists"]) == (3, 10)
    np.testing.assert_allclose(np.linalg.norm(index.reconstruct_n(0, 1), axis=1), 1, rtol=1e-6)


def test_parquet_is_read_by_duckdb_and_arrow(rng, tmp_path):
    needs("parquet")
    duckdb = pytest.importorskip("duckdb")
    import pyarrow as pa
    import pyarrow.parquet as parquet

    x, y = case(rng, "normal", 8, 400, 12)
    ids = np.arange(400) * 7
    gallery = Gallery(y, ids)
    gallery.remove([70])
    labels = [f"class {i % 9}" for i in range(400)]
    path = tmp_path / "shop.parquet"
    kept = np.delete(np.arange(400), 10)
    for distance in ("euclidean", "cosine", "dot"):
        facts = gallery.export(path, distance=distance, columns={"label": labels})
        assert facts["vectors_sha256"] == hashlib.sha256(y[kept].tobytes()).hexdigest()
        ask = f"{facts['metrics']['DuckDB']}(vector::FLOAT[12], ?::FLOAT[12])"
        order = ranking(x, y[kept], 5, distance)[0]
        for query, expected in zip(x, order, strict=True):
            found = duckdb.execute(
                f"SELECT row, id, label FROM '{path}' ORDER BY {ask}, row LIMIT 5", [query.tolist()]
            ).fetchall()
            rows = kept[expected]
            assert [row for row, _, _ in found] == expected.tolist()
            assert [i for _, i, _ in found] == ids[rows].tolist()
            assert [label for _, _, label in found] == [labels[row] for row in rows]
    table = parquet.read_table(path)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 12)
    assert json.loads(table.schema.metadata[b"siamese_jax"])["distance"] == "dot"
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(flat.reshape(-1, 12), y[kept])


def test_ids_that_are_bytes_and_the_largest_numbers_travel(rng, tmp_path):
    needs("parquet")
    import pyarrow.parquet as parquet

    y = rng.normal(size=(3, 4))
    for ids in ([b"a", b"\xff\x00b", b"c"], [0, 2**64 - 1, 5], ["", "it's", "日本"]):
        Gallery(y, ids).export(tmp_path / "a.parquet", distance="cosine")
        assert parquet.read_table(tmp_path / "a.parquet")["id"].to_pylist() == ids
    needs("usearch")
    Gallery(y, [b"a", b"\xff\x00b", b"c"]).export(tmp_path / "a.usearch", distance="cosine", k=1)
    assert "1,ff0062" in (tmp_path / "a.usearch.csv").read_text().splitlines()
    with pytest.raises(UserError, match="no table holds"):
        Gallery(y, ["a", "b", "\udcff"]).export(tmp_path / "b.parquet", distance="cosine")
    assert not (tmp_path / "b.parquet").exists()


def test_mistakes_are_one_line_and_lose_nothing(rng, tmp_path, monkeypatch):
    needs("parquet")
    y = rng.normal(size=(50, 4)).astype(np.float32)
    gallery, there = Gallery(y), tmp_path / "a.parquet"
    gallery.export(there, distance="cosine")
    before = there.read_bytes()
    bad = y.copy()
    bad[7, 1] = np.nan
    with pytest.raises(UserError, match="gallery row 7 is not finite"):
        Gallery(bad).export(there, distance="cosine")
    assert there.read_bytes() == before
    cases = [
        ({"path": "a.bin"}, r"must end in one of \.faiss"),
        ({"format": "annoy"}, "use one of faiss_hnsw"),
        ({"distance": "hamming"}, "distance='hamming' is unknown"),
        ({"probes": 3}, "parquet has no parameters"),
        ({"columns": {"id": y}}, "another name than row, id, vector"),
        ({"columns": {"label": "ab"}}, "50 values"),
    ]
    for options, says in cases:
        options = {"path": "a.parquet", "distance": "cosine"} | options
        path = tmp_path / options.pop("path")
        with pytest.raises(UserError, match=says) as error:
            gallery.export(path, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no rows to export"):
        Gallery(y[:0]).export(there, distance="cosine")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        gallery.export(there, distance="cosine")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["faiss_hnsw", "usearch", "parquet"])
def test_a_full_disk_is_one_line(rng, name):
    needs(name)
    says = "usearch could not write" if name == "usearch" else "No space left"
    with pytest.raises((OSError, UserError), match=says):
        Gallery(rng.normal(size=(9000, 16))).export("/dev/full", name, distance="dot", sample=5)


def test_mistakes_of_an_index(rng, tmp_path):
    needs("usearch")
    gallery, path = Gallery(rng.normal(size=(50, 4))), tmp_path / "a.usearch"
    for options, says in [
        ({"probes": 3}, "it has connectivity, expansion_add, expansion_search"),
        ({"connectivity": 0}, "connectivity = 0 must be"),
        ({"k": 0}, "k = 0 must be"),
        ({"queries": np.zeros((2, 5))}, "queries have 5 columns"),
        ({"queries": np.zeros((0, 4))}, "at least one to measure"),
    ]:
        with pytest.raises(UserError, match=says):
            gallery.export(path, distance="cosine", **options)
    assert not list(tmp_path.iterdir())
    one = Gallery(np.ones((1, 4)), ["only"]).export(path, distance="cosine")
    assert one["recall"] is None
