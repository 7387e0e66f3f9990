"""The average of the weights (optim.ema): its formula, and that it is what a run measures."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from configs import common
from siamese_jax.data.preprocess import read_image
from siamese_jax.encoder.load import load_encoder
from siamese_jax.errors import UserError
from siamese_jax.losses import LOSSES
from siamese_jax.storage import checkpoint
from siamese_jax.storage.tree import flatten
from siamese_jax.tools.images import own_records
from siamese_jax.train import optim
from siamese_jax.train.fields import check_config
from siamese_jax.train.step import (
    averaged,
    init_state,
    make_train_step,
    update_average,
    with_average,
)
from siamese_jax.weights import load

run = partial(tiny.run, script=tiny.SMALL)


@pytest.fixture
def optax_promotion():
    """Optax's own Adam mixes a float with the integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def weighted(values, decay):
    """sum over s of decay^(t - s) x_s, over the sum of these weights, in float64."""
    weights = decay ** np.arange(len(values))[::-1].astype(np.float64)
    return sum(w * np.asarray(x, np.float64) for w, x in zip(weights, values, strict=True)) / (
        weights.sum()
    )


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_of_each_step_is_the_weighted_sum(decay, rng):
    """A sum by hand, and Optax's debiased average; the start has no weight in it."""
    values = rng.normal(size=(40, 3, 2)).astype(np.float32)
    theirs = optax.ema(decay)
    state, mean = theirs.init(jnp.zeros((3, 2))), jnp.full((3, 2), 5.0)
    for t, value in enumerate(values, 1):
        mean = update_average(mean, jnp.asarray(value), decay, jnp.int32(t))
        np.testing.assert_allclose(mean, weighted(values[:t], decay), atol=2e-6)
        with jax.numpy_dtype_promotion("standard"):
            expected, state = theirs.update(jnp.asarray(value), state)
        np.testing.assert_allclose(mean, expected, atol=2e-5)


def test_what_never_changes_stays_bit_for_bit(rng):
    still = jnp.asarray(rng.normal(size=1000), jnp.float32)
    mean = still
    for t in range(1, 50):
        mean = update_average(mean, still, 0.99, jnp.int32(t))
    np.testing.assert_array_equal(mean, still)


def apply_linear(params, batch_stats, x, *, train, mask, key):
    """A frozen and a moving layer; the statistics count the steps."""
    stats = {"trunk": {"seen": batch_stats["trunk"]["seen"] + 1}, "head": {}}
    return x @ params["trunk"]["stage1"] @ params["head"]["kernel"], stats


def steps(ema, rng, count=6):
    """The states after each step, on NumPy's side."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"trunk": {"stage1": draw(5, 4)}, "head": {"kernel": draw(4, 3)}, "loss": {}}
    stats = {"trunk": {"seen": jnp.zeros(2)}, "head": {}}
    tx = optim.make_optimizer(params, learning_rate=0.05, freeze=["trunk"])
    mask = optim.trainable(params, ["trunk"])
    state = init_state(params, stats, tx, jax.random.key(0))
    if ema:
        state = with_average(state, mask)
    loss = LOSSES["triplet"](mining="all", margin=0.5)
    step = make_train_step(apply_fn=apply_linear, loss=loss, tx=tx, trainable=mask, ema=ema)
    labels = jnp.arange(8, dtype=jnp.int32) // 2
    found = []
    for _ in range(count):
        batch = {"feature": draw(8, 5), "label": labels, "mask": jnp.ones(8, bool)}
        state, _ = step(state, batch)
        found.append(jax.device_get((state.params, state.batch_stats, averaged(state), state.ema)))
    return found


@pytest.mark.usefixtures("optax_promotion")
def test_a_step_keeps_the_average_and_is_no_other_step_for_it():
    plain, kept = (steps(ema, np.random.default_rng(1)) for ema in (0.0, 0.8))
    for (one, stats, mean, none), (other, _, _, _) in zip(plain, kept, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
        jax.tree.map(np.testing.assert_array_equal, (one, stats), (mean.params, mean.batch_stats))
        assert none == ()
    for t in range(1, len(kept) + 1):
        params, _, mean, ema = kept[t - 1]
        kernels = [found[0]["head"]["kernel"] for found in kept[:t]]
        expected = weighted(kernels, 0.8)
        np.testing.assert_allclose(mean.params["head"]["kernel"], expected, atol=1e-6)
        np.testing.assert_array_equal(mean.params["trunk"]["stage1"], params["trunk"]["stage1"])
        seen = weighted([found[1]["trunk"]["seen"] for found in kept[:t]], 0.8)
        np.testing.assert_allclose(mean.batch_stats["trunk"]["seen"], seen, rtol=1e-6)
        assert not any("stage1" in name for name in flatten(ema))  # nothing of what is frozen
    assert np.abs(kept[-1][0]["head"]["kernel"] - expected).max() > 1e-3


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_bad_decays_are_named(value):
    config = common.base()
    config.optim.ema = value
    with pytest.raises(UserError, match=r"^optim\.ema=.*: must be"):
        check_config(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole run of 12 steps of a moving last stage, and its command line."""
    place = tmp_path_factory.mktemp("average")
    folder = tiny.make_folder(place / "shop", classes=12, noise=160)
    options = [
        *tiny.TINY,
        f"--config.data.root={folder}",
        f"--config.data.cache_dir={place / 'cache'}",
        "--config.trunk.freeze=('stem','stage[123]')",
        "--config.trunk.batch_norm=train",
        "--config.optim.ema=0.9",
        "--config.optim.learning_rate=0.05",
        "--config.train.eval_every=4",
        "--config.train.max_to_keep=4",
    ]
    done = run(place, *options, f"--workdir={place / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "is the average of the weights (optim.ema=0.9)" in done.stderr
    return place, options


@pytest.mark.usefixtures("small_trunk")
def test_a_run_measures_and_saves_the_average(trained):
    """The encoder that tools load has the averages, and the scores in the log are its own."""
    place, _ = trained
    results = json.loads((place / "run" / "results.json").read_text())
    step, leaves = checkpoint.load_newest(place / "run" / "checkpoints", results["checkpoint_step"])
    assert step == 12
    encoder = load_encoder(place / "run")
    loaded = load("resnet18", str(place / "run")).variables  # the encoder's own is folded
    mine = {"head": encoder.params["head"], "trunk": loaded["params"]}
    for name in ("head/dense1/kernel", "trunk/stage4/kernel"):
        mean, raw = leaves[f"ema/params/{name}"], leaves[f"params/{name}"]
        np.testing.assert_array_equal(flatten(mine)[name], mean, err_msg=name)
        assert np.abs(mean - raw).max() > 1e-4, name
    assert "ema/params/trunk/stage1/kernel" not in leaves
    part = own_records([str(place / "run")])[1].where("test")
    vectors = encoder(np.stack([read_image(path, (32, 32)) for path in part.path]))
    apart = np.square(vectors[:, None] - vectors[None]).sum(-1) + np.diag([np.inf] * len(part))
    found = (part.label[apart.argmin(axis=1)] == part.label).mean()
    assert found == pytest.approx(results["test"]["after"]["recall@1"], abs=1e-6)


@pytest.mark.usefixtures("small_trunk")
def test_a_run_cut_off_goes_on_with_its_average_bit_for_bit(trained):
    place, options = trained
    whole, cut = place / "run", place / "cut"
    shutil.copytree(whole, cut)
    (cut / "results.json").unlink()
    for step in (12, 8):
        shutil.rmtree(cut / "checkpoints" / str(step))
    done = run(place, *options, f"--workdir={cut}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stderr
    found, expected = (checkpoint.load_newest(w / "checkpoints", 12)[1] for w in (cut, whole))
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    results = [json.loads((w / "results.json").read_text()) for w in (cut, whole)]
    assert results[0]["test"] == results[1]["test"]
