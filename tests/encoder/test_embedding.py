"""The cache of features: whole after a crash, never stale, and computed once."""

import multiprocessing

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trunk import WIDTH

import siamese_jax as sj
from siamese_jax.data.records import content_keys
from siamese_jax.data.sources import load_images
from siamese_jax.encoder.combined import fused
from siamese_jax.encoder.embedding import (
    CachedVectors,
    Kept,
    embed_folder,
    embed_records,
    embedded_rows,
    feature_batches,
)
from siamese_jax.encoder.encoder import Encoder
from siamese_jax.errors import UserError
from siamese_jax.storage.tree import fingerprint
from siamese_jax.storage.vectors import VectorStore


def keys_of(numbers):
    return [int(i).to_bytes(16, "little") for i in numbers]


def test_a_store_gives_back_what_was_put_in(tmp_path, rng):
    store = VectorStore(tmp_path / "s", (3, 2))
    assert len(store) == 0
    assert store.vectors().shape == (0, 3, 2)
    first, second = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    store.append(keys_of([5, 1, 3, 9]), first)
    store.append(keys_of([3, 7, 9, 2]), second)  # 3 and 9 are there already
    np.testing.assert_array_equal(store.rows(keys_of([9, 8, 7, 5])), [3, -1, 4, 0])
    again = VectorStore(tmp_path / "s", (3, 2))
    rows = again.rows(keys_of([5, 1, 3, 9, 7, 2]))
    np.testing.assert_array_equal(again.vectors()[rows], np.concatenate([first, second[[1, 3]]]))


def test_a_store_of_bfloat16_rounds_and_notices_damage(tmp_path, rng):
    values = rng.normal(size=(4, 3, 2)).astype(np.float32)
    VectorStore(tmp_path / "s", (3, 2), "bfloat16").append(keys_of(range(4)), values)
    assert (tmp_path / "s" / "vectors.bin").stat().st_size == values.nbytes // 2
    found = VectorStore(tmp_path / "s", (3, 2), "bfloat16")
    np.testing.assert_array_equal(found.rows(keys_of([3, 0, 9])), [3, 0, -1])
    kept = np.asarray(found.vectors(), np.float32)
    np.testing.assert_allclose(kept, values, rtol=2**-8)  # half a unit of its 8 bits
    assert (kept != values).any()
    data = bytearray((tmp_path / "s" / "vectors.bin").read_bytes())
    data[2 * 12 + 5] ^= 1
    (tmp_path / "s" / "vectors.bin").write_bytes(data)
    again = VectorStore(tmp_path / "s", (3, 2), "bfloat16")
    np.testing.assert_array_equal(again.rows(keys_of(range(4))), [0, 1, -1, 3])


@settings(max_examples=25, deadline=None)
@given(keep_keys=st.integers(0, 64), keep_values=st.integers(0, 4 * 12))
def test_a_store_cut_off_anywhere_keeps_its_whole_rows(tmp_path_factory, keep_keys, keep_values):
    folder = tmp_path_factory.mktemp("cut")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    VectorStore(folder, (3,)).append(keys_of(range(4)), values)
    for name, size in (("keys", keep_keys), ("vectors", keep_values)):
        with open(folder / f"{name}.bin", "r+b") as file:
            file.truncate(size)
    whole = min(keep_keys // 16, keep_values // 12)
    store = VectorStore(folder, (3,))
    assert len(store) == whole
    np.testing.assert_array_equal(store.vectors(), values[:whole])
    store.append(keys_of(range(4)), values)
    np.testing.assert_array_equal(store.vectors()[store.rows(keys_of(range(4)))], values)


DAMAGE = {
    "flipped": lambda data, rng: (
        data[: (i := rng.integers(len(data)))]
        + bytes([data[i] ^ (1 << rng.integers(8))])
        + data[i + 1 :]
    ),
    "exchanged": lambda data, rng: data[len(data) // 2 :] + data[: len(data) // 2],
    "zeroed tail": lambda data, rng: data[: rng.integers(len(data))].ljust(len(data), b"\0"),
    "negated": lambda data, rng: bytes(b ^ 0x80 if i % 4 == 3 else b for i, b in enumerate(data)),
}


@pytest.mark.parametrize("name", ["keys", "vectors", "sums"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_missing_and_is_said(damage, name, tmp_path, rng, caplog):
    """What a store gives was put in, whatever befell its files; put in again, all is there."""
    keys = [rng.bytes(16) for _ in range(8)]
    values = rng.normal(size=(8, 3)).astype(np.float32)
    for trial in range(3):
        folder = tmp_path / str(trial)
        VectorStore(folder, (3,)).append(keys, values)
        file = folder / f"{name}.bin"
        before = file.read_bytes()
        file.write_bytes(DAMAGE[damage](before, rng))
        caplog.clear()
        store = VectorStore(folder, (3,))
        rows = store.rows(keys)
        assert (rows < 0).any() == (file.read_bytes() != before)
        np.testing.assert_array_equal(store.vectors()[rows[rows >= 0]], values[rows >= 0])
        said = [r.getMessage() for r in caplog.records]
        assert len(said) <= 1
        if name != "keys" and (rows < 0).any():
            assert f"{folder}: {(rows < 0).sum()} of 8 rows are damaged" in said[0]
        store.append(keys, values)
        for again in (store, VectorStore(folder, (3,))):
            np.testing.assert_array_equal(again.vectors()[again.rows(keys)], values)


def test_rows_of_the_first_version_have_no_checksums_and_get_them(tmp_path, rng, caplog):
    keys, values = keys_of(range(5)), rng.normal(size=(5, 2)).astype(np.float32)
    VectorStore(tmp_path, (2,)).append(keys, values)
    (tmp_path / "sums.bin").unlink()
    store = VectorStore(tmp_path, (2,))
    np.testing.assert_array_equal(store.vectors()[store.rows(keys)], values)
    assert "5 rows have no checksums" in caplog.text
    with open(tmp_path / "vectors.bin", "r+b") as file:
        file.write(b"?")
    np.testing.assert_array_equal(VectorStore(tmp_path, (2,)).rows(keys), [-1, 1, 2, 3, 4])


def test_two_processes_may_write_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=tiny.append_some, args=(tmp_path, s)) for s in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    store = VectorStore(tmp_path, (1,))
    assert len(store) == 30
    np.testing.assert_array_equal(store.vectors()[store.rows(keys_of(range(30)))][:, 0], range(30))


def test_equal_images_are_computed_once(tmp_path):
    read, seen = [], []

    def batches(rows):
        for row in rows:
            read.append(int(row))
            image = np.full((1, 2, 2, 3), row, np.uint8)
            yield {"image": image, "id": np.array([row]), "mask": np.array([row != 2])}

    def compute(images):
        seen.append(int(images[0, 0, 0, 0]))
        return np.full((1, 1), seen[-1], np.float32)

    cached = CachedVectors([VectorStore(tmp_path, (1,))], batches, compute)
    keys = keys_of([0, 1, 2, 1])
    np.testing.assert_array_equal(cached.kept(np.arange(4), keys).rows, [[0, 1, -1, 1]])
    assert (sorted(set(read)), sorted(seen)) == ([0, 1, 2], [0, 1])
    read.clear()
    cached.kept(np.arange(4), keys)
    assert read == [2]  # What cannot be read is tried again: it may have been mended.


def test_a_damaged_row_is_computed_again(tmp_path):
    def batches(rows):
        yield {"image": rows, "id": rows, "mask": np.ones(len(rows), bool)}

    def rows():
        store = VectorStore(tmp_path, (1,))
        cached = CachedVectors([store], batches, lambda image: image[:, None].astype(np.float32))
        return cached.kept(np.arange(4), keys).take(np.arange(4))[:, 0]

    keys = keys_of(range(4))
    np.testing.assert_array_equal(rows(), range(4))
    with open(tmp_path / "vectors.bin", "r+b") as file:
        file.seek(9)
        file.write(b"?")
    np.testing.assert_array_equal(rows(), range(4))


def test_batches_are_a_function_of_seed_and_step(rng):
    vectors = rng.normal(size=(9, 4)).astype(np.float32)
    rows = (np.arange(6), np.array([8, 7, 6, -1, 8, 7]))
    views = [Kept((vectors,), row[None]) for row in rows]
    labels, ids = np.arange(6) // 2, np.arange(6) + 10

    def sample(step):
        return np.random.default_rng(step).integers(0, 6, 64)

    def batches(seed, start, n):
        made = feature_batches(views, labels, ids, sample, seed=seed, start_step=start)
        return [next(made) for _ in range(n)]

    whole, tail = batches(1, 0, 5), batches(1, 3, 2)
    for a, b in zip(whole[3:], tail, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    other = batches(2, 0, 1)[0]
    assert not np.array_equal(other["feature"], whole[0]["feature"])
    batch = whole[0]
    np.testing.assert_array_equal(batch["id"], ids[sample(0)])
    plain = (batch["feature"] == vectors[sample(0)]).all(axis=1)
    assert 0.2 < plain.mean() < 0.8  # both views are drawn
    assert set(batch["id"][~batch["mask"]]) == {13}  # the record whose second view is missing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images") / "shop", classes=3, images=3)


@pytest.fixture(scope="module")
def encoder(small_trunk):
    with jax.numpy_dtype_promotion("standard"):
        return sj.load_encoder("resnet18", weights="random", image_size=32)


class Counting:
    """An encoder that counts the images it is asked for."""

    def __init__(self, encoder):
        self.encoder, self.count = encoder, 0
        self.fingerprint, self.embedding_dim = encoder.fingerprint, encoder.embedding_dim
        self.image_size, self.fit = encoder.image_size, encoder.fit

    def __call__(self, images):
        self.count += len(images)
        return self.encoder(images)


def test_a_folder_is_embedded_once(folder, encoder, tmp_path):
    counting = Counting(encoder)
    found = embed_folder(counting, folder, cache_dir=tmp_path, batch_size=4)
    assert found.vectors.shape == (9, WIDTH)
    assert counting.count == 12  # three batches of four
    np.testing.assert_array_equal(found.labels, np.repeat(["class0", "class1", "class2"], 3))
    assert str(found.paths[0]).endswith("class0/0.png")
    again = embed_folder(counting, folder, cache_dir=tmp_path, batch_size=4)
    assert counting.count == 12
    np.testing.assert_array_equal(found.vectors, again.vectors)


def test_a_touched_image_alone_is_computed_again(folder, encoder, tmp_path):
    counting = Counting(encoder)
    before = embed_folder(counting, folder, cache_dir=tmp_path, batch_size=1).vectors
    changed, other = folder / "class1" / "1.png", folder / "class2" / "0.png"
    original = changed.read_bytes()
    changed.write_bytes(other.read_bytes())
    counting.count = 0
    try:
        after = embed_folder(counting, folder, cache_dir=tmp_path, batch_size=1).vectors
        assert counting.count == 0  # its new content is that of an image known already
        np.testing.assert_array_equal(after[4], before[6])
        with open(changed, "ab") as file:
            file.write(b"\0")
        embed_folder(counting, folder, cache_dir=tmp_path, batch_size=1)
        assert counting.count == 1
    finally:
        changed.write_bytes(original)


def test_what_changed_since_it_was_hashed_is_left_out(folder, encoder, tmp_path, caplog):
    """The cache keeps vectors of the bytes that were decoded, whatever happens in between."""
    records = load_images(folder)
    keys = content_keys(records)
    right = embed_records(encoder, records, keys=keys, cache_dir=tmp_path / "right").vectors
    changed, copy, other = (folder / "class1" / f"{i}.png" for i in range(3))
    before = [path.read_bytes() for path in (changed, copy)]
    try:
        changed.write_bytes(other.read_bytes())
        found = embed_records(encoder, records, keys=keys, cache_dir=tmp_path)
        assert f"skipped {changed}: its content has changed" in caplog.text
        np.testing.assert_array_equal(found.vectors, np.delete(right, 3, axis=0))
        with pytest.raises(UserError, match=r"0\.png: its content has changed since"):
            embed_records(encoder, records, keys=keys, cache_dir=tmp_path / "new", strict=True)
        keys[4] = keys[3]  # of two copies the first one has changed: the second is read
        copy.write_bytes(before[0])
        found = embed_records(encoder, records, keys=keys, cache_dir=tmp_path)
        np.testing.assert_array_equal(found.vectors, right[[0, 1, 2, 3, 3, 5, 6, 7, 8]])
    finally:
        for path, data in zip((changed, copy), before, strict=True):
            path.write_bytes(data)
    after = embed_records(encoder, records, cache_dir=tmp_path).vectors
    np.testing.assert_array_equal(after, right)


def test_another_option_is_another_cache(folder, encoder, tmp_path):
    plain = embed_folder(encoder, folder, cache_dir=tmp_path)
    padded = Encoder(
        encoder.model, encoder.params, encoder.batch_stats, encoder.image_size, fit="crop"
    )
    assert padded.fingerprint != encoder.fingerprint
    assert len(list((tmp_path / "embeddings").iterdir())) == 1
    embed_folder(padded, folder, cache_dir=tmp_path)
    assert len(list((tmp_path / "embeddings").iterdir())) == 2
    assert plain.vectors.shape == (9, WIDTH)


def test_a_broken_image_is_left_out(folder, encoder, tmp_path):
    broken = folder / "class0" / "9.jpg"
    broken.write_text("this is no picture")
    try:
        found = embed_folder(encoder, folder, cache_dir=tmp_path)
        assert len(found.vectors) == len(found.labels) == len(found.paths) == 9
        with pytest.raises(UserError, match=r"9\.jpg"):
            embed_folder(encoder, folder, cache_dir=tmp_path, strict=True)
    finally:
        broken.unlink()


def test_some_rows_are_those_of_all(folder, encoder, tmp_path):
    """Read when asked for, in any order, of one encoder and of two joined, without a broken one."""
    broken = folder / "class0" / "broken.png"
    broken.write_bytes(b"no image")
    records = load_images(folder)
    for which in (encoder, fused([encoder, encoder], [1, 3])):
        found = embed_records(which, records, cache_dir=tmp_path)
        rows, kept = embedded_rows(which, records, cache_dir=tmp_path)
        assert kept.path.tolist() == found.paths.tolist()
        assert len(kept) == len(records) - 1
        places = np.array([3, 0, len(kept) - 1])
        np.testing.assert_allclose(rows(places), found.vectors[places], rtol=1e-6)
    broken.unlink()


def test_fingerprints_do_not_depend_on_order():
    assert fingerprint(a=1, b=(2, 3)) == fingerprint(b=(2, 3), a=1)
    assert fingerprint(a=1) != fingerprint(a=2)
