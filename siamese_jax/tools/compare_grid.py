"""A grid of experiments: an ordinary config, and axes of named changes to it.

A config file for `compare` has `get_config()` as every config, and

    GRID = {"trunk": {"lite0": {"trunk.name": "efficientnet_lite0"}, ...},
            "loss": {"triplet": {}, "infonce": {"loss": {"name": "nt_xent"}}, ...}}

A change names a field ("trunk.name"), or a whole section ("loss") that takes the place of the old
one. An axis called "seed" is averaged over.
"""

import ast
import importlib.util
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from siamese_jax.errors import UserError
from siamese_jax.tools.configs import find_config

Grid = Mapping[str, Mapping[str, Mapping[str, Any]]]


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


def read_grid(path: str | Path) -> tuple[ConfigDict, Grid]:
    """The base config and the axes of a config file.

    Raises:
      UserError: no such file, or it is no grid.
    """
    path = find_config(str(path))
    if not Path(path).is_file():
        raise UserError(f"--config={path} does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not hasattr(module, "get_config") or not getattr(module, "GRID", None):
        raise UserError(f"{path} is no grid: it needs get_config() and GRID = {{axis: {{...}}}}")
    return module.get_config(), module.GRID


def cells(base: ConfigDict, grid: Grid) -> list[Cell]:
    """Every combination of the axes' choices, the last axis changing fastest.

    Raises:
      UserError: a change names a field that the config does not have, or one of another type.
    """
    found = []
    for names in itertools.product(*(axis for axis in grid.values())):
        choice = dict(zip(grid, names, strict=True))
        config = ConfigDict(base.to_dict())
        for axis, name in choice.items():
            for field, value in grid[axis][name].items():
                set_field(config, field, value)
        found.append(Cell(choice, config))
    folders = [cell.name for cell in found]
    if len(set(folders)) < len(folders):
        raise UserError(f"two cells of the grid would share a folder: {sorted(folders)}")
    return found


def set_field(config: ConfigDict, field: str, value: Any) -> None:
    """config.a.b = value for "a.b"; a mapping replaces the section.

    >>> config = ConfigDict({"optim": {"learning_rate": 0.1}, "loss": {"name": "triplet"}})
    >>> set_field(config, "optim.learning_rate", 1)
    >>> set_field(config, "loss", {"name": "nt_xent", "temperature": 0.1})
    >>> config.optim.learning_rate, config.loss.to_dict()
    (1.0, {'name': 'nt_xent', 'temperature': 0.1})
    """
    *parents, last = field.split(".")
    section = config
    for parent in parents:
        section = section.get(parent) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or last not in section:
        raise UserError(f"the config has no field {field}")
    if isinstance(value, Mapping | ConfigDict):
        plain = value.to_dict() if isinstance(value, ConfigDict) else dict(value)
        del section[last]
        section[last] = ConfigDict(plain)
        return
    try:
        section[last] = value
    except TypeError:
        kind = type(section[last]).__name__
        raise UserError(f"{field}={value!r}: the config has a {kind} there") from None


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Applies `--config.a.b=value` arguments; values are read as Python writes them.

    >>> config = ConfigDict({"train": {"steps": 600}, "data": {"source": "emoji"}})
    >>> override(config, ["--config.train.steps=5", "--config.data.source=folder"])
    >>> config.train.steps, config.data.source
    (5, 'folder')
    """
    for argument in arguments:
        matched = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, flags=re.DOTALL)
        if not matched:
            raise UserError(f"unknown argument {argument}; see compare --help")
        field, text = matched.groups()
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False}.get(text, text)
        set_field(config, field, value)
