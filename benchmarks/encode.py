"""Images per second through a frozen trunk: ours, Keras on TensorFlow, PyTorch, side by side.

    python benchmarks/encode.py [--trunks resnet50 vit_small_patch16_224 ...] [--sizes 224 112]

Each peer computes the same architecture with the same weights, and its features are compared with
ours. Runs alternate (ours, peer, ours, peer, ...); the table has the medians and the ratio of ours
to the peer. Peers that are not installed are left out. On a GPU, PyTorch is compiled, channels
last, in bfloat16, and ours is shown in bfloat16 and float32 with the share of the card's measured
bfloat16 matrix rate.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np

from siamese_jax import weights
from siamese_jax.encoder import encoder
from siamese_jax.trunks.table import TRUNKS, find, normalise
from siamese_jax.weights.port import flatten, names, schemes

sys.path.insert(0, str(Path(__file__).parent))

import records

from siamese_jax.encoder import model as encoder_model

DEFAULT = [
    *("resnet50", "vgg16", "efficientnet_b0"),
    *("vit_small_patch16_224", "vit_base_patch16_224", "convnext_tiny"),
]
Run = Callable[[np.ndarray], np.ndarray]


def random_weights(trunk: str, form: str) -> weights.TrunkWeights:
    """Random kernels and biases, and statistics that are not those of an identity."""
    found = weights.load(trunk, "random", form=form)
    rng = np.random.default_rng(0)

    def vary(path: Any, leaf: Any) -> Any:
        name = path[-1].key
        low = {"scale": 0.5, "var": 0.5, "kernel": None}.get(name, -0.2)
        if low is None:
            return leaf
        high = 1.0 if low > 0 else 0.2
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(vary, found.variables)
    return weights.TrunkWeights(**{**vars(found), "variables": variables})


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
    """torch.nn: eager on the CPU, compiled in bfloat16 on a GPU."""
    gpu = jax.default_backend() == "gpu"
    try:
        import torch

        device = torch.device("cuda" if gpu else "cpu")
        model, scale = torch_model(found, device)
    except ImportError:
        return None
    model.eval()

    def forward(images: Any) -> Any:
        return model(scale(images)).mean((2, 3))

    if gpu:
        forward = torch.compile(forward)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            return forward(torch.from_numpy(images).to(device)).float().cpu().numpy()

    return run


def seconds(run: Run, images: np.ndarray) -> tuple[float, float]:
    """(wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run(images)
    return time.perf_counter() - wall, time.process_time() - processor


def compare(a: Run, b: Run, images: np.ndarray, repeats: int) -> tuple[tuple, tuple, float]:
    """Median (wall, processor) seconds of both, and the largest difference of their features."""
    first, second = a(images), b(images)
    scale = np.abs(second).max()
    difference = float(np.max(np.abs(first - second)) / scale)
    times: tuple[list, list] = ([], [])
    for _ in range(repeats):
        times[0].append(seconds(a, images))
        times[1].append(seconds(b, images))
    medians = [tuple(statistics.median(t) for t in zip(*rows, strict=True)) for rows in times]
    return medians[0], medians[1], difference


def matrix_rate() -> float:
    """The device's bfloat16 matrix product, in FLOP/s."""
    n = 8192
    x = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        y = product(x)
    y.block_until_ready()
    return 10 * 2 * n**3 / (time.perf_counter() - start)


def flops(trunk: str, form: str, size: int) -> float:
    """Of one image, as XLA counts them for plain convolutions."""
    found = weights.load(trunk, "random", form=form)
    module = find(trunk).build(form=form)
    image = jnp.zeros((1, size, size, 3), jnp.uint8)
    scaled = lambda x: module.apply(found.variables, normalise(x, found.preprocessing))  # noqa: E731
    analysis: Any = jax.jit(scaled).lower(image).compile().cost_analysis()
    return float(analysis["flops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", default=DEFAULT, choices=sorted(TRUNKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 112])
    parser.add_argument("--peers", nargs="+", default=["keras", "torch"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    records.add_option(parser)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    peers = {"keras": None if gpu else keras_peer, "torch": torch_peer}
    print(f"{jax.devices()[0].device_kind}, batch {args.batch}, medians of {args.repeats}")
    table = []
    print("trunk             size  peer    ours img/s  peer img/s  ratio  (processor)  difference")
    for trunk in args.trunks:
        for size in args.sizes:
            images = np.random.default_rng(1).integers(
                0, 256, (args.batch, size, size, 3), np.uint8
            )
            for peer in [peer for peer in args.peers if peer in find(trunk).forms]:
                found = random_weights(trunk, peer)
                make = peers[peer]
                other = make(found, size) if make else None
                if other is None:
                    continue
                for dtype in [jnp.bfloat16, jnp.float32] if gpu else [jnp.float32]:
                    a, b, difference = compare(
                        ours(found, size, dtype), other, images, args.repeats
                    )
                    print(
                        f"{trunk:17} {size:4}  {peer:6} {args.batch / a[0]:10.1f} "
                        f"{args.batch / b[0]:11.1f} {b[0] / a[0]:6.2f} {b[1] / a[1]:12.2f} "
                        f"{difference:12.1e}  {jnp.dtype(dtype).name if gpu else ''}",
                        flush=True,
                    )
                    kind = jnp.dtype(dtype).name
                    row = [trunk, size, kind, peer, f"{args.batch / a[0]:.0f}"]
                    table.append([*row, f"{b[0] / a[0]:.2f}", f"{difference:.0e}"])
            if gpu:
                rate, work = matrix_rate(), flops(trunk, "torch", size) * args.batch
                t = statistics.median(
                    seconds(ours(random_weights(trunk, "torch"), size, jnp.bfloat16), images)[0]
                    for _ in range(3)
                )
                share, peak = 100 * work / t / rate, rate / 1e12
                print(f"{trunk:17} {size:4}  {share:.0f}% of {peak:.0f} TFLOP/s")
    if args.record:
        columns = ["trunk", "px", "dtype", "peer", "ours images/s", "/ peer", "difference"]
        note = f"Batch {args.batch}, medians of {args.repeats} turns."
        records.save("encode", columns, table, [note])


if __name__ == "__main__":
    main()
