"""Files as people have them: every kind of file, every wrapper, by load_encoder and a command."""

import json
import logging
import zipfile

import numpy as np
import pytest
import torch_files as tf
from PIL import Image

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.__main__ import main
from siamese_jax.errors import UserError
from siamese_jax.trunks.table import HALF, IMAGENET, PREPROCESSING, as_preprocessing
from siamese_jax.weights import fit, formats, origin
from siamese_jax.weights.namings import names, schemes, shapes

TRUNK, SIZE = "efficientnet_lite0", 32


def state_of(trunk, naming, seed=0, dtype=np.float16):
    """Random leaves in a library's names and layout, in half precision to keep the files small."""
    rng, scheme = np.random.default_rng(seed), schemes(trunk)[naming]
    state = {}
    wanted = names(trunk, scheme.form, scheme)
    for path, shape in shapes(trunk, scheme.form).items():
        positive = path.endswith(("/var", "norm/scale"))
        scale = np.sqrt(2 / np.prod(shape[:-1])) if len(shape) == 4 else 0.2
        leaf = rng.uniform(0.5, 1.5, shape) if positive else rng.normal(0, scale, shape)
        if len(shape) == 4 and not scheme.keras:
            leaf = leaf.transpose(3, 2, 0, 1)
        elif path.endswith("depthwise/kernel"):
            leaf = leaf.transpose(0, 1, 3, 2)
        state[wanted[path]] = np.ascontiguousarray(leaf, dtype)
    return state


@pytest.fixture(scope="module")
def state():
    return state_of(TRUNK, "timm")


@pytest.fixture(scope="module")
def other():
    return state_of(TRUNK, "timm", seed=1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def vectors(encoder, images):
    found = sj.embed_folder(encoder, images, cache_dir=images / ".cache")
    return np.asarray(found.vectors)


@pytest.fixture(scope="module")
def expected(state, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    tf.write_zip(path, *tf.state_dict(state))
    return vectors(sj.load_encoder(TRUNK, path, SIZE), images)


def command(images, tmp_path, file, *options, trunk=TRUNK):
    """The vectors that the command line writes, or its exit code."""
    out = tmp_path / "vectors.npz"
    argv = ["embed", f"--encoder={trunk}", f"--weights={file}", f"--images={images}"]
    argv += ["--labels=none", f"--image-size={SIZE}", f"--out={out}", *options]
    code = main([*argv, f"--cache-dir={tmp_path / 'cache'}"])
    return np.load(out)["vectors"] if code == 0 else code


def both_ways(images, tmp_path, file, expected, **options):
    found = vectors(sj.load_encoder(TRUNK, file, SIZE, **options), images)
    np.testing.assert_array_equal(found, expected)
    flags = [f"--{key}={value}" for key, value in options.items()]
    np.testing.assert_array_equal(command(images, tmp_path, file, *flags), expected)


# Wrappers. Each gives the pickle of a checkpoint that has `state` in it, and what to ignore.


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def entry(*path):
    """{"a": {"b": state}} beside what trainers keep there."""

    def wrap(storages, state, other):
        value = storages.add_all(state)
        for key in reversed(path):
            value = tf.mapping({key: value, "epoch": tf.integer(3)})
        return value

    return wrap


def below(prefix):
    return lambda storages, state, other: storages.add_all(prefixed(prefix, state))


def optimiser(storages):
    moments = {"exp_avg": np.ones(5, np.float16), "step": np.zeros(2, np.int64)}
    states = {0: {key: storages.add(array) for key, array in moments.items()}}
    groups = [{"lr": 0.1, "betas": [0.9, 0.999], "params": [0]}]
    return tf.plain({"state": states, "param_groups": groups})


def imagenet_example(storages, state, other):
    return tf.plain(
        {
            "epoch": 90,
            "arch": TRUNK,
            "state_dict": storages.add_all(prefixed("module.", state)),
            "best_acc1": storages.add(np.ones(1, np.float16)),
            "optimizer": optimiser(storages),
            "args": tf.new("argparse", "Namespace", {"arch": TRUNK, "lr": 0.1, "path": None}),
        }
    )


def lightning(storages, state, other):
    hyper = tf.new("pytorch_lightning.utilities.parsing", "AttributeDict", None)
    hyper += b"(" + tf.text("backbone") + tf.text("timm") + b"u"
    return tf.plain(
        {
            "epoch": 3,
            "pytorch-lightning_version": "2.4.0",
            "state_dict": storages.add_all(prefixed("model.backbone.", state)),
            "optimizer_states": [optimiser(storages)],
            "callbacks": {"ModelCheckpoint": tf.new("my.project", "Settings", {"best": 0.5})},
            "hparams_name": "kwargs",
            "hyper_parameters": hyper,
        }
    )


def whole_module(storages, state, other):
    """torch.save(model): the classes are only named, the tensors lie in `_parameters`."""

    def module(leaves):
        own = {key: storages.add(leaf) for key, leaf in leaves.items() if "." not in key}
        children = {}
        for key, leaf in leaves.items():
            child, _, rest = key.partition(".")
            if rest:
                children.setdefault(child, {})[rest] = leaf
        kinds = {True: {}, False: {}}
        for key, value in own.items():
            kinds[key.startswith("running")][key] = value
        inside = {"training": 0, "_parameters": kinds[False] | {"none": None}}
        inside |= {"_buffers": kinds[True]}
        inside["_modules"] = {key: module(rest) for key, rest in children.items()}
        return tf.new("timm.models.efficientnet", "EfficientNet", inside)

    return tf.plain({"model": module(state), "epoch": 4})


def ema(storages, state, other):
    average = storages.add_all(state)
    return tf.plain({"state_dict": storages.add_all(other), "state_dict_ema": average})


def beside(trained, averaged):
    def wrap(storages, state, other):
        average = storages.add_all(state)
        return tf.plain({trained: storages.add_all(other), averaged: average})

    return wrap


def dino(storages, state, other):
    teacher = storages.add_all(prefixed("module.backbone.", state))
    student = storages.add_all(prefixed("module.backbone.", other))
    loss = storages.add_all({"center": np.ones((1, 5), np.float16)})
    return tf.plain({"student": student, "teacher": teacher, "dino_loss": loss, "epoch": 1})


def moco(storages, state, other):
    both = prefixed("module.encoder_k.", other) | prefixed("module.encoder_q.", state)
    return tf.plain({"state_dict": storages.add_all(both)})


def with_head(storages, state, other):
    head = {"projector.0.weight": np.ones((4, 4), np.float16), "queue": np.ones(3, np.float16)}
    return storages.add_all(prefixed("backbone.", state) | head)


WRAPPERS = {
    "plain": (below(""), None),
    **{key: (entry(key), None) for key in ("state_dict", "model_state_dict", "net", "model")},
    **{key: (entry(key), None) for key in ("model_ema", "ema", "teacher", "student", "weights")},
    "two deep": (entry("checkpoint", "state_dict"), None),
    **{
        prefix: (below(prefix), None)
        for prefix in ("module.", "backbone.", "encoder.", "trunk.", "features.", "_orig_mod.")
    },
    "many": (below("module._orig_mod.model.backbone."), None),
    "ImageNet's example": (imagenet_example, None),
    "Lightning": (lightning, None),
    "a whole module": (whole_module, None),
    "an average beside": (ema, None),
    "two in one restorer's file": (beside("params", "params_ema"), None),
    "stochastic weight averaging": (beside("model", "swa_model"), None),
    "averaged": (beside("model", "averaged_model"), None),
    "DINO": (dino, None),
    "MoCo": (moco, None),
    "foreign leaves": (with_head, r"^projector\.|queue"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_is_taken_off(wrapper, state, other, images, expected, tmp_path):
    wrap, ignore = WRAPPERS[wrapper]
    storages = tf.Storages()
    path = tmp_path / "file.pth"
    tf.write_zip(path, tf.pickle(wrap(storages, state, other)), storages)
    both_ways(images, tmp_path, path, expected, **({"ignore": ignore} if ignore else {}))
    path.unlink()


# Kinds of files, each holding a checkpoint where it can.


def write_torch(writer, wrap):
    def write(path, state):
        storages = tf.Storages()
        writer(path, tf.pickle(wrap(storages, state, {})), storages)

    return write


def write_safetensors(path, state):
    from safetensors.numpy import save

    path.write_bytes(save(prefixed("backbone.", state)))


def write_npz(path, state):
    with path.open("wb") as file:
        np.savez(file, **state)


checkpoint = write_torch(tf.write_zip, imagenet_example)
old = write_torch(tf.write_old, imagenet_example)
KINDS = {
    "a.pth": checkpoint,
    "a.pth.tar": checkpoint,
    "a.ckpt": write_torch(tf.write_zip, lightning),
    "a.pt": checkpoint,
    "pytorch_model.bin": checkpoint,
    "checkpoint": checkpoint,
    "best.model": checkpoint,
    "old.pth": old,
    "old.pth.tar": old,
    "old": old,
    "a.safetensors": write_safetensors,
    "0af12548": write_safetensors,
    "a.npz": write_npz,
    "npz": write_npz,
    "wrong.h5": checkpoint,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_files_format_is_told_by_its_content(name, state, images, expected, tmp_path):
    path = tmp_path / name
    KINDS[name](path, state)
    both_ways(images, tmp_path, path, expected)
    path.unlink()


@pytest.mark.parametrize("padded", ["GLOBAL", "STACK_GLOBAL"])
def test_what_a_checkpoint_keeps_is_never_made(padded, state, tmp_path, monkeypatch):
    """A class is only named; a call of the system is refused even beside good tensors."""
    monkeypatch.chdir(tmp_path)
    called = tf.name("os", "system")
    if padded == "STACK_GLOBAL":
        called = tf.text("os") + tf.text("system") + b"\x93"
    hostile = tf.call(called, tf.items(tf.text("touch was-here")))
    storages = tf.Storages()
    tf.write_zip("a.pth", tf.pickle(tf.plain({"state_dict": storages.add_all(state)})), storages)
    assert len(weights.load(TRUNK, "a.pth").variables) == 2
    for value in (hostile, tf.new("my.project", "Config", {"a": hostile})):
        storages = tf.Storages()
        program = tf.plain({"state_dict": storages.add_all(state), "args": value})
        tf.write_zip("a.pth", tf.pickle(program), storages)
        with pytest.raises(UserError, match=r"wants to call os\.system"):
            weights.load(TRUNK, "a.pth")
    assert not (tmp_path / "was-here").exists()


def test_dicts_that_hold_each_other_end(state, tmp_path):
    """One that holds itself, and forty that each hold the one before twice: 2^40 ways through."""
    laughs = b"}q\x00"
    for i in range(40):
        again = b"h" + bytes([i])
        laughs = b"}(" + tf.text("a") + laughs + tf.text("b") + again + b"uq" + bytes([i + 1])
    looped = b"}q\xc8" + tf.text("me") + b"h\xc8s"
    storages = tf.Storages()
    value = tf.plain({"laughs": laughs, "loop": looped, "model": storages.add_all(state)})
    tf.write_zip(tmp_path / "a.pth", tf.pickle(value), storages)
    assert weights.load(TRUNK, tmp_path / "a.pth").trunk == TRUNK


# What a file is taken for.


def said(caplog):
    """The one line that loading a file said."""
    (record,) = [r for r in caplog.records if r.name.startswith("siamese_jax.weights")]
    assert "\n" not in record.getMessage()
    caplog.clear()
    return record.getMessage()


def write(path, state, texts=None, config=None):
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, texts)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


HUB = "models--timm--tf_efficientnet_lite0.in1k"
TOLD = {
    "its own text": ("a.safetensors", {"model": "timm/tf_efficientnet_lite0.in1k"}, None),
    "config.json": ("a.safetensors", None, {"architecture": "tf_efficientnet_lite0"}),
    "its name": ("my-tf_efficientnet_lite0-0aa007d2.safetensors", None, None),
    "the Hub's cache": (f"{HUB}/snapshots/0123/model.safetensors", None, None),
    "a blob there": (f"{HUB}/blobs/0123456789abcdef", None, None),
    "a folder of a download": ("tf_efficientnet_lite0.in1k/model.safetensors", None, None),
    "another config.json": ("tf_efficientnet_lite0.safetensors", None, {"model_type": "resnet"}),
}


@pytest.mark.parametrize("how", TOLD)
def test_tensorflows_form_is_told(how, state, tmp_path, caplog):
    name, texts, config = TOLD[how]
    path = write(tmp_path / name, state, texts, config)
    found = weights.load(TRUNK, path)
    assert (found.form, found.preprocessing) == ("keras", HALF)
    line = said(caplog)
    assert str(path) in line
    assert "tf_efficientnet_lite0 by" in line
    assert "in the keras form" in line
    assert "inception" in line
    assert "--form" in line
    assert line.endswith(f"{'; '.join(found.notes)} (--form, --preprocessing say otherwise)")
    assert weights.load(TRUNK, path, form="torch").form == "torch"
    assert "as asked" in said(caplog)


@pytest.mark.parametrize(
    ("name", "form", "scaling"),
    [
        ("tf_efficientnet_b0.in1k", "keras", IMAGENET),
        ("tf_efficientnet_b0_ns-c0e6a31c", "keras", IMAGENET),
        ("tf_efficientnet_b0.ap_in1k", "keras", HALF),
        ("tf_efficientnet_b0_ap-f262efe1", "keras", HALF),
        ("efficientnet_b0.ra_in1k", "torch", IMAGENET),
        ("efficientnet_b0.ra4_e3600_r224_in1k", "torch", HALF),
        ("EfficientNetB0-mine", "torch", IMAGENET),
    ],
)
def test_names_of_timm(name, form, scaling, tmp_path):
    """As timm 1.0.31 lists them in its default_cfgs."""
    path = write(tmp_path / f"{name}.safetensors", state_of("efficientnet_b0", "timm"))
    found = weights.load("efficientnet_b0", path)
    assert (found.form, found.preprocessing) == (form, scaling)


def test_config_json_tells_pixels_and_size(state, tmp_path, caplog):
    config = {
        "architecture": "efficientnet_lite0",
        "pretrained_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "input_size": [3, 160, 160]},
    }
    path = write(tmp_path / "model.safetensors", state, config=config)
    made = sj.load_encoder(TRUNK, path)
    assert made.image_size == 160
    assert made.model.preprocessing == as_preprocessing("0.5,0.4,0.3/0.2")
    assert "by config.json beside it" in said(caplog)
    assert made.provenance["preprocessing"]["mean"] == (127.5, 102.0, 76.5)
    for damage in ({"mean": [1], "std": "x"}, {"mean": None}, {"std": [0, 0, 0], "mean": [0] * 3}):
        config["pretrained_cfg"] = damage | {"input_size": "large"}
        found = weights.load(TRUNK, write(path, state, config=config))
        assert (found.preprocessing, found.image_size) == (IMAGENET, 224)


def test_where_nothing_tells_both_are_named(state, tmp_path, caplog):
    path = write(tmp_path / "a.safetensors", state)
    assert weights.load(TRUNK, path).form == "torch"
    line = said(caplog)
    assert "taken as efficientnet_lite0 in the torch form, as nothing tells" in line
    assert "tf_efficientnet_lite0 (--form=keras) would fit as well" in line


@pytest.fixture(scope="module")
def resnet18():
    return state_of("resnet18", "torch")


def test_networks_with_the_same_leaves_are_named_or_refused(resnet18, tmp_path, caplog):
    weights.load("resnet18", write(tmp_path / "a.safetensors", resnet18))
    assert "resnetblur18 would fit as well" in said(caplog)
    weights.load("resnet18", write(tmp_path / "resnet18-f37072fd.safetensors", resnet18))
    assert "resnetblur18" not in said(caplog)
    for name, texts, config in (
        ("resnetblur18.safetensors", None, None),
        ("b.safetensors", {"arch": "resnetblur18"}, None),
        ("c/model.safetensors", None, {"architecture": "resnetblur18"}),
        ("d/resnet18.safetensors", None, {"architecture": "resnetblur18"}),
        ("e/model.safetensors", None, {"architecture": "ecaresnet18t"}),
    ):
        path = write(tmp_path / name, resnet18, texts, config)
        with pytest.raises(UserError, match=r"resnetblur18|ecaresnet18t") as caught:
            weights.load("resnet18", path)
        assert "not of resnet18" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_network_with_the_same_leaves_is_listed():
    """Against timm itself, of which every model of the families is built without memory."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    known = {name for names in origin.SAME_LEAVES.values() for name in names}
    families = timm.list_models(["resnet[1-9]*", "resnet[ab]*", "*efficientnet_*", "vgg*"])

    def leaves(name):
        state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
        skipped = ("num_batches_tracked", "pre_logits")
        return {k: tuple(v.shape) for k, v in state.items() if not any(s in k for s in skipped)}

    with torch.device("meta"):
        ours = {name: leaves(name) for name in origin.TRUNKS}
        for name in set(families) - set(ours):
            theirs = leaves(name)
            for trunk, wanted in ours.items():
                assert theirs != wanted or name in known or name == f"tf_{trunk}", (name, trunk)


# What is asked for.


def test_pixels_are_scaled_as_asked(state, images, tmp_path, caplog):
    path = write(tmp_path / "a.safetensors", state)
    prints, made = {}, {}
    for asked, expected in {
        **PREPROCESSING,
        "0.5/0.25": as_preprocessing("0.5,0.5,0.5/0.25,0.25,0.25"),
    }.items():
        encoder = sj.load_encoder(TRUNK, path, SIZE, preprocessing=asked)
        assert encoder.model.preprocessing == expected
        assert tuple(encoder.provenance["preprocessing"]["std"]) == expected.std
        assert encoder.arguments["preprocessing"]["mean"] == expected.mean
        assert "as asked" in said(caplog)
        prints[encoder.fingerprint] = asked
        made[asked] = encoder
    made["form"] = sj.load_encoder(TRUNK, path, SIZE, form="keras", preprocessing="0.5/0.25")
    prints[made["form"].fingerprint] = "form"
    assert len(prints) == len(PREPROCESSING) + 2
    for asked, *options in (("0.5/0.25",), ("form", "--form=keras")):
        found = command(images, tmp_path, path, "--preprocessing=0.5/0.25", *options)
        np.testing.assert_array_equal(found, vectors(made[asked], images))
    for scaling in ("imagenets", "0.5", "1/2/3", "0.5,0.5/1", "123/58", "0.5/0", "nan/1"):
        with pytest.raises(UserError, match="choose from imagenet, inception") as caught:
            weights.load(TRUNK, path, preprocessing=scaling)
        assert "\n" not in str(caught.value)


def test_what_was_asked_outlives_the_encoders_folder(state, images, tmp_path):
    path = write(tmp_path / "a.safetensors", state)
    asked = {"form": "keras", "preprocessing": "caffe"}
    folder = tmp_path / "whitened"
    argv = ["whiten", f"--encoder={TRUNK}", f"--weights={path}", f"--images={images}"]
    argv += ["--method=pca", "--dim=1", f"--image-size={SIZE}", f"--out={folder}"]
    assert main([*argv, *(f"--{key}={value}" for key, value in asked.items())]) == 0
    again = sj.load_encoder(folder, whitening=False)
    same = sj.load_encoder(TRUNK, path, SIZE, **asked)
    assert again.fingerprint == same.fingerprint
    with pytest.raises(UserError, match="for a trunk by its name"):
        sj.load_encoder(folder, form="keras")


def test_an_export_keeps_what_was_decided(state, tmp_path, caplog, capsys):
    path = write(tmp_path / "a.safetensors", {**state, "queue": np.ones(3, np.float16)})
    out = tmp_path / "out.npz"
    argv = ["weights", "convert", str(path), f"--trunk={TRUNK}", f"--out={out}", "--form=keras"]
    assert main([*argv, "--preprocessing=unit", "--ignore=queue"]) == 0
    caplog.clear()
    found = weights.load(TRUNK, out)
    assert (found.form, found.preprocessing) == ("keras", PREPROCESSING["unit"])
    assert "1 leaves are ignored: queue" in found.notes
    assert not caplog.records
    assert sj.load_encoder(TRUNK, out, SIZE).provenance["notes"] == list(found.notes)


def test_a_config_passes_on_how_a_file_is_read(state, tmp_path):
    from configs.common import base
    from siamese_jax.train import experiment

    config = base()
    config.trunk.update(name=TRUNK, form="keras", preprocessing="unit", ignore="^queue$")
    config.trunk.weights = str(
        write(tmp_path / "a.safetensors", {**state, "queue": np.ones(3, np.float16)})
    )
    run = {"warnings": []}
    found = experiment.load_trunk(config, run, None)
    assert (found.form, found.preprocessing) == ("keras", PREPROCESSING["unit"])
    assert run["warnings"] == list(found.notes)


# Several copies, and leaves that do not fit.


def kernel(found):
    return np.asarray(found.variables["params"]["stem"]["conv"]["kernel"])


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ("model", "model_ema", "model_ema"),
        ("student", "teacher", "teacher"),
        ("online_encoder", "target_encoder", "online_encoder"),
        ("encoder_k", "encoder_q", "encoder_q"),
        ("a", "b", "a"),
    ],
)
@pytest.mark.parametrize("separator", [".", "/"])
def test_of_several_copies_one_is_taken_by_a_rule(
    first, second, taken, separator, state, other, tmp_path, caplog
):
    copies = {first: state, second: other}
    storages = tf.Storages()
    if separator == "/":
        value = tf.plain({key: storages.add_all(copies[key]) for key in copies})
    else:
        parts = (prefixed(f"{key}.", leaves) for key, leaves in copies.items())
        value = storages.add_all({name: leaf for part in parts for name, leaf in part.items()})
    tf.write_zip(tmp_path / "a.pth", tf.pickle(value), storages)
    left = second if taken == first else first
    stem = "conv_stem.weight"
    expected = copies[taken][stem].transpose(2, 3, 1, 0).astype(np.float32)
    np.testing.assert_array_equal(kernel(weights.load(TRUNK, tmp_path / "a.pth")), expected)
    line = said(caplog)
    assert f"of its 2 copies '{taken}{separator}' is taken, not '{left}{separator}'" in line
    pattern = line.partition("for the other --ignore='")[2].partition("'")[0]
    found = weights.load(TRUNK, tmp_path / "a.pth", ignore=pattern)
    expected = copies[left][stem].transpose(2, 3, 1, 0).astype(np.float32)
    np.testing.assert_array_equal(kernel(found), expected)


def test_a_larger_teacher_is_not_taken_for_its_student(resnet18, tmp_path):
    teacher = state_of("resnet34", "torch")
    both = prefixed("student.", resnet18) | prefixed("teacher.", teacher)
    path = write(tmp_path / "a.safetensors", both)
    found = weights.load("resnet18", path)
    expected = resnet18["conv1.weight"].transpose(2, 3, 1, 0).astype(np.float32)
    np.testing.assert_array_equal(kernel(found), expected)
    expected = teacher["conv1.weight"].transpose(2, 3, 1, 0).astype(np.float32)
    assert r"--ignore='^student\.'" in str(refusal("resnet34", path))
    found = weights.load("resnet34", path, ignore=r"^student\.")
    np.testing.assert_array_equal(kernel(found), expected)


def refusal(trunk, path, **options):
    with pytest.raises(fit.Mismatch) as caught:
        weights.load(trunk, path, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_unknown_leaves_suggest_what_to_leave_out(resnet18, tmp_path, capsys, images):
    foreign = ("head.mlp.0.weight", "head.mlp.0.bias", "module.backbone.neck.bn.weight", "queue")
    state = prefixed("module.backbone.", resnet18)
    state |= {name: np.ones(3, np.float16) for name in foreign}
    path = write(tmp_path / "a.safetensors", state)
    error = refusal("resnet18", path)
    assert "0 leaves are missing, 4 are unknown (+ head.mlp.0.bias, " in str(error)
    assert "all of resnet18 is there below 'module.backbone.'" in str(error)
    assert "another" not in str(error)
    assert error.lines == [f"+ {name}" for name in sorted(foreign)]
    pattern = str(error).partition("--ignore='")[2].partition("'")[0]
    found = weights.load("resnet18", path, ignore=pattern)
    assert "4 leaves are ignored" in " ".join(found.notes)
    assert command(images, tmp_path, path, f"--ignore={pattern}", trunk="resnet18").shape[1] == 512
    capsys.readouterr()
    assert main(["weights", "verify", str(path), "--trunk=resnet18", "--all"]) == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == error.lines
    assert shown.err.count("\n") == 1
    for wrong, match in ((r"tail\.", "matches no leaf"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=match):
            weights.load("resnet18", path, ignore=wrong)
    assert "--ignore leaves out what resnet18 needs" in str(
        refusal("resnet18", path, ignore=rf"{pattern}|conv1")
    )
    with pytest.raises(UserError, match="is for a weights file"):
        weights.load("resnet18", "random", ignore="head")


def test_another_trunks_leaves_name_that_trunk(resnet18, tmp_path):
    larger = write(tmp_path / "a.safetensors", prefixed("net.", state_of("resnet34", "torch")))
    assert "are those of resnet34: take that trunk" in str(refusal("resnet18", larger))
    smaller = write(tmp_path / "b.safetensors", resnet18)
    assert "are those of resnet18: take that trunk" in str(refusal("resnet34", smaller))
    assert "few are called as in" in str(refusal(TRUNK, smaller))
    cut = {name: leaf for name, leaf in resnet18.items() if "layer4.1" not in name}
    cut = write(tmp_path / "c.safetensors", cut)
    assert "cut down, or of a changed network" in str(refusal("resnet18", cut))
    wide = write(tmp_path / "d.safetensors", state_of("resnet50", "torch"))
    assert "leave out --form" in str(refusal("resnet50", wide, form="keras"))


@pytest.mark.slow
def test_trunks_whose_leaves_differ_in_size_alone_are_told_apart(tmp_path, capsys):
    """EfficientNet-B1 and B2 name the same leaves."""
    for trunk, other in (("efficientnet_b1", "efficientnet_b2"), ("efficientnet_b2", None)):
        state = state_of(trunk, "timm") | {"extra": np.ones(3, np.float16)}
        path = write(tmp_path / "a.safetensors", prefixed("net.", state))
        assert "--ignore='^net\\.extra$'" in str(refusal(trunk, path))
        if other:
            with pytest.raises(UserError, match="another trunk"):
                weights.load(other, path, ignore="extra")
        assert main(["weights", "verify", str(path), "--ignore=extra"]) == 0
        assert f"is sound: {trunk}" in capsys.readouterr().out


def test_a_sequence_of_a_resnets_children(resnet18, tmp_path):
    """nn.Sequential(*list(resnet.children())[:-1]), as many keep a trunk."""
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    renamed = {}
    for name, leaf in resnet18.items():
        child, _, rest = name.partition(".")
        renamed[f"backbone.{places[child]}.{rest}"] = leaf
    found = weights.load("resnet18", write(tmp_path / "a.safetensors", renamed))
    expected = weights.load("resnet18", write(tmp_path / "b.safetensors", resnet18))
    for path in ("layer1.0.conv1", "layer4.1.bn2"):
        assert f"{path}.weight" in resnet18
    ours = {"params/stage4/block2/conv2/norm/bias", "batch_stats/stage2/block1/shortcut/norm/var"}
    flat = [formats_of(w) for w in (found, expected)]
    assert ours <= flat[0].keys()
    for name, leaf in flat[1].items():
        np.testing.assert_array_equal(flat[0][name], leaf)


def formats_of(found):
    from siamese_jax.weights.port import flatten

    return flatten(found.variables)


def test_a_source_comes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet", "random", "lite0"):
        (tmp_path / name).mkdir()
        assert weights.load(TRUNK, name).trunk == TRUNK


# Keras's files, without Keras.


def keras_file(file, trunk, named):
    """A file of Keras 3: layers by the class's name and a count, in Keras's own order."""
    import h5py

    leaves = state_of(trunk, "keras, by order", dtype=np.float32)
    plain = {}
    order = {"gamma": 0, "beta": 1, "moving_mean": 2, "moving_variance": 3, "kernel": 0, "bias": 1}
    scheme = schemes(trunk)["keras"]
    theirs = names(trunk, "keras", scheme)
    places = names(trunk, "keras", schemes(trunk)["keras, by order"])
    with h5py.File(file, "w") as root:
        for ours, place in places.items():
            layer, _, variable = place.rpartition("/")
            group = root.require_group(f"{layer}/vars")
            group[str(order[variable])] = leaves[place]
            plain[theirs[ours]] = leaves[place]
            if named:
                group.attrs["name"] = theirs[ours].rpartition("/")[0]
    return plain


@pytest.mark.parametrize("trunk", ["vgg19", "resnet50", "efficientnet_lite0"])
def test_keras_3_with_and_without_names(trunk, tmp_path):
    """The order itself is held against Keras in test_weights_keras.py."""
    keras_file(tmp_path / "a.weights.h5", trunk, named=True)
    keras_file(tmp_path / "b", trunk, named=False)
    found = [formats_of(weights.load(trunk, tmp_path / name)) for name in ("a.weights.h5", "b")]
    for name, leaf in found[0].items():
        np.testing.assert_array_equal(found[1][name], leaf)


def archive(path, config, weights_file):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", "{}")
        file.writestr("config.json", config)
        file.write(weights_file, "model.weights.h5")


def test_keras_archives_name_their_layers(tmp_path):
    keras_file(tmp_path / "w.h5", "vgg16", named=False)
    blocks = (2, 2, 3, 3, 3)
    layers = [f"block{i + 1}_conv{j + 1}" for i, depth in enumerate(blocks) for j in range(depth)]
    config = [{"class_name": "Conv2D", "config": {"name": name}} for name in layers]
    inner = {"class_name": "Functional", "config": {"name": "vgg16", "layers": config}}
    archive(tmp_path / "a.keras", json.dumps(inner), tmp_path / "w.h5")
    assert f"{layers[-1]}/kernel" in formats.read(tmp_path / "a.keras")
    found = weights.load("vgg16", tmp_path / "a.keras")
    assert found.form == "keras"
    (tmp_path / "a.keras").rename(tmp_path / "without")
    np.testing.assert_array_equal(
        formats_of(found)["params/stage5/conv3/kernel"],
        formats_of(weights.load("vgg16", tmp_path / "without"))["params/stage5/conv3/kernel"],
    )


@pytest.mark.parametrize(
    "config",
    ["", "{", "\x00", '{"config": {"layers": [3]}}', '{"config": {"layers": [{}]}}', "[" * 10**5],
)
def test_damaged_archives_are_one_line(config, tmp_path):
    keras_file(tmp_path / "w.h5", "vgg16", named=False)
    archive(tmp_path / "a.keras", config, tmp_path / "w.h5")
    with pytest.raises(UserError, match=r"a\.keras was not read as Keras's") as caught:
        weights.load("vgg16", tmp_path / "a.keras")
    assert "\n" not in str(caught.value)


def test_what_no_format_claims_is_refused(tmp_path):
    for name, content in (
        ("a", b""),
        ("b.bin.gz", b"\x1f\x8b"),
        ("c", b"PK\x03\x04"),
        ("d", b"{}"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="no file of PyTorch, safetensors, Keras or NumPy"):
            weights.load(TRUNK, tmp_path / name)


def test_nothing_is_logged_for_named_sources(caplog):
    with caplog.at_level(logging.WARNING):
        weights.load(TRUNK)
    assert not caplog.records
