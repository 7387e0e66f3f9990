"""What version 0.1.0 left on disk: runs, a whitening, a gallery and cached embeddings.

`fixtures/version_0_1_0.tar.gz` was written by it: six classes of four small pictures; `finished`, a
run of eight steps; `stopped`, one that was cut off after step 4, and how it ended where it was not;
and what its tools said of them.
"""

import csv
import json
import os
import subprocess
import tarfile

import numpy as np
import pytest
import tiny
import warm
from ml_collections import ConfigDict

import siamese_jax as sj
from siamese_jax.errors import UserError
from siamese_jax.storage import run_folder
from siamese_jax.train.fields import EARLIER, check_config, completed


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The unpacked folder."""
    place = tmp_path_factory.mktemp("older")
    with tarfile.open(tiny.ROOT / "tests" / "fixtures" / "version_0_1_0.tar.gz") as archive:
        archive.extractall(place, filter="data")
    return place / "old"


def run(old, *arguments):
    """A command in that folder, on its cache."""
    done = subprocess.run(
        [warm.python(), *arguments],
        cwd=old,
        env=tiny.environment(old / "cache") | {"PYTHONPATH": os.fspath(tiny.ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(old, *arguments):
    return run(old, "-m", "siamese_jax", *arguments)


def test_a_stopped_run_goes_on(old):
    config = json.loads((old / "runs" / "stopped" / "config.json").read_text())
    expected = json.loads((old / "expected" / "stopped_results.json").read_text())
    program = (
        "import json, sys; from ml_collections import ConfigDict;"
        "from siamese_jax.train.experiment import train;"
        "train(ConfigDict(json.load(open('runs/stopped/config.json'))), 'runs/stopped')"
    )
    run(old, "-c", program)
    found = json.loads((old / "runs" / "stopped" / "results.json").read_text())
    assert config["train"]["steps"] == found["checkpoint_step"] == expected["checkpoint_step"]
    assert found["test"]["before"] == expected["test"]["before"]
    for name, value in expected["test"]["after"].items():
        assert found["test"]["after"][name] == pytest.approx(value, abs=0.1), name
    logs = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (
            old / "runs" / "stopped" / "metrics.jsonl",
            old / "expected" / "stopped_metrics.jsonl",
        )
    ]
    losses = [{row["step"]: row["loss"] for row in log if "loss" in row} for log in logs]
    assert losses[0].keys() == losses[1].keys()
    # Processors differ in the last digits of the trunk's features.
    np.testing.assert_allclose([*losses[0].values()], [*losses[1].values()], rtol=1e-3)


def test_a_config_of_it_is_completed(old):
    stored = json.loads((old / "runs" / "finished" / "config.json").read_text())
    with pytest.raises(UserError, match="lacks the field"):
        check_config(ConfigDict(stored))
    config = completed(ConfigDict(stored))
    check_config(config)
    assert config.trunk.offline_fallback is config.data.layout is None
    found = run_folder.begun(old / "runs" / "finished", config.to_dict(), earlier=EARLIER)
    assert found is not None


def test_a_finished_run_ranks(old):
    tool(old, "rank", "--encoder=runs/finished", "--no-whitening", "--query=pictures/class0",
         "--gallery=pictures", "-k", "3", "--out=new.csv")  # fmt: skip
    tables = []
    for name in ("new.csv", "expected/a.csv"):
        with open(old / name, newline="") as file:
            tables.append([*csv.DictReader(file)])
    assert len(tables[0]) == len(tables[1]) == 12
    new, was = (np.array([float(row["distance"]) for row in table]) for table in tables)
    np.testing.assert_allclose(new, was, atol=1e-4)
    same = [a["gallery"] == b["gallery"] for a, b in zip(*tables, strict=True)]
    assert np.mean(same) > 0.8


def test_its_embeddings_its_whitening_and_its_gallery(old, monkeypatch):
    monkeypatch.chdir(old)
    expected = np.load("expected/a.npz")
    encoder = sj.load_encoder("runs/finished", whitening=False)
    found = sj.embed_folder(encoder, "pictures", cache_dir=old / "other")
    np.testing.assert_allclose(found.vectors, expected["vectors"], atol=1e-4)
    whitened = sj.load_encoder("runs/finished")
    assert whitened.parts[0].fingerprint == encoder.fingerprint
    gallery = sj.Gallery.load("gallery")
    ranking = sj.rank(expected["vectors"], gallery, k=1)
    assert ranking.indices[:, 0].tolist() == list(range(24))


def test_an_evaluation_is_compared_with_it(old):
    tool(old, "evaluate", "--encoder=runs/finished", "--no-whitening", "--out=new.json")
    assert "recall@1" in tool(old, "diff", "expected/b.json", "new.json")
