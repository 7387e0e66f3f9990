"""`main.py` as a user runs it: trained, killed, resumed, and given nonsense."""

import csv
import functools
import json
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny

from siamese_jax.data.preprocess import read_image
from siamese_jax.data.sources import load_records
from siamese_jax.encoder.load import load_encoder
from siamese_jax.errors import UserError
from siamese_jax.storage import checkpoint
from siamese_jax.tools.images import own_records

pytestmark = pytest.mark.usefixtures("small_trunk")
run = functools.partial(tiny.run, script=tiny.SMALL)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("data") / "shop")


def read_log(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(cache, folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "cached"
    done = run(cache, *tiny.TINY, f"--config.data.root={folder}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_its_results(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    after = results["test"]["after"]
    assert set(results["test"]) == {"before", "fitted", "after", "gain, low", "gain, high"}
    assert "the bare trunk" in results["verdict"]["test"]
    assert results["saved"] == "step 12"
    assert 0 <= after["recall@1"] <= after["recall@5"] <= after["recall@10"] <= 1
    assert f"{after['recall@1']:.4f}" in done.stdout
    assert results["split"]["test"]["classes"] == results["split"]["train"]["classes"] == 3
    assert results["trunk"]["source"] == "random"
    assert results["checkpoint_step"] == 12
    page = (workdir / "report" / "index.html").read_text()
    assert "data:image" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    facts = json.loads((workdir / "run.json").read_text())
    assert len(facts["data"]["fingerprint"]) == 32
    assert facts["versions"]["jax"]
    steps = [line["step"] for line in read_log(workdir) if "loss" in line]
    assert steps == list(range(1, 13))
    assert list((workdir / "events").iterdir())
    last = [line for line in read_log(workdir) if "test/recall@1" in line][-1]
    assert last["step"] == 12
    logged = {name.removeprefix("test/"): v for name, v in last.items() if name != "step"}
    assert logged == {name: after[name] for name in logged}


def test_a_folder_with_faults_is_trained_on(cache, tmp_path):
    """A text file named .jpg, an empty class and a class of one image: said, and got over."""
    root = tiny.make_folder(tmp_path / "shop")
    (root / "class0" / "note.jpg").write_text("no picture")
    (root / "empty").mkdir()
    for image in list((root / "class5").iterdir())[1:]:
        image.unlink()
    workdir = tmp_path / "run"
    done = run(cache, *tiny.TINY, f"--config.data.root={root}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "note.jpg" in done.stderr
    assert "empty" in done.stderr
    results = json.loads((workdir / "results.json").read_text())
    assert [path.rsplit("/", 1)[1] for path in results["skipped"]] == ["note.jpg"]
    assert results["data"]["images"] == 21
    strict = run(
        cache,
        *tiny.TINY,
        f"--config.data.root={root}",
        f"--workdir={tmp_path / 'strict'}",
        "--config.data.strict=True",
    )
    assert strict.returncode == 2
    assert "note.jpg" in strict.stderr.strip().splitlines()[-1]


def test_images_with_several_labels_are_trained_on(cache, folder, tmp_path):
    """Colours and shapes in one CSV; two images match that share either. One `main.py`."""
    table, workdir = tmp_path / "several.csv", tmp_path / "run"
    rows = []
    for c in range(6):
        for i in range(4):
            split = "train" if i < 2 else "test"
            rows.append([f"class{c}/{i}.png", f"colour{c % 3} ; shape{c % 2}", split])
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    options = [
        *tiny.TINY,
        "--config.data.source=csv",
        f"--config.data.root={table}",
        f"--config.data.images={folder}",
        "--config.train.steps=3",
        f"--workdir={workdir}",
    ]
    done = run(cache, *options, "--config.data.separator=;")
    assert done.returncode == 0, done.stderr
    assert "train: 12 images of 5 classes" in done.stderr
    results = json.loads((workdir / "results.json").read_text())
    after = results["test"]["after"]
    assert results["split"]["test"] == {"images": 12, "classes": 5, "queries": 12, "gallery": 12}
    assert (after["queries"], after["lone_queries"]) == (12, 0)
    assert [line["step"] for line in read_log(workdir) if "loss" in line] == [1, 2, 3]
    # Each image shares its colour with 3 others of the 11, its shape with 5, and both with 1.
    with np.load(workdir / "report" / "per_query_test.npz") as arrays:
        assert set(arrays["relevant"]) == {7}
    assert "colour0, shape0" in (workdir / "report" / "index.html").read_text()
    # The tools read the run's data as it was; without a split there is no rule to make one.
    assert len(own_records([str(workdir)])[1].class_names) == 5
    table.write_text("path,label\n" + "".join(f"{row[0]},{row[1]}\n" for row in rows))
    with pytest.raises(UserError, match="give the CSV a column 'split'"):
        load_records("csv", table, images=str(folder), separator=";")


@pytest.mark.parametrize(
    ("made", "said"), [("nothing", "neither images nor folders"), ("flat", "class")]
)
def test_folders_that_cannot_be_trained_on(cache, tmp_path, made, said):
    root = tmp_path / "shop"
    root.mkdir()
    if made == "flat":
        tiny.make_folder(tmp_path / "other")
        (tmp_path / "other" / "class0" / "0.png").rename(root / "0.png")
    done = run(cache, *tiny.TINY, f"--config.data.root={root}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert str(root) in last


def test_a_finished_run_is_not_run_again(finished, cache, folder):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(cache, *tiny.TINY, f"--config.data.root={folder}", f"--workdir={workdir}")
    assert again.returncode == 0
    assert "recall@1" in again.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_run_that_gets_worse_ends_with_its_best(cache, tmp_path):
    """A rate that grows until it ruins the head; then again, from the last checkpoint."""
    root = tiny.make_folder(tmp_path / "shop", classes=18, noise=160)
    workdir = tmp_path / "run"
    options = [
        *tiny.TINY,
        f"--config.data.root={root}",
        "--config.head.init=pca",
        "--config.data.validation_fraction=0.33",
        "--config.data.test_fraction=0.33",
        "--config.optim.learning_rate=3.0",
        "--config.optim.warmup_steps=12",
        "--config.train.eval_every=2",
        "--config.train.max_to_keep=1",
        f"--workdir={workdir}",
    ]
    done = run(cache, *options)
    assert done.returncode == 0, done.stderr
    name = "validation/map@r"
    logged = {line["step"]: line[name] for line in read_log(workdir) if name in line}
    best = max(logged, key=lambda step: (logged[step], -step))
    assert list(logged) == [0, 2, 4, 6, 8, 10, 12]
    assert logged[best] > logged[12]
    results = json.loads((workdir / "results.json").read_text())
    assert (results["checkpoint_step"], results["chosen_by"]) == (best, "validation")
    assert f"step {best} is the best on validation" in done.stderr
    after = results["validation"]["after"]
    assert after["map@r"] == logged[best]
    assert f"{after['recall@1']:.4f}" in done.stdout
    assert checkpoint.steps(workdir / "checkpoints") == sorted({best, 12}, reverse=True)
    # The encoder that every tool loads is the one that was measured.
    encoder = load_encoder(workdir)
    assert encoder.provenance["step"] == best
    part = own_records([str(workdir)])[1].where("validation")
    vectors = encoder(np.stack([read_image(path, (32, 32)) for path in part.path]))
    apart = np.square(vectors[:, None] - vectors[None]).sum(-1) + np.diag([np.inf] * len(part))
    found = part.label[apart.argmin(axis=1)] == part.label
    assert found.mean() == pytest.approx(after["recall@1"], abs=1e-6)
    # Gone on with, the run makes the same choice.
    (workdir / "results.json").unlink()
    again = run(cache, *options)
    assert again.returncode == 0, again.stderr
    assert "resumed at step 12" in again.stderr
    once_more = json.loads((workdir / "results.json").read_text())
    assert once_more | {"seconds": 0} == results | {"seconds": 0}


def test_another_config_is_refused(finished, cache, folder):
    workdir, _ = finished
    other = run(
        cache,
        *tiny.TINY,
        f"--config.data.root={folder}",
        f"--workdir={workdir}",
        "--config.loss.margin=0.7",
    )
    assert other.returncode == 2
    assert "loss.margin (0.2 there, 0.7 now)" in other.stderr
    assert other.stderr.count("\n") == 1


def kill_when(process, reached):
    """kill -9 as soon as `reached()` is true; fails where the process ends by itself."""
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_exactly(kept, cache, folder, tmp_path):
    """20 steps, against 9 or more, kill -9, and the rest: equal bit for bit.

    The last stage of the trunk, the real one, moves, with batch statistics, dropout, augmentation
    and an average of the weights; what the stages before it give is kept, or not.
    """
    options = [
        *tiny.TINY,
        f"--config.data.root={folder}",
        "--config.trunk.freeze=('stem','stage[123]')",
        "--config.trunk.batch_norm=train",
        f"--config.cache.enabled={kept}",
        "--config.optim.ema=0.9",
        "--config.train.steps=20",
        "--config.train.checkpoint_every=4",
        "--config.train.eval_every=10",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = tiny.run(cache, *options, f"--workdir={whole}")
    assert done.returncode == 0, done.stderr
    assert ("is computed once and kept" in done.stderr) == kept
    process = subprocess.Popen(
        tiny.command(*options, f"--workdir={cut}"),
        cwd=tiny.ROOT,
        env=tiny.environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = cut / "metrics.jsonl"
    kill_when(process, lambda: log.exists() and log.read_text().count('"loss"') >= 9)
    assert not (cut / "results.json").exists()
    resumed = tiny.run(cache, *options, f"--workdir={cut}")
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed at step" in resumed.stderr

    assert read_log(cut) == read_log(whole)
    (step, expected), (_, found) = (checkpoint.load_newest(w / "checkpoints") for w in (whole, cut))
    assert step == 20
    assert expected.keys() == found.keys()
    assert any("opt_state" in name and "stage4" in name for name in expected)
    assert any("ema/params" in name and "stage4" in name for name in expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_a_damaged_checkpoint_is_passed_over(finished, cache, folder):
    """With its newest checkpoint damaged, a run goes on from the one before."""
    source, _ = finished
    workdir = source.parent / "damaged"
    options = [*tiny.TINY, f"--config.data.root={folder}", "--config.train.max_to_keep=3"]
    done = run(cache, *options, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    newest, before, *_ = checkpoint.steps(workdir / "checkpoints")
    for path in (workdir / "checkpoints" / str(newest) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    (workdir / "results.json").unlink()
    again = run(cache, *options, f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert "is damaged" in again.stderr
    assert f"resumed at step {before}" in again.stderr
    assert load_encoder(workdir).provenance["step"] == newest  # written anew
    assert read_log(workdir) == read_log(source)


def test_a_mistake_does_not_claim_the_folder(cache, folder, tmp_path):
    """A mistake corrected, the same --workdir serves."""
    options = [*tiny.TINY, f"--workdir={tmp_path / 'w'}", "--config.train.steps=1"]
    wrong = run(cache, *options, "--config.data.root=/no/such/folder")
    assert wrong.returncode == 2
    right = run(cache, *options, f"--config.data.root={folder}")
    assert right.returncode == 0, right.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.optim.lerning_rate=1"], "lerning_rate"),
        (["--config.train.steps=many"], "train.steps"),
        (["--config.trunk.name=resnet51"], "resnet51"),
        (["--config.trunk.weights=/no/such/file.h5"], "/no/such/file.h5"),
        (["--config.trunk.freeze=('stage9',)"], "stage9"),
        (["--config.loss.name=tripelt"], "tripelt"),
        (["--config.distance=manhattan"], "manhattan"),
        (["--config.head.dropout=1.5"], "head.dropout"),
        (["--config.data.root=/no/such/folder"], "/no/such/folder"),
        (["--config.data.source=folders"], "folders"),
        (["--config.optim.name=adamm"], "adamm"),
        (["stray"], "stray"),
    ],
)
def test_a_mistake_is_one_line(cache, folder, tmp_path, arguments, said):
    done = run(
        cache, *tiny.TINY, f"--config.data.root={folder}", f"--workdir={tmp_path / 'w'}", *arguments
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(cache, folder, tmp_path):
    done = run(
        cache,
        *tiny.TINY,
        f"--config.data.root={folder}",
        f"--workdir={tmp_path / 'w'}",
        "--config.optim.learning_rate=1e38",
        "--config.optim.warmup_steps=0",
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "the loss is" in last
    assert "ids" in last
    assert "checkpoint" in last
