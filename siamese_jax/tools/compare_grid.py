"""A grid of experiments: an ordinary config, and axes of named changes to it.

A config file for `compare` has `get_config()` as every config, and

    GRID = {"trunk": {"lite0": {"trunk.name": "efficientnet_lite0"}, ...},
            "loss": {"triplet": {}, "infonce": {"loss": {"name": "nt_xent"}}, ...}}

A change names a field ("trunk.name"), or a whole section ("loss") that takes the place of the old
one; a head may go by its name: {"head": "linear"}. The axes called "seed" and "fold" are averaged
over. Scores that others published of the bare trunks may stand beside it, by the names on the axes:

    PUBLISHED = {("sop", "DINO ViT-S16"): 0.648, ...}
"""

import itertools
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from siamese_jax.errors import UserError
from siamese_jax.tools.configs import read_config, set_field

log = logging.getLogger(__name__)

Grid = Mapping[str, Mapping[str, Mapping[str, Any]]]
Published = Mapping[tuple[str, ...], float]  # recall@1 by the names on the axes
SEED, FOLD = "seed", "fold"


@dataclass(frozen=True)
class Cell:
    """One experiment of a grid.

    Attributes:
      choice: axis -> the name chosen on it.
      config: the whole config.
    """

    choice: dict[str, str]
    config: ConfigDict

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return "-".join(re.sub(r"[^\w.]+", "_", value) for value in self.choice.values())


def read_grid(name: str, *, alone: bool = False) -> tuple[ConfigDict, Grid, Published]:
    """The base config and the axes of a config file, and what others published.

    Args:
      name: of the file.
      alone: whether a config without a grid is taken, as the only name on an axis "config".

    Raises:
      UserError: no such file, it is no grid, or a published score is of no cell of it.
    """
    config, path, module = read_config(name)
    if not getattr(module, "GRID", None):
        if alone and not hasattr(module, "GRID"):
            return config, {"config": {path.stem: {}}}, {}
        raise UserError(
            f"{path} is no grid: it needs get_config() and GRID = {{axis: {{...}}}}; --folds=4 "
            "compares the folds of a config without one"
        )
    if not _is_grid(module.GRID):
        raise UserError(
            f"{path}: GRID must be {{axis: {{name: {{field: value}}}}}}, with one name or more on "
            "each axis, and names of text that holds a letter or digit"
        )
    published = getattr(module, "PUBLISHED", {})
    _check_published(published, module.GRID, path)
    return config, module.GRID, published


def _check_published(published: Any, grid: Grid, path: Path) -> None:
    axes = [axis for axis in grid if axis not in (SEED, FOLD)]
    rows = set(itertools.product(*(grid[axis] for axis in axes)))
    if not isinstance(published, Mapping):
        raise UserError(f"{path}: PUBLISHED must be {{(a name on each axis): recall@1}}")
    for names, score in published.items():
        complete = isinstance(names, tuple) and len(names) == len(axes)
        if not complete or not isinstance(score, float) or not 0 <= score <= 1:
            raise UserError(
                f"{path}: PUBLISHED has {names!r}: {score!r}, but needs a name on each of the axes "
                f"{', '.join(axes)}, and a recall@1 from 0 to 1"
            )
    if others := [" ".join(map(str, names)) for names in published if names not in rows]:
        log.info("%s: PUBLISHED has what GRID has not: %s", path, ", ".join(others))


def _is_grid(grid: Any) -> bool:
    """Whether every name can be part of a folder's, and every change is one of named fields."""

    def is_axis(axis: Any) -> bool:
        return isinstance(axis, Mapping) and bool(axis) and all(map(is_choice, axis.items()))

    def is_choice(item: tuple[Any, Any]) -> bool:
        name, changes = item
        return _is_name(name) and isinstance(changes, Mapping) and all(map(_is_name, changes))

    return (
        isinstance(grid, Mapping) and all(map(_is_name, grid)) and all(map(is_axis, grid.values()))
    )


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.search(r"\w", name) is not None


def cells(base: ConfigDict, grid: Grid) -> list[Cell]:
    """Every combination of the axes' choices, the last axis changing fastest.

    Raises:
      UserError: a change names a field that the config does not have, or one of another type.
    """
    found = []
    for names in itertools.product(*(axis for axis in grid.values())):
        choice = dict(zip(grid, names, strict=True))
        config = ConfigDict(base.to_dict())
        cell = Cell(choice, config)
        for axis, name in choice.items():
            for field, value in grid[axis][name].items():
                try:
                    set_field(config, field, value)
                except UserError as error:
                    raise UserError(f"the cell {cell.name}: {error}") from None
        found.append(cell)
    folders = [cell.name for cell in found]
    if len(set(folders)) < len(folders):
        raise UserError(f"two cells of the grid would share a folder: {sorted(folders)}")
    return found
