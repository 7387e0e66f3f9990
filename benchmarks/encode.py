"""Images per second through a frozen trunk: ours, Keras on TensorFlow, PyTorch, side by side.

    python benchmarks/encode.py [--trunks resnet50 vit_small_patch16_224 ...] [--sizes 224 112]

Each peer computes the same architecture with the same weights, and its features are compared with
ours. Runs alternate (ours, peer, ours, peer, ...); the table has the medians and the ratio of ours
to the peer. Peers that are not installed are left out. This is for a CPU; `gpu.py` is for a GPU.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax import weights
from siamese_jax.encoder import encoder
from siamese_jax.trunks.table import TRUNKS, find
from siamese_jax.weights.port import flatten, names, schemes

sys.path.append(str(Path(__file__).parent))

import measuring
import records
from measuring import Spent

from siamese_jax.encoder import model as encoder_model

DEFAULT = [
    *("resnet50", "vgg16", "efficientnet_b0"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "convnext_tiny"),
]
Run = Callable[[np.ndarray], np.ndarray]


def ours(found: weights.TrunkWeights, size: int, dtype: Any = jnp.float32) -> Run:
    """The encoder that `load_encoder` makes of a bare trunk."""
    params, stats = ({"trunk": found.variables[k], "head": {}} for k in ("params", "batch_stats"))
    model = encoder_model.build_model(found, dtype=jnp.dtype(dtype).name)
    return encoder.make_encoder(model, params, stats, image_size=size)


def keras_model(found: weights.TrunkWeights, size: int) -> tuple[Any, Callable[[Any], Any]]:
    """keras.applications with these weights, and what scales uint8 images for it."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    applications = {
        "resnet50": "ResNet50",
        "vgg16": "VGG16",
        "efficientnet_b0": "EfficientNetB0",
    }
    make = getattr(keras.applications, applications[found.trunk])
    model = make(weights=None, include_top=False, input_shape=(size, size, 3), pooling="avg")
    theirs = names(found.trunk, "keras", schemes(found.trunk)["keras"])
    for path, leaf in flatten(found.variables).items():
        layer, variable = theirs[path].split("/")
        value = leaf.transpose(0, 1, 3, 2) if path.endswith("depthwise/kernel") else leaf
        held = {w.path.rpartition("/")[2]: w for w in model.get_layer(layer).weights}
        held[variable].assign(value)
    efficientnet = "efficientnet" in found.trunk

    def scale(images: Any) -> Any:
        x, scaling = tf.cast(images, tf.float32), found.preprocessing
        if efficientnet:  # this model scales by 1/255 itself, and its norm layer is an identity
            return 255.0 * (x - tf.constant(scaling.mean)) / tf.constant(scaling.std)
        return x[..., ::-1] - tf.constant(scaling.mean)

    return model, scale


def keras_peer(found: weights.TrunkWeights, size: int) -> Run | None:
    """keras.applications as a traced TensorFlow function."""
    try:
        import tensorflow as tf

        model, scale = keras_model(found, size)
    except ImportError:
        return None
    run = tf.function(lambda images: model(scale(images), training=False))
    return lambda images: run(tf.constant(images)).numpy()


def torch_model(found: weights.TrunkWeights, device: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The same layers in torch.nn with these weights, and what scales uint8 images for them."""
    import torch
    import torch_trunks

    scheme = schemes(found.trunk)
    naming = scheme.get("torch") or scheme["torchvision"]
    theirs = names(found.trunk, "torch", naming)

    def as_theirs(path: str, leaf: np.ndarray, shape: Any) -> Any:
        order = {4: (3, 2, 0, 1), 2: (1, 0)} if path.endswith("kernel") else {}
        leaf = leaf.transpose(order[leaf.ndim]) if leaf.ndim in order else leaf
        return torch.from_numpy(np.array(leaf, order="C")).reshape(shape)

    model = torch_trunks.build(found.trunk)
    inner = model.model if isinstance(model, torch_trunks.Timm) else model
    shapes = {name: leaf.shape for name, leaf in inner.state_dict().items()}
    state = {
        theirs[path]: as_theirs(path, leaf, shapes[theirs[path]])
        for path, leaf in flatten(found.variables).items()
    }
    missing = inner.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("num_batches" in key for key in missing.missing_keys)
    model = model.to(device, memory_format=torch.channels_last)
    mean = torch.tensor(found.preprocessing.mean, device=device)[:, None, None]
    std = torch.tensor(found.preprocessing.std, device=device)[:, None, None]

    def scale(images: Any) -> Any:
        x = (images.permute(0, 3, 1, 2).float() - mean) / std
        return x.contiguous(memory_format=torch.channels_last)

    return model, scale


def torch_peer(found: weights.TrunkWeights, size: int) -> Run | None:
    """torch.nn, eager."""
    try:
        import torch

        model, scale = torch_model(found, torch.device("cpu"))
    except ImportError:
        return None
    model.eval()

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(scale(torch.from_numpy(images))).mean((2, 3)).numpy()

    return run


def compare(a: Run, b: Run, images: np.ndarray, repeats: int) -> tuple[Spent, Spent, float]:
    """Median seconds of both, and the largest difference of their features."""
    first, second = a(images), b(images)
    scale = np.abs(second).max()
    difference = float(np.max(np.abs(first - second)) / scale)
    runs = {"ours": lambda: a(images), "peer": lambda: b(images)}
    spent = measuring.turns(runs, repeats)
    return measuring.median(spent["ours"]), measuring.median(spent["peer"]), difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", default=DEFAULT, choices=sorted(TRUNKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 112])
    parser.add_argument("--peers", nargs="+", default=["keras", "torch"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    records.add_option(parser)
    args = parser.parse_args()
    peers = {"keras": keras_peer, "torch": torch_peer}
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, medians of {args.repeats}")
    table = []
    print("trunk             size  peer    ours img/s  peer img/s  ratio  (processor)  difference")
    for trunk in args.trunks:
        for size in args.sizes:
            images = np.random.default_rng(1).integers(
                0, 256, (args.batch, size, size, 3), np.uint8
            )
            for peer in [peer for peer in args.peers if peer in find(trunk).forms]:
                found = measuring.random_weights(trunk, peer)
                other = peers[peer](found, size)
                if other is None:
                    continue
                a, b, difference = compare(ours(found, size), other, images, args.repeats)
                print(
                    f"{trunk:17} {size:4}  {peer:6} {args.batch / a[0]:10.1f} "
                    f"{args.batch / b[0]:11.1f} {b[0] / a[0]:6.2f} {b[1] / a[1]:12.2f} "
                    f"{difference:12.1e}",
                    flush=True,
                )
                row = [trunk, size, "float32", peer, f"{args.batch / a[0]:.0f}"]
                table.append([*row, f"{b[0] / a[0]:.2f}", f"{difference:.0e}"])
    if args.record:
        columns = ["trunk", "px", "dtype", "peer", "ours images/s", "/ peer", "difference"]
        note = f"Batch {args.batch}, medians of {args.repeats} turns."
        records.save("encode", columns, table, [note])


if __name__ == "__main__":
    main()
