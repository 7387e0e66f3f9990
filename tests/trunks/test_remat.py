"""Blocks computed again in the backward pass: the same numbers, of less that is kept for them.

XLA's compiler for CPUs joins what is computed twice, so memory is what the program keeps between
its two passes, not what that compiler makes of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_trunk

from configs import common
from siamese_jax import weights
from siamese_jax.encoder import model as encoder_model
from siamese_jax.errors import UserError
from siamese_jax.storage.tree import flatten
from siamese_jax.train.experiment import with_remat
from siamese_jax.train.fields import check_config
from siamese_jax.trunks import stochastic_depth, vit
from siamese_jax.trunks.table import TRUNKS, Trunk

SIZE, IMAGES = 32, 4
PLAN = vit.Plan(patch=16, grid=2, width=32, depth=3, heads=2)
BLOCKS = dict.fromkeys(["block1", "block2", "block3"], 1)
SMALL = {
    "short_resnet": small_trunk.SHORT,
    "short_vit": Trunk(
        functools.partial(vit.ViT, PLAN), PLAN.widths, ("torch",), SIZE, "none", blocks=BLOCKS
    ),
}
NAMES = [
    "resnet18",
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "convnextv2_nano",
    "vit_tiny_patch16_224",
]


@functools.cache
def model_of(name):
    """A model that drops blocks and takes batch statistics where the trunk has any."""
    found = weights.load(name, "random", key=jax.random.key(2))
    trunk = TRUNKS[name]
    rates = stochastic_depth.drop_rates(trunk.blocks, 0.2, trunk.blocks)
    moving = tuple(trunk.blocks) if found.variables["batch_stats"] else ()
    model = encoder_model.build_model(found, head={"layers": 4}, train_stages=moving)
    fresh = encoder_model.init_head(model, (sum(model.widths),), jax.random.key(4))
    both = [
        {"trunk": found.variables[kind], "head": fresh[kind]} for kind in ("params", "batch_stats")
    ]
    return model._replace(drop_rates=rates), both


def gradient_of(model):
    """(params, stats, images, key) -> loss and new statistics, gradient; compiled for them."""

    def loss(params, stats, images, key):
        vectors, new = encoder_model.embed(model, params, stats, images, train=True, key=key)
        weights = jnp.cos(jnp.arange(vectors.size, dtype=jnp.float32)).reshape(vectors.shape)
        return jnp.sum(weights * vectors), new

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept_between_the_passes(name):
    """Bytes of the residuals of one pass with batch statistics, beside the parameters."""
    trunk = TRUNKS[name]
    images = jax.ShapeDtypeStruct((16, 128, 128, 3), jnp.float32)
    kept = []
    for remat in (False, True):
        module = trunk.build(form=trunk.forms[0]).clone(remat=remat)
        variables = jax.eval_shape(module.init, jax.random.key(0), images)
        params, stats = variables["params"], variables.get("batch_stats", {})

        def backward(params, stats, x, module=module):
            def run(params):
                given = {"params": params, "batch_stats": stats}
                options = {"train_stages": trunk.stages, "mutable": ["batch_stats"]}
                return module.apply(given, x, **options)[0][trunk.stages[-1]]

            return jax.vjp(run, params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, params, stats, images))
        kept.append(sum(leaf.size * leaf.dtype.itemsize for leaf in residuals))
        kept[-1] -= sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert kept[1] < 0.6 * kept[0], kept


@pytest.mark.parametrize(
    "name", [pytest.param("short_resnet", marks=pytest.mark.long), "short_vit"]
)
def test_the_numbers_are_the_same(name, rng, monkeypatch):
    monkeypatch.setitem(TRUNKS, name, SMALL[name])
    plain, both = model_of(name)
    again = plain._replace(trunk=with_remat(plain))
    assert repr(again.trunk) == repr(plain.trunk)  # fits and caches know a trunk by it
    images = rng.integers(0, 256, (IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    given = (*both, images, jax.random.key(7))
    found = [gradient_of(model)(*given) for model in (plain, again)]
    ((value, stats), slope), ((other, new), slope2) = found
    assert float(other) == pytest.approx(float(value), abs=1e-5)
    for one, two in ((stats, new), (slope, slope2)):
        one, two = flatten(one), flatten(two)
        assert one.keys() == two.keys()
        for leaf in one:
            size = max(1e-3, float(jnp.abs(one[leaf]).max()))
            np.testing.assert_allclose(two[leaf], one[leaf], atol=1e-5 * size, err_msg=leaf)


def test_a_trunk_without_blocks_is_told():
    model = encoder_model.build_model(weights.load("vgg16", "random"))
    with pytest.raises(UserError, match=r"trunk\.remat=True: vgg16 has no blocks"):
        with_remat(model)
    config = common.base()
    with config.ignore_type():
        config.trunk.remat = 1
    with pytest.raises(UserError, match=r"^trunk\.remat=1: must be True or False"):
        check_config(config)
