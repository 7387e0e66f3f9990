"""What a run chooses without its test data, and what it saves: bare trunk, start or step."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

import siamese_jax as sj
from configs import common
from siamese_jax.data.sources import load_records
from siamese_jax.encoder.embedding import embed_records
from siamese_jax.errors import UserError
from siamese_jax.metrics.bootstrap import difference
from siamese_jax.metrics.evaluation import sides_of
from siamese_jax.train import choosing, fitting
from siamese_jax.train.experiment import load_data, train
from siamese_jax.train.from_config import idle_options
from siamese_jax.train.metrics_log import read_curves


@pytest.fixture(scope="module")
def world(tmp_path_factory, short_trunk):
    root = tmp_path_factory.mktemp("choosing")
    tiny.make_folder(root / "shop", classes=16, images=4, noise=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        yield root


def config_of(world):
    config = common.base()
    config.data.update(source="folder", root=str(world / "shop"))
    config.trunk.update(name="resnet18", weights="random", image_size=32, stage="auto")
    config.head = common.linear_head(8)
    config.sampler.batch_size = 8
    config.train.update(steps=12, log_every=2, eval_every=2, checkpoint_every=2, patience=2)
    return config


def run(config, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train(config, workdir)


def loaded(workdir):
    with jax.numpy_dtype_promotion("standard"):
        return sj.load_encoder(workdir)


def measured(world, workdir):
    """The test classes by the encoder that the tools load."""
    records = load_records("folder", world / "shop", seed=0, fractions=(0.5, 0, 0.5)).where("test")
    encoder = loaded(workdir)
    found = embed_records(encoder, records)
    return sides_of(found.vectors, found.records, encoder.distance).measure((1,)).means()


@pytest.fixture(scope="module")
def rehearsed(world, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "rehearsed"
    return workdir, run(config_of(world), workdir)


def test_the_steps_are_those_of_the_rehearsal(world, rehearsed):
    """The best on held-out training classes, with the start among the candidates."""
    workdir, results = rehearsed
    curves = [
        dict(
            read_curves(workdir / "rehearsal" / f"fold{fold}" / "metrics.jsonl")["validation/map@r"]
        )
        for fold in (1, 2, 3, 4)
    ]
    for curve in curves:
        steps, top = [*curve], max(curve, key=lambda step: (curve[step], -step))
        assert len(steps) - 1 - steps.index(top) == 2 or steps[-1] == 12  # patience, or the end
    # Each fold asks 8 images of 2 classes. What all came to is averaged.
    means = {
        step: sum(curve[step] for curve in curves) for step in set.intersection(*map(set, curves))
    }
    assert 0 in means
    best = max(means, key=lambda step: (round(means[step], 9), -step))
    # Taken where it is told from the start: whole classes are drawn, and each has 4 images.
    values = {
        step: np.concatenate([
            np.load(workdir / "rehearsal" / f"fold{fold}" / "validation" / f"{step}.npz")["values"]
            for fold in (1, 2, 3, 4)
        ])
        for step in (0, best)
    }  # fmt: skip
    gain = difference(values[0], values[best], groups=np.repeat(np.arange(8), 4))
    assert gain.mean * 32 == pytest.approx(8 * (means[best] - means[0]), abs=1e-6)
    assert results["choices"]["steps"] in (best if gain.low > 0 else 0, -1)
    assert results["checkpoint_step"] == max(0, results["choices"]["steps"])
    assert results["chosen_by"] == "validation, in a rehearsal"
    assert results["choices"]["stage"].split(",")[-1] == "stage4"
    assert results["choices"]["shrinkage"] in fitting.SHRINKAGES
    # The run itself had all training classes, and its test data were looked at once.
    assert json.loads((workdir / "run.json").read_text())["split"]["train"]["classes"] == 8
    tested = [step for step, _ in read_curves(workdir / "metrics.jsonl")["test/recall@1"]]
    assert tested == [results["checkpoint_step"]]
    table = results["test"]
    assert [*table] == ["before", "fitted", "after", "gain, low", "gain, high"]
    gain = table["after"]["map@r"] - table["before"]["map@r"]
    assert table["gain, low"]["map@r"] <= gain <= table["gain, high"]["map@r"]
    assert f"{gain:+.4f}" in results["verdict"]["test"]
    if not results["checkpoint_step"]:
        assert table["fitted"] == table["after"] or results["saved"] == "the bare trunk"
    assert measured(world, workdir)["map@r"] == pytest.approx(table["after"]["map@r"], abs=1e-3)


def fold(rng, gain, classes):
    """A fold of 8 queries a class: of whole classes, `gain` is found at step 50 and not at 0."""
    of = np.repeat(np.arange(classes), 8)
    at_0 = (rng.random(len(of)) < 0.5).astype(float)
    at_50 = np.where(rng.permutation(classes)[of] < gain, 1.0, at_0)
    return choosing.Curve({0: at_0, 50: at_50}, at_0 * 0.9, of)


def asked_of(curves, init="random"):
    config = common.base()
    config.head.init = init
    run = choosing.Run(config, None, None, {"choices": {}, "warnings": []})
    return choosing.choose(run, curves)


def test_steps_are_taken_where_the_folds_tell_that_they_help(rng, caplog):
    """One class in ten that gets better is chance; half of the classes are not."""
    caplog.set_level("INFO")
    few = [fold(rng, gain, 3) for gain in (1, 0, 0, 0)]
    for number, curve in enumerate(few):
        few[number] = curve._replace(classes=curve.classes + 3 * number)
    assert asked_of(few) == 0
    assert "step 50 is not told apart from step 0" in caplog.text
    many = [fold(rng, 5, 10)._replace(classes=np.repeat(np.arange(10), 8) + i) for i in (0, 10, 20)]
    assert asked_of(many) == 50
    assert "step 50 is better than step 0" in caplog.text
    # Somebody's own validation split chooses its best, whatever the size.
    assert asked_of(few[:1]) == 50
    # The bare trunk, where it is better than what is chosen.
    worse = [curve._replace(bare=np.ones(len(curve.bare))) for curve in few]
    assert asked_of(worse) == -1


def test_lda_stays_unless_the_bare_trunk_is_told_to_be_better(rng, caplog):
    """By a hundredth over few classes it is not; another start has no such claim."""
    caplog.set_level("INFO")
    of = np.repeat(np.arange(10), 8)
    lda = (rng.random(80) < 0.9).astype(float)
    near = lda.copy()
    near[np.flatnonzero(lda == 0)[:1]] = 1
    assert asked_of([choosing.Curve({0: lda}, near, of)], init="lda") == 0
    assert "LDA (step 0) is taken, as nothing tells the bare trunk to be better" in caplog.text
    assert asked_of([choosing.Curve({0: lda}, near, of)], init="pca") == -1
    assert asked_of([choosing.Curve({0: lda * 0.5}, near, of)], init="lda") == -1
    one = np.zeros(80, int)  # of one class every answer is right
    assert asked_of([choosing.Curve({0: np.ones(80)}, np.ones(80), one)], init="lda") == 0
    known = choosing.Curve({0: np.array([0.8])}, near, of)  # of an earlier version
    assert asked_of([known], init="lda") == -1


def test_queries_without_an_answer_choose_nothing(rng):
    curves = [fold(rng, 5, 10)._replace(classes=np.repeat(np.arange(10), 8) + i) for i in (0, 10)]
    lone = [
        curve._replace(
            values={step: np.append(v, np.nan) for step, v in curve.values.items()},
            bare=np.append(curve.bare, np.nan),
            classes=np.append(curve.classes, 99),
        )
        for curve in curves
    ]
    assert asked_of(lone) == asked_of(curves) == 50


def test_gone_on_with_it_ends_the_same(world, rehearsed):
    """Without its results, and without the rehearsal: what was chosen is kept."""
    workdir, results = rehearsed
    (workdir / "results.json").unlink()
    shutil.rmtree(workdir / "rehearsal")
    again = run(config_of(world), workdir)
    assert not (workdir / "rehearsal").exists()
    assert again | {"seconds": 0} == json.loads(json.dumps(results)) | {"seconds": 0}


def test_the_images_that_it_was_trained_on_are_known(world, rehearsed):
    workdir, _ = rehearsed
    assert len(loaded(workdir).fitted_to) == 32


def fitted_to_bare(results):
    """What the bare trunk gains over the fitted head."""
    return results["test"]["before"]["map@r"] - results["test"]["fitted"]["map@r"]


def test_the_bare_trunk_is_saved_where_it_is_better(world, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "choose", lambda *args: -1)
    config = config_of(world)
    config.data.validation_fraction = 0.25
    config.trunk.stage = "stage4"
    config.head.shrinkage = 0.5
    config.train.steps = 2
    results = run(config, tmp_path / "bare")
    assert results["saved"] == "the bare trunk"
    assert results["test"]["after"] == results["test"]["before"]
    assert results["embedding_dim"] == 512
    said = results["verdict"]["test"]
    assert said.startswith("test: the same as the bare trunk, query by query; ")
    assert f" the fitted head (map@r {fitted_to_bare(results):+.4f}, " in said
    encoder = loaded(tmp_path / "bare")
    with jax.numpy_dtype_promotion("standard"):
        bare = sj.load_encoder("resnet18", "random", 32)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(encoder(images), bare(images), atol=1e-5)
    assert encoder.distance == "cosine"
    assert not encoder.fitted_to  # nothing was fitted to the training images
    assert {name: encoder.provenance[name] for name in ("stage", "pool")} == {
        "stage": "stage4",
        "pool": "average",
    }
    expected = measured(world, tmp_path / "bare")["map@r"]
    assert expected == pytest.approx(results["test"]["after"]["map@r"], abs=1e-3)


def test_few_images_keep_all_axes(world, tmp_path, caplog):
    """8 axes of 64 want 16 images to be told by; 12 are there. All tools take what was built."""
    tiny.make_folder(tmp_path / "few", classes=8, images=3, noise=120)
    config = config_of(world)
    config.data.root = str(tmp_path / "few")
    config.trunk.stage = "stage1"
    config.train.steps = 2
    results = run(config, tmp_path / "run")
    assert "the head keeps all 64 axes, not 8: 12 training images are fewer than 2 an axis" in (
        caplog.text
    )
    choices = json.loads((tmp_path / "run" / "run.json").read_text())["choices"]
    assert choices["layers"] == [64]
    assert choices["steps"] in (0, -1)
    assert "no step is tried: images that are too few to tell the axes" in caplog.text
    assert results["embedding_dim"] == loaded(tmp_path / "run").embedding_dim == 64
    (tmp_path / "run" / "results.json").unlink()
    again = run(config, tmp_path / "run")
    assert again["test"] == json.loads(json.dumps(results["test"]))
    # Another run that begins with it has the same head; one of enough images keeps the 8.
    assert train_from(config, tmp_path / "run", tmp_path / "child")["embedding_dim"] == 64
    config.data.root = str(world / "shop")
    assert "layers" not in run(config, tmp_path / "enough")["choices"]


def train_from(config, parent, workdir):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return train(config, workdir, fork=parent)


@pytest.mark.parametrize("init", ["lda", "pca"])
def test_a_head_keeps_no_more_axes_than_its_features_have(init, caplog):
    config = common.base()
    config.head = common.linear_head(512, init)
    records = SimpleNamespace(split=np.array(["train"] * 5000))
    assert choosing.layers_for(config, 40, records) == {"layers": (40,)}
    assert "the head keeps 40 axes, not 512: its features have no more" in caplog.text
    assert choosing.layers_for(config, 512, records) == {}


def test_steps_that_end_before_the_warm_up_are_said():
    config = common.base()
    config.train.steps = config.optim.warmup_steps
    (line,) = idle_options(config)
    assert "train.steps=20 end before optim.warmup_steps=20 do" in line
    config.train.steps += 1
    assert idle_options(config) == []


def test_a_finished_run_says_that_there_are_other_images_now(world, tmp_path, caplog):
    tiny.make_folder(tmp_path / "shop", classes=4, images=3)
    config = config_of(world)
    config.data.root = str(tmp_path / "shop")
    config.trunk.stage, config.head.shrinkage = "stage4", 0.5
    config.train.update(steps=1, rehearse=False)
    results = run(config, tmp_path / "run")
    for said in ("", "has 15 images now, and had 12 then"):
        if said:
            shutil.copytree(tmp_path / "shop" / "class0", tmp_path / "shop" / "class9")
        caplog.clear()
        assert run(config, tmp_path / "run")["test"] == json.loads(json.dumps(results["test"]))
        assert ("images now" in caplog.text) == bool(said)
        assert said in caplog.text
    shutil.rmtree(tmp_path / "shop")
    run(config, tmp_path / "run")
    assert "its data cannot be read any more" in caplog.text


def test_few_classes_are_said(world, tmp_path, caplog):
    """One class to train on: nothing to choose by."""
    tiny.make_folder(tmp_path / "few", classes=2, images=4)
    config = config_of(world)
    config.data.root = str(tmp_path / "few")
    config.train.steps = 2
    results = run(config, tmp_path / "run")
    assert "takes the last stage and a shrinkage of 0.5" in caplog.text
    assert results["choices"]["stage"] == "stage4"
    assert "the bare trunk stays as it is" in caplog.text
    assert results["saved"] == "the bare trunk"
    assert results["checkpoint_step"] == 0
    config.train.rehearse = False
    assert run(config, tmp_path / "all")["checkpoint_step"] == 2


def test_stages_of_a_config_may_have_spaces_and_auto_takes_one_pooling():
    config = common.base()
    trunk = SimpleNamespace(trunk="resnet18")
    config.trunk.stage = "stage3:max, stage4"
    assert choosing.stage_choice(config, trunk) == [("stage3:max", "stage4")]
    config.trunk.update(stage="auto", pool="average,max")
    with pytest.raises(UserError, match="give one pooling, or name the stages"):
        choosing.stage_choice(config, trunk)


def test_a_fraction_that_holds_nothing_out_is_said(tmp_path, caplog):
    """A folder that brings its own split has no validation but of a fold."""
    tiny.make_folder(tmp_path / "shop" / "train", classes=4, images=3)
    tiny.make_folder(tmp_path / "shop" / "test", classes=4, images=3)
    config = common.base()
    config.data.update(source="folder", root=str(tmp_path / "shop"), validation_fraction=0.3)
    records, _ = load_data(config, {})
    assert "data.validation_fraction=0.3 holds nothing out" in caplog.text
    assert set(records.split) == {"train", "test"}
    caplog.clear()
    config.data.root = str(tmp_path / "shop" / "train")
    assert "validation" in load_data(config, {})[0].split
    assert "holds nothing out" not in caplog.text
