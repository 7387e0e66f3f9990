"""Every Keras trunk against keras.applications: the same random weights give the same features."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import siamese_jax as sj
from siamese_jax import weights
from siamese_jax.__main__ import main
from siamese_jax.errors import UserError
from siamese_jax.trunks.table import TRUNKS, normalise

CASES = {
    "resnet50": ("ResNet50", (224, 97)),
    "vgg16": ("VGG16", (64, 49)),
    "vgg19": ("VGG19", (48,)),
    "efficientnet_b0": ("EfficientNetB0", (64, 75)),
    "efficientnet_b1": ("EfficientNetB1", (64,)),
    "efficientnet_b2": ("EfficientNetB2", (64,)),
    "efficientnet_b3": ("EfficientNetB3", (64,)),
    "mobilenetv3_small_100": ("MobileNetV3Small", (75,)),
}


# Others of a family that one trunk stands for.
LONG = ("vgg19", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3")


def asked(request):
    """The trunks that some test of this run asks for."""
    return sorted(
        {
            item.callspec.params["trunk"]
            for item in request.session.items
            if item.path == request.path and hasattr(item, "callspec")
        }
    )


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    jobs = [f"{CASES[trunk][0]}:{','.join(map(str, CASES[trunk][1]))}" for trunk in asked(request)]
    script = Path(__file__).parents[1] / "keras_oracle.py"
    subprocess.run([sys.executable, script, folder, *jobs], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "trunk", [pytest.param(c, marks=pytest.mark.long) if c in LONG else c for c in CASES]
)
def test_features_are_those_of_keras(folder, trunk):
    application, sizes = CASES[trunk]
    found = weights.load(trunk, folder / f"{application}.weights.h5")
    published = weights.load(trunk, folder / f"{application}.h5")
    assert found.form == published.form == "keras"
    jax.tree.map(np.testing.assert_array_equal, found.variables, published.variables)
    module = TRUNKS[trunk].build(form="keras")

    @jax.jit
    def features(images):
        x = normalise(images, found.preprocessing)
        return jnp.mean(module.apply(found.variables, x)[TRUNKS[trunk].stages[-1]], (1, 2))

    for size in sizes:
        oracle = np.load(folder / f"{application}_{size}.npz")
        expected = oracle["features"]
        assert expected.std() > 1e-3
        difference = np.abs(np.asarray(features(oracle["images"])) - expected)
        assert np.max(difference / (np.abs(expected) + 1e-2 * np.abs(expected).max())) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["resnet50", "vgg16", "efficientnet_b0", "mobilenetv3_small_100"])
def test_layers_without_names_are_taken_in_order(folder, trunk, tmp_path):
    """Keras 3.0 to 3.4 wrote the same places, and no names."""
    application, _ = CASES[trunk]
    shutil.copy(folder / f"{application}.weights.h5", tmp_path / "a.h5")
    nameless(tmp_path / "a.h5")
    with_names = weights.load(trunk, folder / f"{application}.weights.h5")
    found = weights.load(trunk, tmp_path / "a.h5")
    assert found.preprocessing == with_names.preprocessing
    jax.tree.map(np.testing.assert_array_equal, found.variables, with_names.variables)


def nameless(path):
    def drop(_, item):
        if "name" in item.attrs:
            del item.attrs["name"]

    with h5py.File(path, "r+") as file:
        file.visititems(drop)


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("trunk", ["resnet50", "efficientnet_b0"])
def test_whole_models_of_keras(folder, trunk, named, tmp_path):
    """`.keras` and `.h5` of a model alone, and of one that another holds beside an optimiser."""
    application, sizes = CASES[trunk]
    oracle = np.load(folder / f"{application}_{sizes[-1]}.npz")
    expected = oracle["features"]
    for i, pixels in enumerate(oracle["images"]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    for name, ignore in ((".keras", None), ("_inside.keras", "^dense/"), ("_inside.h5", "^dense/")):
        path = folder / f"{application}{name}"
        if not named:
            if name != "_inside.keras":
                continue
            path = nameless_archive(path, tmp_path / f"copy{name}")
        if ignore:
            with pytest.raises(UserError, match=r"0 leaves are missing, 2 .*--ignore='\^dense/'"):
                weights.load(trunk, path)
        encoder = sj.load_encoder(trunk, path, sizes[-1], ignore=ignore)
        assert cosines(encoder(oracle["images"]), expected).min() > 1 - 1e-5
        argv = ["embed", f"--encoder={trunk}", f"--weights={path}", f"--images={tmp_path}"]
        argv += ["--labels=none", f"--image-size={sizes[-1]}", f"--out={tmp_path}/v.npz"]
        argv += [f"--ignore={ignore}"] if ignore else []
        assert main([*argv, f"--cache-dir={tmp_path}/cache"]) == 0
        found = np.load(tmp_path / "v.npz")["vectors"]
        assert cosines(found, expected).min() > 1 - 1e-5


def nameless_archive(path, copy):
    """The same archive, its layers named by config.json alone."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    copy.with_suffix(".inner").write_bytes(entries["model.weights.h5"])
    nameless(copy.with_suffix(".inner"))
    entries["model.weights.h5"] = copy.with_suffix(".inner").read_bytes()
    copy.with_suffix(".inner").unlink()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return copy


def cosines(a, b):
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
