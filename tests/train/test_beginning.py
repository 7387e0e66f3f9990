"""A finished run that is given more steps, and a new run that begins with another's checkpoint."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny

from siamese_jax.__main__ import main
from siamese_jax.storage import checkpoint

OPTIONS = [*tiny.TINY, "--config.optim.schedule=constant", "--config.train.eval_every=2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, small_trunk):
    """Runs of 4 and of 6 steps, alike but for that, under a constant learning rate."""
    root = tmp_path_factory.mktemp("world")
    tiny.make_folder(root / "shop", classes=8, images=3, noise=90)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIAMESE_JAX_CACHE", str(root / "cache"))
        for steps in (4, 6):
            assert (
                train(root, f"--workdir={root / str(steps)}", f"--config.train.steps={steps}") == 0
            )
        yield root


def train(root, *options, config=True):
    given = ["--config=resnet_triplet", *OPTIONS, f"--config.data.root={root / 'shop'}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return main(["train", *(given if config else []), *options])


def copied(world, tmp_path, name="4"):
    shutil.copytree(world / name, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_goes_on_as_if_it_had_been_to_take_more_steps(world, tmp_path):
    run = copied(world, tmp_path)
    before = (run / "results.json").read_text()
    assert train(world, f"--workdir={run}", "--config.train.steps=6", config=False) == 0
    (a, one), (b, other) = (checkpoint.load_newest(r / "checkpoints") for r in (run, world / "6"))
    assert a == b == 6
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[name])
    assert (run / "metrics.jsonl").read_text() == (world / "6" / "metrics.jsonl").read_text()
    assert (run / "results-4.json").read_text() == before
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 6
    assert json.loads((run / "run.json").read_text())["extended"] == [{"from": 4, "to": 6}]
    assert json.loads((run / "results.json").read_text())["checkpoint_step"] == 6


def test_where_it_cannot_go_on_it_says_why(world, tmp_path, capsys):
    run = copied(world, tmp_path)
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    def refused(*options):
        assert train(world, f"--workdir={run}", *options) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "train.steps is 4 there and 3 now, but it has taken 4" in refused(
        "--config.train.steps=3"
    )
    config = json.loads((run / "config.json").read_text())
    config["optim"]["schedule"] = "cosine"
    (run / "config.json").write_text(json.dumps(config))
    kept[run / "config.json"] = (run / "config.json").read_bytes()
    line = refused("--config.train.steps=6", "--config.optim.schedule=cosine")
    assert "under optim.schedule=cosine the learning rate of every step depends on it" in line
    assert "--fork=NEW" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept


def test_a_fork_begins_with_the_other_runs_parameters(world, tmp_path, caplog):
    """At learning rate 0 nothing moves: the fork's parameters are those it began with."""
    new = tmp_path / "new"
    options = ["--config.optim.learning_rate=0.0", "--config.optim.weight_decay=0.0"]
    fork = [f"--workdir={world / '4'}", f"--fork={new}", "--config.train.steps=1", *options]
    assert train(world, *fork, config=False) == 0
    (_, one), (_, other) = (checkpoint.load_newest(r / "checkpoints") for r in (new, world / "4"))
    names = [name for name in one if name.startswith(("params/", "batch_stats/"))]
    assert names
    for name in names:
        np.testing.assert_array_equal(one[name], other[name])
    told = json.loads((new / "run.json").read_text())["forked_from"]
    assert (told["run"], told["step"], told["fresh"]) == (str(world / "4"), 4, [])
    assert told["changed"]["train.steps"] == [4, 1]
    assert told["changed"]["optim.learning_rate"] == [3e-4, 0.0]
    # Killed before its first checkpoint: the folder alone tells what it began with.
    shutil.rmtree(new / "checkpoints")
    (new / "results.json").unlink()
    assert train(world, f"--workdir={new}", config=False) == 0
    again = checkpoint.load_newest(new / "checkpoints")[1]
    for name in names:
        np.testing.assert_array_equal(one[name], again[name])
    # Another head cannot take the old one's place, and other splits are told.
    caplog.clear()
    fork[1] = f"--fork={tmp_path / 'wide'}"
    assert train(world, *fork, "--config.head.layers=(5,)", "--config.seed=3", config=False) == 0
    assert "the head begins anew" in caplog.text
    assert "what is tested here may have been trained on there" in caplog.text


def test_mistakes_in_a_fork(world, tmp_path, capsys):
    old = f"--workdir={world / '4'}"
    for options, words in (
        ([f"--fork={tmp_path / 'x'}"], "--fork=.* needs --workdir"),
        ([old, f"--fork={world / '4'}"], "is the run itself"),
        ([old, f"--fork={tmp_path / 'x'}", "--config.trunk.name=resnet34"], "has the trunk of"),
        ([f"--workdir={tmp_path}", f"--fork={tmp_path / 'x'}"], "is missing|give an experiment"),
    ):
        assert train(world, *options, config=old in options) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: ")
        assert re.search(words, line), line
    assert not (tmp_path / "x").exists()
