"""What a run starts from: the pretrained trunk, the fitted head, fresh parameters of the loss."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from siamese_jax import processes, stopping
from siamese_jax.encoder import model as encoder_model
from siamese_jax.encoder.head import fit_head
from siamese_jax.encoder.model import Model
from siamese_jax.errors import UserError
from siamese_jax.losses import Loss
from siamese_jax.storage import tree
from siamese_jax.train import huge_pages, optim
from siamese_jax.train import mesh as meshes
from siamese_jax.train.beginning import Parent, inherit
from siamese_jax.train.from_config import (
    embedding_width,
    make_loss,
    make_memory,
    make_miner,
    make_optimizer,
)
from siamese_jax.train.frozen import freeze_patterns
from siamese_jax.train.inputs import Inputs, train_labels
from siamese_jax.train.loop import Run, Step
from siamese_jax.train.step import TrainState, init_state, make_train_step, with_average
from siamese_jax.weights.load import TrunkWeights

log = logging.getLogger(__name__)
INITS = ("random", "pca", "lda")


def is_fitted(config: ConfigDict) -> bool:
    """Whether a run begins with a head that was fitted to its training features."""
    if config.head.init not in INITS:
        raise UserError(f"head.init={config.head.init!r}; choose one of {', '.join(INITS)}")
    return config.head.init != "random" and bool(config.head.layers)


def start(
    run: Run,
    model: Model,
    trunk: TrunkWeights,
    head: dict[str, Any],
    found: tuple[int, dict[str, Any]] | None,
    parent: Parent | None,
) -> tuple[TrainState, Step, Any]:
    """The state to go on from, the step, and which parameters it moves.

    Args:
      run: what is trained.
      model, trunk: its model and the trunk's weights.
      head: of `start_head`.
      found: a checkpoint's step and leaves; None to begin.
      parent: another run's checkpoint, to begin with.
    """
    config = run.config
    loss, miner = make_loss(config), make_miner(config)
    width = embedding_width(config, run.inputs, run.facts.get("choices", {}))
    params, batch_stats = initial_parameters(config, trunk, run.inputs, loss, head, width)
    params, batch_stats = inherit(parent, params, batch_stats, run.facts)
    freeze = [f"trunk/{pattern}" for pattern in freeze_patterns(config, trunk)]
    tx = make_optimizer(config, params, freeze, model)
    memory = make_memory(config, run.inputs, width)
    state = init_state(params, batch_stats, tx, jax.random.key(config.seed), memory)
    moving = optim.trainable(params, freeze)
    if config.optim.ema:
        state = with_average(state, moving)
        log.info("measured, chosen and saved is the average of the weights (optim.ema=%g)",
                 config.optim.ema)  # fmt: skip
    if found:
        state = tree.unflatten(found[1], state)
        log.info("resumed at step %d", found[0])
    if said := huge_pages.line():
        log.info(said)
    devices = meshes.make_mesh()
    step = make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=meshes.of_all_rows(loss, devices, config.train.shard) if devices else loss,
        tx=tx,
        miner=miner,
        trainable=moving,
        ema=config.optim.ema,
        chunks=config.train.accumulate,
        keep=functools.partial(meshes.keep, mesh=devices, shard=config.train.shard)
        if devices
        else None,
    )
    if devices:
        if processes.count() > 1:  # whose processors may differ in a last bit
            leaves = processes.of_first(jax.device_get(tree.flatten(state)))
            state = tree.unflatten(leaves, state)
        state = meshes.place(state, devices, config.train.shard)
        log.info("%d devices: batches lie on them by rows; train.shard=%s splits %d leaves",
                 devices.size, config.train.shard, meshes.count_split(state))  # fmt: skip
        return state, _over(devices, step), moving
    return state, step, moving


def _over(devices: Mesh, step: Callable[..., Any]) -> Step:
    """A step of batches [n, ...] on the host, over all devices.

    Of several processes each has read its own rows, and had its own signals: the metrics have the
    mask of all rows, and a signal that one of them had.
    """

    def run(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        rows = len(batch["mask"])
        _say_filled(rows, devices.size)
        if processes.count() > 1:
            batch = {**batch, "signal": np.full(rows, stopping.came(), np.int32)}
        placed = meshes.spread(batch, devices)
        told = {}
        if "signal" in placed:
            signal, mask = placed.pop("signal"), placed["mask"]
            told = _told(signal, mask, devices, rows)
        state, metrics = step(state, placed, rows=rows)
        return state, metrics | told

    return run


@functools.cache
def _say_filled(rows: int, devices: int) -> None:
    if left := -rows % devices:
        log.info("a batch of %d is filled up to %d for %d devices; the filling counts for nothing",
                 rows, rows + left, devices)  # fmt: skip


@functools.partial(jax.jit, static_argnums=(2, 3))
def _told(signal: jax.Array, mask: jax.Array, devices: Mesh, rows: int) -> dict[str, jax.Array]:
    told = {"signal": signal.max(), "mask": mask[:rows]}
    return jax.lax.with_sharding_constraint(told, NamedSharding(devices, PartitionSpec()))


def initial_parameters(
    config: ConfigDict,
    trunk: TrunkWeights,
    inputs: Inputs,
    loss: Loss,
    head: dict[str, Any],
    width: int,
) -> tuple[Any, Any]:
    """Pretrained trunk, the head that is given, fresh loss parameters of embeddings [width]."""
    labels = train_labels(inputs.records)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    params = {
        "trunk": trunk.variables["params"],
        "head": head["params"],
        "loss": loss.init(_keys(config)[1], width, classes),
    }
    # A copy, because the step donates its buffers and the trunk is in use elsewhere.
    return jax.tree.map(jnp.array, (params, {
        "trunk": trunk.variables["batch_stats"], "head": head["batch_stats"],
    }))  # fmt: skip


def _keys(config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    """Of the head and of the loss."""
    head, loss = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    return head, loss


def fresh_head(run: Run, model: Model, trunk: TrunkWeights) -> dict[str, Any]:
    """{"params", "batch_stats"} of the head before anything is fitted."""
    size = run.config.trunk.image_size
    shape = encoder_model.feature_shape(model, trunk.variables, size)
    return encoder_model.init_head(model, shape, _keys(run.config)[0])


def start_head(run: Run, model: Model, trunk: TrunkWeights) -> dict[str, Any]:
    """The same, as `head.init` has it start: fitted to the training features."""
    config, head = run.config, fresh_head(run, model, trunk)
    if not (is_fitted(config) or config.head.centre):
        return head
    features, records = run.inputs.features(run.inputs.records.where("train"))
    options: dict[str, Any] = {"init": config.head.init, "labels": records.label}
    if config.head.init == "lda":
        options["shrinkage"] = run.facts["choices"]["shrinkage"]
    return fit_head(model.head, head, features, **options)
