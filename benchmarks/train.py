"""Images per second in training: ours, Keras on TensorFlow, PyTorch with pytorch-metric-learning.

    python benchmarks/train.py [--trunks resnet50 efficientnet_b0 ...] [--size 112] [--batch 48]
    python benchmarks/train.py --python torch=/path/to/python     (a peer with its own environment)

All have the same images, weights, head (linear, 128 axes, unit length), loss (batch-hard triplets,
margin 0.2, the mean of all anchors) and optimiser; the loss of the first step is compared. Each
runs in a process of its own, for its peak of memory, and they take turns: the table has medians.

What moves: "whole", everything; "partly", the last stages and the head; "frozen", the head. Frozen,
ours reads the trunk's features from its cache, which is what it does in earnest, and the one pass
that fills it is left out; the peers run the trunk. Peers that are not installed are left out.

Ours starts with huge pages of memory, as `siamese-jax train` does. To give them to all:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train.py
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from siamese_jax.train import huge_pages

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

AXES, MARGIN, CLASSES = 128, 0.2, 4
MOVES = ("frozen", "partly", "whole")
DEFAULT = ["resnet50", "efficientnet_b0", "vit_small_patch16_224"]
# Of each trunk: our last stages, and how the names of their layers begin in Keras and in PyTorch.
LAST: dict[str, dict[str, tuple[str, ...]]] = {
    "resnet50": {"ours": ("stage4",), "keras": ("conv5",), "torch": ("layer4",)},
    "efficientnet_b0": {
        "ours": ("stage7", "top"),
        "keras": ("block7", "top"),
        "torch": ("features.7", "features.8"),
    },
    "vit_small_patch16_224": {
        "ours": ("block10", "block11", "block12", "top"),
        "torch": ("model.blocks.9", "model.blocks.10", "model.blocks.11", "model.norm"),
    },
}
# A step with images uint8 [n,h,w,3] and labels int32 [n] -> the loss before it.
Step = Callable[[np.ndarray, np.ndarray], float]


def ours(args: argparse.Namespace, found: Any, kernel: np.ndarray) -> Step:
    """The step that `siamese-jax` trains with."""
    import jax
    import jax.numpy as jnp
    import measuring

    from siamese_jax.encoder.model import run_features
    from siamese_jax.losses import LOSSES

    moving = {"whole": None, "partly": LAST[args.trunk]["ours"], "frozen": ()}[args.moves]
    model, state, step = measuring.training(
        *(found, moving),
        head={"layers": (AXES,)},
        loss=LOSSES["triplet"](margin=MARGIN, mining="hard", average="all"),
        name={"sgd": "sgd", "adam": "adamw"}[args.optimizer],
        learning_rate=args.rate,
    )
    shaped = {2: jnp.asarray(kernel), 1: jnp.zeros(AXES)}
    head = jax.tree.map(lambda leaf: shaped[leaf.ndim], state.params["head"])
    held = [state.replace(params={**state.params, "head": head})]
    cache: dict[int, Any] = {}

    def run(images: np.ndarray, labels: np.ndarray) -> float:
        batch: dict[str, Any] = {"label": labels, "mask": np.ones(len(labels), bool)}
        if args.moves == "frozen":
            if id(images) not in cache:
                cache[id(images)] = run_features(model, found.variables, images)
            batch["feature"] = cache[id(images)]
        else:
            batch["image"] = images
        held[0], metrics = step(held[0], batch)
        return float(metrics["loss"])

    return run


def keras(args: argparse.Namespace, found: Any, kernel: np.ndarray) -> Step:
    """keras.applications in a traced TensorFlow step."""
    import encode

    model, scale = encode.keras_model(found, args.size)
    import keras
    import tensorflow as tf

    for layer in model.layers:
        moves = args.moves == "whole" or layer.name.startswith(LAST[args.trunk]["keras"])
        layer.trainable = moves and args.moves != "frozen"
        if isinstance(layer, keras.layers.Dropout):  # none of the others has stochastic depth
            layer.rate = 0.0
    head, bias = keras.Variable(kernel), keras.Variable(np.zeros(AXES, np.float32))
    rates = {
        "sgd": lambda: keras.optimizers.SGD(args.rate, momentum=0.9),
        "adam": lambda: keras.optimizers.Adam(args.rate, epsilon=1e-8),
    }
    optimizer = rates[args.optimizer]()
    optimizer.build([head, bias, *model.trainable_weights])

    def batch_hard(rows: Any, labels: Any) -> Any:
        """[farthest positive - nearest negative + margin]_+, the mean of the anchors."""
        rows = tf.math.l2_normalize(rows, 1)
        squares = tf.maximum(2 - 2 * tf.matmul(rows, rows, transpose_b=True), 1e-12)
        d, same = tf.sqrt(squares), labels[:, None] == labels
        others = ~tf.eye(len(labels), dtype=tf.bool)
        farthest = tf.reduce_max(tf.where(same & others, d, -np.inf), 1)
        nearest = tf.reduce_min(tf.where(same, np.inf, d), 1)
        return tf.reduce_mean(tf.nn.relu(farthest - nearest + MARGIN))

    @tf.function
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            features = model(scale(images), training=args.moves != "frozen")
            loss = batch_hard(tf.matmul(features, head.value) + bias.value, labels)
        moving = [head, bias, *model.trainable_weights]
        optimizer.apply(tape.gradient(loss, moving), moving)
        return loss

    return lambda images, labels: float(step(tf.constant(images), tf.constant(labels)))


def torch(args: argparse.Namespace, found: Any, kernel: np.ndarray) -> Step:
    """The layers in torch.nn, channels last, eager, with pytorch-metric-learning's loss."""
    import encode
    import torch
    from pytorch_metric_learning import distances, losses, miners, reducers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    trunk, scale = encode.torch_model(found, torch.device("cpu"))
    head = torch.nn.Linear(*kernel.shape)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(kernel.T))
        head.bias.zero_()
    last = () if args.moves == "frozen" else LAST[args.trunk]["torch"]
    trunk.train(args.moves == "whole")
    for name, module in trunk.named_modules():
        if args.moves != "whole" and name.startswith(last or ("-",)):
            module.train()
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_(args.moves == "whole" or name.startswith(last or ("-",)))
    moving = [p for p in (*trunk.parameters(), *head.parameters()) if p.requires_grad]
    rates: dict[str, Any] = {
        "sgd": lambda: torch.optim.SGD(moving, args.rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(moving, args.rate),
    }
    optimizer, distance = rates[args.optimizer](), distances.LpDistance()
    hard = miners.BatchHardMiner(distance=distance)
    loss_of = losses.TripletMarginLoss(MARGIN, distance=distance, reducer=reducers.MeanReducer())

    def step(images: np.ndarray, labels: np.ndarray) -> float:
        optimizer.zero_grad()
        rows = head(trunk(scale(torch.from_numpy(images))).mean((2, 3)))
        numbers = torch.from_numpy(labels)
        loss = loss_of(rows, numbers, hard(rows, numbers))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


SIDES = {"ours": ours, "keras": keras, "torch": torch}


def serve(args: argparse.Namespace) -> None:
    """Makes the step, then does one for each line that it reads: its loss and seconds."""
    import measuring

    found = measuring.random_weights(args.trunk, args.form)
    from siamese_jax.trunks.table import find

    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(find(args.trunk).width, AXES)).astype(np.float32)
    images = rng.integers(0, 256, (args.batch, args.size, args.size, 3), np.uint8)
    labels = (np.arange(args.batch) // CLASSES).astype(np.int32)
    try:
        step = SIDES[args.serve](args, found, kernel / np.float32(np.sqrt(len(kernel))))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    print(json.dumps({"loss": step(images, labels)}), flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        step(images, labels)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"wall": wall, "processor": processor, "gb": peak}), flush=True)


class Side:
    """One contender in its own process."""

    def __init__(self, name: str, form: str, options: Sequence[str], python: str):
        command = [python, __file__, f"--serve={name}", f"--form={form}", *options]
        environment = huge_pages.environment() if name == "ours" else None
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.first = self.answer()
        self.turns: list[dict[str, float]] = []

    def answer(self) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"missing": f"it ended with status {self.process.wait()}"}

    def turn(self) -> None:
        """Two steps, of which the second counts, as in training each follows another one."""
        self.process.send_signal(signal.SIGCONT)
        for _ in range(2):
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            found = self.answer()
        self.turns.append(found)
        self.process.send_signal(signal.SIGSTOP)  # threads that wait for work may spin

    def median(self, what: str) -> float:
        return statistics.median(turn[what] for turn in self.turns)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def compare(args: argparse.Namespace, trunk: str, peer: str, moves: str) -> list[str] | None:
    """A row of the table; None, and the reason printed, where the peer is left out."""
    pythons = dict(pair.split("=", 1) for pair in args.python)
    options = [f"--trunk={trunk}", f"--moves={moves}", f"--optimizer={args.optimizer}"]
    options += [f"--size={args.size}", f"--batch={args.batch}", f"--rate={args.rate}"]
    sides = [
        Side(name, peer, options, pythons.get(name, sys.executable)) for name in ("ours", peer)
    ]
    try:
        for name, side in zip(("ours", peer), sides, strict=True):
            if "missing" in side.first:
                print(f"{trunk} {moves}: {name} is left out: {side.first['missing']}")
                return None
        for _ in range(args.repeats):
            for side in sides:
                side.turn()
    finally:
        for side in sides:
            side.close()
    (a, b), losses = sides, [side.first["loss"] for side in sides]
    if abs(losses[0] - losses[1]) > 1e-3:
        print(f"{trunk} {moves}: the first losses differ: {losses[0]:.5f} and {losses[1]:.5f}")
    rates = [args.batch / side.median("wall") for side in sides]
    row = [trunk, moves, peer, f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[0] / rates[1]:.2f}"]
    row.append(f"{b.median('processor') / a.median('processor'):.2f}")
    row += [f"{args.images / rate:.0f}" for rate in rates]
    row += [f"{side.turns[-1]['gb']:.1f}" for side in sides]
    return [*row, f"{abs(losses[0] - losses[1]):.0e}"]


COLUMNS = [
    *("trunk", "moves", "peer", "ours images/s", "peer images/s", "/ peer", "/ peer (processor)"),
    *("ours s/epoch", "peer s/epoch", "ours GB", "peer GB", "first losses differ"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunks", nargs="+", default=DEFAULT, choices=DEFAULT)
    parser.add_argument("--peers", nargs="+", default=["keras", "torch"])
    parser.add_argument("--kinds", nargs="+", default=list(MOVES), choices=MOVES)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--images", type=int, default=10_000, help="of an epoch")
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adam"])
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=PATH")
    for inner in ("--serve", "--form", "--trunk", "--moves"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    import records

    records.add_option(parser)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return
    print("  ".join(COLUMNS))
    table = []
    for trunk in args.trunks:
        for peer in args.peers:
            if peer not in LAST[trunk]:
                print(f"{trunk}: {peer} has no such trunk")
                continue
            for moves in args.kinds:
                row = compare(args, trunk, peer, moves)
                if row:
                    table.append(row)
                    print("  ".join(row), flush=True)
    if args.record:
        note = f"{args.size} px, batch {args.batch}, {args.optimizer}, an epoch of {args.images}."
        pages = os.environ.get(huge_pages.VARIABLE)
        pages = f"All with {pages}." if pages else "Ours with huge pages, as it starts itself."
        medians = f"Medians of {args.repeats} turns."
        records.save("train", COLUMNS, table, [note, medians, pages])


if __name__ == "__main__":
    main()
