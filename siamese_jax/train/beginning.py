"""What a run begins with where it is not fresh: steps of its own, or another run's checkpoint."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from siamese_jax.errors import UserError
from siamese_jax.processes import by_first
from siamese_jax.storage import checkpoint, run_folder, tree
from siamese_jax.storage.json_files import read_json
from siamese_jax.storage.run_folder import RunFolder, flat
from siamese_jax.weights.load import TrunkWeights, stored_weights

log = logging.getLogger(__name__)

# A fork has the trunk of the run that it comes from; these fields say which that is.
TRUNK = tuple(f"trunk.{name}" for name in ("name", "weights", "form", "preprocessing", "ignore"))


def extended(run: RunFolder, config: ConfigDict) -> RunFolder:
    """The run of a folder; unfinished again, where other steps than before are asked for.

    A constant learning rate does not know the last step, so the run goes on as if it had been to
    take that many from its start (with one evaluation more, at the step that was the last).

    Raises:
      UserError: the schedule depends on the last step, or more steps have been taken.
    """
    then, now = run.config["train"]["steps"], config.train.steps
    if then == now:
        return run
    taken = checkpoint.steps(run.folder / "checkpoints")[:1]
    said = f"{run.folder}: train.steps is {then} there and {now} now"
    if config.optim.schedule != "constant":
        raise UserError(
            f"{said}, but under optim.schedule={config.optim.schedule} the learning rate of every "
            'step depends on it; only under "constant" can a run go on. For a new run that begins '
            f"with its parameters: --workdir={run.folder} --fork=NEW"
        )
    if taken and now < taken[0]:
        raise UserError(f"{said}, but it has taken {taken[0]} already: choose another --workdir")
    log.info("%s: it goes on", said)
    told = run.facts.setdefault("extended", [])
    told += [change] if (change := {"from": then, "to": now}) not in told[-1:] else []
    return run._replace(results=None)


@by_first
def set_aside(run: RunFolder | None) -> None:
    """Keeps the results of a shorter run under another name, as the folder is not finished now."""
    results = run.folder / "results.json" if run else None
    if run and results and results.exists():
        kept = results.with_name(f"results-{run.config['train']['steps']}.json")
        os.replace(results, kept)
        log.info("the results so far are kept as %s", kept)


class Parent(NamedTuple):
    """Another run's checkpoint, to begin with.

    Attributes:
      run: the other run.
      step: of the checkpoint: the one that its results are of, or the newest.
      leaves: of the state there, by path.
    """

    run: RunFolder
    step: int
    leaves: dict[str, Any]

    @property
    def trunk(self) -> TrunkWeights:
        """The trunk as it is there."""
        return stored_weights(self.run.facts, self.leaves)

    def describe(self, config: ConfigDict) -> dict[str, Any]:
        """For run.json: where it comes from, and which fields are others now."""
        before, now = dict(flat(self.run.config)), dict(flat(config.to_dict()))
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in now.items()}
        names = sorted(n for n in before.keys() | plain.keys() if before.get(n) != plain.get(n))
        changed = {name: [before.get(name), plain.get(name)] for name in names}
        return {"run": str(self.run.folder.resolve()), "step": self.step, "changed": changed}


@by_first
def find_parent(workdir: Path, fork: str | Path | None, config: ConfigDict) -> Parent | None:
    """The checkpoint to begin with: of the run `fork`, or of the one that the folder began with.

    Raises:
      UserError: it is no run, has no checkpoint, or another trunk than the config.
    """
    told = workdir / "run.json"
    if fork is None and told.is_file():
        fork = read_json(told).get("forked_from", {}).get("run")
    if fork is None:
        return None
    run = run_folder.read(Path(fork))
    before, now = dict(flat(run.config)), dict(flat(config.to_dict()))
    for name in TRUNK:
        if before.get(name) != now.get(name):
            raise UserError(
                f"{name}={now.get(name)!r}: a fork has the trunk of {fork}, which is "
                f"{before.get(name)!r} there; leave it so, or train without --fork"
            )
    step, found = checkpoint.load_chosen(run)
    log.info("begins with step %d of %s", step, fork)
    return Parent(run, step, {name: jnp.asarray(leaf) for name, leaf in found.items()})


def inherit(
    parent: Parent | None, params: Any, batch_stats: Any, facts: dict[str, Any]
) -> tuple[Any, Any]:
    """Fresh parameters and statistics with the parent's in their place, part by part.

    A part (head, loss) whose leaves are others now stays fresh, and that is said.
    """
    if parent is None:
        return params, batch_stats
    fresh = []
    params, batch_stats = dict(params), dict(batch_stats)
    for part in ("trunk", "head", "loss"):
        whole = {
            "params": {part: params[part]},
            "batch_stats": {part: batch_stats[part]} if part in batch_stats else {},
        }
        wanted = tree.flatten(whole)
        held = {n: leaf for n, leaf in parent.leaves.items() if n.split("/")[1:2] == [part]}
        held = {n: leaf for n, leaf in held.items() if n.startswith(("params/", "batch_stats/"))}
        if _shapes(wanted) != _shapes(held):
            fresh.append(part)
            continue
        taken = tree.unflatten(held, whole)
        params[part] = taken["params"][part]
        if part in batch_stats:
            batch_stats[part] = taken["batch_stats"][part]
    facts["forked_from"]["fresh"] = fresh
    if fresh:
        log.warning(
            "the %s begins anew: it is another than in %s",
            " and the ".join(fresh),
            parent.run.folder,
        )
    return params, batch_stats


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in leaves.items()}


def warn_of_other_data(parent: Parent, fingerprint: str, facts: dict[str, Any]) -> None:
    """Says where images that are tested here may have been trained on there."""
    if parent.run.facts["data"]["fingerprint"] != fingerprint:
        said = (
            f"{parent.run.folder}, which this run begins with, had other data or another split: "
            "what is tested here may have been trained on there"
        )
        facts["warnings"].append(said)
        log.warning("%s", said)
