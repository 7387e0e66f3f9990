"""Freezing by path, clipping, decay, scales and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from siamese_jax.errors import UserError
from siamese_jax.train import optim


@pytest.fixture
def optax_promotion():
    """Optax's own Adam and Lion mix a float with the integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def params():
    return {
        "trunk": {"stage1": {"kernel": jnp.ones((2, 2))}, "stage2": {"kernel": jnp.ones((2, 2))}},
        "head": {"dense1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "loss": {"proxies": jnp.ones((4, 3))},
    }


def test_patterns_match_from_the_start(params):
    mask = optim.trainable(params, ["trunk/stage1"])
    assert jax.tree.leaves(mask["trunk"]) == [False, True]
    assert all(jax.tree.leaves(mask["head"]))


@pytest.mark.parametrize("pattern", ["trunk/stage3", "stage1", "kernel"])
def test_a_pattern_that_matches_nothing_is_an_error(params, pattern):
    with pytest.raises(UserError, match=r"matches no parameter.*head/dense1"):
        optim.trainable(params, [pattern])


def test_a_malformed_pattern(params):
    with pytest.raises(UserError, match="malformed"):
        optim.trainable(params, ["trunk/("])


def test_select_and_merge_are_inverse(params):
    mask = optim.trainable(params, ["trunk"])
    selected = optim.select(params, mask)
    assert len(jax.tree.leaves(selected)) == 3
    merged = optim.merge(selected, params, mask)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_frozen_leaves_have_no_state_and_no_part_in_the_norm(params):
    tx = optim.make_optimizer(
        params, name="sgd", learning_rate=1.0, clip_norm=1.0, freeze=["trunk", "loss"]
    )
    state = tx.init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 9
    mask = optim.trainable(params, ["trunk", "loss"])
    grads = optim.select(jax.tree.map(lambda leaf: 2 * jnp.ones_like(leaf), params), mask)
    updates, _ = tx.update(grads, state, params)
    # Nine entries of 2 have the norm 6, and are clipped to 1.
    np.testing.assert_allclose(updates["head"]["dense1"]["bias"], -2 / 6, rtol=1e-6)


def test_decay_is_on_matrices_alone(params):
    tx = optim.make_optimizer(params, name="sgd", learning_rate=0.5, weight_decay=0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["dense1"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["head"]["dense1"]["bias"], 0)


@pytest.mark.usefixtures("optax_promotion")
def test_adamw_is_optax_adamw(params):
    tx = optim.make_optimizer(params, learning_rate=1e-2, weight_decay=0.0)
    other = optax.adamw(1e-2, weight_decay=0.0)
    grads = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(float(leaf.size))).reshape(leaf.shape), params
    )
    ours, theirs = (t.update(grads, t.init(params), params)[0] for t in (tx, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_scale_of_a_group(params):
    tx = optim.make_optimizer(
        params, name="sgd", learning_rate=1.0, lr_scale=[("loss/", 100.0)], freeze=["trunk"]
    )
    mask = optim.trainable(params, ["trunk"])
    grads = optim.select(jax.tree.map(jnp.ones_like, params), mask)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["loss"]["proxies"], -100)
    np.testing.assert_allclose(updates["head"]["dense1"]["bias"], -1)


@pytest.mark.usefixtures("optax_promotion")
def test_every_optimiser_goes_downhill(params):
    def loss(p):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))

    for name in optim.OPTIMIZERS:
        tx = optim.make_optimizer(params, name=name, learning_rate=1e-2)
        p, state = params, tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            p = optax.apply_updates(p, updates)
        assert loss(p) < loss(params), name


def test_schedules():
    made = {
        name: optim.warmup_schedule(1.0, schedule=name, warmup_steps=4, total_steps=12)
        for name in ("constant", "cosine", "linear")
    }
    for schedule in made.values():
        ramp = [float(schedule(i)) for i in range(5)]
        np.testing.assert_allclose(ramp, [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert float(made["constant"](12)) == 1
    assert float(made["linear"](8)) == pytest.approx(0.5)
    assert float(made["cosine"](8)) == pytest.approx(0.5)
    assert float(made["cosine"](12)) == pytest.approx(0, abs=1e-7)
    with pytest.raises(UserError, match=r"optim\.schedule"):
        optim.warmup_schedule(1.0, schedule="step", warmup_steps=0, total_steps=2)


def test_unknown_optimiser(params):
    with pytest.raises(UserError, match=r"optim.name='adma'"):
        optim.make_optimizer(params, name="adma", learning_rate=1.0)
