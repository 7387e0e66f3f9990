"""Whitened, augmented and fused encoders, in Python and from the command line."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
import tiny

import siamese_jax as sj
from siamese_jax.__main__ import main
from siamese_jax.encoder import combined
from siamese_jax.encoder.embedding import embed_folder
from siamese_jax.encoder.whitening import Whitening
from siamese_jax.errors import UserError
from siamese_jax.search import rerank

SIZE = 32
pytestmark = pytest.mark.usefixtures("short_trunk")
ENCODER = ["--encoder=resnet18", "--weights=random", f"--image-size={SIZE}"]


def load(*args, **options):
    with jax.numpy_dtype_promotion("standard"):
        return sj.load_encoder(*args, **options)


def normal(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory, short_trunk):
    """Labelled images, and a cache that all tests share."""
    root = tmp_path_factory.mktemp("combined")
    tiny.make_folder(root / "shop", classes=5, images=4, size=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


@pytest.fixture(scope="module")
def encoder(short_trunk):
    return load("resnet18", weights="random", image_size=SIZE)


@pytest.fixture(scope="module")
def views(encoder):
    return combined.augmented(encoder, scales=(1.0, 1.5))


@pytest.fixture(scope="module")
def larger(views):
    return views.parts[1]


@pytest.fixture(scope="module")
def other(encoder):
    """Another encoder of another width: a random map of the first one's embeddings."""
    rng = np.random.default_rng(5)
    return combined.whitened(encoder, Whitening(rng.normal(size=512), rng.normal(size=(7, 512))))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)


def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(argument) for argument in argv]) == 0
    return printed.getvalue()


def embedded(world, name, *options):
    """Vectors and provenance, by the tool."""
    path = world / f"{name}.npz"
    run("embed", *options, f"--images={world}/shop", f"--out={path}")
    with np.load(path) as arrays:
        return arrays["vectors"], json.loads(str(arrays["provenance"]))


def caches(world):
    return len(list((world / "cache" / "embeddings").iterdir()))


def test_a_mirrored_encoder_sees_the_mirror_image(encoder, images):
    mirrored = encoder.mirrored()
    np.testing.assert_array_equal(mirrored(images), encoder(images[:, :, ::-1]))
    assert mirrored.fingerprint != encoder.fingerprint == mirrored.mirrored().fingerprint


def test_another_size_is_another_encoder_with_the_same_weights(larger, images):
    fresh = load("resnet18", weights="random", image_size=48)
    assert larger.fingerprint == fresh.fingerprint
    big = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)[:, :48, :48]
    np.testing.assert_array_equal(larger(big), fresh(big))


def test_a_size_seen_before_compiles_nothing(encoder, larger, monkeypatch):
    """Other weights of the same trunk at the same size use the program that is there."""
    negated = jax.tree.map(lambda leaf: -leaf, encoder.params["trunk"])
    other = dataclasses.replace(encoder, params={**encoder.params, "trunk": negated})
    traced, whole = [], type(encoder.model.trunk).apply
    monkeypatch.setattr(
        type(encoder.model.trunk), "apply", lambda *a, **k: traced.append(1) or whole(*a, **k)
    )
    again, made = encoder.at_size(larger.image_size), other.at_size(larger.image_size)
    assert traced == []
    kernels = [jax.tree.leaves(e.kernels) for e in (larger, again, made)]
    for first, second, third in zip(*kernels, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(third, -np.asarray(first), atol=1e-6)
    assert kernels[0]
    encoder.at_size(larger.image_size + 16)
    assert traced


@pytest.mark.slow
def test_views_are_mirrored_resized_and_averaged(encoder, views, images):
    both = combined.augmented(encoder)
    expected = normal(normal(encoder(images)) + normal(encoder(images[:, :, ::-1])))
    np.testing.assert_allclose(both(images), expected, atol=1e-6)
    np.testing.assert_allclose(both(images[:, :, ::-1]), both(images), atol=1e-6)
    alone = combined.augmented(encoder, mirror=False)
    np.testing.assert_allclose(alone(images), normal(encoder(images)), atol=1e-6)
    seen = [(part.image_size, part.mirror) for part in views.parts]
    assert seen == [(32, False), (48, False), (32, True), (48, True)]
    larger = np.clip(
        np.round(jax.image.resize(np.float32(images), (5, 48, 48, 3), "bilinear")), 0, 255
    )
    larger = np.asarray(larger).astype(np.uint8)
    total = sum(
        normal(encoder(batch[:, :, ::step])) for batch in (images, larger) for step in (1, -1)
    )
    np.testing.assert_allclose(views(images), normal(total), atol=1e-5)


def test_a_fused_cosine_is_the_weighted_mean_of_the_cosines(encoder, other, images):
    made = combined.fused([encoder, other], [3, 1])
    a, b = normal(encoder(images)), normal(other(images))
    vectors = made(images).astype(np.float64)
    np.testing.assert_allclose(vectors @ vectors.T, (3 * a @ a.T + b @ b.T) / 4, atol=1e-6)
    assert made.embedding_dim == vectors.shape[1] == 512 + 7
    assert made.fingerprint != combined.fused([encoder, other]).fingerprint
    with pytest.raises(UserError, match=r"weights=\[1, -1\]: must be"):
        combined.fused([encoder, other], [1, -1])


def test_combinations_combine_and_agree_with_a_folder(world, encoder, larger, other):
    """embed_folder reads every part's images in its own size; without scales it is the same."""
    made = combined.fused([combined.augmented(encoder), other], [2, 1])
    found = embed_folder(made, world / "shop")
    from siamese_jax.data.pipeline import Reading, eval_batches

    (batch,) = eval_batches(found.records, Reading(image_size=SIZE, batch_size=20))
    np.testing.assert_allclose(found.vectors, made(batch["image"]), atol=1e-5)
    # The larger view is read larger, not blown up.
    (batch,) = eval_batches(found.records, Reading(image_size=48, batch_size=20))
    direct = embed_folder(larger, world / "shop").vectors
    np.testing.assert_allclose(direct, larger(batch["image"]), rtol=1e-4, atol=1e-4)


def test_whitening_is_fitted_saved_and_loaded_in_one_call(world, encoder, tmp_path):
    plain = embed_folder(encoder, world / "shop")
    before = caches(world)
    made = sj.whiten(encoder, world / "shop", tmp_path / "white", dim=4, shrinkage=0.3)
    expected = rerank.fit_whitening(plain.vectors, plain.labels, dim=4, shrinkage=0.3)
    found = embed_folder(made, world / "shop")
    np.testing.assert_allclose(found.vectors, expected(plain.vectors), atol=1e-6)
    again = load(tmp_path / "white")
    np.testing.assert_array_equal(embed_folder(again, world / "shop").vectors, found.vectors)
    assert caches(world) == before  # the embeddings under the whitening are the plain ones
    assert again.fingerprint == made.fingerprint != encoder.fingerprint
    assert again.embedding_dim == 4
    assert again.provenance["whitening"]["method"] == "learned"
    assert load(tmp_path / "white", whitening=False).fingerprint == encoder.fingerprint
    pca = sj.whiten(encoder, world / "shop", method="pca", shrinkage=0.3)
    np.testing.assert_allclose(
        embed_folder(pca, world / "shop").vectors,
        rerank.fit_whitening(plain.vectors, shrinkage=0.3)(plain.vectors),
        atol=1e-6,
    )


def test_a_whitening_of_another_encoder_is_refused(world, encoder, tmp_path):
    sj.whiten(encoder, world / "shop", tmp_path / "white", dim=4)
    pointer = tmp_path / "white" / "encoder.json"
    changed = json.loads(pointer.read_text()) | {"pool": "max"}
    pointer.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="another encoder"):
        load(tmp_path / "white")
    narrow = Whitening(np.zeros(3), np.eye(3))
    with pytest.raises(UserError, match="3 dimensions"):
        combined.whitened(encoder, narrow)
    foreign = dataclasses.replace(encoder, arguments={})
    with pytest.raises(UserError, match="load_encoder"):
        sj.whiten(foreign, world / "shop", tmp_path / "other")
    with pytest.raises(UserError, match="needs one label"):
        sj.whiten(encoder, world / "shop" / "class0", method="learned")


POINTERS = {
    "a list": [],
    "nothing": {},
    "no name": {"image_size": 32},
    "an unknown one": {"name": "resnet18", "imagesize": 32},
    "a size in words": {"name": "resnet18", "weights": "random", "image_size": "x"},
    "a size below 1": {"name": "resnet18", "weights": "random", "image_size": -1},
    "scaling by 0": {"name": "resnet18", "preprocessing": {"mean": [0] * 3, "std": [0] * 3}},
    "no scaling": {"name": "resnet18", "preprocessing": [1]},
}


@pytest.mark.parametrize("name", POINTERS)
def test_a_damaged_pointer_is_one_line(name, tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps(POINTERS[name]))
    with pytest.raises(UserError, match=r"encoder\.json|preprocessing") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_encoder_s_folder_without_its_whitening_is_refused(tmp_path):
    """As is one whose `whiten` was killed between the two files."""
    arguments = {"name": "resnet18", "weights": "random", "image_size": SIZE}
    (tmp_path / "encoder.json").write_text(json.dumps(arguments))
    with pytest.raises(UserError, match=r"whitening\.npz is missing"):
        load(tmp_path)
    assert load(tmp_path, whitening=False).embedding_dim == 512


def test_the_tools_apply_a_whitening_by_themselves(world, tmp_path):
    plain, _ = embedded(world, "plain", *ENCODER)
    before, out = caches(world), tmp_path / "white"
    told = run("whiten", *ENCODER, f"--images={world}/shop", "--dim=6", f"--out={out}")
    assert "LDA, 512 -> 6 dimensions" in told
    vectors, facts = embedded(world, "white", f"--encoder={out}")
    np.testing.assert_allclose(vectors, Whitening.load(out / "whitening.npz")(plain), atol=1e-6)
    assert facts["encoder"]["whitening"]["images"] == 20
    assert facts["encoder"]["width"] == 6
    again, facts = embedded(world, "again", f"--encoder={out}", "--no-whitening")
    np.testing.assert_array_equal(again, plain)
    assert "whitening" not in facts["encoder"]
    assert caches(world) == before


@pytest.mark.slow
def test_the_tools_views_and_fusion_are_those_of_python(world, encoder, views, tmp_path):
    plain, _ = embedded(world, "plain", *ENCODER)
    options = [*ENCODER, f"--cache-dir={tmp_path}"]
    vectors, facts = embedded(world, "views", *options, "--mirror", "--scales=1,1.5")
    assert len(list((tmp_path / "embeddings").iterdir())) == 4  # a cache for each view
    np.testing.assert_allclose(vectors, embed_folder(views, world / "shop").vectors, atol=1e-6)
    assert not np.allclose(vectors, normal(plain), atol=1e-3)
    assert facts["encoder"]["views"] == {"mirror": True, "scales": [1.0, 1.5]}
    white = sj.whiten(encoder, world / "shop", tmp_path / "white", dim=3)
    second = [f"--encoder={tmp_path}/white", "--fuse-weights=2,1"]
    fused, facts = embedded(world, "fused", *ENCODER, *second)
    other = embed_folder(white, world / "shop").vectors
    expected = rerank.concatenate([plain, other], [2, 1])
    np.testing.assert_allclose(fused, expected, atol=1e-6)
    assert facts["encoder"]["weights"] == [2.0, 1.0]
    parts = facts["encoder"]["fused"]
    assert ["whitening" in parts[i] for i in "12"] == [False, True]
