"""One step of training: TrainState in, TrainState and the step's numbers out."""

from collections.abc import Callable
from typing import Any

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
    """

    step: Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    memory: Tree
    key: Array


def init_state(
    params: Tree, batch_stats: Tree, tx: optax.GradientTransformation, key: Array, memory: Tree = ()
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, batch_stats, tx.init(params), memory, key)


def make_train_step(
    *,
    apply_fn: Callable[..., tuple[Array, Tree]],
    loss: Loss,
    tx: optax.GradientTransformation,
    miner: Callable[..., Any] | None = None,
    trainable: Tree = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
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

    Returns:
      step(state, batch) -> (state, metrics). The batch holds "image" uint8 [n, h, w, 3] or
      "feature" float [n, ...], "label" int32 [n] or bool [n, c], "mask" bool [n]; the metrics are
      float32 scalars loss and grad_norm, and "embeddings" float32 [n, d], for the statistics of
      `siamese_jax.train.collapse`.
    """

    def compute_loss(moving: Tree, state: TrainState, batch: Batch) -> tuple[Array, Tree]:
        params = merge(moving, state.params, full_mask(state.params))
        dropout_key, miner_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        embeddings, batch_stats = apply_fn(
            params,
            state.batch_stats,
            batch["feature"] if "feature" in batch else batch["image"],
            train=True,
            mask=batch["mask"],
            key=dropout_key,
        )
        labels, mask = batch["label"], batch["mask"]
        references = memory_bank.references(state.memory) if state.memory != () else None
        mined = None
        if miner is not None:
            mined = miner(embeddings, labels, mask, miner_key, references=references)
        values, weights = loss.apply(
            params["loss"], embeddings, labels, mask, mined=mined, references=references
        )
        return reduce(values, weights), (batch_stats, jax.lax.stop_gradient(embeddings))

    def full_mask(params: Tree) -> Tree:
        return jax.tree.map(lambda keep, sub: jax.tree.map(lambda _: keep, sub), trainable, params)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        mask = full_mask(state.params)
        moving = select(state.params, mask)
        (value, (batch_stats, embeddings)), grads = jax.value_and_grad(compute_loss, has_aux=True)(
            moving, state, batch
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        moving = optax.apply_updates(moving, updates)
        memory = state.memory
        if memory != ():
            memory = memory_bank.push(memory, embeddings, batch["label"], batch["mask"])
        metrics = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "embeddings": embeddings,
        }
        state = state.replace(
            step=state.step + 1,
            params=merge(moving, state.params, mask),
            batch_stats=batch_stats,
            opt_state=opt_state,
            memory=memory,
        )
        return state, metrics

    return jax.jit(step, donate_argnums=0)
