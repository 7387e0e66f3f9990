"""Pooling and the head, against NumPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from siamese_jax.encoder import lda
from siamese_jax.encoder.head import fit_head, make_head
from siamese_jax.encoder.pooling import (
    FIXED_POOLS,
    GeM,
    pooled_parts,
    pooled_width,
    rmac,
    rmac_regions,
)
from siamese_jax.errors import UserError


def test_average_and_max(rng):
    x = rng.normal(size=(3, 5, 4, 6)).astype(np.float32)
    np.testing.assert_allclose(FIXED_POOLS["average"](x), x.mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(FIXED_POOLS["max"](x), x.max(axis=(1, 2)))


def test_gem_between_average_and_max(rng):
    x = np.abs(rng.normal(size=(3, 5, 4, 6))).astype(np.float32) + 0.1
    for p in (1.0, 3.0, 7.5):
        gem = GeM().apply({"params": {"p": jnp.float32(p)}}, x)
        np.testing.assert_allclose(
            gem, (x.astype(np.float64) ** p).mean(axis=(1, 2)) ** (1 / p), rtol=1e-5
        )
    near_max = GeM().apply({"params": {"p": jnp.float32(60.0)}}, x)
    np.testing.assert_allclose(near_max, x.max(axis=(1, 2)), rtol=0.06)


def test_gem_learns_its_power(rng):
    x = rng.normal(size=(2, 3, 3, 4)).astype(np.float32)
    grad = jax.grad(lambda p: GeM().apply({"params": {"p": p}}, x).sum())(jnp.float32(3))
    assert np.isfinite(grad)
    assert grad != 0


@pytest.mark.parametrize("shape", [(7, 7), (4, 7), (9, 5), (1, 1), (2, 6)])
def test_rmac_regions_cover_the_map_and_stay_inside(shape):
    h, w = shape
    regions = rmac_regions(h, w, 3, 0.4)
    covered = np.zeros(shape, bool)
    for top, left, side in regions:
        assert side >= 1
        assert 0 <= top <= h - side
        assert 0 <= left <= w - side
        covered[top : top + side, left : left + side] = True
    assert covered.all()


def test_rmac_sums_unit_regions(rng):
    x = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    expected = np.zeros((2, 4))
    for top, left, side in rmac_regions(5, 6, 3, 0.4):
        r = x[:, top : top + side, left : left + side].astype(np.float64).max(axis=(1, 2))
        expected += r / np.linalg.norm(r, axis=1, keepdims=True)
    np.testing.assert_allclose(rmac(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("shape", [(6, 6), (7, 5), (1, 2)])
def test_a_grid_has_the_mean_of_every_cell(rng, side, shape):
    """A place is in a cell where the two, as intervals of the map's edge, overlap."""
    h, w = shape
    x = rng.normal(size=(2, h, w, 4)).astype(np.float32)

    def inside(place: int, cell: int, size: int) -> bool:
        return place * side < (cell + 1) * size and (place + 1) * side > cell * size

    cells = []
    for i in range(side):
        for j in range(side):
            places = [(r, c) for r in range(h) for c in range(w)
                      if inside(r, i, h) and inside(c, j, w)]  # fmt: skip
            cells.append(np.mean([x[:, r, c].astype(np.float64) for r, c in places], axis=0))
    np.testing.assert_allclose(
        FIXED_POOLS[f"grid{side}"](x), np.concatenate(cells, axis=1), atol=1e-6
    )
    assert pooled_width(4, f"grid{side}") == 4 * side * side


def test_unknown_pooling():
    with pytest.raises(UserError, match=r"'avg'.*average"):
        pooled_parts("top", "avg")
    assert pooled_parts("a,b", "max") == (("a", "max"), ("b", "max"))
    assert pooled_parts("a,b", "rmac,gem3") == (("a", "rmac"), ("b", "gem3"))
    assert pooled_parts("a:max,a,b", "gem3") == (("a", "max"), ("a", "gem3"), ("b", "gem3"))
    with pytest.raises(UserError, match="2 poolings for 3 stages"):
        pooled_parts("a,b,c", "max,rmac")
    with pytest.raises(UserError, match="gem3"):
        pooled_parts("a,b", "gem")
    with pytest.raises(UserError, match="names a stage twice"):
        pooled_parts("a,a:max", "max")


def init(head, features):
    return {"batch_stats": {}, **head.init(jax.random.key(0), features)}


def test_three_dense_layers(rng):
    x = rng.normal(size=(4, 10)).astype(np.float32)
    head = make_head((8, 6, 5), activation="relu", normalize=True)
    variables = init(head, x)
    y = x.astype(np.float64)
    for i in (1, 2, 3):
        layer = variables["params"][f"dense{i}"]
        y = y @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)
        y = np.maximum(y, 0) if i < 3 else y
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    np.testing.assert_allclose(head.apply(variables, x), y, atol=1e-5)


def test_no_layers_give_the_features(rng):
    x = rng.normal(size=(4, 10)).astype(np.float32)
    head = make_head((), normalize=False)
    np.testing.assert_array_equal(head.apply({}, x), x)


@pytest.mark.parametrize("centre", [True, False])
def test_pca_start(rng, centre):
    """The head starts as scikit-learn's PCA of the signed roots, up to the sign of a component."""
    x = rng.normal(size=(60, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32) + 2
    head = make_head(5, signed_sqrt=True, centre=centre, normalize=False)
    fitted = fit_head(head, init(head, x), x, init="pca", block=17)
    root = np.sign(x) * np.sqrt(np.abs(x))
    expected = PCA(5).fit_transform(root.astype(np.float64))
    found = np.asarray(head.apply(fitted, x))
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found, expected * signs, atol=2e-4)


@pytest.mark.parametrize("centre", [True, False])
def test_lda_start(rng, centre):
    """The head starts as the closed form of its unit roots, from blocks of a memory map's rows."""
    x = rng.normal(size=(60, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32) + 2
    labels = np.arange(60) % 7 - 1
    options = {"signed_sqrt": True, "unit": True, "parts": (5, 7), "centre": centre}
    head = make_head(4, normalize=False, **options)
    fitted = fit_head(head, init(head, x), x, init="lda", labels=labels, shrinkage=0.3, block=17)
    root = np.sign(x) * np.sqrt(np.abs(x.astype(np.float64)))
    parts = [
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in (root[:, :5], root[:, 5:])
    ]
    root = np.concatenate(parts, axis=1)
    every = lda.scatter(lambda places: root[places], labels)
    mean, projection = lda.closed_form(every, shrinkage=0.3, width=4)
    projection /= np.sqrt(np.square(projection).sum() / 4)
    np.testing.assert_allclose(head.apply(fitted, x), (root - mean) @ projection.T, atol=1e-5)


def test_pca_of_fewer_images_than_features(rng):
    x = rng.normal(size=(5, 12)).astype(np.float32)
    head = make_head(12, centre=True, normalize=False)
    kernel = fit_head(head, init(head, x), x, init="pca")["params"]["dense1"]["kernel"]
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(12), atol=1e-5)


def test_pca_cannot_widen(rng):
    x = rng.normal(size=(5, 12)).astype(np.float32)
    head = make_head(13)
    with pytest.raises(UserError, match=r"13 outputs of 12"):
        fit_head(head, init(head, x), x, init="pca")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": (4, 0)}, "layers"),
        ({"layers": 4, "activation": "rleu"}, "rleu"),
        ({"layers": 4, "norm": "group"}, "group"),
        ({"layers": 4, "dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_options(options, said):
    with pytest.raises(UserError, match=said):
        make_head(**options)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_normalisation_changes_the_output(rng, norm):
    x = rng.normal(size=(6, 10)).astype(np.float32)
    plain, other = make_head((8, 4)), make_head((8, 4), norm=norm)
    a = plain.apply(init(plain, x), x, train=True, mutable=["batch_stats"])[0]
    b = other.apply(init(other, x), x, train=True, mutable=["batch_stats"])[0]
    assert np.abs(a - b).max() > 1e-3


def test_masked_rows_take_no_part_in_batch_statistics(rng):
    x = rng.normal(size=(6, 10)).astype(np.float32)
    head = make_head((8, 4), norm="batch", normalize=False)
    variables = init(head, x)
    mask = np.array([1, 1, 1, 1, 0, 0], bool)
    junk = np.where(mask[:, None], x, np.float32(1e6))
    apply = jax.jit(
        lambda x: head.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    )
    (a, stats_a), (b, stats_b) = apply(x), apply(junk)
    np.testing.assert_array_equal(a[:4], b[:4])
    jax.tree.map(np.testing.assert_array_equal, stats_a, stats_b)


def test_dropout_is_on_in_training_alone(rng):
    x = rng.normal(size=(6, 10)).astype(np.float32)
    head = make_head(4, dropout=0.5)
    variables = init(head, x)
    drawn = [
        head.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    np.testing.assert_array_equal(head.apply(variables, x), head.apply(variables, x))


def test_the_root_has_a_finite_slope_at_zero():
    head = make_head((), signed_sqrt=True, normalize=False)
    grad = jax.grad(lambda x: head.apply({}, x).sum())(jnp.array([[0.0, 4.0, -4.0]]))
    np.testing.assert_allclose(grad, [[0.0, 0.25, 0.25]])
