"""Keras's files: the HDF5 of Keras 1 and 2, the one of Keras 3, and the `.keras` archive around it.

Nothing of a file is executed: of an archive's config.json only the layers' names are read.
"""

import io
import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_MAX_OBJECTS = 100_000
_MAX_CONFIG = 64 << 20  # bytes; that of ResNet50 has 0.2 MB
WEIGHTS = "model.weights.h5"


class Budget:
    """Reads data sets only while what they claim is in proportion to the file.

    `check(bytes)` and `numbers(name, dtype)` raise ValueError.
    """

    def __init__(self, check: Any, numbers: Any):
        self.check, self.numbers, self.claimed, self.objects = check, numbers, 0, 0

    def take(self, name: str, dataset: Any) -> np.ndarray:
        """A data set as an array; ValueError if it is no plain one, or beyond the budget."""
        import h5py

        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(f"{name[:80]!r} is no data set")
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{name[:80]!r} keeps its numbers in another file")
        self.numbers(name, dataset.dtype)
        self.claimed += dataset.size * dataset.dtype.itemsize
        self.check(self.claimed)
        return dataset[()]


def read(file: Path | io.BytesIO, budget: Budget, names: "Names | None" = None) -> dict[str, Any]:
    """The variables of an HDF5 file as `layer/variable`.

    A layer of Keras 3 whose name is neither in the file nor in `names` keeps that of its place:
    `layers/conv2d_7/kernel`.
    """
    import h5py

    with h5py.File(file, "r") as opened:
        _check_links(opened, budget)
        root = opened.get("model_weights", opened)
        if {"layer_names", "layer_names0"} & root.attrs.keys():
            found = _legacy_variables(root)
        else:
            found = _keras3_variables(opened, names or {})
        leaves = {name: budget.take(name, dataset) for name, dataset in found}
    if leaves and all(re.search(r"/\d+$", name) for name in leaves):
        raise ValueError(f"its layers are of no known kind ({next(iter(leaves))[:80]!r})")
    return leaves


def read_archive(path: Path, budget: Budget) -> dict[str, Any]:
    """The variables of a `.keras` file, its layers named by its config.json."""
    with zipfile.ZipFile(path) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        if "config.json" not in sizes or WEIGHTS not in sizes:
            raise ValueError(f"it lacks config.json or {WEIGHTS}")
        budget.check(sizes[WEIGHTS])
        if sizes["config.json"] > _MAX_CONFIG:
            raise ValueError("its config.json is larger than a model's can be")
        config = json.loads(archive.read("config.json"))
        content = io.BytesIO(archive.read(WEIGHTS))
    return read(content, budget, _names(config))


def _check_links(group: Any, budget: Budget, depth: int = 0) -> None:
    """Refuse links out of the file and trees without end."""
    import h5py

    if depth > 32:
        raise ValueError("its groups are nested too deep")
    for key in group:
        budget.objects += 1
        if budget.objects > _MAX_OBJECTS:
            raise ValueError("it has too many objects")
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{key[:80]!r} is a link, not an object of this file")
        if isinstance(child := group[key], h5py.Group):
            _check_links(child, budget, depth + 1)


# Keras 1 and 2.


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _attribute(group: Any, key: str) -> list[str]:
    """A list of names; Keras splits one that is longer than 64 kB into key0, key1, ..."""
    if key in group.attrs:
        return [_text(v) for v in np.atleast_1d(group.attrs[key])]
    names: list[str] = []
    for i in itertools.count():
        if f"{key}{i}" not in group.attrs:
            return names
        names += [_text(v) for v in np.atleast_1d(group.attrs[f"{key}{i}"])]
    return names


_OLD_NAMES = {"W": "kernel", "b": "bias", "depthwise_kernel": "kernel"}


def _legacy_variables(root: Any) -> Iterator[tuple[str, Any]]:
    """A group per layer with `weight_names`; Keras 1 called them `layer_W_1:0`."""
    for layer in _attribute(root, "layer_names"):
        group = root[layer]
        for full in _attribute(group, "weight_names"):
            owner, _, variable = full.removesuffix(":0").rpartition("/")
            owner = owner.rpartition("/")[2]
            if not owner or variable.startswith(layer + "_"):
                owner = layer
                variable = variable.removeprefix(layer + "_").removesuffix("_1")
            yield f"{owner}/{_OLD_NAMES.get(variable, variable)}", group[full]


# Keras 3.

VARIABLES = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
}
# A layer's place, such as "conv2d_7" -> its name, and those of the layers inside it.
Names = Mapping[str, tuple[str, Any]]


def _keras3_variables(group: Any, names: Names) -> Iterator[tuple[str, Any]]:
    """`.../conv2d_7/vars/0`; since Keras 3.5 the layer's own name is an attribute of `vars`."""
    import h5py

    for key in group:
        if key == "optimizer" or not isinstance(child := group[key], h5py.Group):
            continue
        place = key.rpartition("\\")[2]  # Keras 2.13 to 2.15 write "layers\conv2d_7"
        name, inside = names.get(place, ("", names))
        variables = child.get("vars")
        if isinstance(variables, h5py.Group) and len(variables):
            layer = _text(variables.attrs.get("name", name)) or f"layers/{place}"
            known = VARIABLES.get(re.sub(r"_\d+$", "", place), ())
            for i in range(len(variables)):
                yield f"{layer}/{known[i] if i < len(known) else i}", variables[str(i)]
        yield from _keras3_variables(child, inside)


def _names(config: Any, depth: int = 0) -> dict[str, tuple[str, Any]]:
    """The places of a model's layers: a class's name in snake case, counted as Keras counts."""
    inner = config.get("config") if isinstance(config, dict) else None
    layers = inner.get("layers") if isinstance(inner, dict) else None
    names: dict[str, tuple[str, Any]] = {}
    counts: Counter[str] = Counter()
    for layer in layers if isinstance(layers, list) and depth < 32 else []:
        place = _snake_case(str(layer["class_name"]))
        counts[place] += 1
        place = f"{place}_{counts[place] - 1}" if counts[place] > 1 else place
        names[place] = str(layer["config"]["name"]), _names(layer, depth + 1)
    return names


def _snake_case(name: str) -> str:
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
