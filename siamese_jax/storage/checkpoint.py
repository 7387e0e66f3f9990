"""Checkpoints by Orbax: asynchronous, verified, and without what never changes.

    checkpoints/frozen/<digest> leaves that training does not touch, once, by their content
    checkpoints/<step>/state    every other leaf of the state, by its path
    checkpoints/<step>/metrics  the metrics at that step, where one of them chooses
    checkpoints/<step>/meta     the digests of the leaves and of the frozen ones, how long the log
                                was, and a check of all this and of the metrics

A checkpoint is trusted only if its leaves and what is said of it have the digests written beside
them. The newest ones are kept to go on from, and beside them the best one, which is the result.
Version 0.1.0 kept the frozen leaves in checkpoints/frozen itself, and a digest of the others alone.
"""

import functools
import logging
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from siamese_jax import processes
from siamese_jax.errors import UserError
from siamese_jax.processes import by_first
from siamese_jax.storage.json_files import read_json
from siamese_jax.storage.run_folder import RunFolder
from siamese_jax.storage.tree import Leaves, digest, fingerprint, flatten

log = logging.getLogger(__name__)


def best_first(values: Mapping[int, float | None]) -> list[int]:
    """The steps that have a value, the largest one first; of equals the earliest.

    >>> best_first({1: 0.5, 2: 0.9, 3: 0.9, 4: float("nan"), 5: None})
    [2, 3, 1]
    """
    known = {step: v for step, v in values.items() if v is not None and not math.isnan(v)}
    return sorted(known, key=lambda step: (-known[step], step))


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: created if needed.
      frozen: names of leaves (as `flatten` gives them) that training never changes.
      max_to_keep: newest checkpoints to keep.
      keep_first: whether that of step 0 stays as well.
      best_metric: a name among the metrics given to `save`; the checkpoint with its largest value
        (see `best_first`) is kept as well.
      start: the step that the run goes on from. Later checkpoints are removed: they could not be
        read, or the run would have gone on from them. So are earlier ones that are damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frozen: frozenset[str] = frozenset(),
        max_to_keep: int = 2,
        keep_first: bool = False,
        best_metric: str | None = None,
        start: int | None = None,
    ):
        if max_to_keep < 1:
            raise UserError(f"train.max_to_keep={max_to_keep}: must be 1 or more")
        self.folder = Path(folder).absolute()
        self.frozen, self._frozen_name, self._best_metric = frozen, "", best_metric
        self.manager: ocp.CheckpointManager | None = None
        if not processes.is_first():  # one process writes for all
            return
        if start is not None:
            for step in _steps(self.folder):
                if step > start or _described(self.folder, step) is None:
                    shutil.rmtree(self.folder / str(step))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(max_to_keep, best_metric, keep_first),
                # Without one, Orbax does not write the metrics; the policy above is what decides.
                best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
                cleanup_tmp_directories=True,
                step_prefix=None,
                create=False,  # of several processes Orbax lets none do it
                multiprocessing_options=_multiprocessing(),
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        metrics: Mapping[str, float] | None = None,
        log_mark: Sequence[int] | None = None,
    ) -> None:
        """Copies the state and writes it in the background; the first time, the frozen part too.

        Args:
          step: above that of all others.
          state: any tree of arrays.
          metrics: of that step; not kept where none of them chooses.
          log_mark: what `MetricsLog.mark` says of the log by now.
        """
        if self.manager is None:
            return
        leaves = jax.device_get(flatten(state))
        metrics = dict(metrics or {}) if self._best_metric else {}
        still = {name: leaf for name, leaf in leaves.items() if name in self.frozen}
        if still and not self._frozen_name:
            self._frozen_name = self._save_frozen(still)
        moving = {name: leaf for name, leaf in leaves.items() if name not in self.frozen}
        meta = {"digest": digest(moving), "frozen": self._frozen_name, "log": log_mark}
        saved = self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_escape(moving)),
                meta=ocp.args.JsonSave({**meta, "check": fingerprint(**meta, metrics=metrics)}),
            ),
            metrics=metrics,
        )
        if not saved:  # Orbax passes over a step that is not above all others, without a word.
            raise ValueError(f"{self.folder} holds step {step} or a later one already")

    def _save_frozen(self, leaves: Leaves) -> str:
        """Writes the frozen leaves, unless they are there and sound; their name is their digest."""
        name, folder = digest(leaves), self.folder / "frozen"
        others = [p for p in folder.iterdir() if p.name != name] if folder.is_dir() else []
        for other in others if not _steps(self.folder) else ():  # of a start that died
            shutil.rmtree(other, ignore_errors=True)
        try:
            if digest(load_leaves(folder / name)) == name:
                return name
        except Exception as error:  # Not there, or Orbax's error on damage: it has many kinds.
            if (folder / name).exists():
                log.warning("%s is damaged (%s); it is written again", folder / name, _line(error))
        shutil.rmtree(folder / name, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_leaves(folder / name, leaves)
        return name

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        if self.manager:
            self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all is written, and closes the folder."""
        self.wait()
        if self.manager:
            self.manager.close()


def _multiprocessing() -> ocp.options.MultiprocessingOptions:
    """Of several processes the first one works by itself, and waits for no other."""
    if processes.count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
    )


def _checkpointer() -> ocp.Checkpointer:
    how = _multiprocessing()
    options = ocp.CompositeOptions(multiprocessing_options=how)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=how)


class _NewestAndBest(NamedTuple):
    """Orbax asks it which checkpoints are to stay."""

    newest: int
    metric: str | None
    first: bool

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        saved = {info.step: (info.metrics or {}).get(self.metric) for info in checkpoints}
        kept = {
            *sorted(saved)[-self.newest :],
            *best_first(saved)[:1],
            *([0] if self.first else []),
        }
        return [step in kept for step in saved]


@by_first
def steps(folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints below a folder, newest first."""
    return _steps(Path(folder))


def _steps(folder: Path) -> list[int]:
    names = (p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


@by_first
def best_steps(folder: str | Path, metric: str) -> list[int]:
    """Steps of the finished checkpoints that have a metric, the best first (see `best_first`)."""
    found = {step: _described(Path(folder), step) or {} for step in steps(folder)}
    return best_first({step: about.get("metrics", {}).get(metric) for step, about in found.items()})


@by_first
def log_mark(folder: str | Path, step: int) -> list[int] | None:
    """What the checkpoint of a step was given as `log_mark`; None where there is none."""
    return (_described(Path(folder), step) or {}).get("log")


def _described(folder: Path, step: int) -> dict[str, Any] | None:
    """What is said of a checkpoint, its metrics included; None, and a warning, on damage."""
    try:
        return _description(folder / str(step))
    except (OSError, ValueError) as error:
        log.warning("checkpoint %s is damaged: %s", folder / str(step), _line(error))
        return None


def _description(path: Path) -> dict[str, Any]:
    meta, metrics = read_json(path / "meta" / "metadata"), {}
    if (path / "metrics").exists():
        metrics = read_json(path / "metrics" / "metrics")
    check = meta.pop("check", None)
    older = check is None and "frozen" not in meta  # of version 0.1.0
    if not older and check != fingerprint(**meta, metrics=metrics):
        raise ValueError("what is said of it, or its metrics, have changed")
    return {**meta, "metrics": metrics}


def save_leaves(path: Path, leaves: Leaves) -> None:
    """Writes leaves and their digest in one atomic step."""
    with _checkpointer() as checkpointer:
        checkpointer.save(
            path.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_escape(leaves)),
                meta=ocp.args.JsonSave({"digest": digest(leaves)}),
            ),
        )


def load_leaves(path: Path) -> Leaves:
    """Reads leaves and verifies their digest. Raises ValueError (or Orbax's error) on damage."""
    _ignore_late_calls()
    with _checkpointer() as checkpointer:
        found = checkpointer.restore(
            path.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(),
                meta=ocp.args.JsonRestore(),
            ),
        )
    leaves = {name: np.asarray(leaf) for name, leaf in _unescape(found["state"]).items()}
    if digest(leaves) != found["meta"]["digest"]:
        raise ValueError(f"{path}: the digest of the leaves differs from the one saved with them")
    return leaves


@functools.cache
def _ignore_late_calls() -> None:
    """Orbax ends its event loop at the first damaged leaf; the reads of the others then complain,
    each with a traceback that nobody can catch."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def load_newest(folder: str | Path, step: int | None = None) -> tuple[int, Leaves] | None:
    """`load_first` of every checkpoint, the newest first, or of one step."""
    return load_first(folder, steps(folder) if step is None else [step])


def load_chosen(run: RunFolder) -> tuple[int, Leaves]:
    """The checkpoint that a run's results were measured on; the newest of an unfinished run.

    Where it keeps averages of the weights, these stand in their place, as they were measured.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    found = load_newest(run.folder / "checkpoints", run.step)
    if found is None:
        raise UserError(f"{run.folder} has no checkpoint yet: train it first")
    if run.step is None:
        log.warning("%s is not finished: its checkpoint of step %d is used", run.folder, found[0])
    means = {n.removeprefix("ema/"): leaf for n, leaf in found[1].items() if n.startswith("ema/")}
    return found[0], found[1] | means


@by_first
def load_first(folder: str | Path, candidates: Iterable[int]) -> tuple[int, Leaves] | None:
    """Every leaf of the first sound one of these checkpoints, frozen leaves included.

    A damaged checkpoint is reported in a warning and the next one is tried.

    Args:
      folder: a run's `checkpoints/`.
      candidates: steps.

    Returns:
      (step, leaves), or None without a candidate.

    Raises:
      UserError: there are checkpoints, but none can be read.
    """
    folder, candidates = Path(folder), list(candidates)
    for candidate in candidates:
        try:
            return candidate, _load(folder, candidate)
        except Exception as error:  # Whatever Orbax raises on damage: it has many kinds.
            log.warning("checkpoint %s is damaged: %s", folder / str(candidate), _line(error))
    if not candidates:
        return None
    others = {*steps(folder)} - {*candidates}
    raise UserError(
        f"none of the checkpoints in {folder} can be read (steps "
        f"{', '.join(map(str, candidates))}); "
        + ("train again to go on from another" if others else "start again in another --workdir")
    )


def is_sound(folder: str | Path, step: int) -> bool:
    """Whether a checkpoint can be read; a warning says why not."""
    try:
        return load_first(folder, [step]) is not None
    except UserError:
        return False


def _load(folder: Path, step: int) -> Leaves:
    """Every leaf of one checkpoint, frozen ones included, verified."""
    about = _description(folder / str(step))
    frozen, older = about.get("frozen"), folder / "frozen" / "meta"
    leaves = load_leaves(folder / "frozen" / frozen) if frozen else {}
    if frozen is None and older.exists():
        leaves = load_leaves(folder / "frozen")
    if frozen and digest(leaves) != frozen:
        raise ValueError(f"{folder / 'frozen' / frozen}: other leaves than its name says")
    leaves |= load_leaves(folder / str(step))
    if int(leaves.get("step", step)) != step:
        raise ValueError(f"it holds step {int(leaves['step'])}, which is another one's")
    return leaves


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Orbax makes a folder of a name's slashes.
def _escape(leaves: Leaves) -> Leaves:
    return {name.replace("/", "|"): leaf for name, leaf in leaves.items()}


def _unescape(leaves: Leaves) -> Leaves:
    return {name.replace("|", "/"): leaf for name, leaf in leaves.items()}
