"""Training on several devices, or on a batch in chunks: as one device on the whole batch."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import quick
import tiny
import warm

pytestmark = pytest.mark.slow
CERTIFICATE = """
import json, sys
sys.path.insert(0, {folder!r})
import certificate
certificate.meshes.LEAST = 1
for case in {cases}:
    for kind, found in certificate.differences(case, {devices}, ("float64",), ("classes",)):
        print(json.dumps([*case, *kind, found["float64"]]), flush=True)
"""


def on_devices(count, argv, **more):
    """A process that sees its CPU as so many devices."""
    flags = f"--xla_force_host_platform_device_count={count} {quick.FLAGS}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(
        [warm.python(), *argv],
        cwd=tiny.ROOT, env=environment | more, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


# One of each kind; all of them, in float32 too, are in the record that the documents show.
CASES = [
    ("triplet", "distance_weighted", 0), ("triplet", None, 10), ("multi_similarity", None, 10),
    ("sub_center_arcface", None, 0), ("proxy_anchor", None, 0), ("soft_triple", None, 0),
    ("smooth_ap", None, 0), ("recall_at_k", None, 0), ("n_pairs", None, 0),
]  # fmt: skip


def test_losses_miners_and_memory_are_those_of_one_device():
    """Loss, gradient and parameters of five steps, in float64, of rows that do not divide."""
    folder = str(tiny.ROOT / "benchmarks")
    script = CERTIFICATE.format(folder=folder, cases=CASES, devices=(4,))
    rows = [json.loads(line) for line in on_devices(8, ["-c", script]).stdout.splitlines()]
    assert [row[3:5] for row in rows] == [["classes", "4"], ["chunks", "1"]] * len(CASES)
    for row in rows:
        assert row[-1] < 1e-12, row


RUN = [
    "train", "--config=resnet_triplet", "--config.trunk.name=resnet18",
    "--config.trunk.weights=random", "--config.trunk.image_size=32", "--config.trunk.stage=stage4",
    "--config.trunk.freeze=stem,stage[123]", "--config.cache.enabled=False",
    "--config.head.layers=8", "--config.head.dropout=0", "--config.sampler.batch_size=10",
    "--config.train.rehearse=False",
    "--config.train.log_every=1", "--config.train.eval_every=3", "--config.optim.warmup_steps=0",
    "--config.optim.learning_rate=0.001", "--config.optim.name=sgd",
    "--config.train.checkpoint_every=3", "--config.data.source=folder",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("mesh")
    tiny.make_folder(root / "shop", classes=16, images=4, noise=60)
    return root


def trained(place, name, devices, *options, steps=6):
    argv = [*RUN, f"--config.data.root={place / 'shop'}", f"--workdir={place / name}"]
    argv += [f"--config.train.steps={steps}", "--config.optim.schedule=constant", *options]
    cache = {"SIAMESE_JAX_CACHE": str(place / "cache")}
    return on_devices(devices, [tiny.SMALL, *argv], **cache).stderr


def numbers(place, name):
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    return {(line["step"], key): value for line in map(json.loads, lines)
            for key, value in line.items() if key != "step"}  # fmt: skip


def assert_alike(place, one, other):
    first, second = numbers(place, one), numbers(place, other)
    assert first.keys() == second.keys()
    assert len(first) > 20
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=2e-4, atol=1e-5, err_msg=str(key))


def test_a_run_on_several_devices_and_its_rest_on_others(place):
    """10 images on 4 devices; resumed on 2, with parameters split; as the run on one."""
    said = trained(place, "one", 1, "--config.train.shard=state")
    assert "train.shard=state: there is one device, so nothing is split" in said
    said = trained(place, "several", 4, "--config.train.shard=state", steps=3)
    assert "4 devices: batches lie on them by rows; train.shard=state splits " in said
    assert "splits 0 leaves" not in said
    assert "a batch of 10 is filled up to 12 for 4 devices" in said
    trained(place, "several", 2, "--config.train.shard=state")
    assert_alike(place, "one", "several")


def test_a_run_in_chunks(place):
    trained(place, "whole", 1)
    trained(place, "chunks", 1, "--config.train.accumulate=3")
    assert_alike(place, "whole", "chunks")


def test_chunks_and_batch_statistics_are_refused(place):
    argv = [*RUN, f"--config.data.root={place / 'shop'}", f"--workdir={place / 'refused'}"]
    argv += ["--config.train.accumulate=2", "--config.trunk.batch_norm=train"]
    environment = os.environ | {"SIAMESE_JAX_CACHE": str(place / "cache")}
    done = subprocess.run([warm.python(), tiny.SMALL, *argv], cwd=tiny.ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert "train.accumulate=2: a chunk has other batch statistics" in done.stderr
    assert not (Path(place) / "refused" / "checkpoints").exists()


def test_embeddings_of_several_devices(place):
    files = []
    for devices in (1, 4):
        files.append(place / f"of{devices}.npz")
        argv = ["embed", "--encoder=resnet18", "--weights=random", "--image-size=32",
                f"--images={place / 'shop'}", f"--out={files[-1]}"]  # fmt: skip
        cache = {"SIAMESE_JAX_CACHE": str(place / f"cache{devices}")}
        on_devices(devices, [tiny.SMALL, *argv], **cache)
    one, several = (np.load(file)["vectors"] for file in files)
    assert len(one) == 64
    np.testing.assert_allclose(several, one, rtol=1e-5, atol=1e-6)
