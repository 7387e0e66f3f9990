"""Run by test_weights_keras.py in a process of its own: what Keras itself makes of random weights.

    python keras_oracle.py FOLDER 'APPLICATION:SIZE,SIZE' ...

For every application it saves, in FOLDER, `APPLICATION.weights.h5` (Keras 3), `APPLICATION.h5` (the
layout of the published files), the uint8 images and the pooled features at each size; those of
MobileNetV3 are what its classifier sees, so its files have one. Of those in WHOLE also the model,
alone and inside one that is compiled, as `.keras` and as Keras's own `.h5`.
"""

import os
import re
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import h5py
import keras
import numpy as np


def randomised(variable, rng):
    """A value that makes every variable matter: no zeros, no ones, statistics far from the norm."""
    name, shape = variable.path.rpartition("/")[2], variable.shape
    if name in ("gamma", "moving_variance", "variance"):
        return rng.uniform(0.5, 1.5, shape)
    if "kernel" in name:
        depthwise = "dwconv" in variable.path or "depthwise" in variable.path
        fan_in = np.prod(shape[:2]) if depthwise else np.prod(shape[:-1])
        return rng.normal(0, np.sqrt(1.7 / fan_in), shape)
    return rng.normal(0, 0.2, shape)


def old_name(layer):
    """What Keras 2 called a layer: MobileNetV3's names had slashes and capitals."""
    name = re.sub(r"_bn$", "/BatchNorm", layer)
    name = re.sub(r"^(expanded_conv(?:_\d+)?)_(?!conv)", r"\1/", name)
    name = re.sub(r"squeeze_excite_", "squeeze_excite/", name)
    return re.sub(r"(^|/)(conv|logits)", lambda found: found[0].title(), name)


def save_as_published(model, path, called=str):
    """A group per layer, `layer_names` and `weight_names` with ":0", as in files up to 2022."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [called(layer.name).encode() for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(called(layer.name))
            names = [f"{called(layer.name)}/{w.path.rpartition('/')[2]}:0" for w in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(weight)


WHOLE = ("ResNet50", "EfficientNetB0")


def save_whole(model, path):
    model.save(f"{path}.keras")
    images = keras.Input((64, 64, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(model(images))
    compiled = keras.Model(images, keras.layers.Dense(7, name="dense")(pooled))
    compiled.compile("adam", "mse")
    compiled.optimizer.build(compiled.trainable_variables)
    compiled.save(f"{path}_inside.keras")
    compiled.save(f"{path}_inside.h5")


def main(folder, *jobs):
    for job in jobs:
        application, sizes = job.split(":")
        rng = np.random.default_rng(len(application))
        make = getattr(keras.applications, application)
        mobile = application.startswith("MobileNetV3")
        model = make(weights=None, include_top=mobile)
        for variable in model.weights:
            if not variable.path.endswith("count"):
                variable.assign(randomised(variable, rng))
        model.save_weights(Path(folder) / f"{application}.weights.h5")
        called = old_name if mobile else str
        save_as_published(model, Path(folder) / f"{application}.h5", called)
        if application in WHOLE:
            save_whole(model, Path(folder) / application)
        for size in map(int, sizes.split(",")):
            images = rng.integers(0, 256, (2, size, size, 3), np.uint8)
            # Built anew at a known size: Keras's EfficientNet pads by the size it is built for.
            fixed = make(
                weights=None, include_top=mobile, input_shape=(size, size, 3), pooling="avg"
            )
            fixed.load_weights(Path(folder) / f"{application}.weights.h5")
            if mobile:
                last = keras.layers.Flatten()(fixed.get_layer("logits").input)
                fixed = keras.Model(fixed.input, last)
            family = "efficientnet" if "Efficient" in application else application.lower()
            family = "mobilenet_v3" if mobile else family
            family = "resnet" if "resnet" in family else family
            scale = getattr(keras.applications, family).preprocess_input
            features = np.asarray(fixed(scale(images.astype(np.float32)), training=False))
            np.savez(Path(folder) / f"{application}_{size}.npz", images=images, features=features)


if __name__ == "__main__":
    main(*sys.argv[1:])
