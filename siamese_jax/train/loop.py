"""The steps: one after the other, logged, evaluated, checkpointed."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from siamese_jax.data.records import Records
from siamese_jax.errors import UserError
from siamese_jax.metrics import evaluation
from siamese_jax.metrics.evaluation import Evaluated
from siamese_jax.storage import checkpoint, tree
from siamese_jax.train import metrics_log as train_metrics_log
from siamese_jax.train.collapse import collapse_warning, embedding_statistics
from siamese_jax.train.inputs import Inputs
from siamese_jax.train.step import TrainState

log = logging.getLogger(__name__)


Step = Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


def evaluated(records: Records) -> list[str]:
    """The splits there are to evaluate."""
    return [s for s in ("validation", "test") if (records.is_query & (records.split == s)).any()]


def validation_metric(config: ConfigDict) -> str:
    """The metric whose largest value chooses the checkpoint, where there is a validation split."""
    return f"validation/recall@{config.eval.ks[0]}"


def run_steps(
    config: ConfigDict,
    workdir: Path,
    state: TrainState,
    step: Step,
    sampler: Callable[[int], np.ndarray],
    inputs: Inputs,
    moving: Any,
    run: dict[str, Any],
) -> tuple[TrainState, dict[str, Evaluated]]:
    """Runs to the last step, or returns at once where it is done.

    Returns:
      The state after the last step, and its evaluation if that was done here.
    """
    options, start, total = config.train, int(state.step), config.train.steps
    splits = evaluated(inputs.records)
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints",
        frozen=frozen_names(state, moving),
        max_to_keep=options.max_to_keep,
        best_metric=validation_metric(config) if "validation" in splits else None,
        start=start,
    )
    metrics_log = train_metrics_log.MetricsLog(workdir, start)
    statistics = jax.jit(embedding_statistics)
    batches = inputs.batches(sampler, start)
    latest: dict[str, float] = {}
    last: dict[str, Evaluated] = {}
    pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None = None
    try:
        if "validation" in splits and not checkpoint.steps(checkpoints.folder):
            # The start is a candidate too.
            begun = named_means(evaluate_state(config, state, inputs, ["validation"]))
            metrics_log.write(0, begun)
            checkpoints.save(0, state, begun)
        with tqdm(total=total, initial=start, desc="training", unit="step") as bar:
            for i in range(start, total):
                batch = next(batches)
                state, metrics = step(state, {k: v for k, v in batch.items() if k != "id"})
                # Looked at one step late, so that the device is never waited for.
                check_finite(pending, workdir)
                pending = (i + 1, batch["id"], metrics)
                done = i + 1 == total
                if (i + 1) % options.log_every == 0 or done:
                    check_finite(pending, workdir)
                    values = scalars(metrics)
                    values |= scalars(
                        statistics(metrics["embeddings"], batch["label"], batch["mask"])
                    )
                    warn_of_collapse(values, run, i + 1)
                    metrics_log.write(i + 1, values)
                    rate = (bar.format_dict["rate"] or 0) * len(batch["id"])
                    shown = {k: f"{v:.3f}" for k, v in latest.items() if k.endswith("/recall@1")}
                    bar.set_postfix_str(
                        f"{rate:.0f} images/s, loss {values['loss']:.4f}"
                        + "".join(f", {name} {value}" for name, value in shown.items())
                    )
                evaluate_now = (i + 1) % options.eval_every == 0 or done
                if evaluate_now:
                    last = evaluate_state(config, state, inputs, splits)
                    latest = named_means(last)
                    metrics_log.write(i + 1, latest)
                if (i + 1) % options.checkpoint_every == 0 or evaluate_now:
                    check_finite(pending, workdir)
                    checkpoints.save(i + 1, state, latest if evaluate_now else {})
                bar.update()
        checkpoints.wait()
    finally:
        metrics_log.close()
        checkpoints.close()
    return state, last


def frozen_names(state: TrainState, moving: Any) -> frozenset[str]:
    """Names of the leaves that no step changes: frozen parameters, and unused statistics."""
    names = {
        f"params/{tree.path_name(path)}"
        for path, moves in jax.tree_util.tree_leaves_with_path(moving)
        if not moves
    }
    if not any(jax.tree.leaves(moving["trunk"])):
        names |= {n for n in tree.flatten(state) if n.startswith("batch_stats/trunk/")}
    return frozenset(names)


def scalars(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    return {k: float(v) for k, v in jax.device_get(dict(metrics)).items() if np.ndim(v) == 0}


def check_finite(pending: tuple[int, np.ndarray, dict[str, jax.Array]] | None, workdir: Path):
    """Raises UserError where the loss or the gradient of a step is not finite."""
    if pending is None:
        return
    step, ids, metrics = pending
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if np.isfinite(loss) and np.isfinite(norm):
        return
    good = checkpoint.steps(workdir / "checkpoints")
    where = f"the last good checkpoint is step {good[0]}" if good else "there is no checkpoint yet"
    listed = ", ".join(map(str, ids[:16])) + (", ..." if len(ids) > 16 else "")
    raise UserError(
        f"step {step}: the loss is {loss} and its gradient's norm {norm}, on the images with ids "
        f"{listed}; {where} in {workdir / 'checkpoints'}. Lower optim.learning_rate, or set "
        "optim.clip_norm"
    )


def warn_of_collapse(values: Mapping[str, float], run: dict[str, Any], step: int) -> None:
    """Says once that the embeddings have collapsed, with what to try."""
    message = collapse_warning(values)
    if message and not any("collapse" in w for w in run["warnings"]):
        run["warnings"].append(f"step {step}: {message}")
        log.warning("step %d: %s", step, message)


def evaluate_state(
    config: ConfigDict, state: TrainState, inputs: Inputs, splits: list[str]
) -> dict[str, Evaluated]:
    """Each split as the state does on it."""
    found = {}
    for split in splits:
        chosen = inputs.records.where(split)
        vectors, records = inputs.embed(state.params, state.batch_stats, chosen)
        sides = evaluation.sides_of(vectors, records, config.distance)
        values = sides.measure(config.eval.ks, evaluation.METRICS)
        found[split] = Evaluated(vectors, records, values)
    return found


def named_means(found: Mapping[str, Evaluated]) -> dict[str, float]:
    """The metrics of each split, named "test/recall@1" and so on."""
    means = {split: one.values.means() for split, one in found.items()}
    return {f"{split}/{n}": value for split, one in means.items() for n, value in one.items()}
