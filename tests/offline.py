"""Commands as a new user's machine runs them: the plain install of the README, and no network."""

import functools
import os
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def environment(cache: Path) -> dict[str, str]:
    """Of a process in which only the packages of `pip install ".[demo]"` can be imported."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    return own | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "offline_site"), str(ROOT)]),
        "OFFLINE_REFUSED": ":".join(refused()),
        "SIAMESE_JAX_CACHE": str(cache),
        "TFDS_DATA_DIR": str(cache / "tfds_data"),
        "JAX_PLATFORMS": "cpu",
    }


@functools.cache
def refused() -> list[str]:
    """Installed modules that no requirement of the plain install brings."""
    plain = installed()
    return sorted(
        module
        for module, owners in metadata.packages_distributions().items()
        if not plain & {canonicalize_name(owner) for owner in owners}
    )


def installed() -> set[str]:
    """The distributions that pyproject.toml's dependencies and its extra [demo] ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["demo"]]
    todo = [(Requirement(line), "") for line in lines]
    found = {("siamese-jax", "")}
    while todo:
        wanted, of_extra = todo.pop()
        if wanted.marker and not wanted.marker.evaluate({"extra": of_extra}):
            continue
        name = canonicalize_name(wanted.name)
        for extra in {"", *wanted.extras} - {e for n, e in found if n == name}:
            found.add((name, extra))
            todo += [(Requirement(line), extra) for line in metadata.requires(name) or ()]
    return {name for name, _ in found}
