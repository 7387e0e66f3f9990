"""One experiment, read top to bottom: data, trunk, cache, head, steps, evaluation, report."""

import hashlib
import logging
import time
import warnings as python_warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from siamese_jax import processes, stopping, weights
from siamese_jax.data.labels import ONE_CLASS
from siamese_jax.data.preprocess import limit_pixels
from siamese_jax.data.records import (
    Records,
    content_keys,
    fingerprint,
    marks,
    told_copies,
)
from siamese_jax.data.sources import load_records
from siamese_jax.encoder import model as encoder_model
from siamese_jax.encoder.model import Model
from siamese_jax.encoder.pooling import split_stages
from siamese_jax.errors import UserError, naming
from siamese_jax.metrics import evaluation
from siamese_jax.metrics.evaluation import Evaluated
from siamese_jax.report import examples
from siamese_jax.report.run_page import write_report
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.train import choosing, fitting, optim
from siamese_jax.train.beginning import (
    Parent,
    extended,
    find_parent,
    set_aside,
    warn_of_other_data,
)
from siamese_jax.train.fields import EARLIER, check_config, completed
from siamese_jax.train.folds import take_fold
from siamese_jax.train.from_config import (
    embedding_width,
    idle_options,
    make_inputs,
    make_sampler,
)
from siamese_jax.train.frozen import at_boundary, is_cached, is_frozen, moving_leaves
from siamese_jax.train.inputs import Inputs
from siamese_jax.train.loop import (
    Run,
    evaluate_state,
    evaluated,
    named_means,
    run_steps,
    tell,
    validation_metric,
)
from siamese_jax.train.metrics_log import MetricsLog, read_curves
from siamese_jax.train.start import is_fitted, start, start_head
from siamese_jax.train.step import TrainState, averaged
from siamese_jax.trunks import stochastic_depth
from siamese_jax.trunks.stochastic_depth import Rates
from siamese_jax.trunks.table import TRUNKS
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
    agree_on(config)
    with run_folder.claimed(Path(workdir)) as folder:
        return _train(config, folder, fork)


# What of a config is a place on a machine, and may be another on each.
PLACES = ("data.root", "data.cache_dir")


def agree_on(config: ConfigDict) -> None:
    """UserError where one of several processes has another config, or other versions."""
    fields = dict(run_folder.flat(config.to_dict()))
    processes.agree("config", {name: v for name, v in fields.items() if name not in PLACES})
    processes.agree("version", run_folder.environment()["versions"])


def _train(config: ConfigDict, workdir: Path, fork: str | Path | None) -> dict[str, Any]:
    began = time.monotonic()
    before = run_folder.begun(workdir, config.to_dict(), ["train.steps"], EARLIER)
    before = before and extended(before, config)
    if before and before.results is not None:
        if checkpoint.is_sound(workdir / "checkpoints", before.results["checkpoint_step"]):
            tell_finished(config, workdir, before)
            return before.results
        log.warning("%s was finished, but its checkpoint cannot be read: it goes on", workdir)
    found = checkpoint.load_newest(workdir / "checkpoints")
    facts = before.facts if before and found else {"warnings": []}
    parent = None if found else find_parent(workdir, fork, config)
    if before and before.config["train"]["steps"] != config.train.steps:
        facts.get("choices", {}).pop("steps", None)  # all that are asked for now

    records, keys = load_data(config, facts)
    tell(idle_options(config) + told_copies(records, keys), facts)
    stopping.check("no step was taken")
    trunk = parent.trunk if parent else load_trunk(config, facts, found)
    log_summary(records, trunk)
    warn_of_idle_options(config, trunk)
    sampler = make_sampler(config, records)  # what cannot be is said before the trunk runs
    model, inputs = prepare(config, trunk, records, keys, facts, parent)
    if len(inputs.records) < len(records):
        sampler = make_sampler(config, inputs.records)
    if parent:
        facts["forked_from"] = parent.describe(config)
        warn_of_other_data(parent, fingerprint(records, keys), facts)
    if "trunk" not in facts:
        facts = describe(config, facts, trunk, inputs.records, fingerprint(records, keys))
    run = Run(config, workdir, inputs, facts)
    key_of = dict(zip(records.id.tolist(), keys, strict=True))
    if not (found or parent) and rehearses(config, trunk, inputs):
        facts["choices"]["steps"] = choosing.rehearse(run, model, trunk, key_of)
    head = start_head(run, model, trunk)
    state, step, moving = start(run, model, trunk, head, found, parent)
    if config.optim.weight_decay:
        log.info("%s", optim.decay_told(state.params, moving, config.optim.decay_on))
    stopping.check("no step was taken")
    # From here on the folder is this run's.
    set_aside(before)
    run_folder.write_start(workdir, config.to_dict(), facts)
    fits = is_fitted(config) and not parent
    if not (found or is_frozen(config, trunk)):
        keep_start(run, model, state if fits else None)
    run_folder.write_trained_on(workdir, [key_of[i] for i in trained_ids(inputs.records)])
    with naming(workdir, "checkpoints that were saved are kept"):
        state = run_steps(run, state, step, sampler, moving)
    chosen = choose_result(run, model, trunk, state)
    fitted = started(state, trunk, head) if fits and is_frozen(config, trunk) else None
    marked = np.zeros(int(records.id.max()) + 1, np.uint64)
    marked[records.id] = marks(records, keys)
    shown = run
    if chosen.bare and not is_frozen(config, trunk):
        first = with_trunk_of(chosen.state, trunk)
        shown = run._replace(inputs=make_inputs(config, model, first, records, keys))
    results = finish(run, chosen, measure(shown, model, chosen, fitted), marked)
    results["seconds"] = round(time.monotonic() - began, 1)
    run_folder.write_checked(workdir / "results.json", results)
    return results


def tell_finished(config: ConfigDict, workdir: Path, run: run_folder.RunFolder) -> None:
    """Says that a run's results stand; and where its data have another number of images by now."""
    log.info("%s is finished; its results stand", workdir)
    if not config.data.root or run.results is None or "images" not in run.facts["data"]:
        return
    then = run.facts["data"]["images"] + len(run.results.get("skipped", ()))
    try:
        now = len(read_records(config))
    except (UserError, OSError) as error:
        log.warning("its data cannot be read any more: %s", error)
        return
    if now != then:
        log.warning("%s has %d images now, and had %d then: another --workdir trains on these",
                    config.data.root, now, then)  # fmt: skip


def prepare(
    config: ConfigDict,
    trunk: TrunkWeights,
    records: Records,
    keys: list[bytes],
    facts: dict[str, Any],
    parent: Parent | None,
) -> tuple[Model, Inputs]:
    """The model and its inputs; what a new run's LDA is of is chosen, and told in `facts`."""

    def build(choices: Mapping[str, Any], *, final: bool = True) -> tuple[Model, Inputs]:
        moving = train_stages(config, trunk)
        stage, layers = choices.get("stage"), choices.get("layers")
        model = encoder_model.model_of_config(
            config.to_dict(), trunk, moving, stage=stage, layers=layers
        )._replace(drop_rates=drop_rates(config, trunk))
        if config.trunk.remat:
            model = model._replace(trunk=with_remat(model))
        model = at_boundary(config, model, trunk, records) if final else model
        return model, make_inputs(config, model, trunk, records, keys)

    check_chunks(config, trunk)
    if "trunk" in facts:  # a run that goes on
        return build(facts.setdefault("choices", {}))
    before = parent.run.facts.get("choices", {}) if parent else {}
    if parent and before.get("stage"):
        choices = {name: before[name] for name in ("stage", "shrinkage")}
        if "layers" in before and same_layers(parent.run.config, config):
            choices["layers"] = before["layers"]
        facts["choices"] = choices
        return build(choices)
    sets = choosing.stage_choice(config, trunk)
    final = len(sets) == 1  # or what is kept would be that before the first stage of all sets
    model, inputs = build({"stage": ",".join(fitting.all_parts(sets))}, final=final)
    choices = processes.of_first(choosing.choose_form(config, model, inputs, sets))
    facts["choices"] = choices
    kept = final or is_frozen(config, trunk)
    same = kept and choices["stage"] == model.stage and "layers" not in choices
    return (model, inputs) if same else build(choices)


def same_layers(one: Mapping[str, Any], other: ConfigDict) -> bool:
    """Whether two configs ask for the same layers of the head."""
    return tuple(one["head"]["layers"]) == tuple(other.head.layers)


def rehearses(config: ConfigDict, trunk: TrunkWeights, inputs: Inputs) -> bool:
    """Whether the steps are chosen in a rehearsal: there is no validation, and steps are cheap."""
    if "validation" in evaluated(inputs.records) or not config.train.get("rehearse", False):
        return False
    if not is_cached(config, trunk):
        log.warning(
            "all steps are taken, as nothing tells which are best: set data.validation_fraction"
        )
        return False
    return True


def trained_ids(records: Records) -> list[int]:
    """Ids of the images that a run is fitted to, or is chosen by."""
    return records.id[records.split != "test"].tolist()


# Data and trunk -----------------------------------------------------------------------------


# Of one source or another; where one is given, a source without it refuses.
DATA_OPTIONS = ("layout", "split", "images", "separator", "image_key", "label_key", "super_key")


def read_records(config: ConfigDict) -> Records:
    """The records as the config divides them; no picture is opened."""
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
    seed = config.seed if data.split_seed < 0 else data.split_seed
    records = load_records(
        data.source,
        data.root,
        seed=seed,
        fractions=(1 - held_out, data.validation_fraction, data.test_fraction),
        cache_dir=data.cache_dir,
        **{name: value for name, value in options.items() if value is not None},
    )
    held = class_count(records.select(records.split == "validation"))
    if data.validation_fraction and held:
        log.info("data.validation_fraction=%g: %d classes choose the step, and are not trained on",
                 data.validation_fraction, held)  # fmt: skip
    elif data.validation_fraction:
        log.warning(
            "data.validation_fraction=%g holds nothing out: the source brings its own split, or "
            "has too few classes; data.fold holds out training classes of any",
            data.validation_fraction,
        )
    if data.get("fold"):
        records = take_fold(records, data.fold, seed)
    return records


def load_data(config: ConfigDict, facts: Mapping[str, Any]) -> tuple[Records, list[bytes]]:
    """The records and the keys of their contents. UserError where a resumed run's data changed."""
    records = read_records(config)
    _check_trainable(records)
    keys = content_keys(records)
    agree_on_images(records, keys)
    if "data" in facts and facts["data"]["fingerprint"] != fingerprint(records, keys):
        raise UserError(
            f"the images of {config.data.root or config.data.source} have changed since this run "
            "began; choose another --workdir"
        )
    return records, keys


def agree_on_images(records: Records, keys: list[bytes]) -> None:
    """UserError where one of several processes has others, or the same in another order."""
    listed = [b"".join(keys), records.label.tobytes(), records.id.tobytes()]
    listed.append("|".join(map(str, records.split)).encode())
    order = hashlib.blake2b(b"".join(listed), digest_size=8).hexdigest()
    told = {"count": len(records), "fingerprint": fingerprint(records, keys), "order": order}
    processes.agree("set of images", told)


def _check_trainable(records: Records) -> None:
    """UserError where there is nothing to train on or to measure by; said before the work."""
    if records.label.ndim == 1 and (records.label < 0).all():
        raise UserError(
            f"{records.name}: the images have no labels to train on: make class folders, or a CSV "
            "with the columns path and label"
        )
    held = {str(split) for split in np.unique(records.split)} & {"test", "validation"}
    if held and not evaluated(records):
        raise UserError(
            f"{records.name}: no image of the {' or '.join(sorted(held))} split has another of its "
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
    stages = split_stages(config.trunk.stage or "")
    return weights.with_stages(trunk, [name for name, _, _ in stages])


def train_stages(config: ConfigDict, trunk: TrunkWeights) -> tuple[str, ...]:
    """The stages whose BatchNorm uses batch statistics: those with nothing frozen, if asked."""
    moving = moving_leaves(config, trunk)
    whole = [stage for stage, leaves in moving.items() if all(jax.tree.leaves(leaves))]
    return tuple(whole) if config.trunk.batch_norm == "train" else ()


# What only a trunk that moves is trained by, with the value that changes nothing.
OF_A_MOVING_TRUNK = {
    "optim.trunk_lr_scale": 1.0,
    "optim.layer_decay": 1.0,
    "trunk.drop_path": 0.0,
    "trunk.remat": False,
}


def warn_of_idle_options(config: ConfigDict, trunk: TrunkWeights) -> None:
    """Says which options change nothing, as the trunk is frozen."""
    given = dict(run_folder.flat(config.to_dict()))
    idle = [name for name, usual in OF_A_MOVING_TRUNK.items() if given[name] != usual]
    if idle and is_frozen(config, trunk):
        log.warning("trunk.freeze leaves nothing of the trunk to move: no effect of %s", idle)


def check_chunks(config: ConfigDict, trunk: TrunkWeights) -> None:
    """UserError where batches are embedded in chunks and batch statistics are used."""
    of_head = config.head.norm == "batch" and len(config.head.layers) > 1
    if config.train.accumulate > 1 and (of_head or train_stages(config, trunk)):
        raise UserError(
            f"train.accumulate={config.train.accumulate}: a chunk has other batch statistics than "
            "its batch; set trunk.batch_norm=frozen and head.norm to none or layer, or accumulate "
            "to 1"
        )


def with_remat(model: Model) -> Any:
    """The model's trunk, its blocks computed again in the backward pass; UserError without any."""
    if not TRUNKS[model.name].blocks:
        raise UserError(
            f"trunk.remat=True: {model.name} has no blocks to compute again; set trunk.remat=False "
            "(smaller batches or images need less memory too), or take another trunk"
        )
    return model.trunk.clone(remat=True)


def drop_rates(config: ConfigDict, trunk: TrunkWeights) -> Rates:
    """How often blocks are passed by, of the stages where anything moves.

    UserError where a trunk has no blocks that can be.
    """
    blocks = TRUNKS[trunk.trunk].blocks
    if not config.trunk.drop_path:
        return ()
    if not blocks:
        raise UserError(
            f"trunk.drop_path={config.trunk.drop_path:g}: {trunk.trunk} has no blocks that add to "
            "their input, so none can be passed by; set it to 0"
        )
    moving = moving_leaves(config, trunk)
    stages = [stage for stage, leaves in moving.items() if any(jax.tree.leaves(leaves))]
    return stochastic_depth.drop_rates(blocks, config.trunk.drop_path, stages)


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
        if split in evaluated(records) and class_count(part.select(part.is_gallery)) == 1:
            log.warning("%s: %s", split, ONE_CLASS)
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


# The end ------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The result of a run.

    Attributes:
      state: that was chosen.
      bare: whether the bare trunk is better than all of them, and so the result.
      by: how it was chosen, in words.
    """

    state: Any
    bare: bool
    by: str

    @property
    def name(self) -> str:
        """What it is, in words."""
        step = int(self.state.step)
        return run_folder.BARE if self.bare else f"step {step}" if step else "step 0"


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


def choose_result(run: Run, model: Model, trunk: TrunkWeights, state: TrainState) -> Chosen:
    """The state, or the bare trunk, that validation prefers; where there is none, the last."""
    best, (step, leaves) = read_back(run)
    if leaves and step != int(state.step):
        log.info("step %d is the best on validation, and the result", step)
        state = tree.unflatten(leaves, state)
    state = averaged(state)
    steps = run.facts["choices"].get("steps")
    if steps is not None:
        by = run.facts["choices"].get("by", "validation, in a rehearsal")
        return Chosen(state, steps < 0, by)
    # Runs that version 0.1.0 began know nothing of choices, others not how the trunk was.
    frozen = is_frozen(run.config, trunk)
    first = 0 in checkpoint.steps(run.folder / "checkpoints")
    there = frozen or (first and choosing.kept(run, "before", ["validation"]) is not None)
    if not (best and run.facts["choices"] and there):
        return Chosen(state, False, "validation" if best else "last step")
    bare = processes.of_first(choosing.choose(run, [choosing.curve_of(run, model)])) < 0
    if bare and not frozen:
        found = checkpoint.load_newest(run.folder / "checkpoints", 0)
        assert found is not None
        state = averaged(tree.unflatten(found[1], state))
    return Chosen(state, bare, "validation")


def measured_again(config: ConfigDict, folder: Path, split: str) -> dict[str, Evaluated]:
    """A split before and after, as `measure` does, of a finished run: a frozen trunk's features are
    kept.

    Args:
      config: of the run.
      folder: its own.
      split: such as "test".
    """
    finished = run_folder.read(folder, finished=True)
    found = checkpoint.load_chosen(finished)
    config, facts, leaves = completed(config), finished.facts, found[1]
    records, keys = load_data(config, facts)
    trunk = load_trunk(config, facts, found)
    model, inputs = prepare(config, trunk, records, keys, facts, None)
    run = Run(config, folder, inputs, facts)
    before = choosing.before(run, model, [split])[split]
    if finished.results and finished.results["saved"] == run_folder.BARE:
        return {"before": before, "after": before}
    state = {
        kind: {"trunk": trunk.variables[kind], "head": tree.nest(leaves, f"{kind}/head/")}
        for kind in ("params", "batch_stats")
    }
    after = evaluate_state(run, SimpleNamespace(**state), [split])[split]
    return {"before": before, "after": after}


def started(state: TrainState, trunk: TrunkWeights, head: dict[str, Any]) -> Any:
    """The state that a run with this head began from, as far as embeddings depend on it."""
    params = {**state.params, "trunk": trunk.variables["params"], "head": head["params"]}
    stats = {"trunk": trunk.variables["batch_stats"], "head": head["batch_stats"]}
    return SimpleNamespace(params=params, batch_stats=stats)


def made_of(chosen: Chosen, choices: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    """What was chosen, as far as the result has it: of a bare trunk its stages and the steps."""
    if not chosen.bare:
        return dict(choices)
    there = {"stage": choosing.bare_stage(config, choices["stage"])} if "stage" in choices else {}
    return there | {name: choices[name] for name in ("steps",) if name in choices}


def with_trunk_of(state: TrainState, trunk: TrunkWeights) -> TrunkWeights:
    """The trunk with a state's weights."""
    kinds = {"params": state.params, "batch_stats": state.batch_stats}
    return replace(trunk, variables={kind: of["trunk"] for kind, of in kinds.items()})


def keep_start(run: Run, model: Model, fitted: Any) -> None:
    """Measures the trunk before it moves, and the head that was fitted to it, and keeps that."""
    splits = evaluated(run.inputs.records)
    choosing.keep(run, "before", choosing.evaluate_bare(run, model, splits))
    if fitted is not None:
        choosing.keep(run, "fitted", evaluate_state(run, fitted, splits))


def measure(run: Run, model: Model, chosen: Chosen, fitted: Any) -> dict[str, dict[str, Evaluated]]:
    """Every split before, fitted (where it began so) and after: the one look at the test data."""
    splits = evaluated(run.inputs.records)
    known = choosing.kept(run, "before", splits)
    found = {"before": known or choosing.evaluate_bare(run, model, splits)}
    start = choosing.kept(run, "fitted", splits)
    if start or fitted is not None:
        found["fitted"] = start or evaluate_state(run, fitted, splits)
    if chosen.bare:  # what is kept has no vectors, to show what they find
        found["after"] = choosing.evaluate_bare(run, model, splits) if known else found["before"]
    else:
        found["after"] = evaluate_state(run, chosen.state, splits)
    return {split: {name: each[split] for name, each in found.items()} for split in splits}


def finish(
    run: Run,
    chosen: Chosen,
    found: Mapping[str, Mapping[str, Evaluated]],
    marked: np.ndarray,
) -> dict[str, Any]:
    """Results and report of what was chosen.

    Args:
      run: what was trained.
      chosen: its result.
      found: of `measure`.
      marked: uint64, the mark of each image by its id (see `siamese_jax.data.records.marks`).
    """
    config, facts, skipped = run.config, run.facts, all_skipped(run)
    results: dict[str, Any] = {}
    pictures: list[Any] = []
    told: dict[str, str] = {}
    for split, measured in found.items():
        before, (vectors, records, values) = measured["before"], measured["after"]
        results[split] = {
            name: evaluation.summary(each.values, int(records.is_gallery.sum()))
            for name, each in measured.items()
        } | choosing.gains(before, measured["after"])
        name = validation_metric(config).rpartition("/")[2]
        told[split] = judged(split, name, measured)
        log.info("%s", told[split])
        asked, searched = (marked[records.id[m]] for m in (records.is_query, records.is_gallery))
        path = run_folder.per_query_path(run.folder, split)
        evaluation.save_per_query(path, values, asked, searched)
        distance = "cosine" if chosen.bare else config.distance
        pictures = examples.examples(vectors, records, distance=distance, seed=config.seed)
        log_once(run, int(chosen.state.step), {split: measured["after"]})
    width = next((len(m["after"].vectors[0]) for m in found.values()), None)
    results |= {
        "checkpoint_step": int(chosen.state.step),
        "saved": chosen.name,
        "chosen_by": chosen.by,
        "verdict": told,
        **{name: facts[name] for name in ("trunk", "data", "split")},
        "choices": made_of(chosen, facts["choices"], config),
        "parameters": {
            part: sum(leaf.size for leaf in jax.tree.leaves(chosen.state.params[part]))
            for part in ("trunk", "head")
        },
        "embedding_dim": width or embedding_width(config, run.inputs, facts["choices"]),
        "warnings": facts["warnings"],
        "skipped": skipped,
    }
    start = chosen.name == "step 0" and is_fitted(config)
    fitted = ", the head as it was fitted" if start else ""
    log.info("saved: %s%s, chosen by %s", chosen.name, fitted, chosen.by)
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


def all_skipped(run: Run) -> dict[str, str]:
    """What could not be read, by any of the processes."""
    told = processes.told_by_all(run.inputs.skipped)
    return dict(pair for some in told for pair in some.items())


def judged(split: str, name: str, measured: Mapping[str, Evaluated]) -> str:
    """The verdict on a split, by a metric, beside the bare trunk and a head that was fitted."""
    called = {"before": run_folder.BARE, "fitted": "the fitted head"}
    of = {part: each.values.values[name] for part, each in measured.items()}
    starts = {called[part]: values for part, values in of.items() if part in called}
    return choosing.verdict(split, name, starts, of["after"])


def log_once(run: Run, step: int, found: Mapping[str, Evaluated]) -> None:
    """A split's result among the curves, where it is not there already."""
    values = named_means(found)
    curves = read_curves(run.folder / "metrics.jsonl")
    if any(dict(curves.get(name, [])).get(step) != value for name, value in values.items()):
        last = max((points[-1][0] for points in curves.values()), default=step)
        metrics_log = MetricsLog(run.folder, last)
        metrics_log.write(step, values)
        metrics_log.close()
