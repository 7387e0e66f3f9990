"""Weights files of six formats, each read into {name: array} without trusting the file.

The format is told by a file's content; its name's ending matters only where that is damaged.

A hostile or damaged file is refused with a UserError of one line. What a file claims to hold is
compared with its length before any memory is taken for it.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from siamese_jax.errors import UserError
from siamese_jax.storage.writing import written
from siamese_jax.weights import keras_file, torch_pickle

Leaves = dict[str, np.ndarray]
META = "__meta__"
# Compressed weights shrink a little; a file that claims to grow more than this is a bomb.
_GROWTH, _ALWAYS = 30, 16 << 20


class Contents(NamedTuple):
    """A file's arrays by name; texts that may tell its architecture; entries without weights."""

    leaves: Leaves
    texts: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def read(path: str | Path) -> Leaves:
    """The arrays of a weights file by name, as `read_contents` gives them."""
    return read_contents(path).leaves


def read_contents(path: str | Path) -> Contents:
    """What a file of Keras (`.h5`, `.keras`), PyTorch, safetensors or NumPy (`.npz`) holds.

    Names are as the format's own tools write them, with Keras's variables called
    `layer/variable`. Raises UserError: no such file, another format, or not to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file at {path}; check the path")
    reader = _by_content(path) or _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} is by its content no file of PyTorch, safetensors, Keras or NumPy, and has "
            f"none of the known extensions: {', '.join(_READERS)}"
        )
    found = reader(path)
    return found if isinstance(found, Contents) else Contents(found)


def _by_content(path: Path) -> Callable[[Path], Leaves | Contents] | None:
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_h5
    if start[:1] == b"\x80":
        return _read_torch
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return _read_safetensors
    names = _entries(path) if start.startswith(b"PK\x03\x04") else []
    if keras_file.WEIGHTS in names:
        return _read_keras
    if any(name.endswith("data.pkl") for name in names):
        return _read_torch
    return _read_npz if names and all(name.endswith(".npy") for name in names) else None


def _entries(path: Path) -> list[str]:
    """The names in a zip; none where it is damaged, which its reader will say."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile lets some of its parts' errors through
        return []


def digest(path: str | Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


# Keras and PyTorch.


def _read_h5(path: Path) -> Leaves:
    return _read_hdf5(path, keras_file.read)


def _read_keras(path: Path) -> Leaves:
    return _read_hdf5(path, keras_file.read_archive)


def _read_hdf5(path: Path, reader: Callable[..., Leaves]) -> Leaves:
    budget = keras_file.Budget(lambda claimed: _check_claim(claimed, path), _check_numbers)
    try:
        return reader(path, budget)
    # h5py reports damage by whatever exception fits the place in its C library.
    except Exception as e:
        raise _refused(path, "Keras's", e) from None


def _read_torch(path: Path) -> Contents:
    return Contents(*torch_pickle.read(path))


# safetensors.


def _read_safetensors(path: Path) -> Contents:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            leaves = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        for name, array in leaves.items():
            _check_numbers(name, array.dtype)
        return Contents(leaves, tuple(text[:10_000] for text in metadata.values()))
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
    with written(path, "wb") as file:
        arrays: dict[str, Any] = {META: np.array(json.dumps(dict(meta))), **leaves}
        np.savez(file, **arrays)


_READERS: dict[str, Callable[[Path], Leaves | Contents]] = {
    ".h5": _read_h5,
    ".hdf5": _read_h5,
    ".keras": _read_keras,
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl"), _read_torch),
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
}
EXTENSIONS = tuple(_READERS)
