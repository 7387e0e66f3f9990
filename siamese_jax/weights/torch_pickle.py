"""PyTorch's files, the zip format and the old one, without torch and without executing them.

A pickle is a program for a small stack machine. Python's unpickler runs it, and so runs whatever
it names. This module walks the same opcodes with `pickletools`, which only parses, and obeys the
few that torch writes. A name in the file is never looked up: it stays a `Name`. "Calling" one of
the handful in `_CALLS` gives a tensor or a dict; calling any other gives an `Object`, which only
keeps what the file sets on it. So a checkpoint's optimiser, arguments or whole module are read over
(a module's tensors are found in it), and a hostile file can do no more than be refused.
"""

import io
import mmap
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass(eq=False)
class Object:
    """What the pickle would have made by calling `name`: never made, only what is set on it."""

    name: Name
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


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


class Checkpoint(NamedTuple):
    """`tensors` by name: "BRANCH/name" where several of the file's dicts hold tensors, else "name".

    `texts` are what it says of its architecture, `left` its entries without any weights.
    """

    tensors: dict[str, np.ndarray]
    texts: tuple[str, ...]
    left: tuple[str, ...]


def read(path: Path) -> Checkpoint:
    """The tensors of a state dict, of a checkpoint with one or more in it, or of a whole module.

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


def _read_zip(data: mmap.mmap) -> Checkpoint:
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

        value, _ = _run(io.BytesIO(raw(pickles[0], _MAX_PICKLE)))
        tensors = _tensors(value)
        storages: dict[str, np.ndarray] = {}
        for storage in {tensor.storage.key: tensor.storage for tensor in tensors.values()}.values():
            size = storage.length * storage.dtype.itemsize
            content = raw(f"{root}data/{storage.key}", size)
            storages[storage.key] = _numbers(content, 0, storage)
        return _checkpoint(value, tensors, storages)


def _read_old(data: mmap.mmap) -> Checkpoint:
    """Four pickles (magic, protocol, byte order, tensors), the storages' keys, then their bytes."""
    file = _Bounded(data)
    if _run(file)[0] != _MAGIC or _run(file)[0] != _PROTOCOL:
        raise Refused("it does not start as torch.save starts one")
    system, _ = _run(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are not little-endian")
    value, announced = _run(file)
    tensors = _tensors(value)
    keys, _ = _run(file)
    wanted = {tensor.storage.key for tensor in tensors.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of storages is not a list of names")
    if len(set(keys)) != len(keys) or wanted - set(keys):
        raise Refused("its list of storages does not fit its tensors")
    storages: dict[str, np.ndarray] = {}
    position = file.tell()
    for key in keys:
        if key not in announced:
            raise Refused(f"storage {key[:40]!r} belongs to no tensor")
        storage = announced[key]
        if data[position : position + 8] != storage.length.to_bytes(8, "little"):
            raise Refused(f"storage {key[:40]!r} is cut off or has another length than announced")
        numbers = _numbers(data, position + 8, storage)
        if key in wanted:
            storages[key] = numbers.copy()
        del numbers  # a view of the map, which could not be closed
        position += 8 + storage.length * storage.dtype.itemsize
    return _checkpoint(value, tensors, storages)


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


# What torch itself calls when it loads a state dict.
_CALLS: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Name("torch._tensor", "_rebuild_from_type_v2"): lambda call, _, made, *__: _call(call, made),
    Name("collections", "OrderedDict"): _ordered_dict,
}
_STORAGES = {Name("torch", kind): np.dtype(dtype) for kind, dtype in _DTYPES.items()}
_MARK = object()


def _storage(reference: Any) -> Storage:
    ok = type(reference) is tuple and len(reference) in (5, 6) and reference[0] == "storage"
    if not ok or (len(reference) == 6 and reference[5] is not None):
        raise Refused("a storage is described in an unknown way")
    _, kind, key, _, length = reference[:5]
    if (
        type(kind) is not Name
        or kind not in _STORAGES
        or type(key) is not str
        or type(length) is not int
        or length < 0
    ):
        raise Refused(f"a storage of the unknown kind {kind!r:.80}")
    return Storage(_STORAGES[kind], key, length)


# Called by no file of weights, but by files that mean harm: said, rather than read over.
_HOSTILE = re.compile(
    r"(os|posix|nt|subprocess|sys|shutil|socket|importlib|imp|runpy|pty|ctypes|code|pickle|_pickle|"
    r"webbrowser|multiprocessing|threading|signal|pdb|timeit|asyncio)(\..*)? .*|"
    r"(builtins|__builtin__) (eval|exec|execfile|compile|open|input|__import__|breakpoint)"
)


def _call(function: Any, arguments: Any) -> Any:
    if type(function) is not Name or _HOSTILE.fullmatch(f"{function.module} {function.name}"):
        raise Refused(f"it wants to call {_describe(function)}, which no file of weights needs")
    if type(arguments) is not tuple:
        raise Refused("a call without a tuple of arguments")
    if function not in _CALLS:
        return Object(function)
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
    "EMPTY_SET": list,  # of things that need not be hashed
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
    *("BINSTRING", "SHORT_BINSTRING"),  # of Python 2
}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _run(file: Any) -> tuple[Any, dict[str, Storage]]:
    """Obey one pickle, up to its STOP: what it leaves, and the storages that it spoke of."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.pop(), machine.storages
            machine.step(opcode.name, argument)
    # A warning of pickletools, where warnings are errors, is of a text that torch never writes.
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError, Warning) as e:
        raise Refused(f"its pickle is malformed ({type(e).__name__})") from None
    raise Refused("its pickle has no end")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

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

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("a name is no text")
        self.stack.append(Name(module, name))

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(_call(function, arguments))

    def new(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if function in _CALLS:
            raise Refused(f"it makes an object of {_describe(function)}, which is no class")
        self.stack.append(_call(function, arguments))

    def new_with_names(self, _: Any) -> None:
        self.pop()
        self.new(None)

    def persistent(self, _: Any) -> None:
        reference = self.pop()
        if type(reference) is tuple and len(reference) == 4 and reference[0] == "module":
            self.stack.append(reference[1])  # a class, with its source, in old files
            return
        storage = _storage(reference)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise Refused(f"storage {storage.key[:40]!r} is described in two ways")
        self.stack.append(storage)

    def build(self, _: Any) -> None:
        """The state of an object, or the `_metadata` that torch hangs on a state dict; dropped."""
        state = self.pop()
        if type(self.stack[-1]) is Object:
            self.stack[-1].state = state
        elif type(self.stack[-1]) is not dict:
            raise Refused(f"it wants to set the state of {_describe(self.stack[-1])}")

    def set_items(self, _: Any) -> None:
        items = self.pop_to_mark()
        self._fill(zip(items[::2], items[1::2], strict=True))

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._fill(iter([(key, value)]))

    def _fill(self, items: Iterator[tuple[Any, Any]]) -> None:
        owner = self.stack[-1]
        target = owner.items if type(owner) is Object else owner
        if type(target) is not dict:
            raise Refused("it sets items of something that is no dict")
        for key, value in items:
            # Any other key stays unread: hashing what a file has nested can exhaust the stack.
            target[key if type(key) in (str, int) else object()] = value

    def extend(self, _: Any) -> None:
        self._append(self.pop_to_mark())

    def append(self, _: Any) -> None:
        self._append([self.pop()])

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif type(self.stack[-1]) is not Object:
            raise Refused("it appends to something that is no list")


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.gather,
    "FROZENSET": _Machine.gather,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "MEMOIZE": _Machine.memoize,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_names,
    "BINPERSID": _Machine.persistent,
    "BUILD": _Machine.build,
    "SETITEMS": _Machine.set_items,
    "SETITEM": _Machine.set_item,
    "APPENDS": _Machine.extend,
    "APPEND": _Machine.append,
    "ADDITEMS": _Machine.extend,
}


# From what the pickle left to arrays.

# Entries of a checkpoint that hold tensors, or texts, of no network.
_NO_WEIGHTS = re.compile(r"^optim$|optimi[sz]er|schedule|scaler|callbacks|^loops$|^rng", re.I)
_SAYS = ("arch", "architecture", "model_name", "model", "backbone", "encoder", "trunk", "timm_name")
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg")


def _tensors(value: Any) -> dict[str, Tensor]:
    """Every tensor that dicts and modules under `value` hold by name, as `Checkpoint` names it."""
    found = list(_walk(value, "", "", set()))
    if not found:
        called = f" but {_describe(value.name)}" if type(value) is Object else ""
        raise Refused(f"it holds no state dict{called or _about(value)}")
    several = len({branch for branch, _, _ in found}) > 1
    return {
        f"{branch}/{name}" if several and branch else name: tensor for branch, name, tensor in found
    }


def _walk(value: Any, branch: str, module: str, seen: set[int]) -> Iterator[tuple[str, str, Any]]:
    """(branch, name, tensor): dicts nest by "/", modules by "."; each thing is entered once."""
    if id(value) in seen or len(branch) + len(module) > 1000:
        return
    seen.add(id(value))
    for key, child in _entries(value):
        if type(child) is Tensor:
            yield branch, module + key, child
        elif type(value) is Object and not value.items:
            yield from _walk(child, branch, f"{module}{key}.", seen)
        elif not _NO_WEIGHTS.search(key):
            yield from _walk(child, f"{branch}/{key}" if branch else key, module, seen)


def _entries(value: Any) -> list[tuple[str, Any]]:
    """What lies in a dict, in an object that is one, or in a module, by its name."""
    if type(value) is Object and not value.items:
        state = value.state if type(value.state) is dict else {}
        parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
        value = {k: v for part in parts if type(part) is dict for k, v in part.items()} or state
    held = value.items if type(value) is Object else value
    return [(k, v) for k, v in held.items() if type(k) is str] if type(held) is dict else []


def _texts(value: Any) -> tuple[str, ...]:
    """What a checkpoint says of its architecture: `arch` of timm and of ImageNet's examples."""
    top = dict(_entries(value))
    places = [top, *(_settings(top.get(key)) for key in _ARGUMENTS)]
    found = [place[key] for place in places for key in _SAYS if type(place.get(key)) is str]
    return tuple(dict.fromkeys(text[:200] for text in found))


def _settings(value: Any) -> dict[str, Any]:
    state = value.state if type(value) is Object and type(value.state) is dict else {}
    return {**state, **dict(_entries(value))}


def _about(value: Any) -> str:
    entries = [f"{key[:40]!r} is {_describe(child)}" for key, child in _entries(value)[:3]]
    return f" ({', '.join(entries)})" if entries else ""


def _checkpoint(
    value: Any, tensors: dict[str, Tensor], storages: dict[str, np.ndarray]
) -> Checkpoint:
    arrays = {name: _view(tensor, storages, name) for name, tensor in tensors.items()}
    held = {id(tensor) for tensor in tensors.values()}
    left = []
    for key, child in _entries(value):
        inside = _NO_WEIGHTS.search(key) is None and list(_walk(child, "", "", set()))
        if id(child) not in held and not inside:
            left.append(key[:40])
    return Checkpoint(arrays, _texts(value), tuple(left))


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
