"""Every Keras trunk against keras.applications: the same random weights give the same features."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from siamese_jax import weights
from siamese_jax.trunks import TRUNKS, normalise

CASES = {
    "resnet50": ("ResNet50", (224, 97)),
    "resnet101": ("ResNet101", (64,)),
    "vgg16": ("VGG16", (64, 49)),
    "vgg19": ("VGG19", (48,)),
    "efficientnet_b0": ("EfficientNetB0", (64, 75)),
    "efficientnet_b1": ("EfficientNetB1", (64,)),
    "efficientnet_b2": ("EfficientNetB2", (64,)),
    "efficientnet_b3": ("EfficientNetB3", (64,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    jobs = [f"{name}:{','.join(map(str, sizes))}" for name, sizes in CASES.values()]
    script = Path(__file__).with_name("keras_oracle.py")
    subprocess.run([sys.executable, script, folder, *jobs], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("trunk", CASES)
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
