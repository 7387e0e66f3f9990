"""Several processes as one program: their run is that of one process, and all end when one does."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import warm
from commands import call, last_line
from network import free_port

from siamese_jax import processes

pytestmark = pytest.mark.slow
RUN = [
    "train", "--config=resnet_triplet", "--config.trunk.name=resnet18",
    "--config.trunk.weights=random", "--config.trunk.image_size=32", "--config.trunk.stage=stage4",
    "--config.head.layers=8", "--config.head.dropout=0", "--config.sampler.batch_size=10",
    "--config.train.log_every=1", "--config.train.eval_every=3", "--config.optim.warmup_steps=0",
    "--config.optim.learning_rate=0.001", "--config.optim.name=sgd", "--config.data.source=folder",
    "--config.train.checkpoint_every=3", "--config.optim.schedule=constant",
]  # fmt: skip
MOVING = [
    "--config.trunk.freeze=stem,stage[123]", "--config.cache.enabled=False",
    "--config.train.rehearse=False",
]  # fmt: skip
FROZEN = ["--config.head.init=lda", "--config.train.steps=3"]
ENDLESS = [
    "--config.head.init=random", "--config.train.rehearse=False", "--config.trunk.stage=stage4",
    "--config.train.steps=100000", "--config.train.eval_every=100000",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    tiny.make_folder(root / "shop", classes=16, images=4, noise=60)
    (root / "shop" / "class0" / "broken.png").write_text("no picture")
    return root


def started(place, argv, count, more=lambda number: (), python=None):
    """The processes, each with a cache of its own, as machines have."""
    at = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"] if count > 1 else []
    found = []
    for number in range(count):
        own = [*at, f"--process-id={number}"] if at else []
        environment = tiny.environment(place / f"cache{count}-{number}")
        found.append(subprocess.Popen(
            [python or warm.python(), tiny.SMALL, *argv, *own, *more(number)], cwd=tiny.ROOT,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
    return found


def ended(running):
    """(exit code, standard output, standard error) of each."""
    said = [process.communicate(timeout=300) for process in running]
    return [(process.returncode, *text) for process, text in zip(running, said, strict=True)]


def trained(place, name, count, *options):
    argv = [*RUN, f"--config.data.root={place / 'shop'}", f"--workdir={place / name}", *options]
    found = ended(started(place, argv, count))
    assert [code for code, *_ in found] == [0] * count, found
    return found


def numbers(place, name):
    lines = (place / name / "metrics.jsonl").read_text().splitlines()
    return {(line["step"], key): value for line in map(json.loads, lines)
            for key, value in line.items() if key != "step"}  # fmt: skip


def results(place, name):
    return json.loads((place / name / "results.json").read_text())


def test_a_run_of_two_goes_on_as_one(place):
    """Each reads its rows of a batch; three steps of two processes, and the rest of one."""
    trained(place, "one", 1, *MOVING, "--config.train.steps=6")
    found = trained(place, "two", 2, *MOVING, "--config.train.steps=3")
    assert "2 devices: batches lie on them by rows" in found[0][2]
    assert found[1][1] == ""
    said = [line for line in found[1][2].splitlines() if not line.startswith("process 1: ")]
    assert said == []
    trained(place, "two", 1, *MOVING, "--config.train.steps=6")
    first, second = numbers(place, "one"), numbers(place, "two")
    assert first.keys() == second.keys()
    assert len(first) > 20
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, rtol=2e-4, atol=1e-5, err_msg=str(key))
    assert list(results(place, "two")["skipped"]) == list(results(place, "one")["skipped"])
    assert len(results(place, "two")["skipped"]) == 1


def test_features_are_shared_by_content(place):
    trained(place, "alone", 1, *FROZEN)
    trained(place, "shared", 2, *FROZEN, "--config.train.shard=state")
    one, other = results(place, "alone"), results(place, "shared")
    for block in ("test", "choices", "skipped", "saved"):
        assert one[block] == other[block]
    keys = [
        sorted((file.parent.name, len(file.read_bytes()))
               for file in (place / f"cache{name}" / "features").rglob("keys.bin"))
        for name in ("1-0", "2-0", "2-1")
    ]  # fmt: skip
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_one_is_killed_and_the_others_end(place, victim):
    name = f"killed{victim}"
    argv = [*RUN, *ENDLESS, f"--config.data.root={place / 'shop'}", f"--workdir={place / name}"]
    running = started(place, argv, 2, python=sys.executable)
    end = time.monotonic() + 120
    while not (place / name / "checkpoints" / "6").exists() and time.monotonic() < end:
        time.sleep(0.05)
    running[victim].kill()
    killed = time.monotonic()
    found = ended(running)
    assert time.monotonic() - killed < 20
    code, _, said = found[1 - victim]
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert "lost" in last
    assert "start all" in last
    assert "go on from what is saved" in last


def test_a_signal_to_one_stops_all_at_one_step(place):
    argv = [*RUN, *ENDLESS, f"--config.data.root={place / 'shop'}", f"--workdir={place / 'signal'}"]
    running = started(place, argv, 2)
    end = time.monotonic() + 120
    while not (place / "signal" / "checkpoints" / "3").exists() and time.monotonic() < end:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    found = ended(running)
    assert [code for code, *_ in found] == [128 + signal.SIGTERM] * 2
    held = [said.split("holds ")[1].split(";")[0] for _, _, said in found]
    assert held[0] == held[1]
    newest = max(int(p.name) for p in (place / "signal" / "checkpoints").iterdir()
                 if p.name.isdigit())  # fmt: skip
    assert held[0] == f"step {newest} of 100000"


def test_another_config_is_refused_by_all(place):
    argv = [*RUN, f"--config.data.root={place / 'shop'}", f"--workdir={place / 'refused'}"]
    found = ended(started(place, argv, 2, lambda number: [f"--config.seed={number}"]))
    line = (
        "error: process 1 has another config than process 0: seed (0 in process 0, 1 in process 1)"
    )
    for code, _, said in found:
        assert code == 2
        assert said.strip().splitlines()[-1].startswith(line)
    assert not (place / "refused").exists()


def test_a_folder_that_cannot_be_had_is_told_by_all(place):
    (place / "file").write_text("no folder")
    argv = [*RUN, f"--config.data.root={place / 'shop'}", f"--workdir={place / 'file'}"]
    for code, _, said in ended(started(place, argv, 2)):
        assert code == 2
        assert said.strip().splitlines()[-1].startswith(f"error: {place / 'file'} is a file")


def of_the_page(images, out):
    """The two commands of docs/clusters.md, on other images with a small trunk."""
    page = (tiny.ROOT / "docs" / "clusters.md").read_text()
    block = page.split("<!-- two terminals -->")[1].split("```")[1]
    lines = block.strip().splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["siamese-jax"] * 2
    ours = {"photos/": str(images), "photos.npz": str(out), "resnet50": "resnet18"}
    ours["127.0.0.1:8476"] = f"127.0.0.1:{free_port()}"
    for line in lines:
        for theirs, other in ours.items():
            assert theirs in line
            line = line.replace(theirs, other)
        yield [*shlex.split(line)[1:], "--weights=random", "--image-size=32"]


def test_embeddings_are_those_of_one_process(place):
    argv = ["embed", "--encoder=resnet18", "--weights=random", "--image-size=32",
            f"--images={place / 'shop'}", f"--out={place / 'one.npz'}"]  # fmt: skip
    assert ended(started(place, argv, 1))[0][0] == 0
    running = [
        subprocess.Popen(
            [warm.python(), tiny.SMALL, *argv], cwd=tiny.ROOT, text=True, stdout=subprocess.PIPE,
            env=tiny.environment(place / "common"), stderr=subprocess.PIPE,
        )
        for argv in of_the_page(place / "shop", place / "two.npz")
    ]  # fmt: skip
    found = ended(running)
    assert [code for code, *_ in found] == [0, 0], found
    one, other = (dict(np.load(place / f"{name}.npz")) for name in ("one", "two"))
    for name in ("vectors", "paths", "labels", "keys"):
        np.testing.assert_array_equal(one[name], other[name])
    assert len(one["vectors"]) == 64


@pytest.mark.parametrize(
    ("count", "loss", "rows"),
    [(2, "proxy_anchor", 3), pytest.param(4, "multi_similarity", 6, marks=pytest.mark.long)],
)
def test_losses_are_those_of_one_process(count, loss, rows):
    done = subprocess.run(
        [warm.python(), "benchmarks/certificate.py", "--devices", f"--processes={count}",
         f"--losses={loss}"],
        cwd=tiny.ROOT, env=os.environ | {"PYTHONPATH": str(tiny.ROOT)}, capture_output=True,
        text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines() if " processes " in line]
    assert len(found) == rows  # each case, with a memory or not, split in three ways
    for row in found:
        assert float(row[-1]) < 1e-12, row
        assert float(row[-2]) < 5e-6, row


# What needs no second process -------------------------------------------------------------------


def refused(capsys, *argv):
    assert call(*argv) == 2
    return last_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coordinator=here:1"], "--coordinator without --process-id and --processes"),
        (["--coordinator=here", "--process-id=0", "--processes=2"], "give HOST:PORT"),
        (["--coordinator=here:1", "--process-id=2", "--processes=2"], "--process-id=2: give a"),
        (["--coordinator=here:1", "--process-id=0", "--processes=0"], "--processes=0: give a"),
        (["--distributed=yes"], "--distributed=yes: it is auto"),
        (["--distributed=auto", "--processes=2"], "--distributed=auto: it is auto, without"),
    ],
)
def test_wrong_options(capsys, options, said):
    assert said in refused(capsys, "train", "--config=resnet_triplet", *options)


def test_a_tool_of_one_process(capsys):
    three = ["--coordinator=here:1", "--process-id=0", "--processes=2"]
    assert "rank runs in one process; several can run train or embed" in refused(
        capsys, "rank", *three
    )


def test_no_coordinator(monkeypatch, capsys):
    monkeypatch.setattr(processes, "WAIT", 1)
    at = f"127.0.0.1:{free_port()}"
    three = [f"--coordinator={at}", "--process-id=1", "--processes=2"]
    said = refused(capsys, "embed", "--encoder=resnet18", "--images=x", *three)
    assert f"--coordinator={at} was not reached in 1 s" in said


def test_alone_nothing_is_told():
    assert processes.told_by_all("x") == ["x"]
    assert processes.of_first({"a": 1}) == {"a": 1}
    rows = np.arange(6).reshape(3, 2)
    assert processes.joined(rows) is rows
    processes.agree("config", {"a": 1})
