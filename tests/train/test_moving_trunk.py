"""What a trunk that moves is trained by: its learning rates, stage by stage, and its decay."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import common
from siamese_jax.errors import UserError
from siamese_jax.storage.tree import flatten
from siamese_jax.train import optim
from siamese_jax.train.experiment import warn_of_idle_options
from siamese_jax.train.fields import EARLIER, check_config, completed
from siamese_jax.train.from_config import make_optimizer
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights import load

# From the head on: the stages of three architectures, counted by hand.
ORDERS = {
    "resnet18": ["stage4", "stage3", "stage2", "stage1", "stem"],
    "efficientnet_lite0": ["top", *(f"stage{i}" for i in range(7, 0, -1)), "stem"],
    "vit_tiny_patch16_224": ["top", *(f"block{i}" for i in range(12, 0, -1)), "stem"],
}


class Named:
    """As much of a model as the optimiser looks at."""

    def __init__(self, name, *stages):
        self.name = name
        self.parts = [(stage, "average") for stage in stages or TRUNKS[name].stages[-1:]]


@pytest.fixture(autouse=True)
def optax_promotion():
    """Optax's own Adam mixes a float with the integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def shapes_of(name):
    """The tree of a trunk's parameters, each cut to two numbers an axis: no formula sees more."""
    trunk = TRUNKS[name]
    module = trunk.build(form=trunk.forms[0])
    images = jnp.zeros((1, trunk.image_size, trunk.image_size, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2,) * leaf.ndim, leaf.dtype), params)


def drawn(shapes, rng):
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def parameters(name, rng):
    """A trunk of that name with a head and proxies, all of random numbers."""
    shape = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    return drawn(
        {
            "trunk": shapes_of(name),
            "head": {"dense1": {"kernel": shape, "bias": shape}},
            "loss": {"proxies": shape},
        },
        rng,
    )


def config_with(**options):
    config = common.base()
    config.optim.update(warmup_steps=0, weight_decay=0.0, schedule="constant", **options)
    return config


def one_update(config, params, model, freeze=()):
    """{name: update} of gradients that are the parameters' cosines."""
    tx = make_optimizer(config, params, [*freeze], model)
    mask = optim.trainable(params, freeze)
    grads = optim.select(jax.tree.map(jnp.cos, params), mask)
    return flatten(tx.update(grads, tx.init(params), params)[0])


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("algorithm", "decay"), [("sgd", 0.7), ("adamw", 0.5)])
def test_each_leaf_moves_at_the_rate_of_its_stage(name, algorithm, decay, rng):
    """-rate * scale * decay^distance * direction, of sgd the gradient, of adamw g / (|g| + e)."""
    params = parameters(name, rng)
    config = config_with(
        name=algorithm, learning_rate=0.01, trunk_lr_scale=0.3, layer_decay=decay, loss_lr_scale=5.0
    )
    updates, checked = one_update(config, params, Named(name)), set()
    for path, leaf in flatten(params).items():
        part, stage, *_ = path.split("/")
        rate = {"head": 0.01, "loss": 0.05}.get(part)
        if part == "trunk":
            rate = 0.01 * 0.3 * decay ** ORDERS[name].index(stage)
            checked.add(stage)
        g = np.cos(np.asarray(leaf, np.float64))
        direction = g if algorithm == "sgd" else g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(updates[path], -rate * direction, rtol=1e-4, err_msg=path)
    assert checked == {*ORDERS[name]}


def test_the_distance_is_from_the_last_stage_that_the_head_sees(rng):
    """Of stages 2 and 3, stage 3 has the whole rate, and so has what nobody sees behind it."""
    params = parameters("resnet18", rng)
    config = config_with(name="sgd", learning_rate=1.0, layer_decay=0.5)
    updates = one_update(config, params, Named("resnet18", "stage2", "stage3"))
    for stage, scale in {"stage4": 1, "stage3": 1, "stage2": 0.5, "stage1": 0.25}.items():
        path = f"trunk/{stage}/block1/conv1/kernel"
        leaf = params["trunk"][stage]["block1"]["conv1"]["kernel"]
        np.testing.assert_allclose(updates[path], -scale * np.cos(leaf), rtol=1e-5)


def test_the_class_token_stands_behind_the_last_norm():
    stages = TRUNKS["vit_tiny_patch16_dinov3_qkvb"].stages
    assert stages[-2:] == ("cls", "top")  # the token has no parameters of its own
    params = dict.fromkeys(["stem", *(f"block{i}" for i in range(1, 13)), "top"])
    scales = optim.stage_scales(stages, params, ["cls"], 0.5)
    assert (scales["top"], scales["block12"], scales["stem"]) == (1, 0.5, 0.5**13)


def test_frozen_stages_count_but_stay(rng):
    params = parameters("resnet18", rng)
    config = config_with(name="sgd", learning_rate=1.0, layer_decay=0.5)
    updates = one_update(config, params, Named("resnet18"), ["trunk/stage[34]"])
    assert not any("stage4" in name or "stage3" in name for name in updates)
    kernel = params["trunk"]["stage2"]["block1"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        updates["trunk/stage2/block1/conv1/kernel"], -0.25 * np.cos(kernel), rtol=1e-5
    )


def test_the_defaults_add_nothing(rng):
    """Same state, same updates, bit for bit, as without the two options."""
    params = parameters("resnet18", rng)
    rate = optim.warmup_schedule(3e-4, schedule="constant", warmup_steps=0, total_steps=9)
    plain = optim.make_optimizer(params, learning_rate=rate, lr_scale=[("loss/", 1.0)])
    ours = make_optimizer(config_with(), params, [], Named("resnet18"))
    grads = jax.tree.map(jnp.cos, params)
    results = [flatten(tx.update(grads, tx.init(params), params)) for tx in (plain, ours)]
    assert results[0].keys() == results[1].keys()
    for name, leaf in results[0].items():
        np.testing.assert_array_equal(results[1][name], leaf, err_msg=name)


# Names of the leaves that are decayed and that are not, of one trunk of each architecture.
DECAYED = {
    "resnet50": ("kernel", "bias scale"),
    "vgg16": ("kernel", "bias"),
    "efficientnet_b0": ("kernel", "bias scale"),
    "mobilenetv3_small_100": ("kernel", "bias scale"),
    "convnext_tiny": ("kernel", "bias gain scale"),
    "convnextv2_nano": ("kernel", "bias scale"),
    "vit_tiny_patch16_224": ("kernel", "bias cls positions scale"),
    "vit_small_patch14_reg4_dinov2": (
        "kernel",
        "bias cls gain1 gain2 positions registers scale",
    ),
    "vit_tiny_patch16_dinov3_qkvb": (
        "kernel",
        "bias cls gain1 gain2 q_bias registers scale v_bias",
    ),
    "vit_base_patch16_siglip_224": ("kernel", "bias latent positions scale"),
    "vit_base_patch32_unicom_224": ("kernel", "bias positions scale"),
}


def test_no_architecture_is_missing():
    modules = {type(TRUNKS[name].build(form=TRUNKS[name].forms[0])) for name in DECAYED}
    assert modules == {type(trunk.build(form=trunk.forms[0])) for trunk in TRUNKS.values()}


@pytest.mark.parametrize("name", DECAYED)
def test_decay_is_on_these_leaves_and_no_others(name):
    """By the update of a zero gradient, which is the decay's alone; `matrices` has tokens too."""
    trunk = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes_of(name))
    ones = {"trunk": trunk, "head": {}, "loss": {"proxies": jnp.ones((2, 2))}}
    found = {}
    for rule in optim.DECAY_ON:
        config = config_with(name="sgd", learning_rate=0.5, decay_on=rule)
        config.optim.weight_decay = 0.1
        tx = make_optimizer(config, ones, [], Named(name))
        updates = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)[0]
        taken = {path for path, leaf in flatten(updates).items() if np.allclose(leaf, -0.05)}
        assert all(np.all(np.asarray(leaf) == 0) for p, leaf in flatten(updates).items()
                   if p not in taken)  # fmt: skip
        found[rule] = taken
    last = {rule: {path.split("/")[-1] for path in taken} for rule, taken in found.items()}
    on, off = (set(names.split()) for names in DECAYED[name])
    assert last["kernels"] == {*on, "proxies"}
    assert last["all"] - last["kernels"] == off
    assert last["matrices"] - last["kernels"] == off & {"positions", "cls", "registers", "latent"}
    assert found["all"] == {*flatten(ones)}
    kernels = {path for path in found["all"] if path.split("/")[-1] in {*on, "proxies"}}
    assert found["kernels"] == kernels


def test_what_is_decayed_is_told():
    params = {"trunk": {"stem": dict.fromkeys(("cls", "positions"), np.ones((2, 3)))}}
    params |= {"head": {"dense1": {"kernel": np.ones((3, 3)), "bias": np.ones(3)}}}
    told = optim.decay_told(params, jax.tree.map(lambda _: True, params), "kernels")
    assert (
        told
        == "weight decay (kernels) on 1 of 4 moving leaves; left out: 1 bias, 1 cls, 1 positions"
    )
    moving = optim.trainable(params, ["trunk"])
    told = optim.decay_told(params, moving, "all")
    assert told == "weight decay (all) on 2 of 2 moving leaves; left out: 0"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optim.decay_on", "biases"),
        ("optim.trunk_lr_scale", -1.0),
        ("optim.trunk_lr_scale", float("nan")),
        ("optim.layer_decay", 0.0),
        ("optim.layer_decay", 1.1),
    ],
)
def test_bad_values_are_named(field, value):
    config = common.base()
    section, name = field.split(".")
    config[section][name] = value
    with pytest.raises(UserError, match=f"^{field}=.*: must be"):
        check_config(config)


def test_a_config_of_before_says_what_was_done_then():
    config = common.base()
    for name in EARLIER:
        section, _, last = name.partition(".")
        del config[section][last]
    made = completed(config)
    check_config(made)
    assert {name: made[name.split(".")[0]][name.split(".")[1]] for name in EARLIER} == EARLIER


def test_options_of_a_frozen_trunk_are_told_to_be_idle(caplog):
    trunk = load("resnet18", "random")
    config = common.base()
    warn_of_idle_options(config, trunk)
    assert not caplog.text
    config.optim.layer_decay = 0.5
    warn_of_idle_options(config, trunk)
    assert "no effect of ['optim.layer_decay']" in caplog.text
    caplog.clear()
    config.trunk.freeze = ("stem",)
    warn_of_idle_options(config, trunk)
    assert not caplog.text


@pytest.mark.usefixtures("small_trunk")
def test_a_run_of_before_goes_on_as_it_was(tmp_path):
    """Its config.json lacks the fields: what was done then goes on, other values are refused."""
    folder, run = tiny.make_folder(tmp_path / "shop"), tmp_path / "run"
    options = [*tiny.TINY, f"--config.data.root={folder}", f"--workdir={run}"]
    options += ["--config.train.steps=2", "--config.data.cache_dir=" + str(tmp_path / "cache")]
    done = tiny.run(tmp_path, *options, script=tiny.SMALL)
    assert done.returncode == 0, done.stderr
    told = "weight decay (kernels) on 1 of 2 moving leaves; left out: 1 bias"
    assert done.stderr.count(told) == done.stderr.count("weight decay") == 1
    config = json.loads((run / "config.json").read_text())
    for name in EARLIER:
        section, _, last = name.partition(".")
        del config[section][last]
    (run / "config.json").write_text(json.dumps(config))
    refused = tiny.run(tmp_path, *options, script=tiny.SMALL)
    assert refused.returncode == 2
    assert "optim.decay_on ('matrices' there, 'kernels' now)" in refused.stderr
    options.append("--config.optim.decay_on=matrices")
    again = tiny.run(tmp_path, *options, script=tiny.SMALL)
    assert again.returncode == 0, again.stderr
    assert "its results stand" in again.stderr
    other = tiny.run(tmp_path, *options, "--config.optim.layer_decay=0.5", script=tiny.SMALL)
    assert other.returncode == 2
    assert "optim.layer_decay (1.0 there, 0.5 now)" in other.stderr
