"""`configs/finetune.py`: which stages move, and that steps which ruin the encoder are not taken."""

import importlib

import jax
import numpy as np
import pytest
import tiny

from siamese_jax.encoder.load import load_encoder
from siamese_jax.storage.run_folder import BARE
from siamese_jax.train.experiment import class_count, read_records, train
from siamese_jax.train.frozen import freeze_patterns, late_stages, moving_leaves
from siamese_jax.train.metrics_log import read_curves
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights.load import load

RUIN = 3.0  # a learning rate that leaves nothing of a trunk


@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_the_late_stages_have_at_most_a_third_of_the_blocks(name):
    row, late = TRUNKS[name], late_stages(name)
    assert late == list(row.channels)[-len(late) :]
    blocks = row.blocks or {stage: 1 for stage in row.stages if stage.startswith("stage")}
    share = sum(blocks.get(stage, 0) for stage in late) / sum(blocks.values())
    before = blocks.get(list(row.channels)[-len(late) - 1], 0) / sum(blocks.values())
    assert 0 < share <= 1 / 3 < share + before


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg16", "efficientnet_lite0", "vit_tiny_patch16_224"]
)
def test_early_is_what_lies_before_the_late_stages(name):
    config = importlib.import_module("configs.finetune").get_config()
    trunk = load(name, "random")
    assert len(freeze_patterns(config, trunk)) == 1
    moving = moving_leaves(config, trunk)
    for stage, leaves in moving.items():
        assert set(jax.tree.leaves(leaves)) == {stage in late_stages(name)}, stage


def run(tmp_path, **options):
    """The recipe on a small folder, every change of the head and the optimiser an option."""
    folder = tiny.make_folder(tmp_path / "shop", classes=12, images=4, noise=60)
    config = importlib.import_module("configs.finetune").get_config()
    config.trunk.update(name="resnet18", weights="random", image_size=32)
    config.data.update(source="folder", root=str(folder), cache_dir=str(tmp_path / "cache"))
    config.data.update(fold="1/2", test_fraction=0.25)
    config.head.layers = (options.get("width", 16),)
    config.head.init = options.get("init", "lda")
    config.sampler.batch_size = 8
    config.optim.learning_rate = options["rate"]
    config.train.update(steps=8, log_every=2, eval_every=2, checkpoint_every=2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        results = train(config, tmp_path / "run")
    curve = read_curves(tmp_path / "run" / "metrics.jsonl")["validation/map@r"]
    return results, dict(curve)


def test_classes_are_held_out_of_data_with_their_own_split_too(tmp_path):
    """Or nothing would tell which steps ruin the encoder, and all of them would be taken."""
    tiny.make_folder(tmp_path / "shop" / "train", classes=12, images=2)
    tiny.make_folder(tmp_path / "shop" / "test", classes=3, images=2)
    config = importlib.import_module("configs.finetune").get_config()
    config.data.update(source="folder", root=str(tmp_path / "shop"))
    records = read_records(config)
    counts = {str(s): class_count(records.where(s)) for s in np.unique(records.split)}
    assert counts["validation"] in (2, 3)
    assert counts["train"] + counts["validation"] == 12
    assert counts["test"] == 3


@pytest.mark.usefixtures("small_trunk")
@pytest.mark.parametrize("rate", [1e-3, RUIN])
def test_steps_that_ruin_the_encoder_are_not_taken(rate, tmp_path, caplog):
    caplog.set_level("INFO")
    results, curve = run(tmp_path, rate=rate)
    assert "stages stem to stage3 are frozen: the output" in caplog.text
    assert list(results["test"]) == ["before", "fitted", "after", "gain, low", "gain, high"]
    if results["saved"] != BARE:
        assert curve[results["checkpoint_step"]] == max(curve.values())
    if rate == RUIN:
        assert max(value for step, value in curve.items() if step) < curve[0]
        assert results["saved"] in ("step 0", BARE)
        assert "validation/map@r is worse than the" in " ".join(results["warnings"])
        assert "map@r was 3 times not better than before (train.patience)" in caplog.text
        kept = "before" if results["saved"] == BARE else "fitted"
        assert results["test"]["after"] == results["test"][kept]


@pytest.mark.usefixtures("small_trunk")
def test_a_trunk_that_moved_is_taken_as_it_was_where_nothing_is_better(tmp_path):
    """A head of one axis is worse than the trunk, and its steps ruin both."""
    results, curve = run(tmp_path, rate=RUIN, init="random", width=1)
    assert results["saved"] == BARE
    assert results["test"]["after"] == results["test"]["before"]
    assert len(curve) > 1  # it did move
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = load_encoder(tmp_path / "run")(images)
        expected = load_encoder("resnet18", "random", image_size=32)(images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
