"""What a run left, as plain values: two runs went the same way where these are equal."""

import json
from pathlib import Path

from siamese_jax.storage import checkpoint, run_folder
from siamese_jax.storage.tree import digest


def of_tools(workdir: Path) -> dict:
    """What every tool takes from a finished run."""
    run = run_folder.read(workdir, finished=True)
    step, leaves = checkpoint.load_chosen(run)
    results = {name: value for name, value in run.results.items() if name != "seconds"}
    facts = {name: value for name, value in run.facts.items() if name != "device"}
    return {"config": run.config, "facts": facts, "results": results, step: digest(leaves)}


def whole(workdir: Path) -> dict:
    """That, the newest checkpoint, the log, and TensorBoard's points."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    step, leaves = checkpoint.load_newest(workdir / "checkpoints")
    return of_tools(workdir) | {
        "log": [json.loads(line) for line in lines],
        "newest": (step, digest(leaves)),
        "points": points(workdir / "events"),
    }


def points(events: Path) -> list[tuple[str, int]]:
    """(name, step) of every point that TensorBoard would read."""
    import tensorflow as tf

    found = []
    for path in sorted(events.iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            found += [(value.tag, event.step) for value in event.summary.value]
    return sorted(found)
