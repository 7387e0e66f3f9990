"""Weights files of six formats, each read into {name: array} without trusting the file.

The format is told by a file's content; its name's ending matters only where that is damaged.

A hostile or damaged file is refused with a UserError of one line. A reader takes time in proportion
to the file, and memory for at most `_GROWTH` times the file (or `_ALWAYS`, if that is more): what a
file claims to hold is compared with its length first. HDF5, which a library in C reads, is read in
a process of its own with these limits; see `keras_file`.
"""

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.storage.json_files import json_text
from siamese_jax.storage.writing import written
from siamese_jax.weights import keras_file, torch_pickle, zip_file

Leaves = dict[str, np.ndarray]
META = "__meta__"
# Compressed weights shrink a little; a file that claims to grow more than this is a bomb.
_GROWTH, _ALWAYS = 10, 16 << 20
_MAX_TEXT = 16 << 20  # bytes that describe the arrays; ResNet50 has 0.2 MB of them


class Contents(NamedTuple):
    """A file's arrays by name; texts that may tell its architecture; entries without weights."""

    leaves: Leaves
    texts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


class File(NamedTuple):
    """A file as its readers take it: its path, its bytes (a memory map), what it may claim."""

    path: Path
    data: Any
    limit: int

    def allow(self, claimed: int) -> None:
        """ValueError if the arrays may not have as many bytes in all."""
        if claimed > self.limit:
            raise ValueError(
                f"it claims to hold {claimed:,} bytes, far more than a file so small can"
            )


class Format(NamedTuple):
    """`read` gives a file's arrays or raises whatever fits; `name` stands in the refusal."""

    name: str
    read: Callable[[File], Leaves | Contents]


def read(path: str | Path) -> Leaves:
    """The arrays of a weights file by name, as `read_contents` gives them."""
    return read_contents(path).leaves


def read_contents(path: str | Path) -> Contents:
    """What a file of Keras (`.h5`, `.keras`), PyTorch, safetensors or NumPy (`.npz`) holds.

    Names are as the format's own tools write them, with Keras's variables called
    `layer/variable`. The arrays are not to be written to. Raises UserError: no such file, another
    format, or not to be read.
    """
    path = existing(Path(path))
    format = FORMATS.get(path.suffix.lower())
    try:
        with _opened(path) as file:
            format = _by_content(file) or format
            found = format.read(file) if format else None
    except Exception as e:  # the libraries report damage by more kinds than can be listed
        line = " ".join(str(e).split())[:300] or type(e).__name__
        name = format.name if format else "a file of weights"
        raise UserError(
            f"{path} was not read as {name}: {line}; get the file again from its source"
        ) from None
    if found is None:
        raise UserError(
            f"{path} is by its content no file of PyTorch, safetensors, Keras or NumPy, and has "
            f"none of the known extensions: {', '.join(FORMATS)}"
        )
    return found if isinstance(found, Contents) else Contents(found)


def existing(path: Path) -> Path:
    """The path; UserError where no file is there."""
    if not os.path.isfile(path):
        raise UserError(f"there is no weights file at {path}; check the path")
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[File]:
    with path.open("rb") as file:
        size = path.stat().st_size
        limit = max(_ALWAYS, _GROWTH * size)
        if not size:  # which cannot be mapped
            yield File(path, b"", limit)
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield File(path, data, limit)


def _by_content(file: File) -> Format | None:
    start = file.data[:16]
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return _H5
    # First of these two: the length that a file of safetensors begins with may begin so too.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= len(file.data):
        return _SAFETENSORS
    if start[:1] == b"\x80":
        return _TORCH
    names: list[str] = []
    if start.startswith(b"PK\x03\x04"):
        with contextlib.suppress(Exception):  # of a damaged one, which its reader will say
            names = list(zip_file.entries(file.data))
    if keras_file.WEIGHTS in names:
        return _KERAS
    if any(name.endswith("data.pkl") for name in names):
        return _TORCH
    return _NPZ if names and all(name.endswith(".npy") for name in names) else None


def digest(path: str | Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_numbers(name: str, dtype: np.dtype) -> None:
    if dtype.kind not in "fiub" and dtype.name != "bfloat16":
        raise ValueError(f"{name[:80]!r} holds {dtype}, not numbers")


# Keras and PyTorch.


def _read_h5(file: File) -> Leaves:
    return keras_file.read(file.path, file.data, file.limit, _check_numbers)


def _read_keras(file: File) -> Leaves:
    entries = zip_file.entries(file.data)
    if not {"config.json", keras_file.WEIGHTS} <= entries.keys():
        raise ValueError(f"it lacks config.json or {keras_file.WEIGHTS}")

    def content(name: str, limit: int) -> bytes:
        return zip_file.read(file.data, name, entries[name], limit)

    config = json.loads(content("config.json", _MAX_TEXT))
    weights = content(keras_file.WEIGHTS, file.limit)
    return keras_file.read(None, weights, file.limit, _check_numbers, config)


def _read_torch(file: File) -> Contents:
    return Contents(*torch_pickle.read(file.data, file.allow))


# safetensors.

_SAFETENSORS_DTYPES = (
    *("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"),
)


def _read_safetensors(file: File) -> Contents:
    import safetensors

    header = int.from_bytes(file.data[:8], "little")
    if header > _MAX_TEXT:
        raise ValueError(f"its header has {header:,} bytes, more than any file of weights")
    with safetensors.safe_open(file.path, framework="numpy") as opened:
        names = list(opened.keys())
        if len(names) > zip_file.MAX_ENTRIES:
            raise ValueError(f"it has {len(names):,} arrays, more than any file of weights")
        for name in names:
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in _SAFETENSORS_DTYPES:
                raise ValueError(f"{name[:80]!r} holds {dtype}, which is not read here")
        leaves = {name: opened.get_tensor(name) for name in names}
        metadata = opened.metadata() or {}
    return Contents(leaves, tuple(text[:10_000] for text in metadata.values()))


# NumPy's npz, the format of our own exports.


def _read_npz(file: File) -> Leaves:
    entries = zip_file.entries(file.data)
    file.allow(sum(entry.size for entry in entries.values()))
    leaves: Leaves = {}
    for name, entry in entries.items():
        leaf = name.removesuffix(".npy")
        if leaf in leaves:
            raise ValueError(f"{leaf[:80]!r} appears twice")
        limit = 4 * _MAX_TEXT if leaf == META else file.limit
        leaves[leaf] = _read_npy(leaf, zip_file.read(file.data, name, entry, limit))
    return leaves


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
    count = math.prod(shape)
    if any(size < 0 for size in shape) or count * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"{name[:80]!r} is cut off or has another shape than announced")
    array = np.frombuffer(content, dtype, count, file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def write_npz(path: str | Path, leaves: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Arrays and a JSON description, written whole or not at all."""
    with written(path, "wb") as file:
        arrays: dict[str, Any] = {META: np.array(json_text(meta)), **leaves}
        np.savez(file, **arrays)


_H5, _KERAS = Format("Keras's", _read_h5), Format("Keras's", _read_keras)
_TORCH = Format("a PyTorch file", _read_torch)
_SAFETENSORS, _NPZ = Format("safetensors", _read_safetensors), Format("npz", _read_npz)
FORMATS = {
    **dict.fromkeys((".h5", ".hdf5"), _H5),
    ".keras": _KERAS,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl"), _TORCH),
    ".safetensors": _SAFETENSORS,
    ".npz": _NPZ,
}
EXTENSIONS = tuple(FORMATS)
