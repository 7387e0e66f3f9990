"""One step of training: TrainState in, TrainState and the step's numbers out."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from siamese_jax.losses import Loss, reduce
from siamese_jax.losses import memory as memory_bank
from siamese_jax.train.gradient import in_chunks, whole
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

    Args:
      apply_fn: (params, batch_stats, inputs, *, train, mask, key) -> (embeddings [n, d],
        batch_stats), as `siamese_jax.encoder.embed` with its model bound.
      loss: of `siamese_jax.losses.LOSSES`.
      tx: of `siamese_jax.train.optim.make_optimizer`, frozen with the same patterns.
      miner: of `siamese_jax.losses.miners.MINERS`, or None for the loss's own choice of pairs.
      trainable: tree of bools over params (or a prefix of it), as `optim.trainable` gives it.
      ema: decay of the average that the state keeps, of `with_average`; 0 for none.
      chunks: parts of the batch that are embedded one after the other, see `gradient.in_chunks`.
      keep: where the new state's arrays live, see `siamese_jax.train.mesh.keep`.

    Returns:
      step(state, batch, rows=None) -> (state, metrics). The batch holds "image" uint8
      [n, h, w, 3] or "feature" float [n, ...], "label" int32 [n] or bool [n, c], "mask" bool [n];
      what comes after the first `rows`, static, is filling for the devices. The metrics are
      float32 scalars loss and grad_norm, and "embeddings" float32 [n, d], for the statistics of
      `siamese_jax.train.collapse`.
    """

    def embed(state: TrainState, moving: Tree, batch: Batch, key: Array) -> tuple[Array, Tree]:
        return apply_fn(
            merge(moving, state.params, _full_mask(trainable, state.params)),
            state.batch_stats,
            batch["feature"] if "feature" in batch else batch["image"],
            train=True,
            mask=batch["mask"],
            key=key,
        )

    def measure(state: TrainState, rows: Array, moving: Tree, batch: Batch, key: Array) -> Array:
        params = merge(moving, state.params, _full_mask(trainable, state.params))
        labels, mask = batch["label"], batch["mask"]
        references = memory_bank.references(state.memory) if state.memory != () else None
        more: dict[str, Any] = {"references": references, "mined": None}
        if miner is not None:
            more["mined"] = miner(rows, labels, mask, key, references=references)
        return reduce(*loss.apply(params["loss"], rows, labels, mask, **more))

    def step(state: TrainState, batch: Batch, rows: int | None = None) -> tuple[TrainState, Batch]:
        batch = {name: column[:rows] for name, column in batch.items()}
        mask = _full_mask(trainable, state.params)
        moving = select(state.params, mask)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step))
        of = partial(embed, state), partial(measure, state), moving, batch, keys
        value, grads, embeddings, new = in_chunks(*of, chunks) if chunks > 1 else whole(*of)
        batch_stats = state.batch_stats if new is None else new
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        moving = optax.apply_updates(moving, updates)
        memory, average = state.memory, state.ema
        if memory != ():
            memory = memory_bank.push(memory, embeddings, batch["label"], batch["mask"])
        if ema:
            after = {"params": moving, "batch_stats": batch_stats}
            average = update_average(average, after, ema, state.step + 1)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "embeddings": embeddings}
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
