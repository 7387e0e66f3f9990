"""From the fields of a config to the parts of a step: loss, miner, sampler, optimiser, memory."""

import inspect
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from siamese_jax.data.pipeline import Reading
from siamese_jax.data.records import Records
from siamese_jax.data.samplers import SAMPLERS
from siamese_jax.encoder.model import Model
from siamese_jax.errors import UserError
from siamese_jax.losses import LOSSES, ON_DISTANCE, Loss
from siamese_jax.losses import memory as memory_bank
from siamese_jax.losses.hyperbolic import CLIP_RADIUS
from siamese_jax.losses.miners import MINERS
from siamese_jax.storage.cache import cache_root
from siamese_jax.train import optim
from siamese_jax.train.frozen import is_cached, kept_once
from siamese_jax.train.inputs import Inputs, cached_inputs, image_inputs
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights.load import TrunkWeights

log = logging.getLogger(__name__)


def _from_table(
    table: Mapping[str, Callable[..., Any]], section: str, options: ConfigDict, **given: Any
) -> Any:
    """table[options.name](**the other options, **given).

    Raises:
      UserError: a name unknown, or an option missing. What else may be wrong, `fields` has checked.
    """
    chosen = {k: v for k, v in options.to_dict().items() if k != "name"}
    if (called := options.get("name")) not in table:
        raise UserError(f"{section}.name={called!r}; choose one of {', '.join(table)}")
    factory = table[called]
    known = inspect.signature(factory).parameters
    arguments = {k: v for k, v in given.items() if k in known} | chosen
    needed = {n for n, p in known.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    if missing := sorted(needed - arguments.keys()):
        raise UserError(f"{section}.name={called} needs {section}.{missing[0]}")
    return factory(**arguments)


def make_inputs(
    config: ConfigDict, model: Model, trunk: TrunkWeights, records: Records, keys: list[bytes]
) -> Inputs:
    """Images; or what is kept of a trunk that is frozen whole, or up to `model.after`."""
    reading = Reading(
        image_size=config.trunk.image_size,
        fit=config.data.fit,
        augment=config.augment.to_dict(),
        seed=config.seed,
        batch_size=config.eval.batch_size,
        strict=config.data.strict,
        keys=dict(zip(records.id.tolist(), keys, strict=True)),
    )
    if not (model.after or is_cached(config, trunk)):
        return image_inputs(model, trunk.variables, records, reading)
    folder = Path(config.data.cache_dir or cache_root()) / "features"
    once = kept_once(config, model, trunk)
    return cached_inputs(
        model,
        trunk.variables,
        records,
        keys,
        reading,
        once,
        views=config.cache.views,
        folder=folder,
    )


def make_loss(config: ConfigDict) -> Loss:
    """The loss, on the config's distance if it is one of distances; similarities keep their own."""
    given = {"distance": config.distance} if config.loss.get("name") in ON_DISTANCE else {}
    return _from_table(LOSSES, "loss", config.loss, **given)


def idle_options(config: ConfigDict) -> list[str]:
    """A line on each option that another one leaves without effect."""
    return _never_warm(config) + _never_cut(config) + _never_split(config)


def _never_warm(config: ConfigDict) -> list[str]:
    steps, warmup = config.train.steps, config.optim.warmup_steps
    if not 0 < steps <= warmup:
        return []
    return [
        f"train.steps={steps} end before optim.warmup_steps={warmup} do: the learning rate does "
        f"not come to {config.optim.learning_rate:g}"
    ]


def _never_split(config: ConfigDict) -> list[str]:
    if config.train.shard == "none" or jax.device_count() > 1:
        return []
    return [f"train.shard={config.train.shard}: there is one device, so nothing is split"]


def _never_cut(config: ConfigDict) -> list[str]:
    radius = config.loss.get("clip_radius", CLIP_RADIUS)
    if config.loss.get("name") != "hyperbolic" or not config.head.normalize or radius < 1:
        return []
    return [
        "head.normalize gives all embeddings the length 1, so "
        f"loss.clip_radius={radius:g} cuts none and the hyperbolic loss is one of angles alone; "
        "its paper has any length: head.normalize=False"
    ]


def make_miner(config: ConfigDict) -> Callable[..., Any] | None:
    """The config's miner with its distance, or None for the name "none"."""
    if config.miner.get("name") == "none":
        return None
    return _from_table(MINERS, "miner", config.miner, distance=config.distance)


def make_sampler(config: ConfigDict, records: Records) -> Callable[[int], np.ndarray]:
    """The config's sampler over the training rows: a step's number to the rows of its batch."""
    train = records.where("train")
    side = train.side if train.side is not None and np.ptp(train.side) else None
    if side is not None and not len(_usable(train.label, side)):
        log.warning("no training class has images of two sides: positives are of one side")
        side = None
    options = fit_batch(config.sampler, train.label, side)
    given = {"labels": train.label, "seed": config.seed, "domain": side}
    if options.get("name") == "hierarchical":
        given["super_labels"] = super_labels(config, train)
    return _from_table(SAMPLERS, "sampler", options, **given)


def super_labels(config: ConfigDict, train: Records) -> np.ndarray:
    """int [n]; UserError where the data say nothing of super-classes, or not for every image."""
    if train.super_label is None:
        raise UserError(
            "sampler.name=hierarchical needs super-classes, and "
            f"{config.data.root or config.data.source} has none; they are in a CSV's column "
            "'category', in sop and inshop, and in the feature data.super_key of a tfds:NAME"
        )
    if (lost := np.flatnonzero(train.super_label < 0)).size:
        raise UserError(
            f"sampler.name=hierarchical: {lost.size} training images have no super-class, the "
            f"first is {train.path[lost[0]]}; fill in the column 'category'"
        )
    return train.super_label


def _usable(labels: np.ndarray, side: np.ndarray | None, least: int = 2) -> np.ndarray:
    """int [c]: how many images the classes have that can give positives.

    They have `least` images or more, and some of two sides where there are sides.
    """
    known = labels[:, None] >= 0 if labels.ndim == 1 else labels
    rows, held = np.nonzero(known)
    held = labels[rows] if labels.ndim == 1 else held
    counts = np.unique(held, return_counts=True)[1]
    if side is None:
        return counts[counts >= least]
    pairs = np.unique(np.stack([held, side[rows]], axis=1), axis=0)
    sides = np.unique(pairs[:, 0], return_counts=True)[1]
    return counts[(counts >= least) & (sides > 1)]


def fit_batch(
    sampler: ConfigDict, labels: np.ndarray, side: np.ndarray | None = None
) -> ConfigDict:
    """A batch of classes x images that the data can fill; classes that can't be in it are told.

    Where there are fewer classes with positives than the batch should hold, it holds all of them,
    with more images of each: as many as the batch size allows and the largest class has.
    """
    if sampler.get("name") != "classes" or not {"batch_size", "per_class"} <= {*sampler}:
        return sampler
    least = sampler.get("min_images", 2)
    counts = _usable(labels, side, least)
    usable = len(counts)
    held = labels[labels >= 0] if labels.ndim == 1 else np.nonzero(labels)[1]
    if lone := len(np.unique(held)) - usable:
        log.warning(
            "%d of %d training classes are in no batch: they have fewer than %d images%s",
            lone,
            usable + lone,
            least,
            "" if side is None else ", or images of one side",
        )
    if not usable or sampler.batch_size // sampler.per_class <= usable:
        return sampler
    most = min(sampler.batch_size // usable, int(counts.max()))
    per_class = max(sampler.per_class, most)
    fitted = ConfigDict(sampler.to_dict() | {"per_class": per_class})
    fitted.batch_size = usable * per_class
    log.info(
        "a batch holds %d classes x %d images: the training split has no more classes",
        usable,
        per_class,
    )
    return fitted


def make_optimizer(config: ConfigDict, params: Any, freeze: list[str], model: Model) -> Any:
    """The config's optimiser and learning rates; what `freeze` names stays as it is."""
    options = config.optim
    schedule = optim.warmup_schedule(
        options.learning_rate,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        total_steps=config.train.steps,
    )
    return optim.make_optimizer(
        params,
        name=options.name,
        learning_rate=schedule,
        weight_decay=options.weight_decay,
        decay_on=options.decay_on,
        clip_norm=options.clip_norm or None,
        freeze=freeze,
        lr_scale=lr_scale(options, params, model),
    )


def lr_scale(options: ConfigDict, params: Any, model: Model) -> list[tuple[str, float]]:
    """(pattern, factor) pairs: of the loss's own parameters, and of the trunk's stages.

    A stage's factor is trunk_lr_scale * layer_decay^distance, see `optim.stage_scales`.
    """
    pairs = [("loss/", float(options.loss_lr_scale))] if params["loss"] else []
    trunk, decay = float(options.trunk_lr_scale), float(options.layer_decay)
    used = [stage for stage, _ in model.parts]
    stages = optim.stage_scales(TRUNKS[model.name].stages, params["trunk"], used, decay)
    scaled = [(f"trunk/{stage}/", trunk * factor) for stage, factor in stages.items()]
    return pairs + (scaled if (trunk, decay) != (1, 1) else [])


def make_memory(config: ConfigDict, inputs: Inputs, width: int) -> Any:
    """The config's cross-batch memory of embeddings, empty; an empty tuple where its size is 0."""
    if not config.memory.size:
        return ()
    shape = inputs.records.label.shape[1:]
    return memory_bank.init(config.memory.size, width, shape)


def embedding_width(config: ConfigDict, inputs: Inputs, choices: Mapping[str, Any]) -> int:
    """How many numbers an embedding has: the head's last layer, or else the features themselves."""
    if layers := choices.get("layers") or config.head.layers:
        return layers[-1]
    return inputs.features(inputs.records.select(np.arange(1)))[0].shape[-1]
