"""Ctrl-C, SIGTERM and SIGHUP, sent at a point of the work: nothing lost, one line, no traceback."""

import http.server
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from commands import ENCODER, at_call, call, last_line, send, train

from siamese_jax import stopping
from siamese_jax.search.engine import cpu
from siamese_jax.storage import checkpoint
from siamese_jax.storage.vectors import VectorStore
from siamese_jax.train import loop
from siamese_jax.weights import download

pytestmark = [
    pytest.mark.usefixtures("cache", "small_trunk"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(autouse=True)
def handlers():
    """A runner in the background ignores some; afterwards all are as they were."""

    def own(number, frame):
        raise AssertionError("a signal reached the caller's handler")

    former = {name: signal.signal(getattr(signal, name), own) for name in CODES}
    yield
    for name, handler in former.items():
        assert signal.signal(getattr(signal, name), handler) is own


def test_training_stops_after_its_step_and_goes_on_to_the_same_bits(folder, tmp_path, capfd):
    """Three signals: between steps, in an evaluation, and at a step of no checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(folder, whole) == 0
    places = [
        ("SIGINT", loop, "check_finite", 4, "2 of 12"),
        ("SIGTERM", loop, "evaluate_state", 1, "6 of 12"),
        ("SIGHUP", loop, "measured", 1, "7 of 12"),
    ]
    for name, owner, function, number, said in places:
        capfd.readouterr()
        with at_call(owner, function, number, send(getattr(signal, name))):
            assert train(folder, cut) == CODES[name]
        line = last_line(capfd.readouterr().err)
        assert line.startswith(f"stopped by {name}: ")
        assert said in line
        assert f"--workdir={cut}" in shlex.split(line.partition("go on: ")[2])
        assert not (cut / "results.json").exists()
    assert train(folder, cut) == 0
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    (step, expected), (_, found) = (checkpoint.load_newest(w / "checkpoints") for w in (whole, cut))
    assert step == 12
    assert expected.keys() == found.keys()
    for leaf in expected:
        np.testing.assert_array_equal(found[leaf], expected[leaf], err_msg=leaf)


def test_what_was_embedded_is_kept(folder, tmp_path, capfd):
    """24 images in blocks of 8: two blocks before the signal, one after it."""
    argv = ["embed", *ENCODER, f"--images={folder}", f"--out={tmp_path / 'v.npz'}"]
    argv += [f"--cache-dir={tmp_path / 'cache'}"]
    with at_call(VectorStore, "append", 2, send(signal.SIGTERM)) as calls:
        assert call(*argv) == 143
    assert len(calls) == 2
    line = last_line(capfd.readouterr().err)
    assert "16 of 24 images are done" in line
    assert line.endswith(shlex.join(["siamese-jax", *argv]))
    assert not (tmp_path / "v.npz").exists()
    with at_call(VectorStore, "append", 0, send(0)) as calls:
        assert call(*argv) == 0
    assert len(calls) == 1
    with np.load(tmp_path / "v.npz") as file:
        assert len(file["vectors"]) == 24


def test_the_cache_of_a_run_is_kept(folder, tmp_path, capfd):
    options = ["--config.seed=7", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    with at_call(VectorStore, "append", 1, send(signal.SIGHUP)):
        assert train(folder, tmp_path / "run", *options, "--config.train.steps=1") == 129
    assert "8 of 24 images are done" in last_line(capfd.readouterr().err)
    with at_call(VectorStore, "append", 0, send(0)) as calls:
        assert train(folder, tmp_path / "run", *options, "--config.train.steps=1") == 0
    assert len(calls) == 2 + 2  # the rest of 24 plain images, and one view of 12


WORK = {
    "rank": (["rank"], cpu, "nearest", "the search begins again"),
}


@pytest.mark.parametrize("name", WORK)
def test_search_and_metrics_stop(name, folder, capfd):
    tool, owner, function, said = WORK[name]
    argv = [*tool, *ENCODER, f"--query={folder}"]
    with at_call(owner, function, 1, send(signal.SIGINT)):
        assert call(*argv) == 130
    assert said in last_line(capfd.readouterr().err)
    assert call(*argv) == 0


def test_a_download_keeps_its_part(tmp_path, monkeypatch):
    content = bytes(range(256)) * 8192  # two chunks

    class Response(io.BytesIO):
        status, headers = 200, {"Content-Length": str(len(content))}

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Response(content))
    real = Response.read
    monkeypatch.setattr(Response, "read", lambda self, n: (send(signal.SIGINT)(), real(self, n))[1])
    target = tmp_path / "weights.h5"
    with pytest.raises(stopping.Stopped, match="is kept"), stopping.heeding():
        download.fetch("http://nowhere.invalid/weights.h5", target, "sha256:00")
    assert (tmp_path / "weights.h5.part").read_bytes() == content[: 1 << 20]


# A data set of TFDS whose download takes its threads longer than anyone waits.
SLOW = """
import sys
import tensorflow_datasets as tfds
from siamese_jax.__main__ import process

class SlowPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=2)
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        manager.download([sys.argv[1] + "/a", sys.argv[1] + "/b"])

    def _generate_examples(self):
        raise AssertionError

process(["embed", "--encoder=resnet18", "--weights=random", "--images=tfds:slow_pictures",
         "--out=out.npz"])
"""


@pytest.fixture
def slow_server():
    """An address, and an event that says that something was asked for: it never comes whole."""
    asked, over = threading.Event(), threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"a")
            self.wfile.flush()
            asked.set()
            over.wait(100)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_download_of_tfds_ends_at_the_first_signal(name, slow_server, tmp_path):
    """Its threads wait for the network, and are waited for as Python ends: not here."""
    address, asked = slow_server
    places = {"TFDS_DATA_DIR": str(tmp_path), "SIAMESE_JAX_CACHE": str(tmp_path / "cache")}
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu", **places}
    command = [sys.executable, "-c", SLOW, address]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert asked.wait(120)
            process.send_signal(getattr(signal, name))
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert process.returncode == CODES[name]
    line = f"stopped by {name}: tfds:slow_pictures is not prepared; downloads that ended are kept"
    assert last_line(said).startswith(f"{line}; go on: ")
    assert "Traceback" not in said


BUSY = """
import os, signal, sys, threading, time
from siamese_jax import stopping
with stopping.heeding():
    print("ready", flush=True)
    threading.Thread(target=lambda: [os.kill(os.getpid(), {number}) or time.sleep(0.1)
                                     for _ in range({times})], daemon=True).start()
    time.sleep({seconds})  # as a compiler: it does not look
    stopping.check("all")
print("went on")
"""


def busy(name, times, seconds, before=""):
    code = before + BUSY.format(number=int(getattr(signal, name)), times=times, seconds=seconds)
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-c", "import signal\n" + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", CODES)
def test_a_second_signal_stops_at_once(name):
    default = f"signal.signal({int(getattr(signal, name))}, signal.SIG_DFL)\n"
    done = busy(name, times=2, seconds=50, before=default)
    assert done.returncode == CODES[name]
    assert "stopped at once" in last_line(done.stderr)


def test_a_signal_that_is_ignored_stays_so():
    """nohup: a terminal that closes does not stop the work."""
    done = busy("SIGHUP", times=2, seconds=0.5, before="signal.signal(1, signal.SIG_IGN)\n")
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "ready\nwent on\n")


def test_only_the_command_line_heeds():
    """A library's caller has its own handlers; a child process has them too."""
    with stopping.heeding():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.asked()
        with stopping.held():
            stopping.check("held")
        with pytest.raises(KeyboardInterrupt):
            stopping.check("seen")
    stopping.check("outside")
    seen = SimpleNamespace(number=0)
    former = signal.signal(signal.SIGTERM, lambda number, frame: setattr(seen, "number", number))
    os.kill(os.getpid(), signal.SIGTERM)
    assert seen.number == signal.SIGTERM
    assert not stopping.asked()
    signal.signal(signal.SIGTERM, former)
