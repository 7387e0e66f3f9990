"""Gallery: searched like its array, grown, thinned out, saved and loaded."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ranking_oracle import case, ranking

from siamese_jax.errors import UserError
from siamese_jax.search.gallery import Gallery
from siamese_jax.search.ranking import range_search, rank


def test_add_and_remove_are_the_array_with_rows_more_and_less(rng):
    x, y = case(rng, "copies", 6, 300, 12)
    names = np.arange(1000, 1300)
    gallery = Gallery(y[:200], names[:200])
    rank(x, gallery, 4)  # Prepared for the first rows, which must not be what is found later.
    gallery.add(jnp.asarray(y[200:]), names[200:])
    np.testing.assert_array_equal(rank(x, gallery, 9).indices, ranking(x, y, 9, "euclidean")[0])
    gone = rng.choice(names, size=120, replace=False)
    assert gallery.remove(gone) == 120
    assert len(gallery) == 180
    keep = ~np.isin(names, gone)
    expected = ranking(x, y, 200, "euclidean", keep=keep)
    found = rank(x, gallery, 200)
    np.testing.assert_array_equal(found.indices, expected[0])
    own = names[rng.integers(0, 300, size=6)]
    found = rank(x, gallery, 9, query_ids=own, keep=lambda ids: ids % 2 == 0)
    both = keep & (names % 2 == 0)
    expected = ranking(x, y, 9, "euclidean", own, names, both)
    np.testing.assert_array_equal(found.indices, expected[0])
    near = range_search(x, gallery, 1.0)
    assert not np.isin(names[near.indices], gone).any()


def test_several_galleries_against_one_set_of_queries(rng):
    x, y = case(rng, "normal", 5, 100, 8)
    for part in (y[:40], y[40:]):
        gallery = Gallery(part)
        for distance in ("cosine", "euclidean"):
            found = rank(x, gallery, 3, distance=distance)
            np.testing.assert_array_equal(found.indices, ranking(x, part, 3, distance)[0])


@pytest.mark.parametrize("text", [False, True])
def test_save_and_load(rng, tmp_path, text):
    x, y = case(rng, "normal", 5, 100, 8)
    ids = np.arange(100) * 7
    gallery = Gallery([y[:30], y[30:]], ids.astype(str) if text else ids)
    gallery.remove(gallery.ids[[3, 50]])
    folder = tmp_path / "a" / "gallery"
    gallery.save(folder)
    gallery.save(folder)  # Over itself.
    assert sorted(p.name for p in folder.iterdir()) == ["ids.npy", "manifest.json", "vectors.npy"]
    assert [p.name for p in folder.parent.iterdir()] == ["gallery"]
    loaded = Gallery.load(folder, verify=True)
    assert isinstance(loaded.rows.shards[0], np.memmap)
    before, after = rank(x, gallery, 9), rank(x, loaded, 9)
    np.testing.assert_array_equal(gallery.ids[before.indices], loaded.ids[after.indices])
    np.testing.assert_array_equal(before.distances, after.distances)


def test_a_damaged_folder_is_refused(rng, tmp_path):
    Gallery(rng.normal(size=(9, 4)), np.arange(9)).save(tmp_path / "g")
    with pytest.raises(UserError, match="no readable gallery"):
        Gallery.load(tmp_path / "nothing")
    vectors = np.load(tmp_path / "g" / "vectors.npy")
    vectors[0, 0] += 1
    np.save(tmp_path / "g" / "vectors.npy", vectors)
    Gallery.load(tmp_path / "g")
    with pytest.raises(UserError, match=r"vectors\.npy is not the file its manifest names"):
        Gallery.load(tmp_path / "g", verify=True)
    np.save(tmp_path / "g" / "vectors.npy", vectors[:5])
    with pytest.raises(UserError, match=r"vectors \(5, 4\)"):
        Gallery.load(tmp_path / "g")
    manifest = json.loads((tmp_path / "g" / "manifest.json").read_text())
    (tmp_path / "g" / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Gallery.load(tmp_path / "g")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no gallery"):
        Gallery(vectors).save(tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text("{}")  # a web page's, say
    with pytest.raises(UserError, match="something else"):
        Gallery(vectors).save(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_damaged_ids_are_refused(rng, tmp_path):
    """They are read whole anyway; the vectors, a memory map, are verified where that is asked."""
    Gallery(rng.normal(size=(9, 4)), np.arange(9)).save(tmp_path / "g")
    np.save(tmp_path / "g" / "ids.npy", np.arange(9)[::-1])
    with pytest.raises(UserError, match=r"ids\.npy is not the file its manifest names"):
        Gallery.load(tmp_path / "g")


@pytest.mark.parametrize("number", [1, 2])
def test_a_save_that_dies_as_it_renames_loses_nothing(number, rng, tmp_path, monkeypatch, caplog):
    Gallery(rng.normal(size=(9, 4))).save(tmp_path / "g")
    calls, rename = [], Path.rename

    def dies(path, target):
        calls.append(path)
        if len(calls) == number:
            raise KeyboardInterrupt
        return rename(path, target)

    smaller = Gallery(rng.normal(size=(5, 4)))
    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        smaller.save(tmp_path / "g")
    assert len(Gallery.load(tmp_path / "g")) == 9
    assert ("not saved whole" in caplog.text) == (number == 2)
    smaller.save(tmp_path / "g")
    assert len(Gallery.load(tmp_path / "g")) == 5
    assert not list(tmp_path.glob(".*.former"))


def test_mistakes_are_named(rng):
    y = rng.normal(size=(5, 3))
    gallery = Gallery(y)
    with pytest.raises(UserError, match="width 4 do not fit"):
        gallery.add(np.zeros((1, 4)))
    with pytest.raises(UserError, match="do not fit a gallery with ids"):
        gallery.add(y, [*"abcde"])
    with pytest.raises(UserError, match="id 17 is not in"):
        gallery.remove([1, 17])
    assert len(gallery) == 5
    with pytest.raises(UserError, match="integers or strings"):
        Gallery(y, [0.5] * 5)
    with pytest.raises(UserError, match="different widths"):
        Gallery([y, y[:, :2]])
    with pytest.raises(UserError, match="leave gallery_ids out"):
        rank(y, gallery, 1, gallery_ids=range(5))
