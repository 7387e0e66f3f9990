"""What devices tell one another in a training step: counted in the compiled program, none is run.

    python benchmarks/collectives.py [--devices 8 64 256] [--record]

XLA makes so many devices of one CPU and compiles the step that trains on them, of shapes alone.
Each collective of the program is counted with its bytes; a device sends, in a ring of n,

    all-reduce 2 (n-1)/n b     all-gather, all-to-all (n-1)/n b     reduce-scatter (n-1) b

of a result of b bytes (Thakur et al. 2005, "Optimization of collective communication operations in
MPICH"). The batch grows with the devices, as in weak scaling. A program of GPUs may join small
collectives, or wait less for them: the bytes are the same.

    head      a frozen trunk's features [n, 1280], a head of 128 axes, multi-similarity
    classes   the same before ArcFace with 1,048,576 classes of 512 axes, split over the devices
    whole     a ResNet50 that moves whole, 224 px, batch statistics of the whole batch, triplets
    fsdp      the same with parameters and optimiser split over the devices
"""

import argparse
import functools
import os
import re
import sys
from typing import Any

# ruff: noqa: E402  (JAX reads the flags as it is imported)
MOST = max([8, *(int(word) for word in sys.argv if word.isdigit())])
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(256, MOST)} "
    "--xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import measuring
import optax
import records
from jax.sharding import NamedSharding, PartitionSpec

from siamese_jax.encoder import model as encoder_model
from siamese_jax.losses import LOSSES
from siamese_jax.train import mesh as meshes
from siamese_jax.train.step import init_state, make_train_step

PER_DEVICE = 16  # images
COLUMNS = [
    *("step", "split", "devices", "batch", "collectives", "MB a device and step"),
    *("largest kinds", "state MB a device"),
]
# Bytes that a device sends, of a result of b bytes on n devices.
SENT = {
    "all-reduce": lambda b, n: 2 * (n - 1) / n * b,
    "all-gather": lambda b, n: (n - 1) / n * b,
    "all-to-all": lambda b, n: (n - 1) / n * b,
    "reduce-scatter": lambda b, n: (n - 1) * b,
    "collective-permute": lambda b, n: b,
}
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "f64": 8}
LINE = re.compile(rf"= (.*?) ({'|'.join(SENT)})(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def head_of(width: int, axes: int, loss: Any, classes: int) -> tuple[Any, Any, Any]:
    """What makes embeddings of these axes of features, the loss, and the state's shapes."""

    def embed(params: Any, stats: Any, x: Any, **_: Any) -> tuple[Any, Any]:
        rows = x @ params["head"]["kernel"] + params["head"]["bias"]
        return rows / jnp.linalg.norm(rows, axis=1, keepdims=True), stats

    def fresh() -> Any:
        head = {"kernel": jnp.zeros((width, axes)), "bias": jnp.zeros(axes)}
        own = loss.init(jax.random.key(0), axes, classes)
        return init_state(
            {"trunk": {}, "head": head, "loss": own}, {}, optax.adamw(1e-3), jax.random.key(0)
        )

    return embed, loss, jax.eval_shape(fresh)


def whole() -> tuple[Any, Any, Any]:
    """A ResNet50 with its head, all of it moving."""
    found = measuring.random_weights("resnet50", "torch")
    loss = LOSSES["triplet"]()
    options: Any = {"head": {"layers": (128,)}, "loss": loss}
    trained = measuring.training(found, None, **options, name="adamw", learning_rate=1e-3)
    state = jax.eval_shape(lambda: trained.state.replace(opt_state=()))
    params = state.params
    tx = optax.adamw(1e-3)
    state = state.replace(opt_state=jax.eval_shape(tx.init, params))
    embed = functools.partial(encoder_model.embed, trained.model)
    return embed, loss, state


def steps() -> Any:
    """(name, what is split, what makes embeddings, loss and state, inputs of an image)."""
    features, image = ("feature", (1280,), jnp.float32), ("image", (224, 224, 3), jnp.uint8)
    yield "head", "none", head_of(1280, 128, LOSSES["multi_similarity"](), 0), features
    many = LOSSES["arcface"]()
    yield "classes", "classes", head_of(1280, 512, many, 2**20), features
    trunk = whole()
    yield "whole", "none", trunk, image
    yield "fsdp", "state", trunk, image


def compiled(made: Any, shard: str, inputs: Any, count: int) -> tuple[str, float]:
    """The program's text on so many devices, and the bytes of the state on each."""
    embed, loss, state = made
    mesh: Any = meshes.make_mesh(jax.devices()[:count])
    places = meshes.shardings(state, mesh, shard)
    step = make_train_step(
        apply_fn=embed,
        loss=meshes.of_all_rows(loss, mesh, shard),
        tx=optax.adamw(1e-3),
        keep=functools.partial(meshes.keep, mesh=mesh, shard=shard),
    )
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    name, shape, dtype = inputs
    rows, by_rows = PER_DEVICE * count, NamedSharding(mesh, PartitionSpec(meshes.DATA))
    batch = {
        name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_rows),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_rows),
        "mask": jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=by_rows),
    }
    placed = jax.tree.map(place, state, places)
    held = sum(
        leaf.dtype.itemsize
        * functools.reduce(int.__mul__, leaf.sharding.shard_shape(leaf.shape), 1)
        for leaf in jax.tree.leaves(placed)
    )
    program: Any = step
    return program.lower(placed, batch, rows=rows).compile().as_text(), held


def counted(text: str, count: int) -> tuple[int, float, dict[str, float]]:
    """Of a program's text: its collectives, the bytes that a device sends, and those by kind."""
    found, kinds = 0, dict[str, float]()
    for result, kind in LINE.findall(text):
        sizes = [
            SIZES[dtype]
            * functools.reduce(int.__mul__, map(int, filter(None, shape.split(","))), 1)
            for dtype, shape in SHAPE.findall(result)
            if dtype in SIZES
        ]
        found += 1
        kinds[kind] = kinds.get(kind, 0.0) + SENT[kind](sum(sizes), count)
    return found, sum(kinds.values()), kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--steps", nargs="+", help="of them: head classes whole fsdp")
    records.add_option(parser)
    args = parser.parse_args()
    print("  ".join(COLUMNS))
    rows = []
    for name, shard, made, inputs in steps():
        if args.steps and name not in args.steps:
            continue
        for count in args.devices:
            text, held = compiled(made, shard, inputs, count)
            found, sent, kinds = counted(text, count)
            largest = sorted(kinds, key=kinds.__getitem__, reverse=True)[:2]
            shown = ", ".join(f"{kind} {kinds[kind] / 1e6:.1f}" for kind in largest)
            row = [name, shard, str(count), str(PER_DEVICE * count), str(found)]
            row += [f"{sent / 1e6:.1f}", shown, f"{held / 1e6:.0f}"]
            rows.append(row)
            print("  ".join(row), flush=True)
    if args.record:
        records.save("collectives", COLUMNS, rows, [f"{PER_DEVICE} images a device."])


if __name__ == "__main__":
    main()
