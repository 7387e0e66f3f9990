"""Stochastic depth: its rates, what is drawn, and that a factor is one on what a block adds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from siamese_jax import weights
from siamese_jax.encoder import model as encoder_model
from siamese_jax.errors import UserError
from siamese_jax.storage.tree import path_name
from siamese_jax.train.experiment import drop_rates
from siamese_jax.train.fields import check_config
from siamese_jax.trunks import stochastic_depth
from siamese_jax.trunks.table import TRUNKS

SIZE = 32
# timm's torch.linspace(0, rate, number of blocks), as these have them.
BLOCKS = {"resnet50": 16, "efficientnet_b0": 16, "vit_small_patch16_224": 12, "convnext_tiny": 18}
# The stage to be tried, which of its blocks add to their input, and what ends each branch.
ENDS = {
    "resnet18": ("stage3", (0, 1), [("conv2/norm/scale", "conv2/norm/bias")]),
    "efficientnet_lite0": ("stage3", (1,), [("project/norm/scale", "project/norm/bias")]),
    "mobilenetv3_small_050": ("stage3", (1, 2), [("project/norm/scale", "project/norm/bias")]),
    "convnext_tiny": ("stage3", tuple(range(9)), [("gain",)]),
    "convnextv2_nano": ("stage2", (0, 1), [("fc2/kernel", "fc2/bias")]),
    "vit_tiny_patch16_224": (
        "block7",
        (0,),
        [("proj/kernel", "proj/bias"), ("fc2/kernel", "fc2/bias")],
    ),
}


@functools.cache
def made(name):
    """A trunk whose norms and gains differ from channel to channel, and its module."""
    found = weights.load(name, "random", key=jax.random.key(2))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.normal(0, 0.02, leaf.shape), leaf.dtype),
        found.variables,
    )
    return variables, TRUNKS[name].build(form=found.form)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_rates_are_a_line_over_all_blocks(name):
    blocks = TRUNKS[name].blocks
    rates = stochastic_depth.drop_rates(blocks, 0.3, blocks)
    every = [0.0] * (BLOCKS[name] - sum(len(r) for _, r in rates)) + [
        p for _, r in rates for p in r
    ]
    np.testing.assert_allclose(every, np.linspace(0, 0.3, BLOCKS[name]), atol=1e-12)
    assert stochastic_depth.drop_rates(blocks, 0.0, blocks) == ()


@pytest.mark.parametrize("name", [n for n, trunk in TRUNKS.items() if trunk.blocks][::20])
def test_the_table_counts_the_blocks_that_there_are(name):
    trunk = TRUNKS[name]
    module = trunk.build(form=trunk.forms[0])
    images = jnp.zeros((1, trunk.image_size, trunk.image_size, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    counted = {
        stage: 1 if stage.startswith("block") else sum(n.startswith("block") for n in leaves)
        for stage, leaves in params.items()
    }
    assert {stage: n for stage, n in counted.items() if n} == dict(trunk.blocks)


def test_what_is_drawn_is_independent_and_of_mean_one():
    images, rates = 40_000, (("a", (0.1, 0.5)), ("b", (0.7,)))
    found = stochastic_depth.draw(jax.random.key(1), rates, images)
    assert {name: f.shape for name, f in found.items()} == {
        "a": (2, 2, images),
        "b": (1, 2, images),
    }
    rows = np.concatenate([np.asarray(found[name]).reshape(-1, images) for name in "ab"])
    p = np.repeat([0.1, 0.5, 0.7], 2)
    for row, rate in zip(rows, p, strict=True):
        np.testing.assert_allclose(np.unique(row), [0, 1 / (1 - rate)], rtol=1e-6)
        spread = np.sqrt(rate / (1 - rate) / images)  # of the mean of images factors
        assert abs(row.mean() - 1) < 4 * spread
    # Neither blocks, branches nor neighbouring images agree more than by chance.
    shifted = np.concatenate([rows, np.roll(rows, 1, axis=1)])
    apart = np.corrcoef(shifted) - np.eye(len(shifted))
    assert np.abs(apart).max() < 4.5 / np.sqrt(images)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.long)
        if n in ("convnext_tiny", "efficientnet_lite0")
        else n
        for n in ENDS
    ],
)
def test_a_factor_is_one_on_what_a_block_adds_for_that_image_alone(name):
    """Three images with factors of their own, against each alone on scaled parameters."""
    stage, adding, ends = ENDS[name]
    (variables, module), rng = made(name), np.random.default_rng(5)
    factors = rng.choice([0.0, 1.0, 2.5], (TRUNKS[name].blocks[stage], 2, 3)).astype(np.float32)
    factors[:, :, 0] = 1
    images = jnp.asarray(rng.normal(size=(3, SIZE, SIZE, 3)), jnp.float32)
    run = jax.jit(lambda v, x, **more: module.apply(v, x, **more)[stage])
    found = run(variables, images, drops={stage: jnp.asarray(factors)})
    plain = run(variables, images)

    def scaled(image):
        def scale(path, leaf):
            place = path_name(path)
            for i in adding:
                inside = stage if stage.startswith("block") else f"{stage}/block{i + 1}"
                for branch, names in enumerate(ends):
                    if any(place == f"params/{inside}/{end}" for end in names):
                        return leaf * factors[i, branch, image]
            return leaf

        return jax.tree_util.tree_map_with_path(scale, variables)

    for image in range(3):
        expected = run(scaled(image), images)[image]
        size = np.abs(np.asarray(expected)).max()
        np.testing.assert_allclose(found[image], expected, atol=2e-5 * size, rtol=1e-4)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-4, atol=2e-5 * np.abs(plain).max())
    assert np.abs(np.asarray(found - plain))[1:].max() > 1e-3 * np.abs(plain).max()


def model_of(rates):
    found = weights.load("resnet18", "random", key=jax.random.key(2))
    model = encoder_model.build_model(found, head={"layers": 4, "dropout": 0.5})
    fresh = encoder_model.init_head(model, (512,), jax.random.key(4))
    both = [
        {"trunk": found.variables[kind], "head": fresh[kind]} for kind in ("params", "batch_stats")
    ]
    return model._replace(drop_rates=rates), both


def test_it_is_of_training_and_of_the_key_alone(rng):
    images = rng.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    rates = stochastic_depth.drop_rates(TRUNKS["resnet18"].blocks, 0.6, ["stage2", "stage3"])
    (model, both), (plain, _) = model_of(rates), model_of(())

    def run(model, key, train=True):
        embed = functools.partial(encoder_model.embed, model, train=train)
        return np.asarray(jax.jit(lambda p, s, x, k: embed(p, s, x, key=k)[0])(*both, images, key))

    one, other = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(run(model, one), run(model, one))
    assert np.abs(run(model, one) - run(model, other)).max() > 1e-3
    np.testing.assert_array_equal(run(model, one, train=False), run(plain, other, train=False))
    with pytest.raises(AssertionError, match="needs a key"):
        encoder_model.embed(model, *both, images, train=True)


def test_a_run_drops_where_anything_moves():
    trunk, config = weights.load("resnet18", "random"), common.base()
    assert drop_rates(config, trunk) == ()
    config.trunk.update(drop_path=0.7, freeze=("stem", "stage1", "stage[234]/block1"))
    # Eight blocks: 0, .1, ..., .7; the first of each stage is frozen, the stages are not.
    found = drop_rates(config, trunk)
    assert [stage for stage, _ in found] == ["stage2", "stage3", "stage4"]
    np.testing.assert_allclose([each for _, each in found], [[0.2, 0.3], [0.4, 0.5], [0.6, 0.7]])
    config.trunk.freeze = (".*",)
    assert drop_rates(config, trunk) == ()
    with pytest.raises(UserError, match=r"trunk\.drop_path=0\.7: vgg16 has no blocks"):
        drop_rates(config, weights.load("vgg16", "random"))


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_bad_rates_are_named(value):
    config = common.base()
    config.trunk.drop_path = value
    with pytest.raises(UserError, match=r"^trunk\.drop_path=.*: must be"):
        check_config(config)
