"""The encoder and the train step: what is frozen, what it costs, what comes out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.data.preprocess import read_image
from siamese_jax.encoder import encoder as encoders
from siamese_jax.encoder import model as encoder_model
from siamese_jax.encoder.embedding import embed_folder
from siamese_jax.errors import UserError
from siamese_jax.losses import LOSSES, memory
from siamese_jax.losses.miners import MINERS
from siamese_jax.storage import tree as storage_tree
from siamese_jax.train import optim
from siamese_jax.train.step import init_state, make_train_step

SIZE = 32
pytestmark = pytest.mark.usefixtures("short_trunk")


@pytest.fixture(autouse=True)
def optax_promotion():
    """Optax's own Adam mixes a float with the integer count."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def trunk(short_trunk):
    """A ResNet18 whose statistics and gains are far from those that change nothing."""
    found = weights.load("resnet18", "random", key=jax.random.key(1))
    rng = np.random.default_rng(2)

    def disturb(path, leaf):
        name = storage_tree.path_name(path)
        if name.endswith(("norm/scale", "norm/var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        if name.endswith(("norm/bias", "norm/mean")):
            return jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
        return leaf

    found.variables.update(jax.tree_util.tree_map_with_path(disturb, found.variables))
    return found


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)


def parts(trunk, *, freeze, loss, train_stages=(), pool="average", dtype="float32", **head):
    """model, loss, optimiser, mask and state, of a head of 8 on the trunk."""
    with jax.numpy_dtype_promotion("standard"):
        model = encoder_model.build_model(
            trunk,
            pool=pool,
            head={"layers": 8, **head},
            dtype=dtype,
            train_stages=train_stages,
        )
        shape = encoder_model.feature_shape(model, trunk.variables, SIZE)
        fresh = encoder_model.init_head(model, shape, jax.random.key(4))
        params = {
            "trunk": trunk.variables["params"],
            "head": fresh["params"],
            "loss": loss.init(jax.random.key(5), 8, 4),
        }
        stats = {"trunk": trunk.variables["batch_stats"], "head": fresh["batch_stats"]}
        params, stats = jax.tree.map(jnp.array, (params, stats))
        tx = optim.make_optimizer(params, learning_rate=1e-2, weight_decay=0.1, freeze=freeze)
        mask = optim.trainable(params, freeze)
        return model, tx, mask, init_state(params, stats, tx, jax.random.key(6))


def batch_of(images):
    labels = np.repeat(np.arange(4, dtype=np.int32), 3)
    return {"image": images, "label": labels, "mask": np.ones(12, bool)}


def stepper(model, tx, mask, loss, miner=None):
    return make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=loss,
        tx=tx,
        miner=miner,
        trainable=mask,
    )


def test_a_frozen_trunk_is_untouched_after_20_steps(trunk, images):
    loss = LOSSES["triplet"](margin=0.2, mining="hard")
    model, tx, mask, state = parts(trunk, freeze=["trunk/"], loss=loss, dropout=0.2)
    before = jax.device_get((state.params, state.batch_stats))
    names = {
        storage_tree.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    assert not any("trunk" in name for name in names)
    assert any("head" in name for name in names)
    step = stepper(model, tx, mask, loss)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of(images))
        losses.append(float(metrics["loss"]))
    after = jax.device_get((state.params, state.batch_stats))
    for part in (0, 1):
        jax.tree.map(np.testing.assert_array_equal, before[part]["trunk"], after[part]["trunk"])
    kernel = [tree[0]["head"]["dense1"]["kernel"] for tree in (before, after)]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3
    assert losses[-1] < losses[0]
    assert int(state.step) == 20


def flops(compiled):
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_a_frozen_trunk_costs_its_forward_pass(trunk, images):
    """No backward pass is built: XLA counts under 1.15 of the forward's FLOPs, not 3."""
    loss = LOSSES["triplet"](margin=0.2, mining="all")
    cost = {}
    for name, freeze in (("frozen", ["trunk/"]), ("stage4", ["trunk/(stem|stage[123])"])):
        model, tx, mask, state = parts(trunk, freeze=freeze, loss=loss)
        step = stepper(model, tx, mask, loss)
        cost[name] = flops(step.lower(state, batch_of(images)).compile())
    forward = jax.jit(lambda p, s, x: encoder_model.embed(model, p, s, x)[0])
    cost["forward"] = flops(forward.lower(state.params, state.batch_stats, images).compile())
    assert 1 <= cost["frozen"] / cost["forward"] < 1.15
    assert 1.15 < cost["stage4"] / cost["forward"] < 2.5


def test_partial_unfreezing_moves_that_stage_alone(trunk, images):
    loss = LOSSES["contrastive"]()
    freeze = ["trunk/(stem|stage[123])"]
    model, tx, mask, state = parts(trunk, freeze=freeze, loss=loss, train_stages=("stage4",))
    before = jax.device_get((state.params["trunk"], state.batch_stats["trunk"]))
    step = stepper(model, tx, mask, loss)
    for _ in range(2):
        state, _ = step(state, batch_of(images))
    after = jax.device_get((state.params["trunk"], state.batch_stats["trunk"]))
    for part in (0, 1):
        for stage in before[part]:
            same = jax.tree.map(np.array_equal, before[part][stage], after[part][stage])
            assert all(jax.tree.leaves(same)) == (stage != "stage4"), stage


def test_masked_rows_change_nothing(trunk, images):
    loss = LOSSES["triplet"](margin=0.2, mining="all")
    model, tx, mask, state = parts(trunk, freeze=["trunk/"], loss=loss, norm="batch")
    step = stepper(model, tx, mask, loss)
    batch = batch_of(images) | {"mask": np.arange(12) < 9}
    noise = np.where(batch["mask"][:, None, None, None], images, 255 - images)
    kept = jax.tree.map(jnp.array, state)
    (a, ma), (b, mb) = step(state, batch), step(kept, batch | {"image": noise})
    assert float(ma["loss"]) == float(mb["loss"])
    jax.tree.map(np.testing.assert_array_equal, a.params["head"], b.params["head"])


def test_miner_and_memory_are_used(trunk, images):
    loss = LOSSES["triplet"](margin=0.2)
    model, tx, mask, state = parts(trunk, freeze=["trunk/"], loss=loss)
    state = state.replace(memory=memory.init(24, 8))
    traces = []

    def counted(*args, **options):
        traces.append(1)
        return encoder_model.embed(model, *args, **options)

    step = make_train_step(
        apply_fn=counted, loss=loss, tx=tx, miner=MINERS["hard"](), trainable=mask
    )
    filled = []
    for _ in range(3):
        state, metrics = step(state, batch_of(images))
        filled.append(int(state.memory.mask.sum()))
    assert filled == [12, 24, 24]
    assert len(traces) == 1  # one compilation serves all steps
    assert np.isfinite(float(metrics["loss"]))


def test_bfloat16_is_near_float32(trunk, images):
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = encoder_model.build_model(trunk, dtype=dtype)
        x, _ = jax.jit(encoder_model.features, static_argnums=0)(
            model, trunk.variables["params"], trunk.variables["batch_stats"], images
        )
        assert x.dtype == jnp.float32
        found[dtype] = np.asarray(x)
    error = np.abs(found["float32"] - found["bfloat16"]).max() / np.abs(found["float32"]).max()
    assert 0 < error < 0.03


def test_folding_changes_no_embedding(trunk, images):
    """The encoder folds BatchNorm away; the model that is trained does not."""
    model = encoder_model.build_model(trunk, pool="gem", head={"layers": 8})
    shape = encoder_model.feature_shape(model, trunk.variables, SIZE)
    fresh = encoder_model.init_head(model, shape, jax.random.key(0))
    params = {"trunk": trunk.variables["params"], "head": fresh["params"]}
    stats = {"trunk": trunk.variables["batch_stats"], "head": {}}
    embed = jax.jit(encoder_model.embed, static_argnums=0)
    expected = embed(model, params, stats, images)[0]
    made = encoders.make_encoder(model, params, stats, image_size=SIZE)
    np.testing.assert_allclose(made(images), expected, atol=2e-5)


def test_the_number_of_images_does_not_matter(images):
    made = sj.load_encoder("resnet18", weights="random", image_size=SIZE)
    whole = made(images)
    assert whole.shape == (12, made.embedding_dim) == (12, 512)
    assert whole.dtype == np.float32
    for n in (0, 1, 5):
        np.testing.assert_allclose(made(images[:n]), whole[:n], atol=1e-5)


def test_the_fingerprint_tells_encoders_apart():
    one = sj.load_encoder("resnet18", weights="random", image_size=SIZE)
    same = sj.load_encoder("resnet18", weights="random", image_size=SIZE)
    size = sj.load_encoder("resnet18", weights="random", image_size=SIZE + 1)
    pool = sj.load_encoder("resnet18", weights="random", image_size=SIZE, pool="max")
    assert one.fingerprint == same.fingerprint
    assert len({e.fingerprint for e in (one, size, pool)}) == 3


@pytest.mark.parametrize("shape", [(3, SIZE, SIZE), (2, SIZE, SIZE, 1)])
def test_wrong_images(shape):
    made = sj.load_encoder("resnet18", weights="random", image_size=SIZE)
    with pytest.raises(UserError, match="uint8 images"):
        made(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="float32"):
        made(np.zeros((1, SIZE, SIZE, 3), np.float32))


def test_wrong_names(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        sj.load_encoder(tmp_path)
    with pytest.raises(UserError, match="resnet19"):
        sj.load_encoder("resnet19")
    with pytest.raises(UserError, match="stage9"):
        sj.load_encoder("resnet18", weights="random", stage="stage9")
    for stage in ("stage4:", ":max", ",", ["stage3", "stage4"], 4, ""):
        with pytest.raises(UserError, match="stage"):
            sj.load_encoder("resnet18", weights="random", stage=stage)
    with pytest.raises(UserError, match="pool"):
        sj.load_encoder("resnet18", weights="random", pool=["max"])
    with pytest.raises(UserError, match="names a stage twice"):
        sj.load_encoder("resnet18", weights="random", stage="stage4,stage4")
    for size in (0, -5, 100_000, 32.5, "32"):
        with pytest.raises(UserError, match=r"image_size=.*whole number from 1 to 4,096"):
            sj.load_encoder("resnet18", weights="random", image_size=size)
    with pytest.raises(UserError, match="preprocessing=5: choose from"):
        sj.load_encoder("resnet18", weights="random", preprocessing=5)
    made = sj.load_encoder("resnet18", weights="random", image_size=SIZE)
    folder = tiny.make_folder(tmp_path / "shop", 1, 2)
    for size in (0, 10**9, 1.5, None):
        with pytest.raises(UserError, match=r"batch_size=.*whole number from 1 to 65,536"):
            sj.embed_folder(made, folder, batch_size=size, cache_dir=tmp_path)


def test_several_stages_come_of_one_pass_and_are_kept_apart(tmp_path, monkeypatch):
    """Each pooled in its own way, or in two, its signed root with unit length, side by side."""
    options = {"weights": "random", "image_size": SIZE}
    pools = [("stage2", "max"), ("stage4", "average"), ("stage4", "gem3")]
    ones = [sj.load_encoder("resnet18", stage=s, pool=p, **options) for s, p in pools]
    some = {"stage": "stage2:max,stage4,stage4:gem3", **options}
    both = sj.load_encoder("resnet18", **some)
    rooted = sj.load_encoder("resnet18", **some, signed_sqrt=True)
    folder = tiny.make_folder(tmp_path / "shop", classes=2, images=3)
    ran, whole = [], encoder_model.run_embed
    counted = lambda model, *rest: ran.append(model.stage) or whole(model, *rest)  # noqa: E731
    monkeypatch.setattr(encoders, "run_embed", counted)
    found, *rest = (
        embed_folder(encoder, folder, cache_dir=tmp_path).vectors.astype(np.float64)
        for encoder in (both, rooted, *ones)
    )
    # What the first one computed, all others find.
    assert set(ran) == {some["stage"]}
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(found, np.concatenate([*map(unit, rest[1:])], 1), atol=1e-6)
    roots = [unit(np.sign(x) * np.sqrt(np.abs(x))) for x in rest[1:]]
    np.testing.assert_allclose(rest[0], np.concatenate(roots, 1), atol=1e-6)
    pictures = [read_image(path, (SIZE, SIZE)) for path in sorted(folder.glob("*/*"))]
    np.testing.assert_allclose(both(np.stack(pictures)), found, atol=1e-6)
    assert both.embedding_dim == found.shape[1] == 128 + 512 + 512
    assert len({e.fingerprint for e in (both, rooted, *ones)}) == 5


def test_spaces_between_stages_mean_nothing():
    close, wide = (
        sj.load_encoder("resnet18", "random", SIZE, stage=stage, pool=pool)
        for stage, pool in (("stage2,stage4", "average,max"), (" stage2, stage4", "average , max"))
    )
    assert wide.fingerprint == close.fingerprint
    assert wide.model.columns == {"stage2": 128, "stage4": 512}


def test_the_fingerprint_is_of_the_weights_and_not_of_the_processors_kernels():
    encoder = sj.load_encoder("resnet18", "random", image_size=32)
    elsewhere = dataclasses.replace(encoder, kernels={})
    assert elsewhere.fingerprint == encoder.fingerprint
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(elsewhere(images), encoder(images), rtol=1e-4, atol=1e-5)
    assert encoder.at_size(48).fingerprint != encoder.fingerprint
    assert len(repr(encoder)) < 100


def test_a_stage_with_gem_of_its_own_is_that_of_pool():
    """The head's power is there however the pooling was named."""
    images = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with jax.numpy_dtype_promotion("standard"):
        own = sj.load_encoder("resnet18", "random", 32, stage="stage2:gem")
        common = sj.load_encoder("resnet18", "random", 32, stage="stage2", pool="gem")
        np.testing.assert_array_equal(own(images), common(images))
