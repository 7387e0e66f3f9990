"""Checkpoints: the newest to go on from, the best to be the result, and damage that is noticed."""

import math
import shutil

import numpy as np
import pytest

from siamese_jax.errors import UserError
from siamese_jax.storage.checkpoint import (
    Checkpoints,
    best_steps,
    is_sound,
    load_first,
    load_newest,
    log_mark,
    steps,
)


def state(step):
    return {"step": np.int32(step), "kernel": np.full((3, 2), step, np.float32)}


def save_all(folder, values, **options):
    """Step 1, 2, ... with these values of "m"."""
    checkpoints = Checkpoints(folder, best_metric="m", **options)
    first = (options.get("start") or 0) + 1
    for step, value in enumerate(values, start=first):
        checkpoints.save(step, state(step), {} if value is None else {"m": value})
    checkpoints.close()


def test_the_best_is_kept_beside_the_newest(tmp_path):
    save_all(tmp_path, [0.9, 0.1, 0.2], max_to_keep=1)
    assert steps(tmp_path) == [3, 1]
    assert best_steps(tmp_path, "m") == [1, 3]
    step, leaves = load_first(tmp_path, best_steps(tmp_path, "m"))
    assert step == 1
    np.testing.assert_array_equal(leaves["kernel"], state(1)["kernel"])
    assert load_newest(tmp_path)[0] == 3


@pytest.mark.parametrize("seed", range(6))
def test_kept_are_the_newest_and_the_earliest_of_the_best(tmp_path, seed):
    """Random values with equal ones, NaN and none at all; broken off and gone on with."""
    rng = np.random.default_rng(seed)
    values = [float(v) for v in rng.choice([0.1, 0.2, 0.2, 0.3, np.nan, np.nan], 7)]
    values = [None if rng.random() < 0.2 else v for v in values]
    keep, cut = int(rng.integers(1, 3)), int(rng.integers(1, 6))
    save_all(tmp_path, values[:cut], max_to_keep=keep)
    save_all(tmp_path, values[cut:], max_to_keep=keep, start=cut)
    best, best_value = None, -math.inf
    for step, value in enumerate(values, start=1):
        if value is not None and value > best_value:  # NaN is above nothing
            best, best_value = step, value
    newest = range(len(values) - keep + 1, len(values) + 1)
    assert set(steps(tmp_path)) == {*newest} | ({best} if best else set())
    assert best_steps(tmp_path, "m")[:1] == ([best] if best else [])


def test_without_a_metric_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step), {"m": 1.0 / step})
    checkpoints.close()
    assert steps(tmp_path) == [3, 2]
    assert best_steps(tmp_path, "m") == []
    assert load_first(tmp_path, []) is None


def damage(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])


def test_a_damaged_checkpoint_gives_way_to_the_next(tmp_path, caplog):
    save_all(tmp_path, [0.3, 0.9, 0.2])
    damage(tmp_path / "2" / "state")
    assert load_first(tmp_path, best_steps(tmp_path, "m"))[0] == 3
    assert "2 is damaged" in caplog.text
    damage(tmp_path / "3" / "state")
    with pytest.raises(UserError, match=r"steps 2, 3\); start again"):
        load_first(tmp_path, best_steps(tmp_path, "m"))


def test_what_a_run_goes_on_from_is_the_last(tmp_path):
    """A damaged checkpoint after `start` does not stand in the way of the one written anew."""
    save_all(tmp_path, [0.3, 0.2, 0.9], max_to_keep=2)
    damage(tmp_path / "3" / "state")
    assert load_newest(tmp_path)[0] == 2
    save_all(tmp_path, [0.1], max_to_keep=2, start=2)
    assert load_newest(tmp_path)[0] == 3
    assert best_steps(tmp_path, "m") == [2, 3]
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="holds step 2 or a later one"):
        checkpoints.save(2, state(2))
    checkpoints.close()
    with pytest.raises(UserError, match="max_to_keep=0"):
        Checkpoints(tmp_path, max_to_keep=0)


def with_frozen(folder, value, step, **options):
    """A start with a frozen leaf of this value, that saves one step."""
    checkpoints = Checkpoints(folder, frozen=frozenset({"still"}), best_metric="m", **options)
    still = np.full(4, value, np.float32)
    checkpoints.save(step, state(step) | {"still": still}, {"m": 0.5}, (7, 8))
    checkpoints.close()


def test_frozen_leaves_are_those_of_the_checkpoint_s_own_start(tmp_path, caplog):
    """A start that died after it wrote other ones leaves nothing behind that is taken for these."""
    with_frozen(tmp_path, 1.0, 1)
    shutil.rmtree(tmp_path / "1")
    with_frozen(tmp_path, 2.0, 1, start=0)
    np.testing.assert_array_equal(load_newest(tmp_path)[1]["still"], np.full(4, 2, np.float32))
    assert len([*(tmp_path / "frozen").iterdir()]) == 1
    damage(tmp_path / "frozen")
    with pytest.raises(UserError, match=r"none of the checkpoints"):
        load_newest(tmp_path)
    caplog.clear()
    with_frozen(tmp_path, 2.0, 2, start=1)
    assert "it is written again" in caplog.text
    assert load_newest(tmp_path)[0] == 2
    assert is_sound(tmp_path, 1)


@pytest.mark.parametrize("keep_first", [False, True])
def test_the_start_is_kept_where_it_is_asked_for(tmp_path, keep_first):
    checkpoints = Checkpoints(tmp_path, best_metric="m", max_to_keep=1, keep_first=keep_first)
    for step, value in enumerate((0.1, 0.9, 0.5, 0.6)):
        checkpoints.save(step, state(step), {"m": value}, (7, 8))
    checkpoints.close()
    assert steps(tmp_path) == [3, 1, *([0] if keep_first else [])]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("metrics/metrics", "0.9", "0.1"),
        ("meta/metadata", "[7, 8]", "[7, 9]"),
        ("meta/metadata", '"frozen"', '"frozem"'),  # what has a check is not of version 0.1.0
    ],
)
def test_what_is_said_of_a_checkpoint_is_verified(tmp_path, name, before, after, caplog):
    """A metric that changed would choose another checkpoint."""
    checkpoints = Checkpoints(tmp_path, best_metric="m", max_to_keep=3)
    for step, value in ((1, 0.9), (2, 0.5)):
        checkpoints.save(step, state(step), {"m": value}, (7, 8))
    checkpoints.close()
    assert (best_steps(tmp_path, "m"), log_mark(tmp_path, 1)) == ([1, 2], [7, 8])
    file = tmp_path / "1" / name
    text = file.read_text()
    assert before in text or before.replace(" ", "") in text
    file.write_text(text.replace(before, after).replace(before.replace(" ", ""), after))
    assert best_steps(tmp_path, "m") == [2]
    assert "have changed" in caplog.text
    assert not is_sound(tmp_path, 1)
    Checkpoints(tmp_path, start=2).close()
    assert steps(tmp_path) == [2]


def test_a_checkpoint_at_another_one_s_place_is_not_taken_for_it(tmp_path, caplog):
    save_all(tmp_path, [0.1, 0.2, 0.3], max_to_keep=3)
    shutil.rmtree(tmp_path / "3")
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    assert load_newest(tmp_path)[0] == 2
    assert "3 is damaged: it holds step 1" in caplog.text
