"""Checkpoints by Orbax: asynchronous, verified, and without what never changes.

    checkpoints/frozen/        leaves that training does not touch, once per run
    checkpoints/<step>/state   every other leaf of the state, by its path
    checkpoints/<step>/meta    a digest of those leaves

    checkpoints/<step>/metrics the metrics at that step, where one of them chooses

A checkpoint is trusted only if its leaves have the digest written beside them. The newest ones are
kept to go on from, and beside them the best one, which is the result.
"""

import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from siamese_jax.errors import UserError
from siamese_jax.storage.run_folder import RunFolder, read_json
from siamese_jax.storage.tree import Leaves, digest, flatten

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
      best_metric: a name among the metrics given to `save`; the checkpoint with its largest value
        (see `best_first`) is kept as well.
      start: the step that the run goes on from. Later checkpoints are removed: they could not be
        read, or the run would have gone on from them.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        frozen: frozenset[str] = frozenset(),
        max_to_keep: int = 2,
        best_metric: str | None = None,
        start: int | None = None,
    ):
        if max_to_keep < 1:
            raise UserError(f"train.max_to_keep={max_to_keep}: must be 1 or more")
        self.folder = Path(folder).absolute()
        self.frozen = frozen
        for step in steps(self.folder):
            if start is not None and step > start:
                shutil.rmtree(self.folder / str(step))
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_NewestAndBest(max_to_keep, best_metric),
                # Without one, Orbax does not write the metrics; the policy above is what decides.
                best_fn=(lambda metrics: metrics[best_metric]) if best_metric else None,
                cleanup_tmp_directories=True,
                step_prefix=None,
            ),
        )

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copies the state and writes it in the background; the first time, the frozen part too."""
        leaves = jax.device_get(flatten(state))
        still = {name: leaf for name, leaf in leaves.items() if name in self.frozen}
        if still and not (self.folder / "frozen").exists():
            save_leaves(self.folder / "frozen", still)
        moving = {name: leaf for name, leaf in leaves.items() if name not in self.frozen}
        saved = self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_escape(moving)),
                meta=ocp.args.JsonSave({"digest": digest(moving)}),
            ),
            metrics=metrics or {},
        )
        if not saved:  # Orbax passes over a step that is not above all others, without a word.
            raise ValueError(f"{self.folder} holds step {step} or a later one already")

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all is written, and closes the folder."""
        self.wait()
        self.manager.close()


class _NewestAndBest(NamedTuple):
    """Orbax asks it which checkpoints are to stay."""

    newest: int
    metric: str | None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        saved = {info.step: (info.metrics or {}).get(self.metric) for info in checkpoints}
        kept = {*sorted(saved)[-self.newest :], *best_first(saved)[:1]}
        return [step in kept for step in saved]


def steps(folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints below a folder, newest first."""
    folder = Path(folder)
    names = (p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def best_steps(folder: str | Path, metric: str) -> list[int]:
    """Steps of the finished checkpoints that have a metric, the best first (see `best_first`)."""
    files = {step: Path(folder) / str(step) / "metrics" / "metrics" for step in steps(folder)}
    found = {step: read_json(file) for step, file in files.items() if file.exists()}
    return best_first({step: metrics.get(metric) for step, metrics in found.items()})


def save_leaves(path: Path, leaves: Leaves) -> None:
    """Writes leaves and their digest in one atomic step."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            path.absolute(),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_escape(leaves)),
                meta=ocp.args.JsonSave({"digest": digest(leaves)}),
            ),
        )


def load_leaves(path: Path) -> Leaves:
    """Reads leaves and verifies their digest. Raises ValueError (or Orbax's error) on damage."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
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


def load_newest(folder: str | Path, step: int | None = None) -> tuple[int, Leaves] | None:
    """`load_first` of every checkpoint, the newest first, or of one step."""
    return load_first(folder, steps(folder) if step is None else [step])


def load_chosen(run: RunFolder) -> tuple[int, Leaves]:
    """The checkpoint that a run's results were measured on; the newest of an unfinished run.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    found = load_newest(run.folder / "checkpoints", run.step)
    if found is None:
        raise UserError(f"{run.folder} has no checkpoint yet: train it first")
    if run.step is None:
        log.warning("%s is not finished: its checkpoint of step %d is used", run.folder, found[0])
    return found


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
    if not candidates:
        return None
    try:
        frozen = load_leaves(folder / "frozen") if (folder / "frozen").exists() else {}
    except Exception as error:
        raise UserError(
            f"{folder / 'frozen'} is damaged ({_line(error)}); start again in another --workdir"
        ) from error
    for candidate in candidates:
        try:
            return candidate, {**frozen, **load_leaves(folder / str(candidate))}
        except Exception as error:  # Whatever Orbax raises on damage: it has many kinds.
            log.warning("checkpoint %s is damaged: %s", folder / str(candidate), _line(error))
    raise UserError(
        f"none of the checkpoints in {folder} can be read (steps "
        f"{', '.join(map(str, candidates))}); start again in another --workdir"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Orbax makes a folder of a name's slashes.
def _escape(leaves: Leaves) -> Leaves:
    return {name.replace("/", "|"): leaf for name, leaf in leaves.items()}


def _unescape(leaves: Leaves) -> Leaves:
    return {name.replace("|", "/"): leaf for name, leaf in leaves.items()}
