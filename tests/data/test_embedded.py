"""Embedded folders and lists of images: searched and measured by names, never by numbers."""

import numpy as np
import pytest
from PIL import Image

import siamese_jax as sj
from siamese_jax.errors import UserError


class Thumbnail:
    """An encoder without a trunk: the pixels of the image, at four by four."""

    image_size, fit, embedding_dim = 4, "squash", 48

    def __init__(self, distance="euclidean", fingerprint="thumbnail"):
        self.distance, self.fingerprint = distance, fingerprint

    def __call__(self, images):
        return images.reshape(len(images), -1).astype(np.float32)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """photos/ of 20 classes and shop/ of 81, of which those are every fourth."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(3)
    for c in range(81):
        base = rng.integers(0, 256, (4, 4, 3))
        for side, n in (("shop", 2), ("photos", 2 if c % 4 == 1 else 0)):
            for i in range(n):
                file = root / side / f"class {c:02}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                noisy = np.clip(base + rng.normal(0, 150, base.shape), 0, 255)
                Image.fromarray(noisy.astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def sides(world):
    options = {"cache_dir": world / "cache"}
    return [sj.embed_folder(Thumbnail(), world / side, **options) for side in ("photos", "shop")]


def recall(photos, shop, k, *, within=False):
    """Recall@k by names, by a loop over float64 distances."""
    hits = []
    for i, x in enumerate(photos.vectors.astype(np.float64)):
        away = np.sqrt(((shop.vectors.astype(np.float64) - x) ** 2).sum(1))
        away[[within and i == j for j in range(len(away))]] = np.inf
        nearest = np.argsort(away, kind="stable")[:k]
        hits.append(any(shop.records.path[j].split("/")[-2] == photos.labels[i] for j in nearest))
    return np.mean(hits)


def test_folders_of_other_classes_are_compared_by_name(sides):
    photos, shop = sides
    assert (len(set(photos.labels)), len(set(shop.labels))) == (20, 81)
    # Numbers of the folders' own, which mean nothing to one another.
    assert (photos.records.label.max(), shop.records.label.max()) == (19, 80)
    found = sj.evaluate(photos, shop, ks=(1, 5))
    for k in (1, 5):
        assert found[f"recall@{k}"] == pytest.approx(recall(photos, shop, k), abs=1e-12)
        assert 0.1 < found[f"recall@{k}"] < 0.95
    by_arrays = sj.evaluate(photos.vectors, photos.labels, shop.vectors, shop.labels, ks=(1, 5))
    assert found == by_arrays
    alone = sj.evaluate(shop, ks=(1,))
    assert alone["recall@1"] == pytest.approx(recall(shop, shop, 1, within=True), abs=1e-12)
    assert sj.metrics.per_query(photos, gallery=shop).relevant.tolist() == [2] * 40


def test_the_distance_is_the_encoders(world, sides):
    cosine = [part._replace(distance="cosine") for part in sides]
    photos, shop = sides
    arrays = (photos.vectors, photos.labels, shop.vectors, shop.labels)
    assert sj.evaluate(*cosine) == sj.evaluate(*arrays, distance="cosine")
    assert sj.evaluate(*cosine) != sj.evaluate(*sides)
    assert sj.evaluate(*cosine, distance="euclidean") == sj.evaluate(*sides)
    ranking = sj.rank(*cosine, k=7)
    expected = sj.rank(photos.vectors, shop.vectors, 7, distance="cosine")
    np.testing.assert_array_equal(ranking.indices, expected.indices)
    near = sj.range_search(*cosine, radius=0.1)
    assert near.limits[-1] == (sj.pairwise_distances(*arrays[::2], distance="cosine") <= 0.1).sum()


def test_what_cannot_be_compared_is_refused(sides):
    photos, shop = sides
    for other, message in (
        (shop._replace(distance="dot"), "compared by euclidean, the gallery by dot"),
        (shop._replace(vectors=shop.vectors[:, :8]), "two encoders .* 48 and 8"),
        (shop._replace(encoder="another"), "two encoders"),
    ):
        for way in (lambda o: sj.evaluate(photos, o), lambda o: sj.rank(photos, o, k=1)):
            with pytest.raises(UserError, match=message):
                way(other)
    with pytest.raises(UserError, match="one side is embedded images and the other an array"):
        sj.rank(photos, shop.vectors, k=1)
    with pytest.raises(UserError, match="need query_labels"):
        sj.evaluate(photos.vectors)
    renamed = shop._replace(labels=np.char.add("x", shop.labels))
    with pytest.raises(UserError, match="none in common"):
        sj.evaluate(photos, renamed)


def test_a_file_found_in_two_folders_is_not_its_own_answer(world, tmp_path, sides):
    _, shop = sides
    (tmp_path / "linked").symlink_to(world / "shop", target_is_directory=True)
    for c in ("class 03", "class 50"):
        (tmp_path / "some" / c).mkdir(parents=True)
        (tmp_path / "some" / c / "x.png").symlink_to(world / "shop" / c / "0.png")
    some, linked = (
        sj.embed_folder(Thumbnail(), tmp_path / name, cache_dir=tmp_path)
        for name in ("some", "linked")
    )
    np.testing.assert_array_equal(linked.ids, shop.ids)
    assert set(some.ids) <= set(shop.ids)
    for gallery in (shop, linked, sj.Gallery(shop)):
        found = sj.rank(some, gallery, k=1)
        assert (found.distances > 0).all()
    assert sj.metrics.per_query(some, shop).relevant.tolist() == [1, 1]
    plain = sj.rank(some.vectors, shop.vectors, k=1, distance="euclidean")
    assert (plain.distances == 0).all()


def test_unlabelled_images_match_nothing(world, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (5, 5), (i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    flat = sj.embed_folder(Thumbnail(), tmp_path / "flat", cache_dir=tmp_path)
    assert flat.labels.tolist() == ["", "", ""]
    assert sj.metrics.per_query(flat).relevant.tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="none of the 3 queries has a label"):
        sj.evaluate(flat)


def test_several_labels_an_image_are_tuples_of_names(tmp_path):
    from siamese_jax.data.csv_file import from_csv
    from siamese_jax.encoder.embedding import embed_records

    sides = []
    # The columns of the two sets have nothing in common but "red".
    for name, labels in (
        ("a", ["red;round", "blue", "red"]),
        ("b", ["zebra", "red;apple", "blue"]),
    ):
        for i in range(3):
            Image.new("RGB", (6, 6), (40 * i, 0, 0)).save(tmp_path / f"{name}{i}.png")
        lines = [f"{label},{name}{i}.png" for i, label in enumerate(labels)]
        (tmp_path / f"{name}.csv").write_text("label,path\n" + "\n".join(lines) + "\n")
        records = from_csv(tmp_path / f"{name}.csv", separator=";")
        sides.append(embed_records(Thumbnail(), records, cache_dir=tmp_path))
    assert sides[0].labels.tolist() == [("red", "round"), ("blue",), ("red",)]
    assert sj.metrics.per_query(*sides).relevant.tolist() == [1, 1, 1]
    one = sj.metrics.per_query(sides[0].vectors, ["red", "blue", ""], *sides[1][0:3:2])
    assert one.relevant.tolist() == [1, 1, 0]


def test_a_list_is_embedded_as_a_folder_is(world, tmp_path, sides):
    photos, shop = sides
    files = [world / "photos" / "class 05" / "1.png", *shop.paths[:3]]
    names = ["class 05", *shop.labels[:3]]
    expected = np.concatenate([photos.vectors[photos.ids == str(files[0])], shop.vectors[:3]])
    found = sj.embed_images(Thumbnail(), files, labels=names, cache_dir=tmp_path)
    np.testing.assert_array_equal(found.vectors, expected)
    assert found.labels.tolist() == names
    assert found.ids.tolist() == [str(files[0]), *shop.ids[:3]]
    assert sj.evaluate(found, shop, metrics=["recall@1"])["lone_share"] == 0
    again = sj.embed_folder(Thumbnail(), files, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.vectors, found.vectors)
    assert again.labels.tolist() == [""] * 4
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    less = sj.embed_images(
        Thumbnail(), [broken, *files], labels=["?", *names], cache_dir=tmp_path, strict=False
    )
    assert less.labels.tolist() == names
    with pytest.raises(UserError, match=r"broken\.png"):
        sj.embed_images(Thumbnail(), [broken, *files], cache_dir=tmp_path, strict=True)


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_images_in_memory_are_brought_to_size_as_files_are(tmp_path, rng, fit):
    """Arrays and Pillow images of all sizes, against the same pixels written without loss."""
    pixels = [
        rng.integers(0, 256, shape).astype(np.uint8)
        for shape in ((30, 50, 3), (50, 30, 3), (7, 9), (12, 12, 4), (40, 64, 3), (1, 3, 3))
    ]
    files = [tmp_path / f"{i}.png" for i in range(len(pixels))]
    for image, file in zip(pixels, files, strict=True):
        Image.fromarray(image).save(file)
    # Opened, and not read yet: turned by their notes, 16-bit grey, a palette.
    turned = Image.fromarray(pixels[4])
    note = Image.Exif()
    note[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=note)
    turned.save(tmp_path / "turned.tif", tiffinfo={0x0112: 6})
    Image.fromarray(rng.integers(0, 2**16, (9, 20)).astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(pixels[0]).quantize(16).save(tmp_path / "palette.png", transparency=3)
    files += [tmp_path / name for name in ("turned.png", "turned.tif", "grey.png", "palette.png")]
    images = [*pixels, *map(Image.open, files[len(pixels) :])]
    encoder = Thumbnail()
    encoder.fit, encoder.fingerprint = fit, fit
    found = sj.embed_images(encoder, images, cache_dir=tmp_path / "a", batch_size=3)
    expected = sj.embed_images(encoder, files, cache_dir=tmp_path / "b")
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    again = sj.embed_images(encoder, images, cache_dir=tmp_path / "a")
    np.testing.assert_array_equal(found.vectors, again.vectors)
    # Named by content: the same image is never its own answer, a copy of it is one.
    assert found.ids.tolist() == again.ids.tolist()
    twice = sj.embed_images(encoder, [*images, pixels[1]], cache_dir=tmp_path / "a")
    assert len(set(twice.ids)) == len(images) + 1
    assert sj.rank(twice, again, k=1).distances[-1, 0] == 0
    assert (sj.rank(found, again, k=1).indices[:, 0] != np.arange(len(images))).all()
    assert images[len(pixels)].size == (64, 40)  # what was given stays as it is


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("a.png", "give a list of images"),
        (np.zeros((8, 8, 3), np.uint8), "give a list of images"),
        ([], "the list of images is empty"),
        ([np.zeros((8, 8, 3))], r"image 0 is ndarray float64 \[8, 8, 3\]: give uint8"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 2), np.uint8)], "image 1 is ndarray"),
        ([np.zeros((0, 8, 3), np.uint8)], "image 0 has no pixels"),
        ([np.zeros((8, 8, 3), np.uint8), "a.png"], "files and images in memory"),
        ([None], "image 0 is NoneType"),
        (["gone.png"], "1 of 1 images do not exist"),
    ],
)
def test_what_is_no_list_of_images_is_said_in_one_line(tmp_path, images, message):
    with pytest.raises(UserError, match=message) as error:
        sj.embed_images(Thumbnail(), images, cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="1 images have 2 labels"):
        sj.embed_images(
            Thumbnail(), np.zeros((1, 8, 8, 3), np.uint8), labels=["a", "b"], cache_dir=tmp_path
        )
