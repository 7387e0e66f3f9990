"""Weights from the Hugging Face Hub, with its own client and a Hub on this machine."""

import hashlib
import http.server
import json
import threading

import jax
import numpy as np
import pytest
from huggingface_hub import constants

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.tools import weights as tool
from siamese_jax.trunks.table import IMAGENET
from siamese_jax.weights import download
from siamese_jax.weights.load import SOURCES
from siamese_jax.weights.port import names, schemes, shapes
from siamese_jax.weights.sources import Source

CONTENT = np.random.default_rng(0).bytes(1_000_000)
SOURCE = Source("torch", IMAGENET, 224, "Apache-2.0", "", hub="timm/small")
FILE = "/timm/small/resolve/main/model.safetensors"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers HEAD and GET for one file as the Hub does; `server.announced` is its ETag."""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer(self.server.content)

    def answer(self, body=b""):
        self.server.requests.append(self.command)
        announced, content = self.server.announced, self.server.content
        if self.path == FILE.replace("model.safetensors", "config.json") and self.server.config:
            content, announced = self.server.config, "0" * 40
            body = content if body else b""
        elif self.path != FILE:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("ETag", f'"{announced}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.content, server.requests, server.config = CONTENT, [], b""
    server.announced = hashlib.sha256(CONTENT).hexdigest()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def stop():
        server.shutdown()
        server.server_close()
        thread.join()
        server.stop = lambda: None

    server.stop = stop
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.stop()


def test_a_file_is_fetched_from_the_endpoint_checked_and_kept(hub, tmp_path):
    path = download.obtain(SOURCE, tmp_path)
    assert path.read_bytes() == CONTENT
    assert hub.requests == ["HEAD", "HEAD", "GET"]
    assert download.located(SOURCE, tmp_path) == path
    assert tmp_path / "weights" / "hub" in path.parents


def test_what_was_fetched_needs_no_hub(hub, tmp_path):
    path = download.obtain(SOURCE, tmp_path)
    hub.stop()
    assert download.obtain(SOURCE, tmp_path) == path
    assert hub.requests == ["HEAD", "HEAD", "GET"]


def test_a_wrong_hash_leaves_nothing(hub, tmp_path):
    hub.announced = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match=r"not the published .*deleted; fetch it again") as caught:
        download.obtain(SOURCE, tmp_path)
    assert not isinstance(caught.value, download.Unavailable)
    assert len(str(caught.value).splitlines()) == 1
    assert download.located(SOURCE, tmp_path) is None
    hub.announced = hashlib.sha256(CONTENT).hexdigest()
    assert download.obtain(SOURCE, tmp_path).read_bytes() == CONTENT


def test_a_file_damaged_in_the_cache_is_deleted_and_fetched_again(hub, tmp_path):
    path = download.obtain(SOURCE, tmp_path)
    path.resolve().write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match="not the published"):
        download.obtain(SOURCE, tmp_path)
    assert download.obtain(SOURCE, tmp_path).read_bytes() == CONTENT


def test_a_file_without_a_sha256_is_taken_with_a_warning(hub, tmp_path, caplog):
    hub.announced = "0" * 40  # the Hub names small files by their git hash
    assert download.obtain(SOURCE, tmp_path).read_bytes() == CONTENT
    assert "not checked" in caplog.text


def test_what_cannot_be_had_is_one_line(hub, tmp_path, monkeypatch):
    def refused(source):
        with pytest.raises(download.Unavailable) as caught:
            download.obtain(source, tmp_path)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    assert "404" in refused(SOURCE._replace(hub="timm/none"))
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "offline mode is enabled" in refused(SOURCE)
    hub.stop()
    assert "timm/small was not fetched from the Hub: [Errno" in refused(SOURCE)


def test_a_named_source_is_fetched_and_ported(hub, tmp_path, monkeypatch):
    """The whole way: our table, the Hub's client, safetensors, timm's names, a trunk."""
    from safetensors.numpy import save

    rng = np.random.default_rng(1)
    scheme = schemes("resnet18")["torch"]
    state = {}
    for path, shape in shapes("resnet18", "torch").items():
        order = (3, 2, 0, 1) if len(shape) == 4 else range(len(shape))
        leaf = rng.random([shape[axis] for axis in order], np.float32)
        state[names("resnet18", "torch", scheme)[path]] = leaf
    hub.content = save(state)
    hub.announced = hashlib.sha256(hub.content).hexdigest()
    monkeypatch.setitem(SOURCES, ("resnet18", "timm:small"), SOURCE)
    found = weights.load("resnet18", "timm:small", cache_dir=tmp_path)
    assert (found.source, found.sha256, found.form) == ("timm:small", hub.announced, "torch")
    kernel = found.variables["params"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, state["conv1.weight"].transpose(2, 3, 1, 0))
    hub.stop()
    again = weights.load("resnet18", "timm:small", cache_dir=tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)


def test_an_unlisted_name_is_taken_as_its_config_says(hub, tmp_path, monkeypatch, caplog):
    """Pixels, size and padding are told by config.json, which is fetched with the weights."""
    from safetensors.numpy import save

    trunk = "efficientnet_lite0"
    scheme, rng = schemes(trunk)["timm"], np.random.default_rng(1)
    theirs = names(trunk, "keras", scheme)
    order = lambda shape: (3, 2, 0, 1) if len(shape) == 4 else range(len(shape))  # noqa: E731
    hub.content = save(
        {
            theirs[path]: rng.random([shape[axis] for axis in order(shape)], np.float32)
            for path, shape in shapes(trunk, "keras").items()
        }
    )
    hub.announced = hashlib.sha256(hub.content).hexdigest()
    told = {"tag": "new", "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "input_size": [3, 160, 160]}
    told |= {"license": "cc-by-nc-4.0"}
    config = {"architecture": f"tf_{trunk}", "pretrained_cfg": told}
    hub.config = json.dumps(config).encode()
    monkeypatch.setattr(f"{__name__}.FILE", f"/timm/tf_{trunk}.new/resolve/main/model.safetensors")
    name = f"timm:tf_{trunk}.new"
    for _ in range(2):
        found = weights.load(trunk, name, cache_dir=tmp_path)
        assert (found.source, found.form, found.image_size) == (name, "keras", 160)
        assert found.preprocessing.mean == (127.5, 102.0, 76.5)
        assert (found.sha256, found.licence) == (hub.announced, "cc-by-nc-4.0")
        assert "by config.json beside it" in caplog.text
        hub.stop()
    assert tool.fetch(f"{trunk}={name}", tmp_path).name == "model.safetensors"
    with pytest.raises(UserError, match=r"timm/resnet18\.new was not fetched"):
        weights.load("resnet18", "timm:resnet18.new", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"no weights called so: .timm:resnet18\.new. is here the"):
        weights.load("resnet50", "timm:resnet18.new", cache_dir=tmp_path)


def test_an_unreachable_hub_falls_back_where_that_was_agreed(hub, tmp_path, monkeypatch):
    hub.stop()
    monkeypatch.setitem(SOURCES, ("resnet18", "timm:small"), SOURCE)
    with pytest.warns(weights.FallbackWarning, match="timm/small was not fetched from the Hub"):
        found = weights.load(
            "resnet18", "timm:small", offline_fallback="efficientnet_lite0", cache_dir=tmp_path
        )
    assert found.trunk == "efficientnet_lite0"
