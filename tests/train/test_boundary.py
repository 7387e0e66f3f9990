"""The output of frozen first stages, computed once: the same numbers, in a step of the rest."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from configs import common
from siamese_jax import stopping, weights
from siamese_jax.data.pipeline import Reading, eval_batches
from siamese_jax.encoder import model as encoder_model
from siamese_jax.encoder.model import model_of_config
from siamese_jax.losses import LOSSES
from siamese_jax.train import frozen, optim
from siamese_jax.train.experiment import load_data
from siamese_jax.train.from_config import make_inputs, make_sampler
from siamese_jax.train.step import init_state, make_train_step
from siamese_jax.trunks import convnext, efficientnet, resnet, vit
from siamese_jax.trunks.table import TRUNKS, Trunk

# Each architecture, with few blocks a stage; what is frozen, what is pooled, what is kept.
PLAN = vit.Plan(patch=16, grid=2, width=32, depth=3, heads=2, registers=1)
CASES = {
    "efficientnet": (
        Trunk(
            functools.partial(efficientnet.EfficientNet, 0.25, 0.2),
            efficientnet.widths(0.25, 0.2, False), ("keras", "torch"), 64, "none",
        ),
        ("stem", "stage[1-4]/"), "top", "stage4",
    ),
    "resnet": (
        Trunk(
            functools.partial(resnet.ResNet, (1, 2, 1, 1), False),
            resnet.widths(False), ("torch",), 64, "none",
        ),
        ("stem", "stage[12]"), "stage4", "stage2",
    ),
    "vit": (
        Trunk(functools.partial(vit.ViT, PLAN), PLAN.widths, ("torch",), 64, "none"),
        ("stem", "block[12]/", "top"), "block3:cls,cls,top", "block2",
    ),
    "convnext": (
        Trunk(
            functools.partial(convnext.ConvNeXt, (1, 1, 1, 1), (8, 16, 24, 32), True),
            convnext.widths((8, 16, 24, 32)), ("torch",), 64, "none",
        ),
        ("stem", "stage[123]"), "stage2,top", "stage2",
    ),
}  # fmt: skip
SIZE = 64


def usual(*cases):
    """All cases, the others asked for by -m long."""
    return [c if c in cases else pytest.param(c, marks=pytest.mark.long) for c in CASES]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for case, (row, *_) in CASES.items():
        monkeypatch.setitem(TRUNKS, f"small_{case}", row)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("data") / "shop", size=80)


def build(case, folder, cache, **options):
    """Config, records, keys, trunk and model; the norms' statistics are no ones and zeros."""
    _, freeze, stage, _ = CASES[case]
    config = common.base()
    config.data.update(source="folder", root=str(folder), cache_dir=str(cache))
    config.trunk.update(
        name=f"small_{case}", weights="random", image_size=SIZE, freeze=freeze, stage=stage
    )
    config.head.layers = (16,)
    config.sampler.batch_size, config.eval.batch_size = 8, 5
    config.cache.views = 1
    config.update(options)
    records, keys = load_data(config, {})
    trunk = weights.load(config.trunk.name, "random", key=jax.random.key(0))
    rng = np.random.default_rng(1)
    stats = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 0.4, x.shape) + np.asarray(x) * 0.5, jnp.float32),
        trunk.variables["batch_stats"],
    )
    trunk = dataclasses.replace(trunk, variables={**trunk.variables, "batch_stats": stats})
    model = model_of_config(config.to_dict(), trunk, ())
    return config, records, keys, trunk, model


def parameters(config, trunk, model):
    shape = encoder_model.feature_shape(model, trunk.variables, config.trunk.image_size)
    head = encoder_model.init_head(model, shape, jax.random.key(2))
    params = {"trunk": trunk.variables["params"], "head": head["params"], "loss": {}}
    stats = {"trunk": trunk.variables["batch_stats"], "head": head["batch_stats"]}
    return jax.tree.map(jnp.array, (params, stats))


def losses(config, trunk, model, batches):
    params, stats = parameters(config, trunk, model)
    freeze = [f"trunk/{pattern}" for pattern in config.trunk.freeze]
    tx = optim.make_optimizer(params, name="sgd", learning_rate=1e-4, freeze=freeze)
    step = make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=LOSSES["nt_xent"](temperature=1.0),
        tx=tx,
        trainable=optim.trainable(params, freeze),
    )
    state, found = init_state(params, stats, tx, jax.random.key(3)), []
    for batch in batches:
        state, metrics = step(state, {k: v for k, v in batch.items() if k != "id"})
        found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(found).T, state


def drawn_images(config, records, cached):
    """The pictures of batches of what is kept: each item's view is drawn from (seed, step)."""
    train = records.where("train")
    reading = Reading(config.trunk.image_size, config.data.fit, batch_size=len(train))
    augmented = reading._replace(augment=config.augment.to_dict(), seed=config.seed)
    (plain,), (view,) = eval_batches(train, reading), eval_batches(train, augmented, view=1)
    assert (plain["image"] != view["image"]).any(axis=(1, 2, 3)).all()
    row = {image: i for i, image in enumerate(train.id.tolist())}
    for step, batch in enumerate(cached):
        rows = np.array([row[i] for i in batch["id"].tolist()])
        drawn = np.random.default_rng((config.seed, step)).integers(0, 2, len(rows))
        image = np.where(drawn[:, None, None, None], view["image"][rows], plain["image"][rows])
        rest = {name: batch[name] for name in ("label", "id", "mask")}
        yield {"image": image, **rest}


@pytest.mark.parametrize("case", usual("resnet"))
def test_losses_are_those_of_the_whole_trunk(case, folder, tmp_path):
    config, records, keys, trunk, model = build(case, folder, tmp_path)
    held = frozen.at_boundary(config, model, trunk, records)
    assert held.after == CASES[case][3]
    inputs = make_inputs(config, held, trunk, records, keys)
    source = inputs.batches(make_sampler(config, inputs.records), 0)
    kept = [next(source) for _ in range(3)]
    assert all("image" not in batch and batch["mask"].all() for batch in kept)
    (found, norms), state = losses(config, trunk, held, kept)
    expected, _ = losses(config, trunk, model, drawn_images(config, records, kept))
    np.testing.assert_allclose(found, expected[0], atol=4e-6, rtol=0)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-3)
    assert len({*found}) == 3
    images = make_inputs(config, model, trunk, records, keys)
    vectors, who = inputs.embed(state.params, state.batch_stats, records)
    expected_vectors, everyone = images.embed(state.params, state.batch_stats, records)
    np.testing.assert_array_equal(who.id, everyone.id)
    np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)


@pytest.mark.parametrize("case", usual("efficientnet", "vit"))
def test_the_fast_form_is_the_plain_one_to_1e5(case, folder, tmp_path):
    """And going on from what the plain form gives is exactly the whole trunk's features."""
    _, records, _, trunk, model = build(case, folder, tmp_path)
    held = model._replace(after=CASES[case][3])
    images = next(eval_batches(records, Reading(SIZE, batch_size=8)))["image"]
    plain = np.asarray(encoder_model.run_stage(held, trunk.variables, images))
    once = frozen.first_stages(held, trunk.variables, SIZE, "squash", "float32")
    assert [*once.shapes.values()] == [plain.shape[1:]]
    np.testing.assert_allclose(once.compute(images), plain, atol=1e-5 * np.abs(plain).max())
    whole = encoder_model.run_features(model, trunk.variables, images)
    rest = encoder_model.run_features(held, trunk.variables, plain)
    np.testing.assert_allclose(rest, whole, rtol=1e-6, atol=1e-6)


def inputs_of(case, folder, cache, **options):
    """What is kept by these options, and what its log says; None where nothing is."""
    config, records, keys, trunk, model = build(case, folder, cache)
    config.cache.update(options)
    held = frozen.at_boundary(config, model, trunk, records)
    return make_inputs(config, held, trunk, records, keys) if held.after else None


def count_computed(monkeypatch):
    """A list that gets the number of images of every block that is computed."""
    counts, in_blocks = [], frozen.in_blocks
    monkeypatch.setattr(
        frozen, "in_blocks", lambda f, x, size: counts.append(len(x)) or in_blocks(f, x, size)
    )
    return counts


def test_a_stopped_pass_goes_on_and_a_changed_picture_is_computed_again(tmp_path, monkeypatch, rng):
    shop = tiny.make_folder(tmp_path / "shop", size=80)
    counts = count_computed(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "check", lambda done: counts and pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            inputs_of("resnet", shop, tmp_path)
    assert counts == [5]
    first = inputs_of("resnet", shop, tmp_path)
    assert sum(counts) == 5 + 20 + 15  # 24 pictures and 12 views, in blocks of 5
    image = Image.fromarray(rng.integers(0, 256, (80, 80, 3), dtype=np.uint8))
    image.save(shop / "class0" / "0.png")
    counts.clear()
    second = inputs_of("resnet", shop, tmp_path)
    assert 1 <= len(counts) <= 2  # the picture, and its view if it is trained on
    some, other = (one.features(one.records)[0] for one in (first, second))
    changed = (some != other).any(axis=1)
    assert second.records.path[changed].tolist() == [str(shop / "class0" / "0.png")]
    counts.clear()
    inputs_of("resnet", shop, tmp_path)
    assert not counts


def test_other_weights_or_another_size_are_another_cache(folder, tmp_path, monkeypatch):
    counts = count_computed(monkeypatch)
    config, records, keys, trunk, model = build("resnet", folder, tmp_path)
    held = model._replace(after="stage2")
    config.cache.views = 0

    def passes(variables=trunk.variables, size=SIZE, **options):
        counts.clear()
        config.trunk.image_size = size
        config.cache.update(options)
        given = dataclasses.replace(trunk, variables=variables)
        make_inputs(config, held, given, records, keys)
        return bool(counts)

    def other(stage):
        params = jax.tree.map(lambda x: x, trunk.variables["params"])
        params[stage]["block1"]["conv1"]["kernel"] += 1e-3
        return {**trunk.variables, "params": params}

    assert passes()
    assert not passes()
    assert not passes(other("stage3"))  # it moves: what comes before it is the same
    assert passes(other("stage2"))
    assert passes(size=32)
    assert passes(dtype="bfloat16")
    assert not passes(dtype="float32")


def test_what_is_too_large_is_not_kept_and_said(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    size = 36 * 8 * 8 * 128 * 4
    assert inputs_of("resnet", folder, tmp_path, limit=size - 1) is None
    assert caplog.messages == [
        "stages stem to stage2 are frozen, but the output (36 x 8 x 8 x 128, 1.18MB) is more than "
        f"cache.limit={size - 1}: nothing is kept, every step runs all stages, and augments anew; "
        "cache.limit=1.18MB allows it, and cache.dtype=bfloat16 halves it"
    ]
    caplog.clear()
    assert inputs_of("resnet", folder, tmp_path, limit="1.18MB")
    assert caplog.messages == [
        "stages stem to stage2 are frozen: the output (36 x 8 x 8 x 128, 1.18MB) is computed once "
        "and kept",
        "training sees each image as it is and in 1 augmented views (cache.views); "
        "cache.enabled=False augments every step anew",
    ]
    assert sum(f.stat().st_size for f in tmp_path.rglob("vectors.bin")) == size
    caplog.clear()
    assert inputs_of("convnext", folder, tmp_path)
    assert "kept, as it is the first that is pooled" in caplog.messages[0]
    for options in ({"enabled": False}, {"limit": None}):  # as runs of earlier versions have it
        assert inputs_of("resnet", folder, tmp_path, **options) is None


def test_bfloat16_halves_the_disk_and_is_close(folder, tmp_path):
    full = inputs_of("resnet", folder, tmp_path / "full")
    half = inputs_of("resnet", folder, tmp_path / "half", dtype="bfloat16")
    bytes_of = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("vectors.bin"))
        for name in ("full", "half")
    ]
    assert bytes_of[0] == 2 * bytes_of[1]
    some, other = (one.features(one.records)[0] for one in (full, half))
    assert 0 < np.abs(some - other).max() < 0.02 * np.abs(some).max()


def test_a_stage_that_moves_in_part_is_not_kept(folder, tmp_path):
    config, records, _, trunk, model = build("resnet", folder, tmp_path)
    for freeze, expected in (
        (("stem", "stage1", "stage2/block1"), "stage1"),
        (("stage[12]",), ""),
        ((".*",), ""),  # its features are kept instead
        (("stem", "stage[1-3]", "stage4/block1/conv1"), "stage3"),
    ):
        config.trunk.freeze = freeze
        assert frozen.at_boundary(config, model, trunk, records).after == expected
