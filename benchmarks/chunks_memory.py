"""The memory of a batch that is embedded in chunks (`train.accumulate`), as XLA plans it.

    python benchmarks/chunks_memory.py [--trunk resnet50 --size 112 --batch 4096 --chunk 64]

The step is compiled, not run: a ResNet50 that moves whole, statistics as they are (a chunk has none
of the batch's), batch-hard triplets of the whole batch. "Temporary" is what the step needs beside
its arguments, which are the state and the uint8 images. On a CPU, XLA plans it for one device.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import optax
import records

from siamese_jax.encoder import model as encoder_model
from siamese_jax.losses import LOSSES
from siamese_jax.train.step import init_state, make_train_step
from siamese_jax.trunks.table import find

COLUMNS = ["step", "batch", "chunks", "temporary, MB", "images, MB", "state, MB"]


def planned(args: argparse.Namespace, batch: int, chunks: int) -> list[str]:
    """A row of the table."""
    found = measuring.random_weights(args.trunk, "torch")
    model = encoder_model.build_model(found, head={"layers": (128,)})
    fresh = encoder_model.init_head(model, (find(args.trunk).width,), jax.random.key(0))
    tx = optax.sgd(1e-3, momentum=0.9)

    def start() -> Any:
        params = {"trunk": found.variables["params"], "head": fresh["params"], "loss": {}}
        stats = {"trunk": found.variables["batch_stats"], "head": fresh["batch_stats"]}
        return init_state(params, stats, tx, jax.random.key(1))

    step: Any = make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=LOSSES["triplet"](mining="hard"),
        tx=tx,
        chunks=chunks,
    )
    images = jax.ShapeDtypeStruct((batch, args.size, args.size, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((batch,), jnp.int32)
    given = {"image": images, "label": label, "mask": jax.ShapeDtypeStruct((batch,), jnp.bool_)}
    state = jax.eval_shape(start)
    plan = step.lower(state, given).compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    sizes = [plan.temp_size_in_bytes, batch * args.size**2 * 3, held]
    return [args.trunk, str(batch), str(chunks), *(f"{size / 1e6:,.0f}" for size in sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trunk", default="resnet50")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=64)
    records.add_option(parser)
    args = parser.parse_args()
    print("  ".join(COLUMNS))
    rows = []
    cases = [(args.chunk, 1), (args.batch, args.batch // args.chunk), (args.batch, 1)]
    for batch, chunks in cases:
        rows.append(planned(args, batch, chunks))
        print("  ".join(rows[-1]), flush=True)
    if args.record:
        records.save("chunks_memory", COLUMNS, rows, [f"{args.size} px; compiled, not run."])


if __name__ == "__main__":
    main()
