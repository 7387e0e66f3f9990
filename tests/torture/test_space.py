"""A disk that is full, read-only, or gone; a device without memory: one line, and nothing lost."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import ENCODER, at_call, call, last_line, train

from siamese_jax import errors
from siamese_jax.encoder import model
from siamese_jax.storage import writing
from siamese_jax.storage.vectors import VectorStore
from siamese_jax.train import loop

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


OUTPUTS = {
    "embed npz": ["embed", "--images={folder}", "--out={out}.npz"],
    "embed csv": ["embed", "--images={folder}", "--out={out}.csv"],
    "rank html": ["rank", "--query={folder}", "--out={out}.html"],
    "rank jsonl": ["rank", "--query={folder}", "--out={out}.jsonl"],
    "evaluate json": ["evaluate", "--query={folder}", "--out={out}.json"],
    "per class": ["evaluate", "--query={folder}", "--per-class={out}.csv"],
    "whiten": ["whiten", "--images={folder}", "--dim=4", "--out={out}.folder"],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_leaves_the_former_file(name, folder, tmp_path, capfd):
    argv = [word.format(folder=folder, out=tmp_path / "out") for word in OUTPUTS[name]]
    argv = [argv[0], *ENCODER, *argv[1:]]
    written = tmp_path / argv[-1].rpartition("/")[2]
    former = written / "whitening.npz" if name == "whiten" else written
    former.parent.mkdir(exist_ok=True)
    former.write_text("the former file")
    number = 2 if name == "whiten" else 1  # its first file says what it belongs to
    # What is written by us counts, and not the cache: its rows are known from the case before.
    call("embed", *ENCODER, f"--images={folder}", f"--out={tmp_path / 'before.npz'}")
    with at_call(writing.os, "fsync", number, full):
        assert call(*argv) == 2
    line = last_line(capfd.readouterr().err)
    assert line.startswith(f"error: {former}: No space left on device; ")
    assert "untouched" in line
    assert former.read_text() == "the former file"
    assert not list(tmp_path.rglob("*.part"))


PLACES = {
    "a file for a folder": ("--out={base}/file/out.npz", "file is a file; choose another place"),
    "a folder": ("--out={base}/folder.npz", "is a folder"),
    "too long": ("--out={base}/" + 300 * "n" + ".npz", "File name too long"),
    "a device that is full": ("--out={base}/full.npz", "No space left on device"),
    "no file system for files": ("--out=/proc/out.npz", "No such file or directory"),
    "cache": ("--cache-dir={base}/file", "Not a directory"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_written(name, folder, tmp_path, capfd):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "full.npz").symlink_to("/dev/full")
    option, said = PLACES[name]
    argv = ["embed", *ENCODER, f"--images={folder}", f"--out={tmp_path / 'fine.npz'}"]
    assert call(*argv, option.format(base=tmp_path)) == 2
    line = last_line(capfd.readouterr().err)
    assert line.startswith("error: ")
    assert said in line


def test_the_cache_fills_the_disk(folder, tmp_path, capfd):
    argv = ["embed", *ENCODER, f"--images={folder}", f"--out={tmp_path / 'v.npz'}"]
    argv += [f"--cache-dir={tmp_path}"]
    with at_call(VectorStore, "append", 3, full):
        assert call(*argv) == 2
    line = last_line(capfd.readouterr().err)
    assert "16 of 24 images are done" in line
    assert "same command" in line
    with at_call(VectorStore, "append", 0, full) as calls:
        assert call(*argv) == 0
    assert len(calls) == 1


def test_a_run_whose_folder_vanishes(folder, tmp_path, capfd):
    run = tmp_path / "run"
    with at_call(loop, "check_finite", 5, lambda: shutil.rmtree(run)):
        assert train(folder, run) == 2
    line = last_line(capfd.readouterr().err)
    assert str(run) in line
    assert "No such file" in line
    assert train(folder, run) == 0


def make_read_only(disk):
    """The disk is busy until TensorStore's own threads have given up their files."""
    for _ in range(40):
        gc.collect()
        done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
        if done.returncode == 0:
            return
        time.sleep(0.25)
    pytest.fail(f"{disk} stays busy: {done.stderr}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of TensorStore
def test_a_run_on_a_small_disk(folder, tmp_path, capfd):
    """8 MB, of which the first checkpoint is 45."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    stack = contextlib.ExitStack()
    try:
        with contextlib.suppress(OSError), open(disk / "rest", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert train(folder, disk / "run") == 2
        line = last_line(capfd.readouterr().err)
        assert line.startswith(f"error: {disk / 'run' / 'lock'}: No space left on device")
        (disk / "rest").unlink()
        assert train(folder, disk / "run") == 2
        line = last_line(capfd.readouterr().err)
        assert "No space left on device" in line
        assert str(disk / "run") in line
        make_read_only(disk)
        assert train(folder, disk / "run") == 2
        assert "Read-only file system" in last_line(capfd.readouterr().err)
        with pytest.raises(OSError, match=re.escape(f"{disk / 'v.npz'}'")):
            stack.enter_context(writing.written(disk / "v.npz"))
        subprocess.run(["mount", "-o", "remount,rw,size=500m", str(disk)], check=True)
        assert train(folder, disk / "run") == 0
        json.loads((disk / "run" / "results.json").read_text())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_an_error_of_the_system_in_a_library_s_words(tmp_path):
    with pytest.raises(OSError, match="No space") as raised, errors.naming(tmp_path, "all is safe"):
        raise ValueError("DATA_LOSS: writing: No space left on device [OS error 28]")
    line = errors.os_error_line(raised.value)
    assert line.startswith(f"{tmp_path}: No space left on device; all is safe; free some space")
    with pytest.raises(ValueError, match="another"), errors.naming(tmp_path):
        raise ValueError("another mistake")


def test_a_device_without_memory_halves_the_block(rng, caplog, monkeypatch):
    monkeypatch.setattr(model, "_room", {})
    rows = rng.normal(size=(37, 5)).astype(np.float32)
    seen = set()

    def compute(block):
        seen.add(len(block))
        if len(block) > 6:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return jax.numpy.asarray(block) * 2

    for expected in ({25, 12, 6}, {6}):  # the second time it knows
        np.testing.assert_array_equal(model.in_blocks(compute, rows, 25), rows * 2)
        assert seen == expected
        seen.clear()
    assert [record.args for record in caplog.records] == [(12,), (6,)]

    def broken(block):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        model.in_blocks(broken, rows, 25)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("options", [[], ["--help"], ["weights", "trunks"]])
def test_standard_output_is_full(options):
    with open("/dev/full", "w") as file:
        command = [sys.executable, "-m", "siamese_jax", *options]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


def test_help_may_be_read_in_part():
    """`... --help | head -1`: the reader is gone before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "siamese_jax", "rank", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.stderr == ""
