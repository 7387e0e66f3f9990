"""What the benchmarks share: turns, the device's matrix rate, work, a step to train, the truth."""

import functools
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from siamese_jax import weights
from siamese_jax.encoder import model as encoder_model
from siamese_jax.losses import Loss
from siamese_jax.train import optim
from siamese_jax.train.step import TrainState, init_state, make_train_step
from siamese_jax.trunks.table import find, normalise


class Spent(NamedTuple):
    """Seconds by the clock, and of the processor, which other programs disturb less."""

    wall: float
    processor: float


def turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Spent]]:
    """What each of the runs took, in turns, so that a busy machine disturbs all alike."""
    spent: dict[str, list[Spent]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            took = Spent(time.perf_counter() - wall, time.process_time() - processor)
            spent[name].append(took)
    return spent


def median(spent: Sequence[Spent]) -> Spent:
    return Spent(*(statistics.median(column) for column in zip(*spent, strict=True)))


# What a matrix product takes, and how it may round; tf32 is what accelerators do by default.
PRODUCTS: dict[str, tuple[Any, lax.Precision]] = {
    "bfloat16": (jnp.bfloat16, lax.Precision.DEFAULT),
    "tf32": (jnp.float32, lax.Precision.DEFAULT),
    "float32": (jnp.float32, lax.Precision.HIGHEST),
}


def matrix_rate(kind: str, n: int | None = None) -> float:
    """FLOP/s of [n, n] x [n, n]^T, multiply-adds counted twice: the best of nine turns.

    Sums are float32. Rows are random: a GPU multiplies equal numbers faster than others.
    """
    cpu = jax.default_backend() == "cpu"
    n, calls = n or (2048 if cpu else 8192), 1 if cpu else 10
    dtype, precision = PRODUCTS[kind]
    # Two operands: a product of a matrix with itself takes another, slower way on the CPU.
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))

    # Into memory that was used before: the first use of memory can take longer than the product.
    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def product(spare: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(
            *(a, b, (((1,), (1,)), ((), ()))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    held = [product(jnp.empty((n, n), jnp.float32), a, b)]

    def run() -> None:
        for _ in range(calls):
            held[0] = product(held[0], a, b)
        held[0].block_until_ready()

    run()
    return 2 * calls * n**3 / min(spent.wall for spent in turns({"": run}, 9)[""])


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


def flops(found: weights.TrunkWeights, size: int) -> float:
    """Of one image, as XLA counts them for plain convolutions, on whatever device."""
    module = find(found.trunk).build(form=found.form)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    scaled = lambda v, x: module.apply(v, normalise(x, found.preprocessing))  # noqa: E731
    analysis: Any = jax.jit(scaled).lower(found.variables, image).cost_analysis()
    return float(analysis["flops"])


class Training(NamedTuple):
    """A trunk behind which a fresh head is trained: step(state, batch) -> (state, metrics)."""

    model: encoder_model.Model
    state: TrainState
    step: Any


def training(
    found: weights.TrunkWeights,
    moving: Sequence[str] | None,
    *,
    head: Mapping[str, Any],
    loss: Loss,
    dtype: str = "float32",
    **optimizer: Any,
) -> Training:
    """The step that `siamese-jax` trains with.

    Args:
      found: the trunk's weights; they are copied, as the step gives its buffers away.
      moving: the stages that move and use batch statistics; none for the head alone, None for all.
      head, dtype: as `siamese_jax.encoder.model.build_model` takes them.
      loss: of `siamese_jax.losses.LOSSES`.
      optimizer: options of `siamese_jax.train.optim.make_optimizer`.
    """
    stages = find(found.trunk).stages if moving is None else tuple(moving)
    model = encoder_model.build_model(found, head=head, train_stages=stages, dtype=dtype)
    shape = encoder_model.feature_shape(model, found.variables, found.image_size)
    fresh = encoder_model.init_head(model, shape, jax.random.key(0))
    params = {"trunk": found.variables["params"], "head": fresh["params"], "loss": {}}
    stats = {"trunk": found.variables["batch_stats"], "head": fresh["batch_stats"]}
    params, stats = jax.tree.map(jnp.array, (params, stats))
    still = [] if moving is None else [f"trunk/{k}/" for k in params["trunk"] if k not in moving]
    tx = optim.make_optimizer(params, freeze=still, **optimizer)
    step = make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=loss,
        tx=tx,
        trainable=optim.trainable(params, still),
    )
    return Training(model, init_state(params, stats, tx, jax.random.key(1)), step)


def float64_sort(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """The k first rows by distance for each query, ties in the order of rows; a loop over both."""
    found = np.empty((len(x), k), np.int64)
    for n, query in enumerate(x.astype(np.float64)):
        squares = [
            ((y[at : at + 4096].astype(np.float64) - query) ** 2).sum(1)
            for at in range(0, len(y), 4096)
        ]
        away = np.sqrt(np.concatenate(squares)).astype(np.float32)
        found[n] = np.argsort(away, kind="stable")[:k]
    return found


def in_process(command: Sequence[str]) -> dict[str, Any]:
    """The last JSON object a command prints; where there is none, {"failed": its last words}."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"failed": words[-1] if words else f"it ended with status {done.returncode}"}
