"""One step of training: TrainState in, TrainState and the step's numbers out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from siamese_jax.losses import Loss, reduce
from siamese_jax.losses import memory as memory_bank
from siamese_jax.train.optim import merge, select

Array = jax.Array
Tree = Any
Batch = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that training changes, and so everything a checkpoint holds.

    Attributes:
      step: int32 [], steps done.
      params: {"trunk", "head", "loss"}.
      batch_stats: {"trunk", "head"}.
      opt_state: of the optimiser; nothing for frozen leaves.
      memory: the cross-batch memory, or an empty tuple.
      key: the run's key; step s draws from fold_in(key, s).
      ema: averages of the moving parameters and of the statistics, {"params", "batch_stats"}, or an
        empty tuple.
    """

    step: Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    memory: Tree
    key: Array
    ema: Tree = ()


def init_state(
    params: Tree, batch_stats: Tree, tx: optax.GradientTransformation, key: Array, memory: Tree = ()
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, batch_stats, tx.init(params), memory, key)


def with_average(state: TrainState, mask: Tree) -> TrainState:
    """The state before the first step, with an average of the leaves in the mask to keep."""
    moving = {"params": select(state.params, mask), "batch_stats": state.batch_stats}
    return state.replace(ema=jax.tree.map(jnp.array, moving))  # the step donates what it is given


def averaged(state: TrainState) -> TrainState:
    """The state with the averages in the place of the weights, where it keeps any."""
    if state.ema == ():
        return state
    params = jax.tree.map(
        lambda mean, leaf: leaf if isinstance(mean, optax.MaskedNode) else mean,
        state.ema["params"],
        state.params,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    return state.replace(params=params, batch_stats=state.ema["batch_stats"])


def update_average(mean: Tree, new: Tree, decay: float, step: Array) -> Tree:
    """mean + w (new - mean), w = (1 - decay) / (1 - decay^step): the debiased average of 1..step.

    A step s has the weight decay^(step - s), and the start has none, as in Adam (Kingma and Ba
    2015, arXiv:1412.6980) and `optax.ema`; what never changes stays as it is, bit for bit.

    Args:
      mean: after the step before; at step 1 it does not count.
      new: after this one.
      decay: above 0 and below 1.
      step: int32 [], this one's number from 1 on.
    """
    weight = (1 - decay) / -jnp.expm1(step.astype(jnp.float32) * math.log(decay))
    return jax.tree.map(lambda m, x: m + weight.astype(m.dtype) * (x - m), mean, new)


def _full_mask(trainable: Tree, params: Tree) -> Tree:
    """`trainable`, a prefix of the tree, at every leaf."""
    return jax.tree.map(lambda keep, sub: jax.tree.map(lambda _: keep, sub), trainable, params)


def make_train_step(
    *,
    apply_fn: Callable[..., tuple[Array, Tree]],
    loss: Loss,
    tx: optax.GradientTransformation,
    miner: Callable[..., Any] | None = None,
    trainable: Tree = True,
    ema: float = 0.0,
    chunks: int = 1,
    keep: Callable[[TrainState], TrainState] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted step. The state's buffers are donated.

    The gradient is taken with respect to the trainable leaves alone: for a frozen trunk no
    backward pass is built, and its leaves leave the step as the very buffers that came in.

    Of several chunks, all are embedded, the loss of the whole batch gives the gradient of each
    embedding, and each chunk is embedded again to pass its own on: the same gradient, in the
    memory of a chunk (GradCache, Gao et al. 2021, arXiv:2101.06983). What `apply_fn` gives for an
    image must not depend on the others then: no batch statistics.

    Args:
      apply_fn: (params, batch_stats, inputs, *, train, mask, key) -> (embeddings [n, d],
        batch_stats), as `siamese_jax.encoder.embed` with its model bound.
      loss: of `siamese_jax.losses.LOSSES`.
      tx: of `siamese_jax.train.optim.make_optimizer`, frozen with the same patterns.
      miner: of `siamese_jax.losses.miners.MINERS`, or None for the loss's own choice of pairs.
      trainable: tree of bools over params (or a prefix of it), as `optim.trainable` gives it.
      ema: decay of the average that the state keeps, of `with_average`; 0 for none.
      chunks: parts of the batch that are embedded one after the other.
      keep: where the new state's arrays live, see `siamese_jax.train.mesh.keep`.

    Returns:
      step(state, batch, rows=None) -> (state, metrics). The batch holds "image" uint8
      [n, h, w, 3] or "feature" float [n, ...], "label" int32 [n] or bool [n, c], "mask" bool [n];
      what comes after the first `rows`, static, is filling for the devices. The metrics are
      float32 scalars loss and grad_norm, and "embeddings" float32 [n, d], for the statistics of
      `siamese_jax.train.collapse`.
    """

    def embed(moving: Tree, state: TrainState, batch: Batch, key: Array) -> tuple[Array, Tree]:
        return apply_fn(
            merge(moving, state.params, _full_mask(trainable, state.params)),
            state.batch_stats,
            batch["feature"] if "feature" in batch else batch["image"],
            train=True,
            mask=batch["mask"],
            key=key,
        )

    def measure(
        embeddings: Array, moving: Tree, state: TrainState, batch: Batch, key: Array
    ) -> Array:
        params = merge(moving, state.params, _full_mask(trainable, state.params))
        labels, mask = batch["label"], batch["mask"]
        references = memory_bank.references(state.memory) if state.memory != () else None
        mined = None
        if miner is not None:
            mined = miner(embeddings, labels, mask, key, references=references)
        return reduce(
            *loss.apply(
                params["loss"], embeddings, labels, mask, mined=mined, references=references
            )
        )

    def whole(moving: Tree, state: TrainState, batch: Batch, keys: Array) -> Gradient:
        def compute(moving: Tree) -> tuple[Array, tuple[Array, Tree]]:
            embeddings, batch_stats = embed(moving, state, batch, keys[0])
            value = measure(embeddings, moving, state, batch, keys[1])
            return value, (jax.lax.stop_gradient(embeddings), batch_stats)

        (value, (embeddings, stats)), grads = jax.value_and_grad(compute, has_aux=True)(moving)
        return Gradient(value, grads, embeddings, stats)

    def in_chunks(moving: Tree, state: TrainState, batch: Batch, keys: Array) -> Gradient:
        parts, each = split(batch, chunks), jax.random.split(keys[0], chunks)
        cached = jax.lax.map(lambda one: embed(moving, state, *one)[0], (parts, each))
        embeddings = joined(cached, len(batch["mask"]))
        value, (passed, grads) = jax.value_and_grad(measure, argnums=(0, 1))(
            embeddings, moving, state, batch, keys[1]
        )

        def add(total: Tree, one: tuple[Batch, Array, Array]) -> tuple[Tree, None]:
            part, key, own = one
            _, pull = jax.vjp(lambda moving: embed(moving, state, part, key)[0], moving)
            return jax.tree.map(jnp.add, total, pull(own)[0]), None

        grads, _ = jax.lax.scan(add, grads, (parts, each, split(passed, chunks)))
        return Gradient(value, grads, embeddings, state.batch_stats)

    def step(
        state: TrainState, batch: Batch, rows: int | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        batch = {name: column[:rows] for name, column in batch.items()}
        mask = _full_mask(trainable, state.params)
        moving = select(state.params, mask)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        value, grads, embeddings, batch_stats = (whole if chunks == 1 else in_chunks)(
            moving, state, batch, keys
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        moving = optax.apply_updates(moving, updates)
        memory, average = state.memory, state.ema
        if memory != ():
            memory = memory_bank.push(memory, embeddings, batch["label"], batch["mask"])
        if ema:
            new = {"params": moving, "batch_stats": batch_stats}
            average = update_average(average, new, ema, state.step + 1)
        norm = optax.tree.norm(grads)
        metrics = {"loss": value, "grad_norm": norm, "embeddings": embeddings}
        state = state.replace(
            step=state.step + 1,
            params=merge(moving, state.params, mask),
            batch_stats=batch_stats,
            opt_state=opt_state,
            memory=memory,
            ema=average,
        )
        return keep(state) if keep else state, metrics

    return jax.jit(step, donate_argnums=0, static_argnames="rows")


class Gradient(NamedTuple):
    """What a batch gives: the loss, its gradient, embeddings [n, d] without one, and statistics."""

    value: Array
    grads: Tree
    embeddings: Array
    batch_stats: Tree


def split(batch: Tree, chunks: int) -> Tree:
    """Columns [n, ...] as [chunks, m, ...], m = ceil(n / chunks), filled up with zeros.

    Chunk k has the rows k, k + chunks, ...: where rows are split over devices, each chunk is too.

    >>> split(jnp.arange(1, 6), 2).tolist()
    [[1, 3, 5], [2, 4, 0]]
    """

    def of(column: Array) -> Array:
        fill = [(0, -len(column) % chunks)] + [(0, 0)] * (column.ndim - 1)
        column = jnp.pad(column, fill)
        return column.reshape(-1, chunks, *column.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(of, batch)


def joined(chunks: Array, rows: int) -> Array:
    """The [n, ...] that `split` has made [chunks, m, ...] of.

    >>> joined(split(jnp.arange(1, 6), 2), 5).tolist()
    [1, 2, 3, 4, 5]
    """
    return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:rows]
