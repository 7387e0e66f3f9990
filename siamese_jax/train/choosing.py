"""What a run chooses without its test data: its LDA, how many steps, what is the result.

The stages and the shrinkage of LDA are chosen by folds over the training classes. Where
the data have no validation split, the steps are chosen in a rehearsal: each fold of the training
classes is held out and asked as a run goes; then the run itself has all of them, and takes as
many steps as were best. Candidates are always the bare trunk and step 0 as well.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from siamese_jax.data.records import Records
from siamese_jax.encoder import lda
from siamese_jax.encoder.head import head_inputs, make_head
from siamese_jax.encoder.model import Model, init_head
from siamese_jax.encoder.pooling import stripped
from siamese_jax.errors import UserError
from siamese_jax.metrics import bootstrap, evaluation
from siamese_jax.metrics.evaluation import Evaluated
from siamese_jax.metrics.retrieval import PerQuery
from siamese_jax.processes import by_first, is_first, of_first
from siamese_jax.storage import checkpoint, run_folder
from siamese_jax.storage.arrays import read_arrays
from siamese_jax.storage.writing import written
from siamese_jax.train import fitting
from siamese_jax.train.fields import EARLIER
from siamese_jax.train.fitting import Candidate
from siamese_jax.train.folds import folds_as_validation
from siamese_jax.train.from_config import make_inputs, make_sampler
from siamese_jax.train.inputs import Inputs
from siamese_jax.train.loop import (
    Run,
    chooser,
    evaluated,
    kept_queries,
    run_steps,
    tell,
    validation_metric,
)
from siamese_jax.train.start import start, start_head
from siamese_jax.trunks.table import TRUNKS
from siamese_jax.weights.load import TrunkWeights

log = logging.getLogger(__name__)


# LDA ----------------------------------------------------------------------------------------


def stage_choice(config: ConfigDict, trunk: TrunkWeights) -> list[tuple[str, ...]]:
    """The sets of stages that a config leaves open; the one that it names."""
    there = TRUNKS[trunk.trunk]
    if config.trunk.stage == "auto":
        return fitting.stage_sets(there.widths, config.trunk.pool)
    return [tuple(stripped(config.trunk.stage or trunk.feature).split(","))]


def shares(config: ConfigDict) -> Sequence[float]:
    """The shrinkages that a config leaves open; the one that it names."""
    text = str(config.head.get("shrinkage"))
    if text in ("auto", "None"):  # runs of version 0.1.0 have none
        return fitting.SHRINKAGES
    try:
        return [float(text)]
    except ValueError:
        raise UserError(f"head.shrinkage={text!r}: give auto, or from 0 to 1") from None


def choose_form(
    config: ConfigDict, model: Model, inputs: Inputs, sets: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """{"stage", "shrinkage"}: the LDA that is best over folds of the training classes.

    With "layers", where the head keeps other axes than the config says: see `layers_for`.

    Args:
      config: of the run.
      model: of all stages that are in question.
      inputs: of that model.
      sets: the sets of stages to choose from.
    """
    open_shares = shares(config)

    def chosen_as(stages: Sequence[str], shrinkage: float) -> dict[str, Any]:
        layers = layers_for(config, sum(model.columns[stage] for stage in stages), inputs.records)
        return {"stage": ",".join(stages), "shrinkage": shrinkage, **layers}

    if len(sets) == 1 and (config.head.init != "lda" or len(open_shares) == 1):
        return chosen_as(sets[0], open_shares[0])
    features, records = inputs.features(inputs.records.where("train"))
    bare = model._replace(head=model.head.clone(layers=()))  # the layers have no part in it
    fresh = init_head(bare, features.shape[1:], jax.random.key(0))
    rows = head_inputs(bare.head, fresh, features)
    parts = model.columns

    def tried(
        stages: Sequence[tuple[str, ...]], shrinkages: Sequence[float]
    ) -> list[fitting.Scored]:
        candidates = [Candidate(s, share) for s in stages for share in shrinkages]
        return fitting.score(rows, records, parts, candidates, seed=config.seed)

    try:
        fitting.held_folds(records.label, fitting.FOLDS, config.seed, tell=True)
        middle = [fitting.MIDDLE] if len(open_shares) > 1 else open_shares
        why = []
        if len(sets) > 1:
            scored = tried(sets, middle)
            sets, why = (
                [fitting.best_if_told(scored).candidate.stages],
                [fitting.why_stages(scored)],
            )
        scored = tried(sets, open_shares)
        chosen = fitting.moderate(scored)
        why += [fitting.why_shrinkage(scored)]
    except fitting.TooFew as error:
        log.warning("LDA takes the last stage and a shrinkage of 0.5: %s", error)
        return chosen_as(sets[0], 0.5)
    stages, share, _ = chosen.candidate
    assert share is not None
    log.info(
        "by folds over the training classes: stages %s, shrinkage %g (%s %.4f). Why: %s",
        ",".join(stages), share, fitting.METRIC, chosen.mean, "; ".join(filter(None, why)),
    )  # fmt: skip
    return chosen_as(stages, share)


def layers_for(config: ConfigDict, width: int, records: Records) -> dict[str, tuple[int, ...]]:
    """{"layers"}: all axes of a head that would keep more than there are; and of an LDA that would
    keep some, of too few images to tell them.

    An axis that no training image speaks for is as good as any other, and unseen classes lose what
    lies along those that are left out: of 10 classes of groceries (310 images) 512 axes of 1,280
    get map@r .44 on others, all of them .46, the trunk's features .42.

    Args:
      config: of the run.
      width: of the features.
      records: with the training images.
    """
    count, layers = int((records.split == "train").sum()), tuple(config.head.layers)
    if config.head.init in ("lda", "pca") and len(layers) == 1 and layers[0] > width:
        log.warning("the head keeps %d axes, not %d: its features have no more", width, layers[0])
        return {"layers": (width,)}
    if config.head.init != "lda" or len(layers) != 1 or not lda.few(count, layers[0], width):
        return {}
    log.warning(
        "the head keeps all %d axes, not %d: %d training images are fewer than %d an axis, and "
        "others would lose what they do not show", width, layers[0], count, lda.IMAGES_AN_AXIS,
    )  # fmt: skip
    return {"layers": (width,)}


# The bare trunk -----------------------------------------------------------------------------


def bare_stage(config: ConfigDict, stage: str) -> str:
    """The stages of the trunk without a head: those that are asked for, or its last one."""
    return stage.rpartition(",")[2] if config.trunk.stage == "auto" else stage


def bare_vectors(config: ConfigDict, model: Model, features: np.ndarray) -> np.ndarray:
    """The embeddings [n, c] of the trunk without a head, of features [n, ...]: by cosine."""
    x = features.mean(axis=tuple(range(1, features.ndim - 1)))
    widths = model.widths
    if config.trunk.stage == "auto":
        x, widths = x[:, -widths[-1] :], widths[-1:]
    if len(widths) == 1:
        return x
    return np.asarray(make_head(normalize=False, unit=True, parts=widths).apply({}, x))


def evaluate_bare(run: Run, model: Model, splits: Sequence[str]) -> dict[str, Evaluated]:
    """Each split as the trunk's features do on it, as they are, by cosine."""
    found = {}
    for split in splits:
        features, records = run.inputs.features(run.inputs.records.where(split))
        vectors = bare_vectors(run.config, model, np.asarray(features))
        sides = evaluation.sides_of(vectors, records, "cosine")
        values = sides.measure(run.config.eval.ks, evaluation.METRICS)
        found[split] = Evaluated(vectors, records, values)
    return found


def keep(run: Run, name: str, found: Mapping[str, Evaluated]) -> None:
    """Keeps with a run what was measured before its trunk moved."""
    for split, (_, _, values) in found.items():
        with written(_kept(run, name, split), "wb") as file:
            columns: dict[str, Any] = dict(values.values)
            np.savez(file, relevant=values.relevant, **columns)


def before(run: Run, model: Model, splits: Sequence[str]) -> dict[str, Evaluated]:
    """Each split by the bare trunk, as it is, or as it was where it has moved since."""
    return kept(run, "before", splits) or evaluate_bare(run, model, splits)


@by_first
def kept(run: Run, name: str, splits: Sequence[str]) -> dict[str, Evaluated] | None:
    """What `keep` has kept, without vectors; None where it has not of every split."""
    if not all(_kept(run, name, split).exists() for split in splits):
        return None
    found = {}
    for split in splits:
        what = "measure of a run's start"
        columns = read_arrays(_kept(run, name, split), what, ("relevant",))
        values = PerQuery(columns, columns.pop("relevant"))
        records = run.inputs.records.where(split)
        found[split] = Evaluated(np.zeros((0, 0), np.float32), records, values)
    return found


def _kept(run: Run, name: str, split: str) -> Path:
    return run.folder / "report" / f"{name}_{split}.npz"


# The steps ----------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The metric that chooses, of each of a run's q validation queries.

    Attributes:
      values: float64 [q], of each step that was measured.
      bare: float64 [q], of the bare trunk.
      classes: int [q], of the queries.
    """

    values: Mapping[int, np.ndarray]
    bare: np.ndarray
    classes: np.ndarray


def rehearse(run: Run, model: Model, trunk: TrunkWeights, keys: Mapping[int, bytes]) -> int | None:
    """How many steps are best for folds of the training classes; None where nothing tells.

    0 is none, as the head starts, and -1 the bare trunk. Each fold is held out once, in a run of
    its own in a folder of the run's, which goes on where it was stopped. Where LDA keeps all axes
    (see `layers_for`), only these two are asked.

    Args:
      run: whose data have no validation split.
      model, trunk: its own.
      keys: the key of each image's content, by its id.
    """
    config = run.config
    try:
        folds = held_out(run.inputs.records, config.seed)
    except fitting.TooFew as error:
        if config.head.init != "lda":
            tell([f"all steps are taken: {error}"], run.facts)
            return None
        said = (
            f"the bare trunk stays as it is: {error}; the tool `fit` fits LDA to all classes, "
            "data.test_fraction leaves more to train on, train.rehearse=False takes all steps"
        )
        tell([said], run.facts)
        run.facts["choices"]["by"] = "nothing: too few classes to choose by"
        return -1
    few = run.facts["choices"].get("layers", (0,))[0] > config.head.layers[0]
    if few:
        # Steps did not help there: of 96 emoji classes .375 -> .360 on the others, recall@1.
        log.warning(
            "no step is tried: images that are too few to tell the axes of LDA are too few to move "
            "them; train.rehearse=False takes all steps"
        )
        config = config.copy_and_resolve_references()
        config.train.steps = 0
    curves, most = list[Curve](), config.train.steps
    for number, records in enumerate(folds, 1):
        count = int((records.split == "validation").sum())
        what = "between LDA and the bare trunk" if few else "the steps"
        log.info("rehearsal %d of %d: %d of the training images are held out to choose %s by",
                 number, len(folds), count, what)  # fmt: skip
        folder = run.folder / "rehearsal" / f"fold{number}"
        inputs = make_inputs(config, model, trunk, records, [keys[i] for i in records.id.tolist()])
        choices = {**run.facts["choices"], "steps": most}
        trial = Run(config, folder, inputs, {**run.facts, "warnings": [], "choices": choices})
        _rehearsed(trial, model, trunk)
        curves.append(curve_of(trial, model))
        most = max(curves[-1].values)  # further steps of other folds are no candidates
    return of_first(choose(run, curves))


def _rehearsed(trial: Run, model: Model, trunk: TrunkWeights) -> None:
    """Runs a fold's rehearsal, or the rest of it."""
    config = trial.config
    begun = run_folder.begun(trial.folder, config.to_dict(), earlier=EARLIER)
    kept_means = by_first((trial.folder / "validation").exists)  # earlier versions kept no more
    if begun and not (kept_means() and begun.facts["data"] == trial.facts["data"]):
        shutil.rmtree(trial.folder, ignore_errors=not is_first())
    sampler = make_sampler(config, trial.inputs.records)
    found = checkpoint.load_newest(trial.folder / "checkpoints")
    head = start_head(trial, model, trunk)
    state, step, moving = start(trial, model, trunk, head, found, None)
    run_folder.write_start(trial.folder, config.to_dict(), trial.facts)
    run_steps(trial, state, step, sampler, moving)


def curve_of(run: Run, model: Model) -> Curve:
    """Of a run that has taken its steps."""
    bare = before(run, model, ["validation"])["validation"]
    asked = bare.records.label[bare.records.is_query]
    return Curve(kept_queries(run), chooser(run.config, bare), fitting.one_class(asked))


def choose(run: Run, curves: Sequence[Curve]) -> int:
    """The best step on validation, over folds if there are any; -1 where the bare trunk is better.

    Folds of the training classes have to tell the best step from the start, or else the start is
    chosen: each fold has few classes, and of many steps one is better by chance. Steps that not all
    folds came to, because they had stopped to get better, are no candidates. A start by LDA is left
    for the bare trunk only where that is told to be better: among the images of a few classes, both
    find nearly all, and in none of 30 cells was LDA below the trunk on the others
    (`benchmarks/few_classes.py`).
    """
    steps = sorted(set.intersection(*(set(curve.values) for curve in curves)))
    values = {step: np.concatenate([curve.values[step] for curve in curves]) for step in steps}
    means = {step: float(np.nanmean(queries)) for step, queries in values.items()}
    bare = np.concatenate([curve.bare for curve in curves])
    best, least = checkpoint.best_first(means)[0], float(np.nanmean(bare))
    later = checkpoint.best_first({step: mean for step, mean in means.items() if step})[:1]
    log.info(
        "validation %s: bare trunk %.4f%s%s",
        validation_metric(run.config).rpartition("/")[2], least,
        f", the head as it starts (step 0) {means[0]:.4f}" if 0 in means else "",
        "".join(f", the best step after it, {step}, {means[step]:.4f}" for step in later),
    )  # fmt: skip
    if len(curves) > 1 and best:
        classes = np.concatenate([curve.classes for curve in curves])
        gain = bootstrap.difference(values[0], values[best], groups=classes)
        log.info(
            "step %d is %s step 0 (%+.4f, 95 %% interval %+.4f to %+.4f over classes)",
            best, bootstrap.compared(gain), gain.mean, gain.low, gain.high,
        )  # fmt: skip
        best = best if gain.low > 0 else 0
    if means[best] > least:
        return best
    if 0 in values and run.config.head.init == "lda" and not _told_better(curves, bare, values[0]):
        log.info(
            "LDA (step 0) is taken, as nothing tells the bare trunk to be better: where both find "
            "nearly all among a few classes, LDA finds more among many"
        )
        return 0
    log.info("the bare trunk is taken: %.4f is not above %.4f", means[best], least)
    return -1


def _told_better(curves: Sequence[Curve], one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the queries of some curves, [q] each, tell one to be better than another.

    Runs that an earlier version began have kept means, which tell by themselves.
    """
    if len(one) != len(other):
        return True
    classes = np.concatenate([curve.classes for curve in curves])
    return bootstrap.difference(other, one, groups=classes).low > 0


def held_out(records: Records, seed: int) -> list[Records]:
    """Each fold of the training classes as validation, and no test images."""
    made = folds_as_validation(records.where("train"), fitting.FOLDS, seed)
    usable = [some for some in made if evaluated(some) and (some.split == "train").any()]
    if not usable:
        raise fitting.TooFew("there is nothing to choose by: no held-out image has an answer")
    return usable


# The verdict --------------------------------------------------------------------------------


def verdict(split: str, name: str, starts: Mapping[str, np.ndarray], after: np.ndarray) -> str:
    """One sentence: better than what a run began with, not told apart from it, or worse.

    Args:
      split: what the queries are of.
      name: of the metric.
      starts: float64 [q], what each query got by the bare trunk and by a fitted head, by name.
      after: float64 [q], what each query gets by the result.
    """
    return f"{split}: " + "; ".join(_than(start, starts[start], name, after) for start in starts)


def _than(start: str, before: np.ndarray, name: str, after: np.ndarray) -> str:
    if np.array_equal(before, after, equal_nan=True):
        return f"the same as {start}, query by query"
    told = bootstrap.difference(before, after)
    return (
        f"{bootstrap.compared(told)} {start} ({name} {told.mean:+.4f}, 95 % interval "
        f"{told.low:+.4f} to {told.high:+.4f}, over {told.queries} queries)"
    )


def gains(before: Evaluated, after: Evaluated) -> dict[str, dict[str, float]]:
    """The ends of the paired 95 % interval of every metric's gain."""
    pairs = ((name, before.values.values[name]) for name in after.values.values)
    told = {name: bootstrap.difference(b, after.values.values[name]) for name, b in pairs}
    ends = {
        "low": {n: t.low for n, t in told.items()},
        "high": {n: t.high for n, t in told.items()},
    }
    return {f"gain, {end}": values for end, values in ends.items()}
