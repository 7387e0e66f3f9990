"""The statistics against NumPy, and the warning on batches that did and did not collapse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax.train.collapse import collapse_warning, embedding_statistics

N, D = 12, 5
statistics = jax.jit(embedding_statistics, compiler_options={"xla_backend_optimization_level": 0})
LABELS = (np.arange(N) // 3).astype(np.int32)
ALL = np.ones(N, bool)


def by_numpy(x, labels, mask, margin=0.2):
    x, labels = x[mask].astype(np.float64), labels[mask]
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    d = np.linalg.norm(u[:, None] - u[None], axis=2)
    active = total = 0
    for a in range(len(u)):
        for p in range(len(u)):
            for n in range(len(u)):
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                    total += 1
                    active += d[a, p] + margin > d[a, n]
    variance = np.linalg.svd(u - u.mean(0), compute_uv=False) ** 2
    return {
        "mean_distance": d[~np.eye(len(u), dtype=bool)].mean(),
        "mean_norm": np.linalg.norm(x, axis=1).mean(),
        "active_triplets": active / total,
        "first_component": variance[0] / variance.sum(),
    }


@pytest.mark.parametrize("dim", [D, 3 * N], ids=["narrow", "wide"])
def test_numpy_gives_the_same(dim, rng):
    x = (rng.normal(size=(N, dim)) * rng.uniform(1, 4, size=dim)).astype(np.float32)
    mask = ALL.copy()
    mask[[3, 7]] = False
    found = statistics(np.where(mask[:, None], x, np.nan), LABELS, mask)
    expected = by_numpy(x, LABELS, mask)
    assert set(found) == set(expected)
    assert 0 < expected["active_triplets"] < 1
    for key, value in expected.items():
        assert found[key].dtype == jnp.float32
        np.testing.assert_allclose(found[key], value, rtol=1e-4, err_msg=key)


def test_multi_hot_labels_and_bfloat16(rng):
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.bfloat16)
    hot = statistics(x, np.eye(4, dtype=bool)[LABELS], ALL)
    plain = statistics(x.astype(jnp.float32), LABELS, ALL)
    for key in plain:
        np.testing.assert_allclose(hot[key], plain[key], rtol=1e-6)


def test_no_gradient_comes_back(rng):
    x = rng.normal(size=(N, D)).astype(np.float32)
    total = jax.jit(lambda x: sum(embedding_statistics(x, LABELS).values()))
    gradient = jax.grad(total)(x)
    assert (np.asarray(gradient) == 0).all()


def test_warnings(rng):
    x = rng.normal(size=(N, D)).astype(np.float32)
    one = np.ones((N, D), np.float32)
    assert collapse_warning(statistics(x, LABELS, ALL)) is None
    for point in (one, 1e4 * one, one + np.float32(1e-3) * x, 0 * one):
        said = collapse_warning(statistics(point, LABELS, ALL))
        assert "point" in said
        assert "learning rate" in said
        assert "\n" not in said
    line = np.where(np.arange(N) % 2 == 0, 1, -1).astype(np.float32)[:, None] * one
    assert "line" in collapse_warning(statistics(line + np.float32(0.01) * x, LABELS, ALL))


def drawn_together(rng, factor):
    """Rows whose classes lie anywhere around one point, at a distance of about `factor`."""
    return (np.eye(1, D) + factor * rng.normal(size=(N, D))).astype(np.float32)


def test_embeddings_that_draw_together_are_told_before_they_are_a_point(rng):
    """Mean distance .28 and all triplets active: learning has stopped, and no point is near."""
    begun = statistics(rng.normal(size=(N, D)).astype(np.float32), LABELS, ALL)
    now = statistics(drawn_together(rng, 0.08), LABELS, ALL)
    assert 0.1 < now["mean_distance"] < 0.35
    assert now["active_triplets"] > 0.95
    assert collapse_warning(now) is None  # a fresh head may begin so
    assert collapse_warning(now, now) is None
    said = collapse_warning(now, begun)
    assert "towards each other" in said
    assert f"from {float(begun['mean_distance']):.3g} to {float(now['mean_distance']):.3g}" in said
    assert "\n" not in said


def test_classes_that_are_told_apart_may_draw_together(rng):
    begun = statistics(rng.normal(size=(N, D)).astype(np.float32), LABELS, ALL)
    apart = np.eye(4, D)[LABELS] * 0.4 + np.eye(1, D, 4) + 0.01 * rng.normal(size=(N, D))
    now = statistics(apart.astype(np.float32), LABELS, ALL)
    assert now["mean_distance"] < 0.5 * begun["mean_distance"]
    assert collapse_warning(now, begun) is None


@pytest.mark.parametrize("mask", [np.zeros(N, bool), np.arange(N) == 4], ids=["none", "one"])
def test_defined_and_silent_where_there_is_nothing_to_compare(mask, rng):
    x = rng.normal(size=(N, D)).astype(np.float32)
    found = statistics(x, LABELS, mask)
    assert found["active_triplets"] == found["first_component"] == 0
    assert np.isclose(found["mean_distance"], np.sqrt(2))
    assert np.isclose(found["mean_norm"], np.linalg.norm(x[4]) if mask.any() else 0, rtol=1e-5)
    assert collapse_warning(found) is None
