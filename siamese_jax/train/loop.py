"""The steps: one after the other, logged, evaluated, checkpointed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from siamese_jax import processes, stopping
from siamese_jax.data.records import Records
from siamese_jax.errors import UserError
from siamese_jax.metrics import bootstrap, evaluation
from siamese_jax.metrics.evaluation import Evaluated
from siamese_jax.storage import checkpoint, tree
from siamese_jax.storage.arrays import read_arrays
from siamese_jax.storage.writing import written
from siamese_jax.train import mesh
from siamese_jax.train.collapse import collapse_warning, embedding_statistics
from siamese_jax.train.inputs import Inputs
from siamese_jax.train.metrics_log import MetricsLog, read_curves
from siamese_jax.train.step import TrainState, averaged

log = logging.getLogger(__name__)

WORSE = "is worse than the"
_statistics = jax.jit(embedding_statistics)
Step = Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def evaluated(records: Records) -> list[str]:
    """The splits there are to evaluate."""
    return [s for s in ("validation", "test") if (records.is_query & (records.split == s)).any()]


def validation_metric(config: ConfigDict) -> str:
    """The metric whose largest value chooses the checkpoint, where there is a validation split."""
    # Runs of version 0.1.0 have no field for it.
    return f"validation/{config.eval.get('choose_by') or f'recall@{config.eval.ks[0]}'}"


class Run(NamedTuple):
    """One run of training: what every part of it works on.

    Attributes:
      config: whole.
      folder: where it is kept.
      inputs: what it trains on, and is evaluated on.
      facts: the content of run.json; warnings join it as they come.
    """

    config: ConfigDict
    folder: Path
    inputs: Inputs
    facts: dict[str, Any]


class Taken(NamedTuple):
    """A step that was taken: its number from 1 on, its batch, and its numbers, on the device."""

    step: int
    batch: dict[str, np.ndarray]
    metrics: dict[str, jax.Array]


def run_steps(
    run: Run, state: TrainState, step: Step, sampler: Callable[[int], np.ndarray], moving: Any
) -> TrainState:
    """Runs to the last step, or returns at once where it is done.

    Where validation has not been better for `train.patience` evaluations, that was the last.

    Args:
      run: what is trained.
      state: to go on from.
      step: of `make_train_step`.
      sampler: step -> rows of the training split.
      moving: which parameters are trained, as `siamese_jax.train.optim.trainable` gives it.

    Returns:
      The state after the last step.

    Raises:
      Stopped: a signal came (`siamese_jax.stopping`). Its step is done and saved.
    """
    options, start, total = run.config.train, int(state.step), steps_to_take(run)
    splits = evaluated_during(run)
    checkpoints = open_checkpoints(run, state, moving)
    begins = not checkpoint.steps(checkpoints.folder)
    metrics_log = open_log(run, checkpoints.folder, -1 if begins else start)
    batches = run.inputs.batches(sampler, start)
    latest: dict[str, float] = {}
    taken: Taken | None = None
    begun = {} if begins else first_measured(run)
    try:
        if begins and ("validation" in splits or not total):
            # The start is a candidate too.
            latest = evaluate_step(run, 0, state, [s for s in splits if s != "test"])
            metrics_log.write(0, latest)
            checkpoints.save(0, mesh.whole(state), latest, metrics_log.mark)
        shown: dict[str, Any] = {"unit": "step", "disable": not processes.is_first()}
        with tqdm(total=total, initial=start, desc="training", **shown) as bar:
            halt = stalled(run)
            for now in range(start + 1, total + 1):
                if halt:
                    break
                batch = next(batches)
                state, metrics = step(state, {k: v for k, v in batch.items() if k != "id"})
                # Looked at one step late, so that the device is never waited for.
                check_finite(taken, run.folder)
                told = told_signal(taken)
                taken = Taken(now, batch, metrics)
                # The first batch is embedded before anything has moved: see `collapse_warning`.
                if now % options.log_every == 0 or now in (1, total):
                    check_finite(taken, run.folder)
                    values = measured(taken)
                    begun = begun or values
                    warn_of_collapse(run, now, values, begun)
                    metrics_log.write(now, values)
                    bar.set_postfix_str(progress(bar, taken, values["loss"], latest))
                evaluate_now = now % options.eval_every == 0 or now == total
                if evaluate_now:
                    with stopping.held():  # it is part of the step that is saved
                        latest = evaluate_step(run, now, state, splits)
                    metrics_log.write(now, latest)
                    halt = stalled(run)
                stop = stopping.asked() if processes.count() == 1 else told
                if now % options.checkpoint_every == 0 or evaluate_now or stop:
                    check_finite(taken, run.folder)
                    (run.folder / "config.json").stat()  # where it is gone, Orbax makes another
                    known = latest if evaluate_now else {}
                    checkpoints.save(now, mesh.whole(state), known, metrics_log.mark)
                bar.update()
                if stop:
                    break
        checkpoints.wait()
        place = run.folder if processes.is_first() else "the run's folder of process 0"
        stopping.check(f"{place} holds step {int(state.step)} of {total}")
    finally:
        metrics_log.close()
        checkpoints.close()
    return mesh.whole(state)


def told_signal(taken: Taken | None) -> bool:
    """Whether one of several processes had a signal before this step: all know, and all stop."""
    number = int(taken.metrics.get("signal", 0)) if taken else 0
    if number:
        stopping.ask(number)
        processes.all_end()
    return number > 0


def steps_to_take(run: Run) -> int:
    """All steps of the config, or those that a rehearsal has found to be best."""
    chosen = run.facts.get("choices", {}).get("steps")
    return run.config.train.steps if chosen is None else max(0, chosen)


def evaluated_during(run: Run) -> list[str]:
    """The splits whose curves are drawn; test data is looked at once, at the end."""
    # Runs of version 0.1.0 have no field for it.
    without = run.config.eval.get("test_during_training") is False
    return [s for s in evaluated(run.inputs.records) if not (without and s == "test")]


def stalled(run: Run) -> bool:
    """Whether validation has been no better for as many evaluations as the run has patience."""
    patience, path = run.config.train.get("patience", 0), run.folder / "metrics.jsonl"
    curve = read_curves(path).get(validation_metric(run.config), []) if patience else []
    values = [value for _, value in curve]
    if not values or len(values) - 1 - int(np.argmax(values)) < patience:
        return False
    log.info("step %d is the last: %s was %d times not better than before (train.patience)",
             curve[-1][0], validation_metric(run.config), patience)  # fmt: skip
    return True


def open_log(run: Run, checkpoints: Path, step: int) -> MetricsLog:
    """The run's log, to go on from the checkpoint of a step; -1 where there is none."""
    mark = None if step < 0 else checkpoint.log_mark(checkpoints, step)
    if not processes.is_first():
        step, mark = -1, None  # it is thrown away
    metrics_log = MetricsLog(run.folder, step, mark)
    tell(metrics_log.notes, run.facts)
    return metrics_log


def tell(notes: list[str], facts: dict[str, Any]) -> None:
    """Says what the results should be read with, now and on the report's page."""
    for note in notes:
        log.warning("%s", note)
    facts["warnings"].extend(note for note in notes if note not in facts["warnings"])


def open_checkpoints(run: Run, state: TrainState, moving: Any) -> checkpoint.Checkpoints:
    """The run's checkpoints, to go on from the state's step."""
    chosen = "validation" in evaluated(run.inputs.records)
    return checkpoint.Checkpoints(
        run.folder / "checkpoints",
        frozen=frozen_names(state, moving),
        max_to_keep=run.config.train.max_to_keep,
        # A trunk that moves may be chosen as it was.
        keep_first=chosen and any(jax.tree.leaves(moving["trunk"])),
        best_metric=validation_metric(run.config) if chosen else None,
        start=int(state.step),
    )


def measured(taken: Taken) -> dict[str, float]:
    """What the log says of a step."""
    metrics, batch = taken.metrics, taken.batch
    mask = metrics.get("mask", batch["mask"])
    statistics = _statistics(metrics["embeddings"], batch["label"], mask)
    return scalars(metrics) | scalars(statistics)


def progress(bar: Any, taken: Taken, loss: float, latest: Mapping[str, float]) -> str:
    """What stands behind the bar: speed, loss, and the latest recall of each split."""
    rate = (bar.format_dict["rate"] or 0) * len(taken.batch["id"])
    recalls = [f"{n} {v:.3f}" for n, v in latest.items() if n.endswith("/recall@1")]
    return ", ".join([f"{rate:.0f} images/s", f"loss {loss:.4f}", *recalls])


def frozen_names(state: TrainState, moving: Any) -> frozenset[str]:
    """Names of the leaves that no step changes: frozen parameters, and unused statistics."""
    names = {
        f"params/{tree.path_name(path)}"
        for path, moves in jax.tree_util.tree_leaves_with_path(moving)
        if not moves
    }
    if not any(jax.tree.leaves(moving["trunk"])):
        still = ("batch_stats/trunk/", "ema/batch_stats/trunk/")
        names |= {n for n in tree.flatten(state) if n.startswith(still)}
    return frozenset(names)


def scalars(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """The metrics that are single numbers, as floats of Python; arrays are left out."""
    single = {n: value for n, value in metrics.items() if np.ndim(value) == 0 and n != "signal"}
    return {name: float(value) for name, value in jax.device_get(single).items()}


def check_finite(taken: Taken | None, workdir: Path) -> None:
    """Raises UserError where the loss or the gradient of a step is not finite."""
    if taken is None:
        return
    ids, metrics = taken.batch["id"], taken.metrics
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    good = checkpoint.steps(workdir / "checkpoints")
    where = f"the last good checkpoint is step {good[0]}" if good else "there is no checkpoint yet"
    listed = ", ".join(map(str, ids[:16])) + (", ..." if len(ids) > 16 else "")
    raise UserError(
        f"step {taken.step}: the loss is {loss} and its gradient's norm {norm}, on the images with "
        f"ids {listed}; {where} in {workdir / 'checkpoints'}. Lower optim.learning_rate, or set "
        "optim.clip_norm"
    )


def warn_of_collapse(
    run: Run, step: int, values: Mapping[str, float], begun: Mapping[str, float]
) -> None:
    """Says once that the embeddings have collapsed since the run has begun, with what to try."""
    message = collapse_warning(values, begun)
    if message and not any("collapse" in w for w in run.facts["warnings"]):
        tell([f"step {step}: {message}"], run.facts)


def first_measured(run: Run) -> dict[str, float]:
    """The first numbers of the batches that the log has, of a run that goes on; else nothing."""
    curves = read_curves(run.folder / "metrics.jsonl")
    named = ("mean_distance", "active_triplets", "first_component")
    return {name: curves[name][0][1] for name in named if curves.get(name)}


def warn_of_worse(run: Run, step: int, found: Mapping[str, Evaluated]) -> None:
    """Says once that the steps have made validation worse than the start, where that is told.

    Not in a rehearsal, which is there to find that out.
    """
    rehearsed = run.facts.get("choices", {}).get("steps") is not None
    if "validation" not in found or rehearsed or any(WORSE in w for w in run.facts["warnings"]):
        return
    metric = validation_metric(run.config)
    start, now = kept_queries(run).get(0), chooser(run.config, found["validation"])
    if start is None or len(start) != len(now):  # of a run that an earlier version began
        return
    told = bootstrap.difference(start, now)
    if processes.of_first(told.high < 0):
        tell([
            f"step {step}: {metric} {WORSE} {np.nanmean(start):.4f} of step 0: "
            f"{np.nanmean(now):.4f} ({told.mean:+.4f}, 95 % interval {told.low:+.4f} to "
            f"{told.high:+.4f}, over {told.queries} queries). The best of step 0 and all steps is "
            "kept; for better ones try a lower optim.learning_rate, or another loss"
        ], run.facts)  # fmt: skip


def evaluate_state(run: Run, state: Any, splits: Sequence[str]) -> dict[str, Evaluated]:
    """Each split as the state's `params` and `batch_stats` do on it."""
    found = {}
    params, batch_stats = mesh.whole((state.params, state.batch_stats))
    for split in splits:
        chosen = run.inputs.records.where(split)
        vectors, records = run.inputs.embed(params, batch_stats, chosen)
        sides = evaluation.sides_of(vectors, records, run.config.distance)
        values = sides.measure(run.config.eval.ks, evaluation.METRICS)
        found[split] = Evaluated(vectors, records, values)
    return found


def evaluate_step(
    run: Run, step: int, state: TrainState, splits: Sequence[str]
) -> dict[str, float]:
    """The metrics of each split after a step; what chooses is kept, and a loss of it is told."""
    found = evaluate_state(run, averaged(state), splits)
    keep_queries(run, step, found)
    if step:
        warn_of_worse(run, step, found)
    return named_means(found)


def keep_queries(run: Run, step: int, found: Mapping[str, Evaluated]) -> None:
    """Keeps what chooses a step, query by query, so that two steps can be told apart."""
    if "validation" in found:
        with written(_queries_file(run, step), "wb") as file:
            np.savez(file, values=chooser(run.config, found["validation"]))


@processes.by_first
def kept_queries(run: Run) -> dict[int, np.ndarray]:
    """What `keep_queries` has kept of each step in the log: float64 [q].

    Of a run that an earlier version began it is the mean alone, [1].
    """
    kept = {}
    for step, mean in read_curves(run.folder / "metrics.jsonl")[validation_metric(run.config)]:
        file = _queries_file(run, step)
        what = "measure of the validation queries"
        kept[step] = read_arrays(file, what, ("values",))["values"] if file.exists() else mean
    return {step: np.atleast_1d(values) for step, values in kept.items()}


def _queries_file(run: Run, step: int) -> Path:
    return run.folder / "validation" / f"{step}.npz"


def chooser(config: ConfigDict, one: Evaluated) -> np.ndarray:
    """Of each query, float64 [q], the metric that chooses."""
    return one.values.values[validation_metric(config).rpartition("/")[2]]


def named_means(found: Mapping[str, Evaluated]) -> dict[str, float]:
    """The metrics of each split, named "test/recall@1" and so on."""
    means = {split: one.values.means() for split, one in found.items()}
    return {f"{split}/{n}": value for split, one in means.items() for n, value in one.items()}
