"""One experiment, read top to bottom: data, trunk, cache, head, steps, evaluation, report."""

import functools
import logging
import time
import warnings as python_warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from siamese_jax import stopping, weights
from siamese_jax.data.pipeline import Reading
from siamese_jax.data.preprocess import limit_pixels
from siamese_jax.data.records import Records, content_keys, fingerprint, marks
from siamese_jax.data.sources import load_records
from siamese_jax.encoder import model as encoder_model
from siamese_jax.encoder.head import fit_head
from siamese_jax.encoder.model import Model
from siamese_jax.errors import UserError, naming
from siamese_jax.losses import Loss
from siamese_jax.metrics import evaluation
from siamese_jax.metrics.evaluation import Evaluated
from siamese_jax.report import examples
from siamese_jax.report.run_page import write_report
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.storage.cache import cache_root
from siamese_jax.train import optim
from siamese_jax.train.beginning import (
    Parent,
    extended,
    find_parent,
    inherit,
    set_aside,
    warn_of_other_data,
)
from siamese_jax.train.fields import check_config, completed
from siamese_jax.train.from_config import (
    embedding_width,
    make_loss,
    make_memory,
    make_miner,
    make_optimizer,
    make_sampler,
)
from siamese_jax.train.inputs import Inputs, cached_inputs, image_inputs, train_labels
from siamese_jax.train.loop import (
    Run,
    Step,
    evaluate_state,
    evaluated,
    run_steps,
    tell,
    validation_metric,
)
from siamese_jax.train.metrics_log import read_curves
from siamese_jax.train.step import TrainState, init_state, make_train_step
from siamese_jax.weights.load import TrunkWeights, stored_weights

log = logging.getLogger(__name__)


def train(
    config: ConfigDict, workdir: str | Path, *, fork: str | Path | None = None
) -> dict[str, Any]:
    """Trains, or goes on training, and evaluates before and after.

    Args:
      config: as `configs/common.py` lays it out.
      workdir: the run's folder; one that holds checkpoints of this config is resumed, and one that
        is finished returns its results at once. With a constant learning rate it may be given
        more steps than before.
      fork: another run's folder. A run that has no checkpoint yet begins with the parameters that
        were the result there, at step 0 and with a fresh optimiser; run.json says so.

    Returns:
      The content of results.json.

    Raises:
      UserError: what the user can mend: a path, a field, weights that cannot be had, a loss that
        is not finite, a folder that another process trains in.
    """
    config = completed(config)
    check_config(config)
    with run_folder.claimed(Path(workdir)):
        return _train(config, Path(workdir), fork)


def _train(config: ConfigDict, workdir: Path, fork: str | Path | None) -> dict[str, Any]:
    began = time.monotonic()
    before = run_folder.begun(workdir, config.to_dict(), may_differ=["train.steps"])
    before = before and extended(before, config)
    if before and before.results is not None:
        if checkpoint.is_sound(workdir / "checkpoints", before.results["checkpoint_step"]):
            log.info("%s is finished; its results stand", workdir)
            return before.results
        log.warning("%s was finished, but its checkpoint cannot be read: it goes on", workdir)
    found = checkpoint.load_newest(workdir / "checkpoints")
    facts = before.facts if before and found else {"warnings": []}
    parent = None if found else find_parent(workdir, fork, config)

    records, keys = load_data(config, facts)
    stopping.check("no step was taken")
    trunk = parent.trunk if parent else load_trunk(config, facts, found)
    model = encoder_model.model_of_config(config.to_dict(), trunk, train_stages(config, trunk))
    log_summary(records, trunk)
    sampler = make_sampler(config, records)  # what cannot be is said before the trunk runs
    inputs = make_inputs(config, model, trunk, records, keys)
    if len(inputs.records) < len(records):
        sampler = make_sampler(config, inputs.records)
    if parent:
        facts["forked_from"] = parent.describe(config)
        warn_of_other_data(parent, fingerprint(records, keys), facts)
    if "before" not in facts:
        facts = describe(config, facts, trunk, inputs.records, fingerprint(records, keys))
        facts["before"] = {s: bare_metrics(config, inputs, s) for s in evaluated(inputs.records)}
    run = Run(config, workdir, inputs, facts)
    state, step, moving = start(run, model, trunk, found, parent)
    stopping.check("no step was taken")
    # From here on the folder is this run's.
    set_aside(before)
    run_folder.write_start(workdir, config.to_dict(), facts)
    with naming(workdir, "checkpoints that were saved are kept"):
        state, last = run_steps(run, state, step, sampler, moving)
    best, chosen = read_back(run)
    if chosen[0] != config.train.steps:
        log.info("step %d is the best on validation, and the result", chosen[0])
        state, last = tree.unflatten(chosen[1], state), {}
    after = last or evaluate_state(run, state, evaluated(inputs.records))
    marked = np.zeros(int(records.id.max()) + 1, np.uint64)
    marked[records.id] = marks(records, keys)
    results = finish(run, state, after, marked, "validation" if best else "last step")
    results["seconds"] = round(time.monotonic() - began, 1)
    run_folder.write_checked(workdir / "results.json", results)
    return results


# Data and trunk -----------------------------------------------------------------------------


# Of one source or another; where one is given, a source without it refuses.
DATA_OPTIONS = ("layout", "split", "images", "separator", "image_key", "label_key", "super_key")


def load_data(config: ConfigDict, facts: Mapping[str, Any]) -> tuple[Records, list[bytes]]:
    """The records and the keys of their contents. UserError where a resumed run's data changed."""
    data = config.data
    limit_pixels(data.get("max_pixels"))
    held_out = data.validation_fraction + data.test_fraction
    if not 0 <= held_out < 1:
        raise UserError(
            f"data.test_fraction + data.validation_fraction = {held_out:g} leaves no class to "
            "train on; their sum must be below 1"
        )
    # Runs of earlier versions have configs without these fields.
    options = {name: data.get(name) for name in DATA_OPTIONS}
    records = load_records(
        data.source,
        data.root,
        seed=config.seed if data.split_seed < 0 else data.split_seed,
        fractions=(1 - held_out, data.validation_fraction, data.test_fraction),
        cache_dir=data.cache_dir,
        **{name: value for name, value in options.items() if value is not None},
    )
    _check_trainable(records)
    keys = content_keys(records)
    if "data" in facts and facts["data"]["fingerprint"] != fingerprint(records, keys):
        raise UserError(
            f"the images of {data.root or data.source} have changed since this run began; "
            "choose another --workdir"
        )
    return records, keys


def _check_trainable(records: Records) -> None:
    """UserError where there is nothing to train on or to measure by; said before the work."""
    if records.label.ndim == 1 and (records.label < 0).all():
        raise UserError(
            f"{records.root}: the images have no labels to train on: make class folders, or a CSV "
            "with the columns path and label"
        )
    held = {str(split) for split in np.unique(records.split)} & {"test", "validation"}
    if held and not evaluated(records):
        raise UserError(
            f"{records.root}: no image of the {' or '.join(sorted(held))} split has another of its "
            "class to find, so there is nothing to measure: add images to its classes"
        )
    if "test" not in held:
        only = "the scores are those of validation, which also chooses the checkpoint"
        log.warning("there is no test split: %s", only if held else "nothing is measured")


def load_trunk(config: ConfigDict, facts: Mapping[str, Any], found: Any) -> TrunkWeights:
    """The trunk's weights: those in the run's own checkpoint, or from where the config says."""
    if found:
        return stored_weights(facts, found[1])
    with python_warnings.catch_warnings(record=True) as caught:
        python_warnings.simplefilter("always")
        trunk = weights.load(
            config.trunk.name,
            config.trunk.weights,
            offline_fallback=config.trunk.offline_fallback or None,
            form=config.trunk.form,
            preprocessing=config.trunk.preprocessing,
            ignore=config.trunk.ignore,
            key=jax.random.key(config.seed),
            cache_dir=config.data.cache_dir,
        )
    for warning in caught:
        log.warning("%s", warning.message)
        facts["warnings"].append(str(warning.message))
    facts["warnings"].extend(trunk.notes)
    return trunk


def train_stages(config: ConfigDict, trunk: TrunkWeights) -> tuple[str, ...]:
    """The stages whose BatchNorm uses batch statistics: those with nothing frozen, if asked."""
    moving = optim.trainable(trunk.variables["params"], config.trunk.freeze)
    whole = [stage for stage, leaves in moving.items() if all(jax.tree.leaves(leaves))]
    return tuple(whole) if config.trunk.batch_norm == "train" else ()


def make_inputs(
    config: ConfigDict, model: Model, trunk: TrunkWeights, records: Records, keys: list[bytes]
) -> Inputs:
    """Cached features where the whole trunk is frozen and the cache is on; images otherwise."""
    moving = optim.trainable(trunk.variables["params"], config.trunk.freeze)
    reading = Reading(
        image_size=config.trunk.image_size,
        fit=config.data.fit,
        augment=config.augment.to_dict(),
        seed=config.seed,
        batch_size=config.eval.batch_size,
        strict=config.data.strict,
        keys=dict(zip(records.id.tolist(), keys, strict=True)),
    )
    if any(jax.tree.leaves(moving)) or not config.cache.enabled:
        return image_inputs(model, trunk.variables, records, reading)
    folder = Path(config.data.cache_dir or cache_root()) / "features"
    return cached_inputs(
        model, trunk.variables, records, keys, reading, views=config.cache.views, folder=folder
    )


def bare_metrics(config: ConfigDict, inputs: Inputs, split: str) -> dict[str, Any]:
    """How well the trunk's features do as they are: average-pooled, by cosine."""
    vectors, records = inputs.features(inputs.records.where(split))
    vectors = vectors.mean(axis=tuple(range(1, vectors.ndim - 1)))
    sides = evaluation.sides_of(vectors, records, "cosine")
    values = sides.measure(config.eval.ks, evaluation.METRICS)
    return evaluation.summary(values, len(sides.ids[1]))


def class_count(records: Records) -> int:
    """How many classes have an image here."""
    if records.label.ndim == 2:
        return int(records.label.any(axis=0).sum())
    return len(np.unique(records.label[records.label >= 0]))


def log_summary(records: Records, trunk: TrunkWeights) -> None:
    """What is about to be trained on what."""
    for split in np.unique(records.split):
        part = records.select(records.split == split)
        log.info(
            "%s: %d images of %d classes, %d queries, %d gallery images",
            split or "no split",
            len(part),
            class_count(part),
            part.is_query.sum(),
            part.is_gallery.sum(),
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(trunk.variables["params"]))
    log.info("trunk: %s, %.1f million parameters, %s", trunk.trunk, count / 1e6, trunk.source)


def describe(
    config: ConfigDict, facts: dict[str, Any], trunk: TrunkWeights, records: Records, data: str
) -> dict[str, Any]:
    """The content of run.json: all that the numbers depend on; `data` is the data's fingerprint."""
    splits = {str(s): records.select(records.split == s) for s in np.unique(records.split)}
    return {
        **facts,
        **run_folder.environment(),
        "seed": config.seed,
        "trunk": trunk.describe() | {"requested": config.trunk.name},
        "data": {
            "source": config.data.source,
            "root": config.data.root,
            "fingerprint": data,
            "notes": list(records.notes),
            "images": len(records),
        },
        "split": {
            name: {
                "images": len(part),
                "classes": class_count(part),
                "queries": int(part.is_query.sum()),
                "gallery": int(part.is_gallery.sum()),
            }
            for name, part in splits.items()
        },
    }


# The start ---------------------------------------------------------------------------------


def initial_parameters(
    config: ConfigDict, model: Model, trunk: TrunkWeights, inputs: Inputs, loss: Loss, *, fit: bool
) -> tuple[Any, Any]:
    """Pretrained trunk, fresh head (fitted to the features, if `fit`), fresh loss parameters."""
    head_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    shape = encoder_model.feature_shape(model, trunk.variables, config.trunk.image_size)
    head = encoder_model.init_head(model, shape, head_key)
    pca = config.head.init == "pca" and bool(config.head.layers)
    if fit and (pca or config.head.centre):
        features, _ = inputs.features(inputs.records.where("train"))
        head = fit_head(model.head, head, features, pca=pca)
    labels = train_labels(inputs.records)
    classes = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
    params = {
        "trunk": trunk.variables["params"],
        "head": head["params"],
        "loss": loss.init(loss_key, embedding_width(config, inputs), classes),
    }
    # A copy, because the step donates its buffers and the trunk is in use elsewhere.
    return jax.tree.map(jnp.array, (params, {
        "trunk": trunk.variables["batch_stats"], "head": head["batch_stats"],
    }))  # fmt: skip


def start(
    run: Run,
    model: Model,
    trunk: TrunkWeights,
    found: tuple[int, dict[str, Any]] | None,
    parent: Parent | None,
) -> tuple[TrainState, Step, Any]:
    """The state to go on from, the step, and which parameters it moves."""
    config = run.config
    loss, miner = make_loss(config), make_miner(config)
    params, batch_stats = initial_parameters(config, model, trunk, run.inputs, loss, fit=not found)
    params, batch_stats = inherit(parent, params, batch_stats, run.facts)
    freeze = [f"trunk/{pattern}" for pattern in config.trunk.freeze]
    tx = make_optimizer(config, params, freeze)
    memory = make_memory(config, run.inputs)
    state = init_state(params, batch_stats, tx, jax.random.key(config.seed), memory)
    if found:
        state = tree.unflatten(found[1], state)
        log.info("resumed at step %d", found[0])
    moving = optim.trainable(params, freeze)
    step = make_train_step(
        apply_fn=functools.partial(encoder_model.embed, model),
        loss=loss,
        tx=tx,
        miner=miner,
        trainable=moving,
    )
    return state, step, moving


# The end ------------------------------------------------------------------------------------


def read_back(run: Run) -> tuple[bool, tuple[int, dict[str, Any]]]:
    """Whether validation chooses the checkpoint, and the chosen one as it lies on disk.

    Raises:
      UserError: it cannot be read; the same command goes on from one that can.
    """
    folder = run.folder / "checkpoints"
    best = checkpoint.best_steps(folder, validation_metric(run.config))
    chosen = checkpoint.load_first(folder, best or checkpoint.steps(folder)[:1])
    if chosen is None:  # No step was asked for.
        return False, (run.config.train.steps, {})
    if best and chosen[0] != best[0]:
        note = f"step {best[0]} is the best on validation, but its checkpoint cannot be read"
        tell([note], run.facts)
    return bool(best), chosen


def finish(
    run: Run,
    state: TrainState,
    found: Mapping[str, Evaluated],
    marked: np.ndarray,
    chosen_by: str,
) -> dict[str, Any]:
    """Results and report of the chosen state.

    Args:
      run: what was trained.
      state: the one that was chosen.
      found: its evaluation.
      marked: uint64, the mark of each image by its id (see `siamese_jax.data.records.marks`).
      chosen_by: how the state was chosen, in words.
    """
    config, facts, skipped = run.config, run.facts, run.inputs.skipped
    results: dict[str, Any] = {}
    pictures: list[Any] = []
    for split, (vectors, records, values) in found.items():
        after = evaluation.summary(values, int(records.is_gallery.sum()))
        results[split] = {"before": facts["before"][split], "after": after}
        asked, searched = (marked[records.id[m]] for m in (records.is_query, records.is_gallery))
        path = run_folder.per_query_path(run.folder, split)
        evaluation.save_per_query(path, values, asked, searched)
        pictures = examples.examples(vectors, records, distance=config.distance, seed=config.seed)
    results |= {
        "checkpoint_step": int(state.step),
        "chosen_by": chosen_by,
        **{name: facts[name] for name in ("trunk", "data", "split")},
        "parameters": {
            part: sum(leaf.size for leaf in jax.tree.leaves(state.params[part]))
            for part in ("trunk", "head")
        },
        "embedding_dim": embedding_width(config, run.inputs),
        "warnings": facts["warnings"],
        "skipped": skipped,
    }
    if skipped:
        log.warning("%d images could not be read and were left out:", len(skipped))
        for reason in skipped.values():
            log.warning("  %s", reason)
    run_folder.write_start(run.folder, config.to_dict(), facts)
    write_report(
        run.folder / "report" / "index.html",
        title=f"{run.folder.name}: {config.loss.name} on {config.data.source}",
        results=results,
        run=facts | {"config": config.to_dict()},
        curves=read_curves(run.folder / "metrics.jsonl"),
        examples=pictures,
        warnings=facts["warnings"],
    )
    return results
