"""A gallery in a LanceDB table: searched as exactly as in memory, or by LanceDB's own index."""

import logging
import sys

import numpy as np
import pytest
from ranking_oracle import KINDS, case, ranking

from siamese_jax.data.embedded import Embedded
from siamese_jax.distances import DISTANCES
from siamese_jax.errors import UserError
from siamese_jax.search import lance
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import range_search, rank

lancedb = pytest.importorskip("lancedb")


def home(folder, y, ids=None, distance="euclidean"):
    where = folder / "shop.lance"
    Gallery(y, ids).export(where, distance=distance)
    return f"lance://{where}"


def same(found, expected):
    np.testing.assert_array_equal(found.indices, expected[0])
    np.testing.assert_array_equal(found.distances, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_searched_exactly(rng, tmp_path, kind):
    """Copies and equal distances too, over several blocks, with rows left out."""
    x, y = case(rng, kind, 9, 700, 16)
    ids = np.array([f"it's {i // 2}" for i in range(700)])
    own = ids[rng.integers(0, 700, size=9)]
    keep = rng.random(700) < 0.7
    where = home(tmp_path, y, ids)
    for distance in DISTANCES:
        same(rank(x, where, 6, distance=distance), ranking(x, y, 6, distance))
        found = rank(x, where, 6, distance=distance, query_ids=own, keep=keep)
        same(found, ranking(x, y, 6, distance, own, ids, keep))


def test_blocks_are_smaller_than_the_table(rng, tmp_path, monkeypatch):
    x, y = case(rng, "copies", 5, 900, 512)
    where, sizes = home(tmp_path, y), []
    blocks = lance.LanceTable.blocks

    def counted(self, *args, **options):
        for part in blocks(self, *args, **options):
            sizes.append(len(part[0]))
            yield part

    monkeypatch.setattr(lance.LanceTable, "blocks", counted)
    k = np.array([1, 7, 3, 900, 2])
    found = rank(x, where, k, memory_limit=1 << 20)
    assert len(sizes) > 5
    assert sum(sizes) == 900
    same(
        found,
        [
            np.where(np.arange(900) < k[:, None], v, f)
            for v, f in zip(ranking(x, y, 900, "euclidean"), (-1, np.inf), strict=True)
        ],
    )
    same(
        rank(x, where, 4, keep=lambda ids: ids % 3 == 0),
        ranking(x, y, 4, "euclidean", keep=np.arange(900) % 3 == 0),
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_candidates_of_an_index_are_measured_exactly(rng, tmp_path, distance, caplog):
    x, y = case(rng, "normal", 30, 3000, 16)
    x, y = x[(x != 0).any(axis=1)], np.where((y != 0).any(axis=1)[:, None], y, 1)
    where = home(tmp_path, y, distance=distance)
    own = np.arange(len(x))
    exact = ranking(x, y, 8, distance, own, np.arange(3000))
    caplog.set_level(logging.INFO, "siamese_jax")
    same(rank(x, where, 8, query_ids=own, approximate="lance"), exact)
    assert "80 candidates a query" in caplog.text
    assert "no index is for this" in caplog.text
    table = lancedb.connect(tmp_path).open_table("shop")
    metric = lance.METRICS[distance]
    config = lancedb.index.IvfPq(distance_type=metric, num_partitions=16, num_sub_vectors=8)
    table.create_index("vector", config=config)
    caplog.clear()
    found = rank(x, where, 8, query_ids=own, approximate="lance")
    assert "its index Ivf" in caplog.text.replace("IVF_", "Ivf")
    away = np.full((len(x), 3000), np.inf, np.float32)
    j, values = ranking(x, y, 3000, distance)
    np.put_along_axis(away, j, values, axis=1)
    np.testing.assert_array_equal(np.take_along_axis(away, found.indices, 1), found.distances)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    assert (found.indices != own[:, None]).all()
    assert (
        np.mean(
            [len(np.intersect1d(a, b)) / 8 for a, b in zip(found.indices, exact[0], strict=True)]
        )
        > 0.7
    )
    # Without being asked for, the index changes nothing, and it is said.
    caplog.clear()
    same(rank(x, where, 8, query_ids=own), exact)
    assert "approximate='lance' asks its index" in caplog.text
    for ids in ([b"a"], ["a"]):
        with pytest.raises(UserError, match=r"ids of shop\.lance whole numbers"):
            rank(x[:1], where, 8, query_ids=ids, approximate="lance")


def test_ids_of_every_kind_are_left_out_and_read(rng, tmp_path):
    x, y = case(rng, "normal", 3, 40, 4)
    for i, ids in enumerate(
        ([f'it\'s "{i}"' for i in range(40)], [b"\x00%d'" % i for i in range(40)])
    ):
        where = home(tmp_path / str(i), y, ids)
        own = [ids[5], ids[7], ids[9]]
        table = lance.LanceTable(where)
        assert table.column("id").tolist() == ids
        for approximate in (None, "lance"):
            found = rank(x, table, 39, query_ids=own, approximate=approximate)
            left = [sorted(set(range(40)) - set(row)) for row in found.indices.tolist()]
            assert left == [[5], [7], [9]]


def test_deleted_rows_leave_the_numbers_and_added_ones_are_refused(rng, tmp_path):
    x, y = case(rng, "normal", 5, 200, 8)
    where = home(tmp_path, y)
    table = lancedb.connect(tmp_path).open_table("shop")
    table.delete("id % 3 = 0")
    same(rank(x, where, 9), ranking(x, y, 9, "euclidean", keep=np.arange(200) % 3 > 0))
    assert lance.LanceTable(where).column("id")[:3].tolist() == [None, 1, 2]
    table.add([{"row": None, "id": 1, "vector": y[0].tolist()}])
    with pytest.raises(UserError, match="added after its export"):
        rank(x, where, 9)


def test_embedded_queries_bring_their_ids_and_distance(rng, tmp_path):
    x, y = case(rng, "normal", 5, 60, 8)
    ids = np.array([f"/shop/{i}.png" for i in range(60)])
    where = home(tmp_path, y, ids, "cosine")
    asked = Embedded(x, ids[:5], ids[:5], ids[:5], "cosine", "abc", None)
    same(rank(asked, where, 4), ranking(x, y, 4, "cosine", ids[:5], ids))
    with pytest.raises(
        UserError, match=r"compared by dot, and shop\.lance was exported for cosine"
    ):
        rank(asked._replace(distance="dot"), where, 4)


def test_without_lancedb_one_line_names_it(rng, tmp_path, monkeypatch):
    x, y = case(rng, "normal", 5, 60, 8)
    where = home(tmp_path, y)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(UserError, match="pip install lancedb"):
        rank(x, where, 3)
    with pytest.raises(UserError, match="pip install lancedb"):
        Gallery(y).export(tmp_path / "other.lance", distance="dot")


def test_mistakes_are_one_line_and_leave_nothing(rng, tmp_path):
    x, y = case(rng, "normal", 5, 60, 8)
    where = home(tmp_path, y)
    bad = y.copy()
    bad[50] = np.inf
    with pytest.raises(UserError, match="gallery row 50 is not finite"):
        Gallery(bad).export(tmp_path / "bad.lance", distance="dot")
    with pytest.raises(UserError, match="is there already: remove it"):
        Gallery(y).export(tmp_path / "shop.lance", distance="dot")
    with pytest.raises(UserError, match="letters, digits"):
        Gallery(y).export(tmp_path / "my shop.lance", distance="dot")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shop.lance", "shop.lance.json"]
    lancedb.connect(tmp_path).create_table("other", data=[{"vector": [1.0, 2.0]}])
    for place, options, says in [
        (where, {"k": 0}, "k must be at least 1"),
        (where, {"distance": "hamming"}, "is unknown"),
        (where, {"gallery_ids": range(60)}, "leave gallery_ids out"),
        (where, {"keep": [True]}, r"keep must give bool \[60\]"),
        (where, {"memory_limit": 5}, "less than 1 MiB"),
        (where, {"approximate": "faiss"}, "use 'lance'"),
        (where, {"approximate": "lance", "keep": np.ones(60, bool)}, "leave approximate out"),
        (where, {"query_ids": list("abcde")}, "do not match"),
        (f"{where}x", {}, "is no LanceDB table"),
        ("lance://nowhere.lance", {}, "is no LanceDB table"),
        (f"lance://{tmp_path}/other.lance", {}, "does not number its rows"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            rank(x, place, **{"k": 3} | options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="queries have 9 columns"):
        rank(np.zeros((1, 9)), where, 3)
    with pytest.raises(UserError, match="searched by rank alone"):
        range_search(x, where, 1.0)
