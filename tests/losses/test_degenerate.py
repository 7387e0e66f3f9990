"""Batches that break losses elsewhere: duplicates, zeros, one class, nothing at all, huge, bf16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from siamese_jax import losses
from siamese_jax.losses import LOSSES

N, D, CLASSES = 12, 6, 12
RNG = np.random.default_rng(1)
NORMAL = RNG.normal(size=(N, D)).astype(np.float32)
PAIRED = (np.arange(N) // 2).astype(np.int32)
ALL = np.ones(N, bool)
ONE = np.arange(N) < 1

BATCHES = {
    "duplicates": (np.repeat(NORMAL[:2], N // 2, axis=0), PAIRED, ALL),
    "all_equal": (np.ones((N, D), np.float32), PAIRED, ALL),
    "zeros": (np.zeros((N, D), np.float32), PAIRED, ALL),
    "some_zeros": (NORMAL * (np.arange(N) % 3 > 0)[:, None], PAIRED, ALL),
    "opposite": (NORMAL[:1] * (-1.0) ** np.arange(N)[:, None].astype(np.float32), PAIRED, ALL),
    "one_class": (NORMAL, np.zeros(N, np.int32), ALL),
    "all_distinct": (NORMAL, np.arange(N, dtype=np.int32), ALL),
    "one_row": (NORMAL, PAIRED, ONE),
    "all_masked": (NORMAL, PAIRED, ~ALL),
    "huge": (NORMAL * np.float32(1e4), PAIRED, ALL),
    "tiny": (NORMAL * np.float32(1e-18), PAIRED, ALL),
}
VARIANTS = [(name, {}) for name in LOSSES] + [
    ("triplet", {"distance": "sqeuclidean", "normalize": False, "soft": True, "swap": True}),
    ("triplet", {"mining": "hard", "normalize": False}),
    ("triplet", {"mining": "semi_hard", "distance": "dot", "normalize": False}),
    ("triplet", {"mining": "explicit", "distance": "cosine"}),
    ("contrastive", {"pairs": "explicit", "normalize": False}),
    ("margin", {"beta_by": "class"}),
    ("nt_xent", {"distance": "dot"}),
    ("proxy_nca", {"own_in_denominator": False}),
    ("recall_at_k", {"mixup": 1}),
    ("hyperbolic", {"curvature": 1e-3, "clip_radius": 1e9}),
]
IDS = [f"{name}-{'-'.join(map(str, o.values()))}" for name, o in VARIANTS]

# What the docstrings promise where there is nothing to compare.
NO_NEGATIVES = {"triplet", "n_pairs", "nt_xent", "circle", "lifted_structure"}
NO_NEGATIVES |= {"fast_ap", "smooth_ap", "hyperbolic"}
NO_POSITIVES = NO_NEGATIVES | {"sup_con", "roadmap", "recall_at_k"}
PAIRS = NO_POSITIVES | {"contrastive", "margin", "multi_similarity", "pairwise_sigmoid"}


def promised_zero(name, options, batch):
    if options.get("mining") == "explicit" or options.get("pairs") == "explicit":
        return batch in ("all_masked", "one_row")
    if batch == "all_masked":
        return True
    if batch == "one_row":
        return name in PAIRS
    if batch == "all_distinct":
        return name in NO_POSITIVES
    return batch == "one_class" and name in NO_NEGATIVES


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_defined_values_and_finite_gradients(name, options):
    loss = LOSSES[name](**options)
    params = loss.init(jax.random.key(0), D, CLASSES)
    traces = []

    def mean(params, x, labels, mask):
        traces.append(name)
        return losses.mean(loss, params, x, labels, mask)

    step = quick.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    for batch, (x, labels, mask) in BATCHES.items():
        value, gradients = step(params, x.astype(np.float32), labels, mask)
        assert np.isfinite(value), batch
        for leaf in jax.tree.leaves(gradients):
            assert np.isfinite(leaf).all(), batch
        if promised_zero(name, options, batch):
            assert abs(value) < 1e-6, batch
            assert np.abs(gradients[1]).max() < 1e-6, batch
        if batch == "all_masked":
            assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradients))
    # Each batch was of one shape, so none of this is a second compilation.
    assert traces == [name]

    if options:
        return
    # A bfloat16 embedding is only a rounded float32 one: all sums are float32.
    rounded = jnp.asarray(NORMAL, jnp.bfloat16)
    value, (_, gradient) = step(params, rounded, PAIRED, ALL)
    exact, (_, full) = step(params, rounded.astype(jnp.float32), PAIRED, ALL)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), full, rtol=1e-2, atol=1e-3 * float(jnp.max(jnp.abs(full)))
    )


def test_a_batch_of_one_row():
    chosen = {name: factory() for name, factory in LOSSES.items() if name != "n_pairs"}
    params = {name: loss.init(jax.random.key(0), D, CLASSES) for name, loss in chosen.items()}

    @quick.jit
    def values(x, labels):
        return {
            name: jax.value_and_grad(
                lambda x, n=name: losses.mean(chosen[n], params[n], x, labels)
            )(x)
            for name in chosen
        }

    for name, (value, gradient) in values(NORMAL[:1], PAIRED[:1]).items():
        assert np.isfinite(value), name
        assert np.isfinite(gradient).all(), name
        if name in PAIRS:
            assert value == 0, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[("triplet", {}), ("triplet", {"soft": True, "swap": True}), ("smooth_ap", {})],
        *[("recall_at_k", {}), ("hyperbolic", {})],
    ],
)
def test_a_batch_of_512_is_not_cubed(name, options):
    """n^3 floats would be 537 MB; a few n^2 are enough, gradient included."""
    loss = LOSSES[name](**options)
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)

    def value(x, labels):
        return losses.mean(loss, {}, x, labels)

    compiled = jax.jit(jax.value_and_grad(value)).lower(x, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 512 * 512 * 4
