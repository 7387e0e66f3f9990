"""Keras's files: the HDF5 of Keras 1 and 2, the one of Keras 3, and the `.keras` archive around it.

Nothing of a file is executed: of an archive's config.json only the layers' names are read.

The library that reads HDF5 is written in C, and a damaged file can lead it into an endless loop, to
all memory, or to a crash. So this file is also a program: `read` starts it, and it alone opens the
HDF5. It sends a line that describes the variables and says where in the file they lie; those that
are compressed it sends. `read` checks that as it checks a file. The process ends after `_seconds`.
Where the system can limit a process (Linux; macOS limits its time alone, Windows neither), it has
`_ROOM` for its libraries, and twice the memory of the variables. Starting it takes about 0.2 s.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = "model.weights.h5"
_MAX_OBJECTS = 100_000
_MAX_LINE = 64 << 20  # bytes of the names, types and shapes
_ROOM = 1 << 30  # bytes of address space for Python and its libraries
# A layer's place, such as "conv2d_7" -> its name, and those of the layers inside it.
Names = Mapping[str, tuple[str, Any]]


def read(
    path: Path | None,
    data: Any,
    limit: int,
    check: Callable[[str, np.dtype], None],
    config: Any = None,
) -> dict[str, np.ndarray]:
    """The variables of an HDF5 file as `layer/variable`.

    A layer of Keras 3 whose name is neither in the file nor in the config keeps that of its place:
    `layers/conv2d_7/kernel`.

    Args:
      path: of the file; None where it lies in an archive.
      data: its bytes, or a memory map of them.
      limit: bytes that the variables may have in all.
      check: raises ValueError for a type that they may not have.
      config: of an archive, config.json.

    Raises ValueError for a file that is not to be read.
    """
    seconds = _seconds(limit)
    asked = {"path": os.fspath(path or ""), "limit": limit, "names": _names(config)}
    places = os.pathsep.join(part for part in sys.path if part)
    with subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": places, "OPENBLAS_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for us; we end it
    ) as reader:
        timer = threading.Timer(4 * seconds, reader.kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                assert reader.stdin  # it is a pipe
                reader.stdin.write(json.dumps(asked).encode() + b"\n")
                reader.stdin.write(b"" if path else data)
                reader.stdin.close()
            return _received(reader.stdout, data, limit, check)
        except EOFError:
            raise ValueError(
                f"HDF5's library crashed on it, or took more than {seconds} seconds or its memory "
                f"(the process that read it ended with {reader.wait()})"
            ) from None
        finally:
            timer.cancel()
            reader.kill()


def _seconds(limit: int) -> int:
    """Of a processor; a file is read at 100 MB in a second, and its limit is 10 times its size."""
    return 10 + limit // (200 << 20)


def _received(
    stream: Any, data: Any, limit: int, check: Callable[[str, np.dtype], None]
) -> dict[str, np.ndarray]:
    """What the other process found: trusted as little as a file."""
    line = stream.readline(_MAX_LINE)
    if not line.endswith(b"\n"):
        raise EOFError
    found = json.loads(line)
    if isinstance(found, str):
        raise ValueError(found)
    leaves = {}
    for name, kind, shape, place in found:
        dtype = np.dtype(kind)
        check(name, dtype)
        size = math.prod(shape) * dtype.itemsize
        limit -= size
        if limit < 0:
            raise ValueError("it holds more than a file of its size can")
        content = stream.read(size) if place is None else data[place : place + size]
        if len(content) != size:
            raise EOFError
        leaves[name] = np.frombuffer(content or bytes(1), dtype, math.prod(shape)).reshape(shape)
    return leaves


# The process that reads.


def _main() -> None:
    output = sys.stdout.buffer
    asked = json.loads(sys.stdin.buffer.readline())
    try:
        import h5py

        _limit(asked["limit"])
        file = asked["path"] or io.BytesIO(sys.stdin.buffer.read())
        with h5py.File(file, "r") as opened:
            variables = _variables(opened, asked["limit"], asked["names"])
            places = {name: _place(dataset) for name, dataset in variables.items()}
            described = [(n, d.dtype.str, d.shape, places[n]) for n, d in variables.items()]
            output.write(json.dumps(described).encode() + b"\n")
            for name, dataset in variables.items():
                if places[name] is None:
                    numbers = np.ascontiguousarray(dataset[()])
                    output.write(numbers.reshape(-1).view(np.uint8).data)
    # h5py reports damage by whatever exception fits the place in its C library.
    except Exception as e:
        output.write(json.dumps(str(e)[:1000] or type(e).__name__).encode() + b"\n")
    output.flush()


def _place(dataset: Any) -> int | None:
    """Where its numbers lie in the file, unless in chunks, compressed or of a type of its own."""
    import h5py

    plain = h5py.h5t.py_create(dataset.dtype).equal(dataset.id.get_type())
    return dataset.id.get_offset() if plain and dataset.size else None


def _limit(size: int) -> None:
    """No more memory and time from here on than variables of `size` bytes need."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in (
        (resource.RLIMIT_AS, _ROOM + 2 * size),
        (resource.RLIMIT_CPU, _seconds(size)),
    ):
        with contextlib.suppress(ValueError, OSError):  # the system's own limit is lower
            resource.setrlimit(kind, (most, most))


def _variables(opened: Any, limit: int, names: Names) -> dict[str, Any]:
    """The data sets by their names, all checked before one is read."""
    objects = itertools.count()
    _check_links(opened, objects)
    root = opened.get("model_weights", opened)
    if {"layer_names", "layer_names0"} & root.attrs.keys():
        named = _legacy_variables(root)
    else:
        named = _keras3_variables(opened, names)
    found = {}
    most = next(objects)
    for count, (name, dataset) in enumerate(named):
        if count > most:
            raise ValueError("it names more variables than it has")
        found[name] = dataset
    if found and all(re.search(r"/\d+$", name) for name in found):
        raise ValueError(f"its layers are of no known kind ({next(iter(found))[:80]!r})")
    claimed = 0
    for name, dataset in found.items():
        _check_plain(name, dataset)
        claimed += dataset.size * dataset.dtype.itemsize
    if claimed > limit:
        raise ValueError(f"it claims to hold {claimed:,} bytes, far more than a file so small can")
    return found


def _check_plain(name: str, dataset: Any) -> None:
    import h5py

    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name[:80]!r} is no data set")
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{name[:80]!r} keeps its numbers in another file")


def _check_links(group: Any, objects: Iterator[int], depth: int = 0) -> None:
    """Refuse links out of the file and trees without end."""
    import h5py

    if depth > 32:
        raise ValueError("its groups are nested too deep")
    for key in group:
        if next(objects) > _MAX_OBJECTS:
            raise ValueError("it has too many objects")
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{key[:80]!r} is a link, not an object of this file")
        if isinstance(child := group[key], h5py.Group):
            _check_links(child, objects, depth + 1)


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
            inside = not f"/{owner}".endswith(f"/{layer}")  # a name may have slashes itself
            owner = owner.rpartition("/")[2] if inside else layer
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


if __name__ == "__main__":
    _main()
