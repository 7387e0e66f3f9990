"""The log of a run: what a run that goes on keeps of it, and what it says of it."""

import json

import numpy as np
import outcome
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from siamese_jax.errors import UserError
from siamese_jax.train.metrics_log import MetricsLog, read_curves


def write(folder, steps, begins=-1, mark=None):
    """The log of these steps, and its marks by step."""
    log, marks = MetricsLog(folder, begins, mark), {}
    for step in steps:
        log.write(step, {"loss": 1 / step, "a": step})
        marks[step] = log.mark
    log.close()
    return log.notes, marks


def steps_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_log_goes_on_where_the_checkpoint_is(tmp_path):
    _, marks = write(tmp_path, range(1, 8))
    notes, _ = write(tmp_path, range(5, 10), 4, marks[4])
    assert (notes, steps_of(tmp_path)) == ([], [*range(1, 10)])
    shown = outcome.points(tmp_path / "events")
    assert shown == sorted((name, step) for step in range(1, 10) for name in ("loss", "a"))
    read = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("loss")
    assert [(p.step, np.float32(p.value)) for p in read] == [
        (s, np.float32(1 / s)) for s in range(1, 10)
    ]
    assert read_curves(tmp_path / "metrics.jsonl")["loss"] == [(s, 1 / s) for s in range(1, 10)]
    notes, _ = write(tmp_path, [1], -1)  # a start without a checkpoint keeps nothing
    assert (notes, steps_of(tmp_path)) == ([], [1])


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: b"", []),
        (lambda data: data[:-8], [1, 2, 3]),  # in the fourth line
        (lambda data: data.replace(b'"step": 2', b'"step": 3', 1), [1, 3, 3, 4]),
        (lambda data: data.replace(b"0.5", b"0.7", 1), [1, 2, 3, 4]),
        (lambda data: data.replace(b'"step": 2', b"\xff\xfe", 1), [1, 3, 4]),
        (lambda data: data[:-1], [1, 2, 3, 4]),
    ],
)
def test_a_log_that_lost_something_is_said(damage, left, tmp_path):
    _, marks = write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    notes, _ = write(tmp_path, [5], 4, marks[4])
    assert len(notes) == 1
    assert f"up to 4 it has {len(left)} lines" in notes[0]
    assert steps_of(tmp_path) == [*left, 5]
    path.unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        read_curves(path)
    notes, _ = write(tmp_path, [5], 4)  # of version 0.1.0, without a mark
    assert "removed" in notes[0]
