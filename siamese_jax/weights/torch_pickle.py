"""PyTorch's files, the zip format and the old one, without torch and without executing them.

A pickle is a program for a small stack machine. Python's unpickler runs it, and so runs whatever
it names. This module reads the same opcodes and obeys the few that torch writes. A name in the file
is never looked up: it stays a `Name`. "Calling" one of the handful in `_CALLS` gives a tensor or a
dict; calling any other gives an `Object`, which only keeps what the file sets on it. So a
checkpoint's optimiser, arguments or whole module are read over (a module's tensors are found in
it), and a hostile file can do no more than be refused.

What a file can cost is bounded. A pickle has at most `_steps` opcodes, each of constant time and of
at most 100 bytes beyond its own; nothing that it nests is compared, hashed, printed or entered
twice. Storages lie inside the file, once. Tensors are views of them, which need no memory, and add
up to no more than the file may claim.
"""

import itertools
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from siamese_jax.weights import zip_file

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_PICKLE = 64 << 20  # bytes; the pickle of ResNet152 has 0.2 MB
_MAX_DEPTH, _MAX_NAME = 64, 1000  # of what is entered in search of tensors

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


class Object:
    """What the pickle would have made by calling `name`: never made, only what is set on it."""

    __slots__ = ("items", "name", "state")

    def __init__(self, name: Name):
        self.name = name
        self.state: Any = None
        self.items: dict[Any, Any] | None = None


class Storage(NamedTuple):
    """A run of `length` numbers in the file, under `key`."""

    dtype: np.dtype
    key: str
    length: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.length * self.dtype.itemsize


class Tensor:
    """A strided view of a storage; offset, shape and strides in elements."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(
        self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class Checkpoint(NamedTuple):
    """`tensors` by name: "BRANCH/name" where several of the file's dicts hold tensors, else "name".

    `texts` are what it says of its architecture, `left` its entries without any weights.
    """

    tensors: dict[str, np.ndarray]
    texts: tuple[str, ...]
    left: tuple[str, ...]


def read(data: Any, allow: Callable[[int], None]) -> Checkpoint:
    """The tensors of a state dict, of a checkpoint with one or more in it, or of a whole module.

    Args:
      data: the file as a memory map.
      allow: raises ValueError if the tensors may not have as many bytes in all.

    Raises ValueError, in one line, or what Python raises for damage, for a file that is hostile,
    damaged or not torch's.
    """
    return (_read_zip if data[:4] == b"PK\x03\x04" else _read_old)(data, allow)


# The two containers.


def _read_zip(data: Any, allow: Callable[[int], None]) -> Checkpoint:
    entries = zip_file.entries(data)

    def raw(name: str, limit: int) -> bytes:
        entry = entries.get(name)
        if entry is None:
            raise Refused(f"{name[:80]} is missing")
        if not entry.stored:
            raise Refused(f"{name[:80]} is compressed, which torch never does")
        return zip_file.read(data, name, entry, limit)

    pickles = [name for name in entries if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise Refused("the zip has no single data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if root + "byteorder" in entries and raw(root + "byteorder", 16) != b"little":
        raise Refused("its numbers are big-endian")
    machine = _Machine(raw(pickles[0], _MAX_PICKLE), 0, _steps(len(data)))
    value = machine.run()
    tensors, left = _tensors(value, allow)
    storages = {}
    for storage in {tensor.storage.key: tensor.storage for tensor in tensors.values()}.values():
        content = raw(f"{root}data/{storage.key}", storage.size)
        storages[storage.key] = _numbers(content, storage)
    return Checkpoint(_views(tensors, storages), _texts(value), left)


def _read_old(data: Any, allow: Callable[[int], None]) -> Checkpoint:
    """Four pickles (magic, protocol, byte order, tensors), the storages' keys, then their bytes."""
    machine = _Machine(data, 0, _steps(min(len(data), _MAX_PICKLE)))
    if machine.run() != _MAGIC or machine.run() != _PROTOCOL:
        raise Refused("it does not start as torch.save starts one")
    system = machine.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its numbers are not little-endian")
    value = machine.run()
    announced = machine.storages
    keys = machine.run()
    tensors, left = _tensors(value, allow)
    wanted = {tensor.storage.key for tensor in tensors.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of storages is not a list of names")
    if len(set(keys)) != len(keys) or wanted - set(keys):
        raise Refused("its list of storages does not fit its tensors")
    storages = {}
    at = machine.at
    for key in keys:
        if key not in announced:
            raise Refused(f"storage {key[:40]!r} belongs to no tensor")
        storage = announced[key]
        if data[at : at + 8] != storage.length.to_bytes(8, "little"):
            raise Refused(f"storage {key[:40]!r} is cut off or has another length than announced")
        start, at = at + 8, at + 8 + storage.size
        if at > len(data):
            raise Refused(f"storage {key[:40]!r} is cut off")
        if key in wanted:
            storages[key] = _numbers(data[start:at], storage)
    return Checkpoint(_views(tensors, storages), _texts(value), left)


def _steps(size: int) -> int:
    """How many opcodes a file may have; a tensor takes about 40."""
    return min(250_000 + size // 16, 4_000_000)


def _numbers(content: bytes, storage: Storage) -> np.ndarray:
    if len(content) != storage.size:
        raise Refused(f"storage {storage.key[:40]!r} is cut off")
    return np.frombuffer(content, storage.dtype)


# What is called.


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) > 8:
        raise Refused("a tensor's shape or strides are no short tuple")
    if len(shape) != len(strides):
        raise Refused("a tensor's shape and strides differ in length")
    if type(storage) is not Storage or not all(
        type(n) is int and n >= 0 for n in (offset, *shape, *strides)
    ):
        raise Refused("a tensor is described by something else than a storage and numbers")
    return Tensor(storage, offset, shape, strides)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if type(tensor) is not Tensor:
        raise Refused("a parameter holds no tensor")
    return tensor


def _from_type(call: Any, _: Any, made: Any, *__: Any) -> Any:
    if call == _FROM_TYPE:
        raise Refused("a tensor of a class of a class")
    return _call(call, made)


def _ordered_dict(*items: Any) -> dict:
    if items not in ((), ([],)):
        raise Refused("an OrderedDict is built from something else than nothing")
    return {}


_FROM_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")
# What torch itself calls when it loads a state dict.
_CALLS: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): _parameter,
    Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    _FROM_TYPE: _from_type,
    Name("collections", "OrderedDict"): _ordered_dict,
}
_STORAGES = {Name("torch", kind): np.dtype(dtype) for kind, dtype in _DTYPES.items()}


def _storage(reference: Any) -> Storage:
    ok = type(reference) is tuple and len(reference) in (5, 6) and reference[0] == "storage"
    if not ok or (len(reference) == 6 and reference[5] is not None):
        raise Refused("a storage is described in an unknown way")
    _, kind, key, _, length = reference[:5]
    if type(kind) is not Name or kind not in _STORAGES:
        raise Refused(f"a storage of the unknown kind {_describe(kind)}")
    if type(key) is not str or type(length) is not int or length < 0:
        raise Refused("a storage is described in an unknown way")
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
        return _CALLS[function](*arguments[:16])
    except TypeError:
        raise Refused(f"{function.name} is called with the wrong arguments") from None


def _describe(value: Any) -> str:
    return f"{value.module}.{value.name}"[:100] if type(value) is Name else type(value).__name__


# The stack machine.

_MARK = object()


class _Machine:
    """Obeys the pickles that begin at `at`, one after the other, in at most `steps` opcodes."""

    def __init__(self, data: Any, at: int, steps: int) -> None:
        self.data, self.at, self.steps = data, at, steps
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """What the next pickle leaves at its STOP."""
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        try:
            while (code := self.data[self.at]) != _STOP:
                if code not in _OPCODES:
                    code = bytes([code])
                    raise Refused(f"its pickle uses the opcode {code!r}, which no weights need")
                self.steps -= 1
                if self.steps < 0:
                    raise Refused("its pickle has more steps than a file of its size needs")
                argument, act = _OPCODES[code]
                value, self.at = argument(self.data, self.at + 1)
                act(self, value)
            self.at += 1
            return self.pop()
        except (LookupError, TypeError, AttributeError, struct.error) as e:
            raise Refused(f"its pickle is malformed or cut off ({type(e).__name__})") from None

    def push(self, value: Any) -> None:
        self.stack.append(value)

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

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def gather(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str or len(module + name) > _MAX_NAME:
            raise Refused("a name is no short text")
        self.stack.append(Name(module, name))

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(_call(function, arguments))

    def new(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is Name and function in _CALLS:
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
        self._fill([(key, value)])

    def _fill(self, items: Iterable[tuple[Any, Any]]) -> None:
        owner = self.stack[-1]
        if type(owner) is Object and owner.items is None:
            owner.items = {}
        target = owner.items if type(owner) is Object else owner
        if type(target) is not dict:
            raise Refused("it sets items of something that is no dict")
        for key, value in items:
            # Any other key stays unread: hashing what a file has nested can exhaust the stack,
            # and its integers can be chosen to have one hash.
            target[key if type(key) is str else object()] = value

    def extend(self, _: Any) -> None:
        self._append(self.pop_to_mark())

    def append(self, _: Any) -> None:
        self._append([self.pop()])

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)
        elif type(self.stack[-1]) is not Object:
            raise Refused("it appends to something that is no list")


# An opcode's argument: from the data and the place behind the opcode, its value and its end.
_Argument = Callable[[Any, int], tuple[Any, int]]
_Act = Callable[[_Machine, Any], None]


def _fixed(value: Any) -> _Argument:
    return lambda data, at: (value, at)


def _made(kind: Callable[[], Any]) -> _Argument:
    return lambda data, at: (kind(), at)


def _packed(format: str) -> _Argument:
    packing = struct.Struct(format)
    return lambda data, at: (packing.unpack_from(data, at)[0], at + packing.size)


def _counted(width: int, decode: Callable[[bytes], Any]) -> _Argument:
    def read(data: Any, at: int) -> tuple[Any, int]:
        end = at + width + int.from_bytes(data[at : at + width], "little")
        if end > len(data):
            raise Refused("its pickle is cut off")
        return decode(data[at + width : end]), end

    return read


def _global(data: Any, at: int) -> tuple[Name, int]:
    """A module and a name, each a line."""
    middle = data.find(b"\n", at, at + _MAX_NAME)
    end = data.find(b"\n", middle + 1, middle + _MAX_NAME)
    if middle < 0 or end < 0:
        raise Refused("its pickle has a name without an end")
    return Name(data[at:middle].decode("utf-8"), data[middle + 1 : end].decode("utf-8")), end + 1


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _python2(data: bytes) -> str:
    return data.decode("latin-1")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _pass(machine: _Machine, _: Any) -> None:
    """What only a reader of streams needs to know."""


_STOP = ord(".")
_NONE = _fixed(None)
_OPCODES: dict[int, tuple[_Argument, _Act]] = {
    ord(code): (argument, act)
    for argument, act, codes in (
        (_packed("<B"), _pass, "\x80"),  # the protocol
        (_packed("<Q"), _pass, "\x95"),  # a frame
        (_NONE, _Machine.push, "N"),
        (_fixed(True), _Machine.push, "\x88"),
        (_fixed(False), _Machine.push, "\x89"),
        (_fixed(_MARK), _Machine.push, "("),
        (_fixed(()), _Machine.push, ")"),
        (_made(list), _Machine.push, "]\x8f"),  # a set too: its items need not be hashed
        (_made(dict), _Machine.push, "}"),
        (_packed("<i"), _Machine.push, "J"),
        (_packed("<B"), _Machine.push, "K"),
        (_packed("<H"), _Machine.push, "M"),
        (_packed(">d"), _Machine.push, "G"),
        (_counted(1, _integer), _Machine.push, "\x8a"),
        (_counted(1, _text), _Machine.push, "\x8c"),
        (_counted(4, _text), _Machine.push, "X"),
        (_counted(1, bytes), _Machine.push, "C"),
        (_counted(4, bytes), _Machine.push, "B"),
        (_counted(1, _python2), _Machine.push, "U"),
        (_counted(4, _python2), _Machine.push, "T"),
        (_global, _Machine.push, "c"),
        (_NONE, _Machine.stack_name, "\x93"),
        (_packed("<B"), _Machine.put, "q"),
        (_packed("<I"), _Machine.put, "r"),
        (_NONE, _Machine.memoize, "\x94"),
        (_packed("<B"), _Machine.get, "h"),
        (_packed("<I"), _Machine.get, "j"),
        (_fixed(1), _Machine.tuple_of, "\x85"),
        (_fixed(2), _Machine.tuple_of, "\x86"),
        (_fixed(3), _Machine.tuple_of, "\x87"),
        (_NONE, _Machine.gather, "t\x91"),
        (_NONE, _Machine.reduce, "R"),
        (_NONE, _Machine.new, "\x81"),
        (_NONE, _Machine.new_with_names, "\x92"),
        (_NONE, _Machine.persistent, "Q"),
        (_NONE, _Machine.build, "b"),
        (_NONE, _Machine.set_items, "u"),
        (_NONE, _Machine.set_item, "s"),
        (_NONE, _Machine.extend, "e\x90"),
        (_NONE, _Machine.append, "a"),
    )
    for code in codes
}


# From what the pickle left to arrays.

# Entries of a checkpoint that hold tensors, or texts, of no network.
_NO_WEIGHTS = re.compile(r"^optim$|optimi[sz]er|schedule|scaler|callbacks|^loops$|^rng", re.I)
_SAYS = ("arch", "architecture", "model_name", "model", "backbone", "encoder", "trunk", "timm_name")
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg")


def _tensors(value: Any, allow: Callable[[int], None]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Every tensor that dicts and modules under `value` hold, by its name; the entries without."""
    found, holding = _search(value)
    if not found:
        called = f" but {_describe(value.name)}" if type(value) is Object else ""
        raise Refused(f"it holds no state dict{called or _about(value)}")
    several = len({branch for branch, _, _ in found}) > 1
    tensors = {
        f"{branch}/{name}" if several and branch else name: tensor for branch, name, tensor in found
    }
    allow(sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values()))
    left = tuple(
        key[:40]
        for key, child in _entries(value)
        if type(child) is not Tensor
        and (id(child) not in holding or _NO_WEIGHTS.search(key[:_MAX_NAME]))
    )
    return tensors, left


class _Place(NamedTuple):
    """A dict or a module in which tensors are looked for, and the names that lead to it."""

    owner: int
    children: Iterator[tuple[Any, Any]]
    branch: str
    module: str
    is_module: bool


def _search(value: Any) -> tuple[list[tuple[str, str, Tensor]], set[int]]:
    """[(branch, name, tensor)] and the ids of what holds them.

    Dicts nest by "/", modules by "."; each thing is entered once.
    """
    found: list[tuple[str, str, Tensor]] = []
    seen: set[int] = set()
    holding: set[int] = set()
    path: list[_Place] = []

    def enter(value: Any, branch: str, module: str) -> None:
        parts = [part for part in _parts(value) if part is value or id(part) not in seen]
        seen.update((id(value), *map(id, parts)))
        children = itertools.chain.from_iterable(part.items() for part in parts)
        is_module = type(value) is Object and not value.items
        path.append(_Place(id(value), children, branch, module, is_module))

    enter(value, "", "")
    while path:
        _, children, branch, module, is_module = path[-1]
        key, child = next(children, (_MARK, None))
        if key is _MARK:
            path.pop()
        elif type(key) is not str or len(branch) + len(module) + len(key) > _MAX_NAME:
            continue
        elif type(child) is Tensor or id(child) in holding:
            if type(child) is Tensor:
                found.append((branch, module + key, child))
            for place in reversed(path):
                if place.owner in holding:
                    break
                holding.add(place.owner)
        elif type(child) not in (dict, Object) or id(child) in seen or len(path) == _MAX_DEPTH:
            continue
        elif is_module:
            enter(child, branch, f"{module}{key}.")
        elif not _NO_WEIGHTS.search(key):
            enter(child, f"{branch}/{key}" if branch else key, module)
    return found, holding


def _parts(value: Any) -> list[dict]:
    """The dicts that hold what lies in a dict, in an object that is one, or in a module."""
    if type(value) is Object and not value.items:
        state = value.state if type(value.state) is dict else {}
        parts = [state.get(part) for part in ("_parameters", "_buffers", "_modules")]
        return [part for part in parts if type(part) is dict and part] or [state]
    held = value.items if type(value) is Object else value
    return [held] if type(held) is dict else []


def _entries(value: Any) -> list[tuple[str, Any]]:
    """What lies there by its name."""
    return [(k, v) for part in _parts(value) for k, v in part.items() if type(k) is str]


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


def _views(tensors: dict[str, Tensor], storages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: _view(t, storages[t.storage.key], name) for name, t in tensors.items()}


def _view(tensor: Tensor, flat: np.ndarray, name: str) -> np.ndarray:
    """The part of a storage that a tensor is, not copied and not to be written to."""
    if 0 in tensor.shape and max(tensor.shape) < 2**31:
        return np.zeros(tensor.shape, flat.dtype)
    # The stride of what has one row says nothing.
    strides = [s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.strides, strict=True)]
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    if math.prod(tensor.shape) > flat.size or tensor.offset + reach >= flat.size:
        raise Refused(f"tensor {name[:80]!r} reaches beyond its storage")
    steps = [stride * flat.itemsize for stride in strides]
    start = flat[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, steps, writeable=False)
