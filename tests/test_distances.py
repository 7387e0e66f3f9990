"""distances.py against float64 loops, and gradients that are finite everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax.distances import DISTANCES, aligned, pairwise
from siamese_jax.errors import UserError


def one(x, y, distance):
    """The definition, of one pair, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if distance == "dot":
        return -sum(a * b for a, b in zip(x, y, strict=True))
    if distance == "cosine":
        lengths = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
        return 1 - (x @ y) / lengths if lengths > 0 else 1.0
    squared = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return squared if distance == "sqeuclidean" else np.sqrt(squared)


@pytest.mark.parametrize("distance", DISTANCES)
def test_pairwise_and_aligned_are_the_definition(rng, distance):
    x = rng.normal(size=(7, 5)).astype(np.float32) * 3 + 1
    y = rng.normal(size=(9, 5)).astype(np.float32)
    y[4] = 0
    expected = np.array([[one(a, b, distance) for b in y] for a in x])
    np.testing.assert_allclose(pairwise(x, y, distance), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        aligned(x, y[:7], distance), np.diag(expected[:, :7]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_a_row_is_at_zero_from_its_copy(rng, distance):
    x = 100 * rng.normal(size=(6, 40)).astype(np.float32)
    np.testing.assert_array_equal(aligned(x, x.copy(), distance), 0)
    if distance == "euclidean":
        assert np.diag(pairwise(x, x, distance)).max() < 1e-3 * 100 * 40**0.5


def test_a_common_offset_does_not_cost_accuracy(rng):
    x = rng.normal(size=(8, 16)).astype(np.float32) + 1e4
    expected = np.array([[one(a, b, "euclidean") for b in x] for a in x])
    np.testing.assert_allclose(pairwise(x, x), expected, atol=5e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_finite_for_equal_zero_tiny_and_huge_rows(distance):
    x = np.array([[0, 0], [1, 2], [1, 2], [1e-30, 0], [1e15, -1e15]], np.float32)

    def total(x, y):
        return jnp.sum(pairwise(x, y, distance)) + jnp.sum(aligned(x, y, distance))

    for gradient in jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(x)):
        assert np.isfinite(gradient).all()
    alone = jax.grad(lambda x: jnp.sum(pairwise(x, x, distance)))(jnp.asarray(x))
    assert np.isfinite(alone).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_those_of_finite_differences(rng, distance):
    x, y = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
    weights = rng.normal(size=(3, 5)).astype(np.float32)
    gradient = jax.grad(lambda x: jnp.sum(weights * pairwise(x, y, distance)))(
        jnp.asarray(x, jnp.float32)
    )
    for i, j in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i, j] = 1e-6
        both = [
            sum(weights[a, b] * one(z[a], y[b], distance) for a, b in np.ndindex(3, 5))
            for z in (x + step, x - step)
        ]
        np.testing.assert_allclose(gradient[i, j], (both[0] - both[1]) / 2e-6, atol=1e-3)


def test_other_dtypes_are_taken_as_float32():
    x = jnp.asarray([[1, 2]], jnp.bfloat16)
    for y in (np.array([[4, 6]]), jnp.asarray([[4, 6]], jnp.float16), [[4, 6]]):
        found = pairwise(x, y)
        assert found.dtype == jnp.float32
        assert found.tolist() == [[5.0]]


def test_mistakes_are_named():
    x = np.zeros((2, 3))
    with pytest.raises(UserError, match="'manhattan' is unknown: use one of euclidean"):
        pairwise(x, x, "manhattan")
    with pytest.raises(UserError, match=r"\(2, 3\) and \(2, 4\)"):
        pairwise(x, np.zeros((2, 4)))
    with pytest.raises(UserError, match="equal shapes"):
        aligned(x, np.zeros((3, 3)))
