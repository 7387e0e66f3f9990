"""Writes `.pth` files as torch.save does, in both containers, byte by byte and without torch."""

import struct
import zipfile

import numpy as np

KINDS = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value):
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def items(*parts):
    return b"(" + b"".join(parts) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(function, arguments):
    return function + arguments + b"R"


ORDERED_DICT = call(name("collections", "OrderedDict"), b")")


def storage(key, count, kind="FloatStorage"):
    parts = (text("storage"), name("torch", kind), text(key), text("cpu"), integer(count))
    return items(*parts) + b"Q"


def tensor(where, shape, strides, offset=0):
    shape, strides = items(*map(integer, shape)), items(*map(integer, strides))
    arguments = items(where, integer(offset), shape, strides, b"\x89", ORDERED_DICT)
    return call(name("torch._utils", "_rebuild_tensor_v2"), arguments)


def pickle(value):
    return b"\x80\x02" + value + b"."


def mapping(entries):
    body = b"".join(text(key) + value for key, value in entries.items())
    return ORDERED_DICT + b"(" + body + b"u"


def state_dict(arrays):
    """The pickle of {name: array} and the bytes of the storages by their keys."""
    entries, storages = {}, {}
    for i, (key, array) in enumerate(arrays.items()):
        strides = [stride // array.itemsize for stride in array.strides]
        where = storage(str(i), array.size, KINDS[array.dtype.name])
        entries[key] = tensor(where, array.shape, strides)
        storages[str(i)] = array.tobytes()
    return pickle(mapping(entries)), storages


def write_zip(path, program, storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def write_old(path, program, storages, itemsize=4):
    magic = bytes.fromhex("6cfc9c46f9206aa85019")
    system = text("little_endian") + b"\x88"
    parts = [
        pickle(b"\x8a\x0a" + magic),
        pickle(b"M\xe9\x03"),
        pickle(b"}(" + system + b"u"),
        # A storage of old files has a view, or None, after its length.
        program.replace(b"tQ", b"NtQ"),
        pickle(b"](" + b"".join(text(key) for key in storages) + b"e"),
    ]
    sizes = getattr(storages, "itemsizes", {})
    parts += [
        struct.pack("<q", len(data) // sizes.get(key, itemsize)) + data
        for key, data in storages.items()
    ]
    path.write_bytes(b"".join(parts))


def random_arrays(rng):
    return {
        "conv.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "bn.running_var": rng.uniform(1, 2, 4).astype(np.float32),
    }


# A checkpoint's other entries, as their own classes are pickled.


def new(module, attribute, state):
    """An object of a class that only its owner has: made, never called, with a state."""
    return name(module, attribute) + b")\x81" + plain(state) + b"b"


def plain(value):
    """Text, numbers, None, lists and dicts of them; bytes are taken as pickled already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        body = b"".join(plain(key) + plain(entry) for key, entry in value.items())
        return b"}(" + body + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(plain, value)) + b"e"
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return b"N" if value is None else text(value) if isinstance(value, str) else integer(value)


class Storages(dict):
    """Storages by key, filled as arrays are pickled."""

    def __init__(self):
        super().__init__()
        self.itemsizes = {}

    def add(self, array):
        key = str(len(self))
        self[key], self.itemsizes[key] = array.tobytes(), array.itemsize
        strides = [stride // array.itemsize for stride in array.strides]
        return tensor(storage(key, array.size, KINDS[array.dtype.name]), array.shape, strides)

    def add_all(self, arrays):
        return mapping({key: self.add(array) for key, array in arrays.items()})
