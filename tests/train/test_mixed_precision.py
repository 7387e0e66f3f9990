"""trunk.dtype=bfloat16 in training: what stays float32, and that the trunk does not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import small_trunk

from siamese_jax import weights
from siamese_jax.encoder import model as encoder_model
from siamese_jax.losses import LOSSES
from siamese_jax.storage.tree import flatten
from siamese_jax.train import optim
from siamese_jax.train.step import init_state, make_train_step, with_average


def stepped(dtype, images):
    """The state after two steps of a whole trunk with all that a step may keep, and its numbers."""
    with small_trunk.installed(), jax.numpy_dtype_promotion("standard"):
        trunk = weights.load("resnet18", "random", key=jax.random.key(1))
        model = encoder_model.build_model(
            trunk, head={"layers": 8}, dtype=dtype, train_stages=("stage4",)
        )
        assert {
            leaf.dtype for leaf in jax.tree.leaves(model.trunk.apply(trunk.variables, images * 1.0))
        } == {jnp.dtype(dtype)}
        fresh = encoder_model.init_head(model, (small_trunk.WIDTH,), jax.random.key(4))
        loss = LOSSES["proxy_anchor"]()
        params = {
            "trunk": trunk.variables["params"],
            "head": fresh["params"],
            "loss": loss.init(jax.random.key(5), 8, 4),
        }
        stats = {"trunk": trunk.variables["batch_stats"], "head": fresh["batch_stats"]}
        params, stats = jax.tree.map(jnp.array, (params, stats))
        tx = optim.make_optimizer(params, learning_rate=1e-3)
        mask = optim.trainable(params, [])
        state = with_average(init_state(params, stats, tx, jax.random.key(6)), mask)
        step = make_train_step(
            apply_fn=functools.partial(encoder_model.embed, model),
            loss=loss, tx=tx, trainable=mask, ema=0.9,
        )  # fmt: skip
        batch = {
            "image": images,
            "label": np.arange(8, dtype=np.int32) // 2,
            "mask": np.ones(8, bool),
        }
        for _ in range(2):
            state, metrics = step(state, batch)
        return flatten(state), metrics


def test_all_that_is_kept_and_the_loss_are_float32(rng):
    """Parameters, statistics, the optimiser's moments, averages, embeddings, loss; equal to 2 %."""
    images = rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    (state, metrics), (plain, known) = (stepped(d, images) for d in ("bfloat16", "float32"))
    floats = {name: x.dtype for name, x in state.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    assert set(floats.values()) == {jnp.dtype("float32")}
    parts = {name.split("/")[0] for name in floats}
    assert parts == {"params", "batch_stats", "opt_state", "ema"}
    assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}
    assert state.keys() == plain.keys()
    one, other = float(metrics["loss"]), float(known["loss"])
    assert one != other  # it is another arithmetic, and so the option does something
    np.testing.assert_allclose(one, other, rtol=0.02)
