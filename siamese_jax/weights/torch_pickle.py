"""PyTorch's `.pth` files, the zip format and the old one, without torch and without executing them.

A pickle is a program for a small stack machine. Python's unpickler runs it, and so runs whatever
it names. This module walks the same opcodes with `pickletools`, which only parses, and obeys the
few that torch writes for tensors. A name in the file is never looked up: it stays a `Name`, and
"calling" one is possible for the handful in `_CALLS` alone. So a hostile file can do no more than
be refused.
"""

import io
import mmap
import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from siamese_jax.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_PICKLE = 64 << 20  # bytes; the pickle of ResNet152 has 0.2 MB

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class Refused(ValueError):
    """The file asks for something that no file of tensors needs, or is damaged."""


class Name(NamedTuple):
    """A global of the pickle, never imported."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """A run of `length` numbers in the file, under `key`."""

    dtype: np.dtype
    key: str
    length: int


@dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset, shape and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name; a checkpoint's "state_dict" or "model" is looked into.

    Raises UserError, in one line, for a file that is hostile, damaged or not torch's.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _read_zip if data[:4] == b"PK\x03\x04" else _read_old
            return reader(data)
    except (Refused, zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as e:
        reason = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(
            f"{path} was not read as a PyTorch file: {reason}; get the file again from its source"
        ) from None


# The two containers.


def _read_zip(data: mmap.mmap) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise Refused("the zip has no single data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if entries.get(root + "byteorder") and archive.read(root + "byteorder") != b"little":
            raise Refused("its numbers are big-endian")
        budget = len(data)

        def raw(name: str, limit: int) -> bytes:
            nonlocal budget
            info = entries.get(name)
            if info is None:
                raise Refused(f"{name} is missing")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                raise Refused(f"{name} is compressed or larger than it can be")
            budget -= info.file_size
            if budget < 0:
                raise Refused("its entries overlap")
            return archive.read(info)

        tensors = _state_dict(_run(io.BytesIO(raw(pickles[0], _MAX_PICKLE))))
        storages: dict[str, np.ndarray] = {}
        for storage in _storages(tensors):
            size = storage.length * storage.dtype.itemsize
            content = raw(f"{root}data/{storage.key}", size)
            storages[storage.key] = _numbers(content, 0, storage)
        return {name: _view(tensor, storages, name) for name, tensor in tensors.items()}


def _read_old(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Four pickles (magic, protocol, byte order, tensors), the storages' keys, then their bytes."""
    file = _Bounded(data)
    if _run(file) != _MAGIC or _run(file) != _PROTOCOL:
        raise Refused("it does not start as torch.save starts one")
    system = _run(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are not little-endian")
    tensors = _state_dict(_run(file))
    keys = _run(file)
    wanted = {storage.key: storage for storage in _storages(tensors)}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of storages is not a list of names")
    if len(set(keys)) != len(keys) or set(wanted) - set(keys):
        raise Refused("its list of storages does not fit its tensors")
    storages: dict[str, np.ndarray] = {}
    position = file.tell()
    for key in keys:
        if key not in wanted:
            raise Refused(f"storage {key[:40]!r} belongs to no tensor")
        storage = wanted[key]
        if data[position : position + 8] != storage.length.to_bytes(8, "little"):
            raise Refused(f"storage {key[:40]!r} is cut off or has another length than announced")
        storages[key] = _numbers(data, position + 8, storage).copy()
        position += 8 + storage.length * storage.dtype.itemsize
    return {name: _view(tensor, storages, name) for name, tensor in tensors.items()}


class _Bounded(io.RawIOBase):
    """A file over a buffer whose reads are clipped to it, however long a length a pickle claims."""

    def __init__(self, data: mmap.mmap):
        self._data, self._position = data, 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        start = self._position
        stop = len(self._data) if size < 0 else min(start + size, len(self._data))
        self._position = stop
        return self._data[start:stop]

    def readline(self, size: int | None = -1) -> bytes:
        end = self._data.find(b"\n", self._position, self._position + 4096)
        return self.read(4096 if end < 0 else end + 1 - self._position)


def _numbers(data: Any, offset: int, storage: Storage) -> np.ndarray:
    if offset + storage.length * storage.dtype.itemsize > len(data):
        raise Refused(f"storage {storage.key[:40]!r} is cut off")
    return np.frombuffer(data, storage.dtype, storage.length, offset)


# The stack machine.


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    numbers = [offset, *shape, *strides] if type(shape) is type(strides) is tuple else [None]
    if type(storage) is not Storage or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused("a tensor is described by something else than a storage and numbers")
    if len(shape) != len(strides) or len(shape) > 8:
        raise Refused("a tensor's shape and strides differ in length")
    return Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if type(tensor) is not Tensor:
        raise Refused("a parameter holds no tensor")
    return tensor


def _ordered_dict(*items: Any) -> dict:
    if items not in ((), ([],)):
        raise Refused("an OrderedDict is built from something else than nothing")
    return {}


# What torch itself calls when it loads a state dict. Nothing else can be called.
_CALLS: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("collections", "OrderedDict"): _ordered_dict,
}
_STORAGES = {Name("torch", kind): np.dtype(dtype) for kind, dtype in _DTYPES.items()}
_MARK = object()


def _storage(reference: Any) -> Storage:
    ok = type(reference) is tuple and len(reference) in (5, 6) and reference[0] == "storage"
    if not ok or (len(reference) == 6 and reference[5] is not None):
        raise Refused("a storage is described in an unknown way")
    _, kind, key, _, length = reference[:5]
    if kind not in _STORAGES or type(key) is not str or type(length) is not int or length < 0:
        raise Refused(f"a storage of the unknown kind {kind!r:.80}")
    return Storage(_STORAGES[kind], key, length)


def _call(function: Any, arguments: Any) -> Any:
    if type(function) is not Name or function not in _CALLS:
        raise Refused(f"it wants to call {_describe(function)}, which no file of weights needs")
    if type(arguments) is not tuple:
        raise Refused("a call without a tuple of arguments")
    try:
        return _CALLS[function](*arguments)
    except TypeError:
        raise Refused(f"{function.name} is called with the wrong arguments") from None


def _describe(value: Any) -> str:
    return f"{value.module}.{value.name}"[:100] if type(value) is Name else type(value).__name__


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(file: Any) -> Any:
    """Obey one pickle, up to its STOP, and give what it leaves."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise Refused(f"its pickle is malformed ({type(e).__name__})") from None
    raise Refused("its pickle has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("its pickle is malformed (a stray mark)")
        return value

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            if at == 0:
                raise Refused("its pickle is malformed (no mark)")
            at -= 1
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def step(self, name: str, argument: Any) -> None:
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise Refused(f"its pickle uses {name}, which no file of weights needs")

    def mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def gather(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(_call(function, arguments))

    def persistent(self, _: Any) -> None:
        self.stack.append(_storage(self.pop()))

    def build(self, _: Any) -> None:
        """The `_metadata` that torch hangs on a state dict; dropped."""
        self.pop()
        if type(self.stack[-1]) is not dict:
            raise Refused(f"it wants to set the state of {_describe(self.stack[-1])}")

    def set_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        self._fill(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._fill(iter([(key, value)]))

    def _fill(self, items: Iterator[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise Refused("it sets items of something that is no dict")
        for key, value in items:
            if type(key) not in (str, int):
                raise Refused("a dict's key is neither text nor a number")
            target[key] = value

    def extend(self, _: Any) -> None:
        self._append(self.pop_to_mark())

    def append(self, _: Any) -> None:
        self._append([self.pop()])

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("it appends to something that is no list")
        self.stack[-1].extend(items)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.gather,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "BINPERSID": _Machine.persistent,
    "BUILD": _Machine.build,
    "SETITEMS": _Machine.set_items,
    "SETITEM": _Machine.set_item,
    "APPENDS": _Machine.extend,
    "APPEND": _Machine.append,
}


# From what the pickle left to arrays.


def _state_dict(value: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict) or not value:
        raise Refused("it holds no state dict")
    for name, tensor in value.items():
        if type(name) is not str or type(tensor) is not Tensor:
            raise Refused(f"entry {str(name)[:80]!r} is no tensor ({_describe(tensor)})")
    return value


def _storages(tensors: dict[str, Tensor]) -> list[Storage]:
    """Each storage once."""
    found: dict[str, Storage] = {}
    for tensor in tensors.values():
        storage = found.setdefault(tensor.storage.key, tensor.storage)
        if storage != tensor.storage:
            raise Refused(f"storage {storage.key[:40]!r} is described in two ways")
    return list(found.values())


def _view(tensor: Tensor, storages: dict[str, np.ndarray], name: str) -> np.ndarray:
    flat = storages[tensor.storage.key]
    count = 1
    for size in tensor.shape:
        count *= size
    if count == 0:
        return np.zeros(tensor.shape, flat.dtype)
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if count > flat.size or tensor.offset + reach >= flat.size:
        raise Refused(f"tensor {name[:80]!r} reaches beyond its storage")
    steps = [stride * flat.itemsize for stride in tensor.strides]
    start = flat[tensor.offset :]
    return np.array(np.lib.stride_tricks.as_strided(start, tensor.shape, steps, writeable=False))
