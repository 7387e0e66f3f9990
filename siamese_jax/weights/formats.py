"""Weights files of five formats, each read into {name: array} without trusting the file.

A hostile or damaged file is refused with a UserError of one line. What a file claims to hold is
compared with its length before any memory is taken for it.
"""

import hashlib
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.weights import torch_pickle

Leaves = dict[str, np.ndarray]
META = "__meta__"
# Compressed weights shrink a little; a file that claims to grow more than this is a bomb.
_GROWTH, _ALWAYS = 30, 16 << 20
_MAX_OBJECTS = 100_000


def read(path: str | Path) -> Leaves:
    """The arrays of a `.h5`, `.pth`/`.pt`/`.bin`, `.safetensors` or `.npz` file by name.

    Names are as the format's own tools write them, with Keras's variables called
    `layer/variable`. Raises UserError: no such file, another extension, or not to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file at {path}; check the path")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} has none of the known extensions: {', '.join(_READERS)}")
    return reader(path)


def digest(path: str | Path, kind: str = "sha256") -> str:
    """The file's hash as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _refused(path: Path, format: str, reason: object) -> UserError:
    line = " ".join(str(reason).split())[:300] or type(reason).__name__
    return UserError(f"{path} was not read as {format}: {line}; get the file again from its source")


def _check_claim(claimed: int, path: Path) -> None:
    allowed = max(_ALWAYS, _GROWTH * path.stat().st_size)
    if claimed > allowed:
        raise ValueError(f"it claims to hold {claimed:,} bytes, far more than a file so small can")


def _check_numbers(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "fiub" and dtype.name != "bfloat16":
        raise ValueError(f"{name[:80]!r} holds {dtype}, not numbers")


# Keras's HDF5.


def _read_h5(path: Path) -> Leaves:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            budget = _Budget(path)
            _check_links(file, budget)
            root = file.get("model_weights", file)
            legacy = bool({"layer_names", "layer_names0"} & root.attrs.keys())
            named = _legacy_variables(root) if legacy else _keras3_variables(file)
            return {name: budget.take(name, dataset) for name, dataset in named}
    except UserError:
        raise
    # h5py reports damage by whatever exception fits the place in its C library.
    except Exception as e:
        raise _refused(path, "Keras HDF5", e) from None


class _Budget:
    """Reads data sets only while what they claim is in proportion to the file."""

    def __init__(self, path: Path):
        self.path, self.claimed, self.objects = path, 0, 0

    def take(self, name: str, dataset: Any) -> np.ndarray:
        import h5py

        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(f"{name[:80]!r} is no data set")
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"{name[:80]!r} keeps its numbers in another file")
        _check_numbers(name, dataset.dtype)
        self.claimed += dataset.size * dataset.dtype.itemsize
        _check_claim(self.claimed, self.path)
        return dataset[()]


def _check_links(group: Any, budget: _Budget, depth: int = 0) -> None:
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


_KERAS3 = {
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "normalization": ("mean", "variance", "count"),
    "conv2d": ("kernel", "bias"),
    "depthwise_conv2d": ("kernel", "bias"),
    "dense": ("kernel", "bias"),
}


def _keras3_variables(group: Any) -> Iterator[tuple[str, Any]]:
    """Keras 3: `.../conv2d_7/vars/0`; the layer's own name is an attribute of `vars`."""
    import h5py

    for key in group:
        if key == "optimizer" or not isinstance(child := group[key], h5py.Group):
            continue
        variables = child.get("vars")
        if isinstance(variables, h5py.Group) and len(variables):
            kind = re.sub(r"_\d+$", "", key)
            if kind not in _KERAS3 or "name" not in variables.attrs:
                raise ValueError(
                    f"{child.name!r} is of no known kind or has no name (Keras 3.5 or newer writes "
                    "names: load and save it there)"
                )
            layer = _text(variables.attrs["name"])
            for i, variable in enumerate(_KERAS3[kind][: len(variables)]):
                yield f"{layer}/{variable}", variables[str(i)]
        yield from _keras3_variables(child)


# safetensors.


def _read_safetensors(path: Path) -> Leaves:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, array in leaves.items():
            _check_numbers(name, array.dtype)
        return leaves
    except (safetensors.SafetensorError, ValueError, OSError, TypeError, KeyError) as e:
        raise _refused(path, "safetensors", e) from None


# NumPy's npz, the format of our own exports.


def _read_npz(path: Path) -> Leaves:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_claim(sum(info.file_size for info in archive.infolist()), path)
            leaves = {}
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name in leaves:
                    raise ValueError(f"{name[:80]!r} appears twice")
                leaves[name] = _read_npy(name, archive.read(info))
            return leaves
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as e:
        raise _refused(path, "npz", e) from None
    except Exception as e:  # zlib.error, struct.error, tokenize errors of a damaged header
        raise _refused(path, "npz", e) from None


def _read_npy(name: str, content: bytes) -> np.ndarray:
    """One array, its header checked against its length before memory is taken."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in header:
        raise ValueError(f"{name[:80]!r} is of npy version {version}")
    shape, fortran, dtype = header[version](file)
    if name != META:
        _check_numbers(name, dtype)
    elif dtype.kind != "U":
        raise ValueError("its description is no text")
    count = 1
    for size in shape:
        count *= size
    if any(size < 0 for size in shape) or count * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{name[:80]!r} is cut off or has another shape than announced")
    array = np.frombuffer(content, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def write_npz(path: str | Path, leaves: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Arrays and a JSON description, written whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        arrays: dict[str, Any] = {META: np.array(json.dumps(dict(meta))), **leaves}
        np.savez(file, **arrays)
    part.replace(path)


_READERS: dict[str, Callable[[Path], Leaves]] = {
    ".h5": _read_h5,
    ".hdf5": _read_h5,
    ".pth": torch_pickle.read,
    ".pt": torch_pickle.read,
    ".bin": torch_pickle.read,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}
EXTENSIONS = tuple(_READERS)
